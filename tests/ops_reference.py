"""Ops done the plain way: on whole activations, row by row and axis by axis, in NumPy's words.

Nothing of lenskit's selections is used here: a row's own tokens are cut out of its padding first, then every axis is
indexed on its own, and rows of different lengths are put together again with zeros on the left. Where neither prompts
nor tokens are selected, everything stays where the batch has it, with zeros for padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOKEN_AXES = ("pos", "query_pos", "key_pos")


def selector_of(axes: Sequence[str], i: int) -> str | None:
    """Which selector an axis listens to."""
    if axes[i] in ("pos", "query_pos"):
        return "tokens"
    if axes[i] == "head":
        return "heads"
    return "dims" if i == len(axes) - 1 else None


@dataclass(frozen=True)
class Plain:
    """A batch, by its mask.

    mask: [batch pos], True for a row's own tokens. keys: [batch key_pos], where there is a past.
    """

    mask: Tensor
    keys: Tensor | None = None

    def own(self, row: int, axis: str) -> Tensor:
        """The columns that a row calls its own, on an axis of tokens."""
        mask = self.keys if axis == "key_pos" and self.keys is not None else self.mask
        return mask[row].nonzero()[:, 0]

    def rows(self, selectors: dict[str, Any]) -> list[int]:
        """Of the prompts selected."""
        found = np.arange(len(self.mask))[selectors.get("prompts", slice(None))]
        return np.atleast_1d(found).tolist()

    def stays(self, axes: Sequence[str], i: int, selectors: dict[str, Any]) -> bool:
        """Whether an axis of tokens is kept with its padding, as the batch has it."""
        chosen = selectors.get(selector_of(axes, i))
        return axes[i] in TOKEN_AXES and chosen is None and selectors.get("prompts") is None

    def of_row(self, act: Tensor, axes: Sequence[str], row: int, selectors: dict[str, Any]) -> Tensor:
        """A row's activation without padding; with zeros in its place, where the axis stays."""
        found = act[row]
        for dim, axis in enumerate(axes[1:]):
            if axis in TOKEN_AXES:
                own = self.own(row, axis)
                cut = found.index_select(dim, own)
                stays = self.stays(axes, dim + 1, selectors)
                found = torch.zeros_like(found).index_copy(dim, own, cut) if stays else cut
        return found

    def read(self, act: Tensor, axes: Sequence[str], selectors: dict[str, Any]) -> Tensor:
        """What is selected, left-padded with zeros where rows differ."""
        parts = []
        for row in self.rows(selectors):
            part = self.of_row(act, axes, row, selectors)
            for i in reversed(range(1, len(axes))):
                selector = selectors.get(selector_of(axes, i))
                if selector is not None:
                    chosen = np.arange(part.shape[i - 1])[selector]
                    if isinstance(selector, int):
                        part = part.select(i - 1, int(chosen))
                    else:
                        part = part.index_select(i - 1, torch.from_numpy(chosen))
            parts.append(part)
        widest = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
        whole = act.new_zeros(len(parts), *widest)
        for index, part in enumerate(parts):
            whole[(index, *(slice(w - n, None) for w, n in zip(widest, part.shape, strict=True)))] = part
        return whole[0] if isinstance(selectors.get("prompts"), int) else whole

    def edit(
        self, act: Tensor, axes: Sequence[str], selectors: dict[str, Any], change: Callable[[Tensor, Any], Any],
        value: Any,
    ) -> Tensor:  # fmt: skip
        """The activation with `change(selected part, value)` in the place of the part, a row at a time."""
        new = act.clone()
        if isinstance(value, Tensor):
            value = value.expand(self.read(act, axes, selectors).shape)
        for index, row in enumerate(self.rows(selectors)):
            columns = []
            for i in range(1, len(axes)):
                own = self.own(row, axes[i]) if axes[i] in TOKEN_AXES else torch.arange(act.shape[i])
                selector = selectors.get(selector_of(axes, i))
                chosen = np.arange(len(own))[slice(None) if selector is None else selector]
                columns.append(own[torch.from_numpy(np.atleast_1d(chosen))].numpy())
            grid = (row, *map(torch.from_numpy, np.ix_(*columns)))
            part = act[grid]
            operand = value
            if isinstance(value, Tensor):
                operand = value if isinstance(selectors.get("prompts"), int) else value[index]
                kept = [i for i in range(1, len(axes)) if not isinstance(selectors.get(selector_of(axes, i)), int)]
                for dim, i in enumerate(kept):
                    n = part.shape[i - 1]
                    if self.stays(axes, i, selectors):
                        operand = operand.index_select(dim, self.own(row, axes[i]))
                    else:
                        operand = operand.narrow(dim, operand.shape[dim] - n, n)
                operand = operand.reshape(part.shape)
            new[grid] = torch.as_tensor(change(part, operand), dtype=act.dtype)
        return new
