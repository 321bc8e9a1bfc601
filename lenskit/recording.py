"""Recording: `.output` and `.input` of a model's modules. Whoever records in this context is asked what they are; this
is only the place where that is known.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from torch import nn

from lenskit.errors import LenskitError, TraceError

P = ParamSpec("P")
R = TypeVar("R")
End = Literal["input", "output"]


class Recorder(Protocol):
    """What a trace does for a module."""

    def read(self, module: nn.Module, end: End) -> Any:
        """What stands for the module's input or output."""

    def write(self, module: nn.Module, end: End, value: Any) -> None:
        """Put a value in its place."""


RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def plainly(method: Callable[P, R]) -> Callable[P, R]:
    """The method, but our own errors show the user's line and one of ours, not the way between."""

    @wraps(method)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except LenskitError as error:
            raise error.with_traceback(None) from None

    return plain


class Recorded(nn.Module):
    """A module whose ends can be read and written within a trace.

    Submodules are plain attributes as well as registered.

    name: its path in the model, written by the model once it is built.
    """

    name: str = ""

    @property
    @plainly
    def output(self) -> Any:
        """What it gives, as a proxy: within `with model.trace(...)` only."""
        return recorder(self, "output").read(self, "output")

    @output.setter
    @plainly
    def output(self, value: Any) -> None:
        recorder(self, "output").write(self, "output", value)

    @property
    @plainly
    def input(self) -> Any:
        """What it is given, as a proxy: within `with model.trace(...)` only."""
        return recorder(self, "input").read(self, "input")

    @input.setter
    @plainly
    def input(self, value: Any) -> None:
        recorder(self, "input").write(self, "input", value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "output" and name != "input":
            super().__setattr__(name, value)
            if isinstance(value, nn.Module):
                self.__dict__[name] = value  # a plain attribute as well, which torch's lookup is not needed for
            return
        try:
            object.__setattr__(self, name, value)  # torch would make a parameter of a parameter
        except LenskitError as error:
            raise error.with_traceback(None) from None


def recorder(module: Recorded, end: End) -> Recorder:
    """Who records here.

    Raises:
        TraceError: nobody does.
    """
    found = RECORDER.get()
    if found is None:
        raise TraceError(
            f"{module.name or 'model'}.{end} is of no trace",
            got="no trace that is open in this thread",
            expected="a with block: inside of it activations are read, set and saved by name",
            fix='write with model.trace("text"): and read it in there; or use lk.Save, which needs no block',
        )
    return found
