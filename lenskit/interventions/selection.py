"""A selection: one point's activation at one step, seen through an op's selectors.

It is compiled once for a batch's geometry and then reads and edits activations of that shape. Padding reads as zeros
and is never written. Columns of tokens are kept relative to the end of the axis, so that a point that is only
computed for the last positions (the logits) can be read all the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lenskit.errors import ReplacementError
from lenskit.hooks import HookPoint
from lenskit.interventions.geometry import Columns, Geometry, Tokens
from lenskit.interventions.selectors import Canonical, Selectors, indices

TOKEN_AXES = ("pos", "query_pos", "key_pos")
Change = Callable[[Tensor], Any]


class MissingIndexError(Exception):
    """An int that selects nothing; whoever knows the op makes a message of it."""

    def __init__(self, selector: str, index: int, length: int, row: int | None = None) -> None:
        super().__init__(selector, index, length, row)
        self.selector, self.index, self.length, self.row = selector, index, length, row


class Axis:
    """What is selected along one axis: the same columns in every row, or each row's own.

    own: where all columns are kept as they lie, those that are a row's own.
    """

    def __init__(
        self,
        columns: Columns,
        *,
        drop: bool,
        whole: bool,
        per_row: Sequence[Columns] | None = None,
        own: Sequence[Columns] | None = None,
    ) -> None:
        self.columns = columns  # with `per_row`, those of the longest row: only their number counts
        self.drop = drop
        self.whole = whole
        self.per_row = per_row
        self.own = own

    def lengths(self, rows: int) -> list[int]:
        """How many columns are selected in each of so many rows."""
        by_row = self.per_row if self.own is None else self.own
        return [len(self.columns)] * rows if by_row is None else [len(columns) for columns in by_row]


class Selection:
    """Reads and edits the selected part of an activation.

    shape: of what is read, dropped axes left out.
    depth: how many of the last token columns the activation must have at least.
    lengths: how many tokens of each row are selected, along the first axis of tokens that is kept; None without one.
    """

    def __init__(self, axes: Sequence[Axis], *, rows: Sequence[int], tokens: dict[int, Tokens]) -> None:
        self.kept = tuple(len(axis.columns) for axis in axes)
        self.dropped = tuple(i for i, axis in enumerate(axes) if axis.drop)
        self.shape = tuple(size for i, size in enumerate(self.kept) if i not in self.dropped)
        self.whole = all(axis.whole and axis.per_row is None and axis.own is None for axis in axes)
        self.depth = max((_depth(axes[i], axis.width) for i, axis in tokens.items()), default=0)
        self._devices: dict[torch.device, tuple[Any, Tensor | None]] = {}
        self._index: tuple[Any, ...] = ()
        self._valid: Tensor | None = None
        self._mesh = False
        kept = [axes[i] for i in tokens if i not in self.dropped]
        self.lengths = kept[0].lengths(len(rows)) if kept else None
        if not self.whole:
            self._build(axes, tokens)

    def read(self, x: Tensor) -> Tensor:
        """The selected part: the activation itself, a view, or a copy."""
        if self.whole:
            return x
        index, valid = self._on(x.device)
        part = x[index]
        if self._mesh and self.dropped:
            part = part.reshape(self.shape)
        return part if valid is None else part.masked_fill(~valid, 0)

    def edit(self, x: Tensor, change: Change) -> Tensor:
        """A new activation in which the selected part is what `change` makes of it; x stays as it is.

        `change` returns a number, or a tensor that broadcasts to what it is given.
        """
        if self.whole:
            return _whole(change(x), x)
        index, valid = self._on(x.device)
        part = x[index]
        if self._mesh and self.dropped:
            part = part.reshape(self.shape)
        new = _fitting(change(part), x)
        if valid is not None:
            new = torch.where(valid, new, part)
        if self._mesh and self.dropped and isinstance(new, Tensor):
            new = new.expand(self.shape).reshape(self.kept)
        own = x.clone()
        own[index] = new
        return own

    def _on(self, device: torch.device) -> tuple[Any, Tensor | None]:
        found = self._devices.get(device)
        if found is None:
            index = tuple(i.to(device) if isinstance(i, Tensor) else i for i in self._index)
            found = self._devices[device] = (index, None if self._valid is None else self._valid.to(device))
        return found

    def _build(self, axes: Sequence[Axis], tokens: dict[int, Tokens]) -> None:
        ends = {i: axis.width for i, axis in tokens.items()}
        slices = [_basic(axis, ends.get(i, 0)) for i, axis in enumerate(axes)]
        self._mesh = any(part is None for part in slices)
        self._index = tuple(slices)
        if self._mesh:
            last = max(i for i, axis in enumerate(axes) if not axis.whole or axis.per_row is not None)
            self._index = tuple(_meshed(axis, i, last + 1, ends.get(i, 0)) for i, axis in enumerate(axes[: last + 1]))
        for i, axis in enumerate(axes):
            if axis.per_row is not None or axis.own is not None:
                valid = self._valid_of(axis, i, len(axes))
                if valid is not None:
                    self._valid = valid if self._valid is None else self._valid & valid

    def _valid_of(self, axis: Axis, i: int, n_axes: int) -> Tensor | None:
        """Where rows have so many columns; None where all have."""
        rows = axis.per_row if axis.own is None else axis.own
        assert rows is not None
        width = len(axis.columns)
        counts = [len(columns) for columns in rows]
        if all(count == width for count in counts):
            return None
        valid = torch.arange(width) >= width - torch.tensor(counts)[:, None]
        if axis.own is not None:
            valid = torch.tensor([[column in columns for column in range(width)] for columns in axis.own])
        shape = [1] * n_axes
        shape[0], shape[i] = len(counts), width
        return valid.reshape([size for j, size in enumerate(shape) if j not in self.dropped])


def select(point: HookPoint, selectors: Selectors, geometry: Geometry, step: int, rows: Sequence[int]) -> Selection:
    """Compile.

    Args:
        rows: the selected rows, as they are numbered in this pass; empty is not allowed.

    Raises:
        MissingIndexError: something that is not there.
    """
    token_axes: dict[int, Tokens] = {}
    axes: list[Axis] = []
    for i, name in enumerate(point.axes):
        if i == 0:
            drop = isinstance(selectors.prompts, int)
            axes.append(Axis(rows, drop=drop, whole=not drop and list(rows) == list(range(len(geometry.rows)))))
        elif name in TOKEN_AXES:
            token_axes[i] = geometry.keys(step) if name == "key_pos" else geometry.queries(step)
            selector = selectors.dims if name == "key_pos" else selectors.tokens
            kind = "dims" if name == "key_pos" else "tokens"
            stays = selector is None and selectors.prompts is None
            axes.append(_token_axis(token_axes[i], selector, rows, kind, geometry, stays=stays))
        else:
            kind = "heads" if name == "head" else "dims"
            selector = selectors.heads if name == "head" else selectors.dims if i == len(point.axes) - 1 else None
            axes.append(_plain_axis(point.sizes[name], selector, kind))
    return Selection(axes, rows=rows, tokens=token_axes)


def _plain_axis(size: int, selector: Canonical, kind: str) -> Axis:
    try:
        columns = indices(selector, size)
    except IndexError as error:
        raise MissingIndexError(kind, error.args[0], size) from None
    if not columns:
        raise MissingIndexError(kind, 0, 0)
    return Axis(columns, drop=isinstance(selector, int), whole=selector is None)


def _token_axis(
    tokens: Tokens, selector: Canonical, rows: Sequence[int], kind: str, geometry: Geometry, *, stays: bool
) -> Axis:
    """Columns of the padded axis, from a selector that counts over each row's own tokens.

    Args:
        stays: nothing is selected, so the axis is kept as the batch has it.
    """
    drop = isinstance(selector, int)
    if tokens.own is None:
        try:
            columns = indices(selector, tokens.width)
        except IndexError as error:
            raise MissingIndexError(kind, error.args[0], tokens.width, geometry.rows[rows[0]]) from None
        if not columns:
            raise MissingIndexError(kind, 0, 0)
        return Axis(columns, drop=drop, whole=selector is None)
    per_row: list[Columns] = []
    for row in rows:
        own = tokens.own[row]
        try:
            chosen = indices(selector, len(own))
        except IndexError as error:
            raise MissingIndexError(kind, error.args[0], len(own), geometry.rows[row]) from None
        per_row.append(own if selector is None else [own[index] for index in chosen])
    longest = max(per_row, key=len)
    if not longest:
        raise MissingIndexError(kind, 0, 0)
    if stays:
        return Axis(range(tokens.width), drop=False, whole=True, own=per_row)
    if all(list(columns) == list(longest) for columns in per_row):
        return Axis(longest, drop=drop, whole=not drop and list(longest) == list(range(tokens.width)))
    return Axis(longest, drop=drop, whole=False, per_row=per_row)


def _basic(axis: Axis, end: int) -> Any:
    """An int or a slice, counted from `end`, that stands for the columns; None where there is none."""
    if axis.per_row is None:
        if axis.whole:
            return slice(None)
        if axis.drop:
            return axis.columns[0] - end
        found = _as_range(axis.columns)
        return None if found is None else _slice(found, end)
    if axis.drop or any(not columns or _as_range(columns) is None for columns in axis.per_row):
        return None
    if any(columns[-1] != axis.columns[-1] or columns[-1] - columns[0] != len(columns) - 1 for columns in axis.per_row):
        return None
    return _slice(range(axis.columns[-1] + 1 - len(axis.columns), axis.columns[-1] + 1), end)


def _as_range(columns: Columns) -> range | None:
    if isinstance(columns, range):
        return columns
    step = columns[1] - columns[0] if len(columns) > 1 else 1
    if step < 1:
        return None
    found = range(columns[0], columns[-1] + 1, step)
    return found if list(found) == list(columns) else None


def _slice(columns: range, end: int) -> slice:
    start, stop = columns.start - end, columns[-1] + 1 - end
    return slice(start, stop if stop or not end else None, columns.step)


def _meshed(axis: Axis, i: int, n: int, end: int) -> Tensor:
    """The columns as an index tensor that broadcasts with those of the other axes."""
    if axis.per_row is None:
        shape = [1] * n
        shape[i] = len(axis.columns)
        return torch.tensor(list(axis.columns)).reshape(shape) - end
    width = len(axis.columns)
    shape = [1] * n
    shape[0], shape[i] = len(axis.per_row), width
    padded = [[*[_unselected(columns, width)] * (width - len(columns)), *columns] for columns in axis.per_row]
    return torch.tensor(padded).reshape(shape) - end


def _unselected(columns: Columns, width: int) -> int:
    """A column that the row did not select, to stand where it has fewer than the others: what is written there is
    what was there. There is one, because the axis is at least as long as the longest row's columns are many.
    """
    chosen = set(columns)
    return next((column for column in range(width) if column not in chosen), 0)


def _depth(axis: Axis, width: int) -> int:
    columns = axis.per_row if axis.per_row is not None else [axis.columns]
    return width - min(some[0] if isinstance(some, range) else min(some) for some in columns if some)


def _whole(new: Any, x: Tensor) -> Tensor:
    """What replaces a whole activation: of its shape and dtype."""
    if not isinstance(new, Tensor):
        return torch.full_like(x, new)
    new = _fitting(new, x)
    return new if new.shape == x.shape else new.expand(x.shape).clone()


def _fitting(new: Any, x: Tensor) -> Any:
    """A value in an activation's dtype, if that loses nothing."""
    if not isinstance(new, Tensor) or new.dtype == x.dtype:
        return new
    if torch.result_type(x, new) == x.dtype:
        return new.to(x.dtype)
    raise ReplacementError(
        "an edit would change the dtype of an activation",
        got=f"a value of {new.dtype}",
        expected=f"{x.dtype}, which the model computes in",
        fix=f"convert the value: value.to({x.dtype})",
    )


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a value of one shape can fill another."""
    if len(shape) > len(target):
        return False
    return all(size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False))
