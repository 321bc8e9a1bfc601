"""Parts: a selection as one pass sees it, and the whole put together from what each pass had of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lenskit.hooks import HookPoint
from lenskit.interventions.selection import TOKEN_AXES, Selection


class Part:
    """A selection as one pass sees it: of the selected rows, those that go through in this pass.

    selection: of the pass's own activation. full: of the whole batch. sub: which of the full selection's rows these
    are; None: all of them. rows: as the pass numbers them.
    """

    __slots__ = ("full", "rows", "selection", "sub", "token_dims")

    def __init__(
        self, selection: Selection, full: Selection, sub: list[int] | None, rows: Sequence[int], token_dims: list[int]
    ) -> None:
        self.selection, self.full, self.sub, self.rows, self.token_dims = selection, full, sub, rows, token_dims

    def value(self, value: Tensor | float) -> Tensor | float:
        """What this pass uses of a value that fits the full selection."""
        if self.sub is None or not isinstance(value, Tensor) or value.dim() == 0:
            return value
        value = value.expand(self.full.shape)
        if 0 not in self.full.dropped:
            value = value[self.sub]
        for dim in self.token_dims:
            width = self.selection.shape[dim]
            value = value.narrow(dim, value.shape[dim] - width, width)
        return value


def merged(parts: Sequence[tuple[Part, Tensor]]) -> Tensor:
    """The full selection from what each pass had of it; padding, and what no pass had, is zeros."""
    first, tensor = parts[0]
    if first.sub is None or 0 in first.full.dropped:
        return tensor
    whole = tensor.new_zeros(first.full.shape)
    for part, tensor in parts:
        columns: list[slice] = [slice(None)] * (whole.dim() - 1)
        for dim in part.token_dims:
            columns[dim - 1] = slice(whole.shape[dim] - tensor.shape[dim], None)
        rows = torch.tensor(part.sub, device=whole.device)
        index: tuple[Any, ...] = (rows, *columns)
        whole[index] = tensor.to(whole.device)
    return whole


def joined(parts: Sequence[tuple[Part | None, Tensor]]) -> Tensor:
    """What a step saved: whole already, or of several passes."""
    return parts[0][1] if parts[0][0] is None else merged(parts)  # type: ignore[arg-type]


def wider(columns: int | None, point: HookPoint, part: Part | None) -> int | None:
    """How many positions need logits, given one more reader of a point."""
    if not of_logits(point) or columns is None:
        return columns
    return None if part is None or part.selection.whole else max(columns, part.selection.depth)


def of_logits(point: HookPoint) -> bool:
    """Whether it is behind the final norm, where only the positions are computed that need logits."""
    return point.name == "hook_logits" or point.name.startswith("unembed.")


def token_dims(point: HookPoint, selection: Selection) -> list[int]:
    """The axes of tokens, as numbered once dropped axes are left out."""
    kept = [i for i in range(len(point.axes)) if i not in selection.dropped]
    return [dim for dim, i in enumerate(kept) if point.axes[i] in TOKEN_AXES]
