"""Which tokens a step processes, row by row: what selectors count over.

A batch goes through the model in one or more passes, each with some of its rows; a pass has steps. Step 0 processes
what of the prompt is new, every later step one token a row. Rows are padded (on the left, mostly), and the tokens that
a row calls its own are those that the mask says.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

Columns = Sequence[int]


class Tokens(NamedTuple):
    """An axis of tokens: its length, and each row's own columns of it in order (None: all of them, in every row)."""

    width: int
    own: tuple[Columns, ...] | None

    def of(self, row: int) -> Columns:
        return range(self.width) if self.own is None else self.own[row]

    def then(self, other: "Tokens") -> "Tokens":
        """This axis with another one behind it."""
        width = self.width + other.width
        if self.own is None and other.own is None:
            return Tokens(width, None)
        rows = len(self.own or other.own or ())
        joined = (_join(self.of(row), other.of(row), self.width) for row in range(rows))
        return Tokens(width, tuple(joined))


def tokens_of(width: int, mask: Bool[Tensor, "batch pos"] | None) -> Tokens:
    """The axis behind a mask (True for a row's own tokens)."""
    if mask is None:
        return Tokens(width, None)
    counts = mask.sum(1).tolist()
    left_padded = torch.arange(width, device=mask.device) >= width - mask.sum(1, keepdim=True)
    if torch.equal(mask, left_padded):
        return Tokens(width, tuple(range(width - count, width) for count in counts))
    return Tokens(width, tuple(tuple(row.nonzero()[:, 0].tolist()) for row in mask))


def _join(before: Columns, after: Columns, width: int) -> Columns:
    shifted = [column + width for column in after]
    if isinstance(before, range) and isinstance(after, range) and before and after and before[-1] + 1 == shifted[0]:
        return range(before[0], shifted[-1] + 1)
    return (*before, *shifted)


class Geometry:
    """The rows of one pass and their tokens, step by step.

    Args:
        rows: which rows of the user's batch these are.
        prompt: the tokens that step 0 processes.
        past: the tokens that were in the cache before.
    """

    def __init__(self, rows: Sequence[int], prompt: Tokens, past: Tokens = Tokens(0, None)) -> None:  # noqa: B008
        self.rows = tuple(rows)
        self.prompt = prompt
        self.past = past
        self._context = past.then(prompt)
        self._keys: dict[int, Tokens] = {0: self._context}
        # What compiled selections depend on; equal for geometries in which nothing differs.
        self.key = (self.rows, prompt.width, prompt.own, past.width, past.own)

    def subset(self, rows: Sequence[int]) -> tuple["Geometry", int]:
        """Some of the rows as a pass of their own, and how many columns of padding on the left it does without."""
        if len(rows) == len(self.rows):
            return self, 0
        prompt, past = ([axis.of(row) for row in rows] for axis in (self.prompt, self.past))
        start = min(columns[0] for columns in prompt)
        width = self.prompt.width - start
        own = tuple(
            range(columns[0] - start, width)
            if isinstance(columns, range)
            else tuple(column - start for column in columns)
            for columns in prompt
        )
        subset = Geometry(
            [self.rows[row] for row in rows],
            Tokens(width, None if all(len(columns) == width for columns in own) else own),
            Tokens(self.past.width, None if self.past.own is None else tuple(past)),
        )
        return subset, start

    def queries(self, step: int) -> Tokens:
        """The tokens that a step processes."""
        return self.prompt if step == 0 else _ONE

    def keys(self, step: int) -> Tokens:
        """The tokens that its queries may look at, theirs included."""
        if step not in self._keys:
            self._keys[step] = self._context.then(Tokens(step, None))
        return self._keys[step]


_ONE = Tokens(1, None)
