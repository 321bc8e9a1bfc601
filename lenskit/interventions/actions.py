"""Actions: what an op does to an activation, as functions of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lenskit.errors import ReplacementError
from lenskit.hooks import HookPoint, check_replacement
from lenskit.interventions.ops import Add, Function, Scale, Set
from lenskit.interventions.selection import broadcasts

Action = Callable[[Tensor], Tensor]


class Stopped(Exception):
    """Nothing after this point is computed: no error, it ends a pass that a `Stop` ends."""


def snapshot(value: Tensor) -> Tensor:
    """A tensor of its own, which keeps no larger one alive, and which autograd takes whatever mode this is."""
    if not value.is_inference():
        return value.clone()
    with torch.inference_mode(False):
        return value.clone()


def _set(old: Tensor, value: Any) -> Any:
    return value


def _add(old: Tensor, value: Any) -> Tensor:
    return old + value


def _scale(old: Tensor, value: Any) -> Tensor:
    return old * value


# What becomes of the selected part of an activation, given the op's value.
CHANGES: dict[type, Callable[[Tensor, Any], Any]] = {Set: _set, Add: _add, Scale: _scale}


def chain(actions: list[Action]) -> Callable[[Tensor, HookPoint], Tensor]:
    """One after another, as a hook point calls them."""
    if len(actions) == 1:
        [only] = actions
        return lambda x, _: only(x)

    def run(x: Tensor, _: HookPoint) -> Tensor:
        for action in actions:
            x = action(x)
        return x

    return run


def calling(op: Function, point: HookPoint) -> Action:
    """A user's function: it gets a copy, and what it returns is checked."""

    def call(x: Tensor) -> Tensor:
        own = x.clone()
        result = op.function(own, point)
        return own if result is None else check_replacement(result, x, point)

    return call


def check_fit(value: Any, shape: Sequence[int], op: str) -> None:
    """See that what a Python function returned can go where an op puts it.

    Raises:
        ReplacementError: it cannot.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return
    if isinstance(value, Tensor) and broadcasts(value.shape, shape):
        return
    raise ReplacementError(
        f"{op}: what its Python function returned does not fit",
        got=f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}",
        expected=f"a number, or a tensor that broadcasts to {tuple(shape)}",
        fix="return a tensor of the activation's own shape",
    )


def stop(x: Tensor) -> Tensor:
    """The end of the pass."""
    raise Stopped
