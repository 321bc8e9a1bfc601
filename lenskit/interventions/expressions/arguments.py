"""What a function in an expression may be applied to: expressions and plain data, nothing that runs."""

import numbers
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lenskit.errors import ExpressionError
from lenskit.interventions.expressions.closed_list import DTYPES

E = TypeVar("E")

DEEPEST = 32  # lists within lists
_PLAIN = frozenset([int, float, bool, type(None), str, type(Ellipsis)])


class Held(Generic[E]):
    """What a call holds: its arguments, checked and copied, and the expressions among them.

    inputs: the expressions, as often and in the order that they come.
    """

    __slots__ = ("_expression", "has_tensors", "inputs")

    def __init__(self, expression: type[E]) -> None:
        self._expression = expression
        self.inputs: list[E] = []
        self.has_tensors = False

    def hold(self, value: Any, depth: int = 0) -> Any:
        """The argument as it is kept: lists copied, NumPy's numbers as Python's.

        Raises:
            ExpressionError: no expression can hold it.
        """
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, self._expression):
            self.inputs.append(value)
            return value
        if isinstance(value, Tensor):
            self.has_tensors = True
            return value
        if isinstance(value, list | tuple) and depth < DEEPEST:
            entries = [self.hold(entry, depth + 1) for entry in value]
            return entries if isinstance(value, list) else tuple(entries)
        if isinstance(value, slice):
            return slice(*(_slice_part(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, torch.dtype) and value in DTYPES.values():
            return value
        if isinstance(value, numbers.Real):  # NumPy's, mostly
            return int(value) if isinstance(value, numbers.Integral) else float(value)
        raise _cannot_hold(value)


def _slice_part(part: Any) -> int | None:
    if part is None or type(part) is int:
        return part
    if isinstance(part, numbers.Integral):
        return int(part)
    raise ExpressionError(
        "a slice in an expression goes from number to number",
        got=f"{type(part).__name__} as an end or step of a slice",
        expected="ints or nothing: the shape could not be known before the model runs",
        fix="index with a tensor, or mask with torch.where",
    )


def _cannot_hold(value: Any) -> ExpressionError:
    fix = "compute it in a Python function: hooks=[(name, lambda act, hook: ...)]"
    if isinstance(value, torch.device):
        fix = "leave devices out: an expression is computed where its activations are"
    elif isinstance(value, list | tuple):
        fix = f"use a tensor: lists may be {DEEPEST} deep"
    elif type(value).__module__ == "numpy":
        fix = "use torch.from_numpy(array)"
    return ExpressionError(
        "an expression cannot hold this",
        got=f"{type(value).__name__} {value!r}"[:200],
        expected="expressions, tensors, numbers, strings, dtypes, slices, and lists of these",
        fix=fix,
    )
