"""Expressions as source-like text: `Act('blocks.3.hook_mlp_out', tokens=-1) * 0.5`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lenskit.interventions.expressions.closed_list import FUNCTIONS, SIGNS

LONGEST = 200  # characters, about
_ATOM = 10  # binds as tightly as a name does


class Text(NamedTuple):
    """A piece of source text.

    binds: how tightly its outermost operator does: what is looser than its surroundings needs parentheses.
    """

    source: str
    binds: int = _ATOM

    def within(self, binds: int) -> str:
        """The text beside an operator that binds so tightly."""
        return self.source if self.binds >= binds else f"({self.source})"


def shortened(source: str) -> str:
    """The text with its middle left out, where it is too long."""
    return source if len(source) <= LONGEST else f"{source[: LONGEST * 2 // 3]} … {source[-LONGEST // 3 :]}"


def value_text(value: Any, known: Callable[[Any], Text | None]) -> Text:
    """An argument.

    Args:
        known: the text of an expression; None for anything else.
    """
    text = known(value)
    if text is not None:
        return text
    if isinstance(value, Tensor):
        return Text(f"tensor{list(value.shape)}")
    if isinstance(value, tuple | list):
        inside = ", ".join(value_text(entry, known).source for entry in value[:LONGEST])
        if isinstance(value, list):
            return Text(shortened(f"[{inside}]"))
        return Text(shortened(f"({inside},)" if len(value) == 1 else f"({inside})"))
    if value is Ellipsis:
        return Text("...")
    negative = isinstance(value, int | float) and value < 0
    return Text(shortened(repr(value)), SIGNS["neg"][1] if negative else _ATOM)


def call_text(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: Callable[[Any], Text | None]) -> Text:
    """A function of the closed list, applied."""
    texts = [value_text(arg, known) for arg in args]
    style = FUNCTIONS[name].style
    if name == "getitem":
        return Text(f"{texts[0].within(_ATOM)}[{_index(args[1], known)}]")
    if name == "setitem":
        return Text(f"setitem({texts[0].source}, ({_index(args[1], known)}), {texts[2].source})")
    if style == "property":
        return Text(f"{texts[0].within(_ATOM)}.{name}")
    if style == "sign" and not kwargs:
        return _operation(name, texts)
    inside = [text.source for text in texts] + [f"{key}={value_text(v, known).source}" for key, v in kwargs.items()]
    if style == "method" and args and known(args[0]) is not None:
        return Text(f"{texts[0].within(_ATOM)}.{name}({', '.join(inside[1:])})")
    prefix = style if style in ("F", "lk") else "torch"
    return Text(f"{prefix}.{name}({', '.join(inside)})")


def _operation(name: str, operands: list[Text]) -> Text:
    sign, binds, *_ = SIGNS[name]
    if len(operands) == 1:
        return Text(f"{sign}{operands[0].within(binds)}", binds)
    # Of two signs in a row that bind alike, the left one goes first; comparisons do not chain, and ** goes from the
    # right.
    left, right = (binds + 1, binds) if name == "pow" else (binds + (binds == 1), binds + 1)
    return Text(f"{operands[0].within(left)} {sign} {operands[1].within(right)}", binds)


def _index(index: Any, known: Callable[[Any], Text | None]) -> str:
    if isinstance(index, slice):
        parts = ["" if part is None else str(part) for part in (index.start, index.stop, index.step)]
        return ":".join(parts if index.step is not None else parts[:2])
    if isinstance(index, tuple) and index:
        return ", ".join(_index(part, known) for part in index) + ("," if len(index) == 1 else "")
    return value_text(index, known).source


def shapes_text(values: Any) -> str:
    """What tensors there are among arguments: `float32 [2, 5, 128], int64 [5]`."""
    found: list[str] = []
    waiting = list(values)[::-1]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}")
        elif isinstance(value, list | tuple):
            waiting.extend(value[::-1])
        elif isinstance(value, int | float | str | torch.dtype):
            found.append(repr(value))
    return shortened(", ".join(found)) or "no tensors"
