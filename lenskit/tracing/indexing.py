"""Indexing: tensors' indices as selectors, which count each row's own tokens, and the other way round."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lenskit.errors import TraceError
from lenskit.tracing.scope import Prompts

_ALL = slice(None)


def is_basic(index: Any) -> bool:
    """Whether an index of a tensor gives a view: ints, slices, `...` and None."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or type(part) is int or isinstance(part, slice) for part in parts)


def as_selectors(index: Any, axes: Sequence[str], *, even: bool) -> dict[str, Any] | None:
    """Selectors that mean the same as an index; None where there are none.

    Args:
        axes: of the hook point.
        even: whether all rows have as many tokens, so that columns can be counted as tokens.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is None for part in parts) or sum(part is Ellipsis for part in parts) > 1:
        return None
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [_ALL] * (len(axes) - len(parts) + 1)
    parts += [_ALL] * (len(axes) - len(parts))
    if len(parts) != len(axes) or parts[0] != _ALL:
        return None
    selectors: dict[str, Any] = {}
    for place, (part, axis) in enumerate(zip(parts, axes, strict=True)):
        if part == _ALL:
            continue
        if not (type(part) is int or isinstance(part, slice)) or (isinstance(part, slice) and not _plain(part)):
            return None
        if axis in ("pos", "query_pos") and even:
            selectors["tokens"] = part
        elif axis == "head":
            selectors["heads"] = part
        elif place == len(axes) - 1 and (axis != "key_pos" or even):
            selectors["dims"] = part
        else:
            return None
    return selectors


def as_index(selectors: Mapping[str, Any], axes: Sequence[str]) -> tuple[Any, ...]:
    """The inverse of `as_selectors`."""
    by_axis = {"head": "heads", "pos": "tokens", "query_pos": "tokens"}
    names = [by_axis.get(axis, "dims" if place == len(axes) - 1 else "") for place, axis in enumerate(axes)]
    return tuple(selectors.get(name, _ALL) for name in names)


def _plain(part: slice) -> bool:
    return all(value is None or type(value) is int for value in (part.start, part.stop, part.step)) and (
        part.step is None or part.step > 0
    )


def token_index(index: Any, shape: Sequence[int], prompts: Prompts) -> Any:
    """An index of a tensor [batch pos ...] that means these tokens of each row, which is padded on the left.

    Raises:
        TraceError: the tensor has no such axes, or no index means that.
    """
    rows, longest = len(prompts.rows), max(prompts.lengths)
    if len(shape) < 2 or shape[0] != rows or shape[1] not in (1, longest):
        raise _no_tokens(f"a value of shape {tuple(shape)}", f"the axes [batch pos ...], here [{rows} {longest} ...]")
    if prompts.even or shape[1] == 1 or _from_the_end(index):
        return (_ALL, index)
    if type(index) is int and all(index < length for length in prompts.lengths):
        first = [longest - length for length in prompts.lengths]
        return (torch.arange(rows), torch.tensor(first) + index)
    raise _no_tokens(
        f"{index!r} on rows of {', '.join(map(str, prompts.lengths))} tokens, padded to the longest",
        "an int that every row has, or a slice that counts from the end",
    )


def _from_the_end(index: Any) -> bool:
    """Whether the index counts from the end, where no row is padded."""
    if isinstance(index, slice):
        ends = (index.start, index.stop)
        return type(index.start) is int and all(end is None or (type(end) is int and end < 0) for end in ends)
    return type(index) is int and index < 0


def _no_tokens(got: str, expected: str) -> TraceError:
    return TraceError(
        "tokens cannot be counted here",
        got=got,
        expected=expected,
        fix="take the tokens of the activation itself, before computing: model.blocks[0].output.t[3:5]",
    )
