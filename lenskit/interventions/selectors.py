"""Selectors: which prompts, tokens, heads, dimensions and steps an op or an `Act` is about.

They count what the user counts: `tokens` over a row's own tokens, so that padding never matters, `steps` from the
prefill (0). An int drops its axis, a slice or a list keeps it, as in NumPy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor

from lenskit.errors import PlanFormatError, SelectorError

# What a user may write, and what it becomes: an int, a slice of ints, or a tuple of ints; None is everything.
Selector = int | slice | Sequence[int] | Tensor | np.ndarray[Any, Any] | None
Canonical = int | slice | tuple[int, ...] | None

NAMES = ("prompts", "tokens", "heads", "dims", "steps")


@dataclass(frozen=True, slots=True)
class Selectors:
    """The five selectors in canonical form; `Selectors.of` makes them from what a user wrote."""

    prompts: Canonical = None
    tokens: Canonical = None
    heads: Canonical = None
    dims: Canonical = None
    steps: Canonical = None

    @classmethod
    def of(
        cls,
        *,
        prompts: Selector = None,
        tokens: Selector = None,
        heads: Selector = None,
        dims: Selector = None,
        steps: Selector = None,
        where: str,
    ) -> Self:
        """Check and normalise.

        Args:
            where: whose selectors these are, for the message.

        Raises:
            SelectorError: a selector is no int, slice or list of ints; or steps count from the end.
        """
        if prompts is tokens is heads is dims is steps is None:
            return cls()
        given = (prompts, tokens, heads, dims, steps)
        made = cls(*(_canonical(value, name, where) for name, value in zip(NAMES, given, strict=True)))
        if _counts_from_the_end(made.steps):
            raise SelectorError(
                f"{where}: steps cannot count from the end",
                got=f"steps={_text(made.steps)}",
                expected="0 for the prefill, k for the step that processes new token k",
                fix="a generation may end early, so its last step is not known: name steps from the start",
            )
        return made

    def __str__(self) -> str:
        given = ((name, getattr(self, name)) for name in NAMES)
        return "".join(f", {name}={_text(value)}" for name, value in given if value is not None)

    def to_json(self) -> dict[str, Any]:
        """Plain data: an int, a list of ints, or {"slice": [start, stop, step]}; what is None is left out."""
        given = ((name, getattr(self, name)) for name in NAMES)
        return {name: _to_json(value) for name, value in given if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            PlanFormatError: it is something else.
        """
        if not isinstance(data, Mapping) or not set(data) <= set(NAMES):
            raise PlanFormatError(
                f"{where}: these are no selectors",
                got=f"a {type(data).__name__}",
                expected=f"an object with some of {', '.join(NAMES)}",
                fix="write plans with Plan.save",
            )
        try:
            return cls.of(**{name: _from_json(value) for name, value in data.items()}, where=where)
        except SelectorError as error:
            raise PlanFormatError(error.what, got=error.got, expected=error.expected, fix=error.fix) from error


def indices(selector: Canonical, length: int) -> Sequence[int]:
    """What a canonical selector stands for among `length` things, counted from 0.

    Raises:
        IndexError: an int that is out of range; slices end where things end, as in Python.
    """
    if selector is None:
        return range(length)
    if isinstance(selector, slice):
        return range(length)[selector]
    wanted = (selector,) if isinstance(selector, int) else selector
    for index in wanted:
        if not -length <= index < length:
            raise IndexError(index)
    return [index % length for index in wanted]


def _canonical(value: Selector, name: str, where: str) -> Canonical:
    if value is None or type(value) is int:
        return value
    if isinstance(value, slice):
        if all(part is None or type(part) is int for part in (value.start, value.stop, value.step)) and (
            value.step is None or value.step > 0
        ):
            return value
    else:
        listed = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
        if type(listed) is int:
            return listed
        if isinstance(listed, Sequence) and listed and all(type(entry) is int for entry in listed):
            return tuple(listed)
    raise SelectorError(
        f"{where}: {name} selects nothing that there is",
        got=f"{name}={_briefly(value)}",
        expected="an int, a slice with a step above 0, or a list of ints that is not empty",
        fix=f"write {name}=3, {name}=slice(2, 5) or {name}=[0, 4]; leave {name} out for all",
    )


def _counts_from_the_end(steps: Canonical) -> bool:
    if isinstance(steps, slice):
        return any(part is not None and part < 0 for part in (steps.start, steps.stop))
    return steps is not None and min((steps,) if isinstance(steps, int) else steps) < 0


def _text(value: Canonical) -> str:
    if isinstance(value, slice):
        parts = (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
        return f"slice({', '.join(map(str, parts))})"
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _to_json(value: Canonical) -> Any:
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    return list(value) if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"slice"}:
        parts = value["slice"]
        if isinstance(parts, list) and len(parts) == 3:
            return slice(*parts)
    return value


def _briefly(value: Any) -> str:
    """What came; deeply nested lists of a file have no repr."""
    try:
        return repr(value)
    except RecursionError:
        return type(value).__name__
