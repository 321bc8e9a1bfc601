"""Streaming a checkpoint into a model: everything is checked first, then tensors are placed one by one."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lenskit.checkpoints.files import TensorFiles
from lenskit.checkpoints.source import Source
from lenskit.errors import ConfigError, InputError, TensorShapeError, UnsupportedModelError
from lenskit.extras import load
from lenskit.models.base import Decoder, DecoderConfig, Family
from lenskit.models.registry import family
from lenskit.weights import Placement, WeightTable, weight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Device = torch.device | str | int


@dataclass(frozen=True)
class Described:
    """What a checkpoint's config says: the family, our config, and Hugging Face's as it was."""

    family: Family
    cfg: DecoderConfig
    hf_config: dict[str, Any]


def describe(source: Source) -> Described:
    """Read the config.

    Raises:
        UnsupportedModelError: no family covers the model's type.
        UnsupportedConfigError: an attribute that would change the computation and is not handled.
        ConfigError: the config makes no sense.
    """
    if source.manifest is not None:
        found = family(source.manifest["model_type"], where=source.where)
        return Described(found, found.config.from_json(source.manifest["config"]), source.manifest["hf_config"])
    raw = source.json("config.json")
    if "model_type" not in raw:
        raise UnsupportedModelError(
            f"{source.where}: config.json has no model_type",
            got=f"attributes {', '.join(sorted(raw)[:8])}",
            expected="model_type, the name of the architecture family",
            fix="add it, or give the folder of a Hugging Face checkpoint",
        )
    found = family(raw["model_type"], where=source.where)
    return Described(found, found.config.from_hf(complete(raw, where=source.where)), raw)


def complete(raw: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """A Hugging Face config with the class's defaults for what it leaves out.

    Raises:
        ConfigError: Hugging Face refuses it.
    """
    attributes = {key: value for key, value in raw.items() if key != "model_type"}
    transformers = load("transformers")
    try:
        config: dict[str, Any] = transformers.AutoConfig.for_model(raw["model_type"], **attributes).to_dict()
    except Exception as error:  # whatever the config class raises, it is about this file
        raise ConfigError(
            f"{where}: config.json is refused by Hugging Face's config class",
            got=f"{type(error).__name__}: {error}",
            expected=f"a valid {raw['model_type']} config",
            fix="correct the attribute that the message names",
        ) from error
    return config


def table_of(source: Source, described: Described) -> WeightTable:
    """The names of the source's tensors: the family's, or our own in a checkpoint that lenskit wrote."""
    table = described.family.weights(described.cfg)
    if source.manifest is None:
        return table
    ours = [name for placement in table.placements() for name in placement.ours]
    return WeightTable(tuple(weight(name, name) for name in ours), n_layers=1)


def open_tensors(source: Source) -> TensorFiles:
    """The source's tensor files."""
    return TensorFiles(source.folder, stem="model" if source.manifest is None else "weights")


def fill(
    model: Decoder,
    source: Source,
    described: Described,
    *,
    device_map: Mapping[str, Device],
    dtype: torch.dtype | None,
) -> None:
    """Give a model built on the meta device its weights; nothing is placed unless everything fits.

    A tensor that can be used as it lies on disk stays there, mapped into memory; others are copied one at a time.

    Args:
        device_map: module path prefix -> device; "" is the default.
        dtype: of the parameters; None for the embedding's on disk.

    Raises:
        MissingTensorError, UnknownTensorError, TensorShapeError, CorruptCheckpointError: see their docstrings.
    """
    files = open_tensors(source)
    placements = table_of(source, described).match(files.files, source.where)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for placement in placements:
        _check_shapes(placement, files, parameters, source.where)
    if dtype is None and placements:
        with torch.no_grad():
            dtype = files.mapped(placements[0].on_disk[0]).dtype
    for placement in placements:
        for name, tensor in zip(placement.ours, _read(placement, files, device_map, dtype), strict=True):
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[attribute] = nn.Parameter(tensor)
    model.tie()


def _check_shapes(placement: Placement, files: TensorFiles, parameters: Mapping[str, nn.Parameter], where: str) -> None:
    on_disk = [torch.empty(files.shape(name), device="meta") for name in placement.on_disk]
    for name, tensor in zip(placement.ours, placement.rule.load(on_disk), strict=True):
        if tensor.shape != parameters[name].shape:
            raise TensorShapeError(
                f"{where}: {placement.on_disk[0]} has another shape than the config says",
                got=f"{[tuple(t.shape) for t in on_disk]} in {files.files[placement.on_disk[0]].name}",
                expected=f"what becomes {tuple(parameters[name].shape)} as {name}",
                fix="check that config.json belongs to these weights",
            )


def _read(
    placement: Placement, files: TensorFiles, device_map: Mapping[str, Device], dtype: torch.dtype | None
) -> list[Tensor]:
    devices = [torch.device(_device_of(name, device_map)) for name in placement.ours]
    as_it_lies = [files.mapped(name) for name in placement.on_disk]
    if all(device.type == "cpu" for device in devices) and all(t.dtype == dtype for t in as_it_lies):
        return list(placement.rule.load(as_it_lies))
    with ExitStack() as pages:
        tensors = [pages.enter_context(files.once(name)) for name in placement.on_disk]
        return [
            tensor.to(device=device, dtype=dtype, copy=True)
            for tensor, device in zip(placement.rule.load(tensors), devices, strict=True)
        ]


def places(model: Decoder, device: Device | None, device_map: str | Mapping[str, Device] | None) -> dict[str, Device]:
    """Module path prefix -> device, from what the user said of `device` and `device_map`.

    Raises:
        InputError: both were given, or a map that leaves modules out.
    """
    if device_map is None:
        return {"": device or "cpu"}
    if device is not None:
        raise InputError(
            "device and device_map exclude each other",
            got=f"device={device!r} and device_map={device_map!r}",
            expected="one of them",
            fix="leave one out",
        )
    if not isinstance(device_map, str):
        return dict(device_map)
    accelerate = load("accelerate")
    blocks = sorted({type(block).__name__ for block in model.blocks})
    memory = accelerate.utils.get_balanced_memory(model, no_split_module_classes=blocks)
    found: dict[str, Device] = accelerate.infer_auto_device_map(
        model, max_memory=None if device_map == "sequential" else memory, no_split_module_classes=blocks
    )
    return found


def dispatch(model: Decoder, places: Mapping[str, Device]) -> None:
    """Let accelerate move activations, and weights kept on the CPU, to where each part runs."""
    devices = {torch.device("cpu" if device == "disk" else device) for device in places.values()}
    if len(devices) > 1:
        on_cpu = {prefix: "cpu" if device == "disk" else device for prefix, device in places.items()}
        load("accelerate").dispatch_model(model, on_cpu)


def _device_of(name: str, device_map: Mapping[str, Device]) -> Device:
    """The device of the longest prefix that covers a parameter; what would be on disk is mapped by the CPU."""
    fitting = [prefix for prefix in device_map if not prefix or name == prefix or name.startswith(prefix + ".")]
    device = device_map[max(fitting, key=len)]
    return "cpu" if device == "disk" else device


def tokenizer_of(source: Source) -> "PreTrainedTokenizerBase | None":
    """The folder's tokenizer, if it has one; code from the checkpoint is never run."""
    if not list(source.folder.glob("tokenizer*")) and not (source.folder / "vocab.json").exists():
        return None
    transformers = load("transformers")
    tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
        source.folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer
