"""Which part of a model goes on which device; accelerate finds that out, and moves activations between them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lenskit.errors import InputError
from lenskit.extras import load
from lenskit.models.base import Decoder

Device = torch.device | str | int


def usable(device: Device) -> torch.device:
    """The device, with its index.

    Raises:
        InputError: there is none of that name, or this torch cannot use it.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"device {device!r} cannot be used",
            got=str(error).splitlines()[0],
            expected='a device of this machine that this torch was built for: "cpu", "cuda", "cuda:1", "mps"',
            fix="leave it out to load on the CPU, or install a torch for that device",
        ) from error


def places(
    model: Decoder,
    device: Device | None,
    device_map: str | Mapping[str, Device] | None,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.device]:
    """Module path prefix -> device, from what the user said of `device` and `device_map`.

    Args:
        model: on the meta device.
        dtype: of the weights to come, for how much memory they will need; None for the model's.

    Raises:
        InputError: both were given, a device that cannot be used, a map that leaves modules out or names none.
    """
    if device_map is None:
        return {"": usable("cpu" if device is None else device)}
    if device is not None:
        raise InputError(
            "device and device_map exclude each other",
            got=f"device={device!r} and device_map={device_map!r}",
            expected="one of them",
            fix="leave one out",
        )
    if isinstance(device_map, str):
        if device_map != "auto":
            raise InputError(
                "no such device_map",
                got=repr(device_map),
                expected='"auto", or a mapping from module paths to devices',
                fix=f"for one device, say device={device_map!r}",
            )
        return _auto(model, dtype)
    _check_covers(model, device_map)
    # What would lie on disk does already: the CPU maps it into memory.
    return {prefix: usable("cpu" if device == "disk" else device) for prefix, device in device_map.items()}


def device_of(name: str, places: Mapping[str, torch.device]) -> torch.device:
    """The device of the longest prefix that covers a parameter."""
    return places[max((prefix for prefix in places if _covers(prefix, name)), key=len)]


def dispatch(model: Decoder, places: Mapping[str, torch.device]) -> None:
    """Let accelerate move activations, and weights that are offloaded to the CPU, to where each part runs.

    The first device of the map that is not the CPU runs what lies on the CPU, too, but for the embedding: to look
    up a few rows of it there is cheaper than to move it. A block's weights come as one, before it runs.
    """
    on: dict[str, str | torch.device] = {part: str(device_of(part, places)) for part in _parts(model)}
    devices = [device for device in on.values() if device != "cpu"]
    if len(set(on.values())) > 1:
        if on["embed"] == "cpu":
            on["embed"] = torch.device("cpu")  # accelerate offloads what is on "cpu", the string
        load("accelerate").dispatch_model(
            model,
            on,
            main_device=devices[0],
            preload_module_classes=sorted({type(block).__name__ for block in model.blocks}),
        )


def _auto(model: Decoder, dtype: torch.dtype | None) -> dict[str, torch.device]:
    accelerate = load("accelerate")
    # accelerate (1.15 at least) takes "embed" for a part of "unembed", and stumbles where the two are tied.
    renamed = {name: "head" if name == "unembed" else name for name, _ in model.named_children()}
    parts = nn.Module()
    for name, child in model.named_children():
        parts.add_module(renamed[name], child)
    whole = sorted({type(model.get_submodule(part)).__name__ for part in _parts(model)})
    options: dict[str, Any] = {"no_split_module_classes": whole, "dtype": dtype}
    memory = accelerate.utils.get_balanced_memory(parts, **options)
    found = accelerate.infer_auto_device_map(parts, max_memory=memory, **options)
    names = {new: old for old, new in renamed.items()}
    return {
        ".".join([names.get(head, head), *rest]): usable("cpu" if device == "disk" else device)
        for (head, *rest), device in ((prefix.split("."), device) for prefix, device in found.items())
    }


def _parts(model: Decoder) -> list[str]:
    """What goes to one device as a whole, in order: blocks, and what is beside them and has weights."""
    blocks = [f"blocks.{layer}" for layer in range(len(model.blocks))]
    children = [name for name, child in model.named_children() if list(child.parameters())]
    return [part for name in children for part in (blocks if name == "blocks" else [name])]


def _covers(prefix: str, name: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _check_covers(model: Decoder, device_map: Mapping[str, Device]) -> None:
    parts = _parts(model)
    left_out = [part for part in parts if not any(_covers(prefix, part) for prefix in device_map)]
    names = [name for name, _ in model.named_children()]
    unknown = [key for key in device_map if key not in names and not any(_covers(key, part) for part in parts)]
    if left_out or unknown:
        few = ", ".join((left_out or unknown)[:3])
        raise InputError(
            "the device_map does not fit the model",
            got=f"no device for {few}" if left_out else f"{few}, which is no part of the model to be placed",
            expected=f"keys that cover {', '.join(dict.fromkeys(part.split('.')[0] for part in parts))}",
            fix='"blocks" stands for all blocks, "blocks.3" for a whole one, "" for all that no other key covers',
        )
