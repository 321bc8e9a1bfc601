"""`HookPoint`: a named activation with named axes; nothing else.

A model calls each of its points on the activation that the point names. Unused, that costs one attribute
check. Used, the functions attached to the point read or replace the activation. Attaching and detaching is the
business of scopes (`interventions/scope.py`), never of the model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident, local
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lenskit.errors import AxisError, HookError, ReplacementError
from lenskit.recording import Recorded

_LOCK = Lock()

HookFunction = Callable[[Tensor, "HookPoint"], Tensor | None]
Kind = Literal["read", "edit", "grad", "plan"]


class Pass(Protocol):
    """What a function on a point may ask of the pass that it runs in; `HookPoint`'s properties say what each is."""

    step: int
    prompts: Sequence[int] | None
    positions: Tensor
    mask: Tensor | None


class _Thread(local):
    """What this thread is doing: the pass under way, and how many `hooks_off` blocks it is in."""

    run: Pass | None = None
    blocks_off: int = 0
    depth: int = 0  # passes that run within each other: a function may run the model


THREAD = _Thread()


@contextmanager
def hooks_off() -> Iterator[None]:
    """A `with` block in which nothing that is attached to any point runs in this thread."""
    THREAD.blocks_off += 1
    try:
        yield
    finally:
        THREAD.blocks_off -= 1


@dataclass(frozen=True, slots=True, eq=False)
class Attachment:
    """A function on a point: it belongs to one scope, and runs in the thread that opened the scope.

    kind: "read" sees the activation itself and replaces nothing; "edit" gets a copy of its own, and what it
    returns (or, returning None, has made of the copy) goes on through the model; "grad" does the same to
    the gradient; "plan" gets the activation itself and returns what goes on, and sees to it by itself that the
    one is left alone and the other fits.
    """

    function: HookFunction
    kind: Kind
    thread: int


class Watch:
    """Whether anything is attached to any of some points: one look, for a module that computes more if so.

    used: whether so, in any thread; `attach` and `detach` keep it.
    """

    def __init__(self, *points: "HookPoint") -> None:
        self.points, self.used = points, False
        for point in points:
            point.watch = self

    def look(self) -> None:
        """Again, after something left."""
        self.used = any(point.attachments is not None for point in self.points)

    def __getstate__(self) -> dict[str, Any]:
        """A copy's points have no attachments."""
        return {"points": self.points, "used": False}


class HookPoint(Recorded):
    """An identity that names an activation.

    Args:
        axes: names of the axes as the user sees them, e.g. "batch pos head d_head".
        swapped: two of them that lie the other way round in the tensor that flows through the model; functions
            on the point still see `axes`.
        on_demand: computed, and cached, only when asked for by name.
        statistic: float32 at least, whatever the dtype of the stream.
        whole_numbers: int64, and without a gradient.
        sizes: lengths of the axes that do not depend on the input, e.g. `head=8, d_head=16`.

    place: where it comes in the forward pass, counted from 0; written by the model, as its name is.
    """

    attachments: tuple[Attachment, ...] | None
    place: int = 0

    def __init__(
        self,
        axes: str,
        *,
        swapped: tuple[str, str] | None = None,
        on_demand: bool = False,
        statistic: bool = False,
        whole_numbers: bool = False,
        **sizes: int,
    ) -> None:
        super().__init__()
        self.axes = tuple(axes.split())
        self.sizes = {"1": 1, **sizes}
        self.on_demand, self.statistic, self.whole_numbers = on_demand, statistic, whole_numbers
        self.watch: Watch | None = None  # where its module looks at several points at once
        self.attachments = None  # None rather than an empty tuple: the cheapest check there is
        self.swap = tuple(self.axes.index(axis) for axis in swapped) if swapped else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.attachments is None:
            return x
        return _run(self, x)

    forward = __call__

    @property
    def used(self) -> bool:
        """Whether anything attached would run in this thread; while a pass is compiled, in any thread."""
        return bool(self.here())

    @property
    def only_read(self) -> bool:
        """Whether nothing that runs in this thread edits the activation or its gradient."""
        return all(attachment.kind == "read" for attachment in self.here())

    def here(self) -> tuple[Attachment, ...]:
        """What is attached and runs in this thread."""
        attachments = self.attachments or ()
        if torch.compiler.is_compiling():
            return attachments
        if THREAD.blocks_off:
            return ()
        thread = get_ident()
        return tuple([attachment for attachment in attachments if attachment.thread == thread])

    @property
    def layer(self) -> int | None:
        """The block that the point belongs to; None for those of the embedding and the output."""
        head, _, rest = self.name.partition(".")
        return int(rest.partition(".")[0]) if head == "blocks" else None

    @property
    def step(self) -> int:
        """Which pass of a generation is running: 0 is the prompt's, and any other that generates nothing.

        Raises:
            HookError: nothing is running here, or what is has been compiled. So do the three below.
        """
        return self._pass("step").step

    @property
    def prompts(self) -> list[int]:
        """The rows' numbers in the batch that the user gave."""
        return list(self._pass("prompts").prompts or ())

    @property
    def positions(self) -> Tensor:
        """[rows pos]: where in its sequence each token of the pass is, from 0; one row if all rows are alike."""
        return self._pass("positions").positions

    @property
    def mask(self) -> Tensor | None:
        """[batch pos]: which tokens of the pass are a row's own, and not padding; None where nothing is padded."""
        return self._pass("mask").mask

    def _pass(self, attribute: str) -> Pass:
        if THREAD.run is None:
            raise HookError(
                f"hook.{attribute} of {self.name!r} cannot be told",
                got="no pass that is running in this thread, or one that torch.compile made a graph of",
                expected="to be asked by a function on the point, while a model that is not compiled runs",
                fix="read it inside the function and keep what is needed; do not compile the model for this",
            )
        return THREAD.run

    def axis(self, name: str) -> int:
        """Position of an axis.

        Raises:
            AxisError: the point has no such axis.
        """
        if name not in self.axes:
            raise AxisError(
                f"hook point {self.name!r} has no axis {name!r}",
                got=repr(name),
                expected=f"one of {', '.join(self.axes)}",
                fix="select along an axis of this point, or use a point that has that axis",
            )
        return self.axes.index(name)

    def shape(self, **input_sizes: int) -> tuple[int, ...]:
        """The activation's shape, from the model's sizes and those of the input (batch, pos, query_pos, ...)."""
        sizes = {**self.sizes, **input_sizes}
        return tuple(sizes[axis] for axis in self.axes)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no attachments: they leave with a scope, which knows nothing of the copy."""
        return {**self.__dict__, "attachments": None}

    def _refuse_torch_hook(self, *_: object, **__: object) -> Any:
        raise HookError(
            f"torch's own hooks do not run on hook point {self.name!r}",
            got="register_forward_hook or its kind",
            expected="a hook that leaves with its scope",
            fix="use model.hooks([(name, function)]), run_with_hooks or run_with_cache",
        )

    register_forward_hook = _refuse_torch_hook
    register_forward_pre_hook = _refuse_torch_hook
    register_backward_hook = _refuse_torch_hook
    register_full_backward_hook = _refuse_torch_hook
    register_full_backward_pre_hook = _refuse_torch_hook

    def extra_repr(self) -> str:
        return " ".join(self.axes) + (", on demand" if self.on_demand else "")


_n_attached = 0


def nothing_attached() -> bool:
    """Whether no point of any model has a function on it."""
    return _n_attached == 0


def attach(attachments: Iterable[tuple[HookPoint, Attachment]]) -> None:
    """Put functions on points, each after those that are there."""
    global _n_attached
    with _LOCK:
        for point, attachment in attachments:
            there = point.attachments
            _n_attached += 1
            # Straight into __dict__: torch's __setattr__ looks for parameters first, which takes 2 us.
            point.__dict__["attachments"] = (attachment,) if there is None else (*there, attachment)
            if point.watch is not None:
                point.watch.used = True


def detach(attachments: Iterable[tuple[HookPoint, Attachment]]) -> None:
    """Take these off, whatever else has come or gone; what is not there does not matter."""
    global _n_attached
    with _LOCK:
        for point, attachment in attachments:
            there = point.attachments or ()
            left = tuple(other for other in there if other is not attachment)
            _n_attached -= len(there) - len(left)
            point.__dict__["attachments"] = left or None
            if point.watch is not None:
                point.watch.look()


def _run(point: HookPoint, x: Tensor) -> Tensor:
    """The activation after every function that is attached in this thread.

    Functions are arbitrary Python: a compiled model calls them, it does not trace them.
    """
    if torch.compiler.is_compiling():
        global _uncompiled
        if _uncompiled is None:
            _uncompiled = torch.compiler.disable(_apply_attached)
        return _uncompiled(point, x)
    return _apply_attached(point, x)


_uncompiled: Callable[[HookPoint, Tensor], Tensor] | None = None


def _apply_attached(point: HookPoint, x: Tensor) -> Tensor:
    value = x.transpose(*point.swap) if point.swap else x
    for attachment in point.here():
        try:
            value = _APPLY[attachment.kind](attachment.function, value, point)
        except BaseException as error:  # an interrupt as well
            error.add_note(f"in a hook on {point.name!r}, whose activation is {_describe(value)}")
            raise
    return value.transpose(*point.swap) if point.swap else value


def _read(function: HookFunction, x: Tensor, hook: HookPoint) -> Tensor:
    function(x, hook)
    return x


def _edit(function: HookFunction, x: Tensor, hook: HookPoint) -> Tensor:
    # A copy, because the same tensor may be held by a cache, by another point's user (the stream is both
    # hook_resid_mid and hook_mlp_in), or by autograd.
    own = x.clone()
    result = function(own, hook)
    return own if result is None else check_replacement(result, x, hook)


def _grad(function: HookFunction, x: Tensor, hook: HookPoint) -> Tensor:
    if not x.requires_grad:
        raise HookError(
            f"gradient hook on {hook.name!r} would never run",
            got="an activation that does not require grad",
            expected="gradients enabled, and weights or an earlier edit that require grad",
            fix="run outside torch.no_grad(), with model.requires_grad_(True)",
        )
    x = x.view_as(x)  # a node of its own, so that only what passes through this point is counted
    run = THREAD.run

    def edit(grad: Tensor) -> Tensor:  # backward: after the pass, and perhaps in a thread of autograd's
        outer, THREAD.run = THREAD.run, run
        try:
            return _edit(function, grad, hook)
        finally:
            THREAD.run = outer

    x.register_hook(edit)
    return x


def _plan(function: HookFunction, x: Tensor, hook: HookPoint) -> Tensor:
    result = function(x, hook)
    assert result is not None
    return result


_APPLY: dict[str, Callable[[HookFunction, Tensor, HookPoint], Tensor]] = {
    "read": _read,
    "edit": _edit,
    "grad": _grad,
    "plan": _plan,
}


def check_replacement(new: Any, old: Tensor, hook: HookPoint) -> Tensor:
    """`new`, if it can stand where `old` stood.

    Raises:
        ReplacementError: it is no tensor, or of another shape, dtype or device.
    """
    got = _describe(new)
    if got == _describe(old):
        return new
    raise ReplacementError(
        f"a hook on {hook.name!r} returned something that cannot replace the activation",
        got=got,
        expected=f"{_describe(old)} [{' '.join(hook.axes)}], or None to leave it",
        fix="return a tensor of the activation's own shape, dtype and device",
    )


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
