"""`ActivationCache`: what `run_with_cache` returns, a mapping from hook point names to activations."""

import re
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from lenskit.errors import UnknownHookPointError

Key = str | tuple[str, int] | tuple[str, int, str]


class ActivationCache(Mapping[str, Tensor]):
    """Activations of one forward pass, by hook point.

    `cache["blocks.3.attn.hook_pattern"]`, or short: `cache["pattern", 3]`, `cache["resid_post", -1]`,
    `cache["scale", 0, "ln1"]`, `cache["embed"]`. Axes are those of the hook point.

    Args:
        activations: by full name.
        n_layers: of the model, for layers counted from the end.
        mask: [batch pos], True for a row's own tokens; None where nothing is padded.
    """

    def __init__(self, activations: dict[str, Tensor], *, n_layers: int, mask: Tensor | None = None) -> None:
        self._activations = activations
        self.n_layers = n_layers
        self.mask = mask

    def __getitem__(self, key: Key) -> Tensor:
        return self._activations[self.full_name(key)]

    def __contains__(self, key: object) -> bool:
        try:
            return self.full_name(key) in self._activations  # type: ignore[arg-type]
        except UnknownHookPointError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensor in self._activations.values()) / 2**20
        return f"ActivationCache({len(self)} activations, {self.n_layers} layers, {size:.1f} MiB)"

    def full_name(self, key: Key) -> str:
        """The cached name that a key stands for.

        Raises:
            UnknownHookPointError: nothing cached, or more than one thing, answers to the key.
        """
        names: list[str] = []
        match key:
            case str():
                full = re.sub(r"^blocks\.-(\d+)\.", lambda m: f"blocks.{self.n_layers - int(m[1])}.", key)
                names = [name for name in (full, f"hook_{full}", f"{full}.hook_scale") if name in self._activations][:1]
            case (str(short), int(layer), *part) if len(part) < 2:
                block = f"blocks.{layer + self.n_layers if layer < 0 else layer}."
                end = f".{part[0]}.hook_{short}" if part else f".hook_{short}"
                names = [name for name in self._activations if name.startswith(block) and name.endswith(end)]
        if len(names) != 1:
            raise UnknownHookPointError(
                f"no single cached activation answers to {key!r}",
                got=f"{key!r}, which stands for {', '.join(names) or 'nothing here'}",
                expected=f"one of the {len(self)} cached names, such as {', '.join(list(self)[:3]) or 'none'}",
                fix='write cache["blocks.0.attn.hook_q"], cache["q", 0] or cache["scale", 0, "ln1"]; '
                "run_with_cache(names=...) decides what is kept",
            )
        return names[0]

    def stack(self, short: str, part: str | None = None) -> Tensor:
        """One point of every layer, e.g. `cache.stack("resid_post")` [layer batch pos d_model]."""
        keys: list[Key] = [(short, layer, part) if part else (short, layer) for layer in range(self.n_layers)]
        return torch.stack([self[key] for key in keys])

    def to(self, device: torch.device | str) -> Self:
        """A cache with every activation on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self._activations.items()}
        return type(self)(moved, n_layers=self.n_layers, mask=self.mask)
