"""`Module`, the base class of everything below a model, `Identity`, the part that is absent, and `Symbol`, what a
module may be given instead of a tensor.

Under 16 tokens and 64 dimensions a forward pass is Python overhead, and most of that is torch.nn's:
looking up a submodule costs 0.5 us (`nn.Module.__getattr__`), calling one 0.5 us more. `Module` keeps
torch.nn's behaviour and pays about a tenth of that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Lock
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from lenskit.errors import HookConflictError, LenskitError
from lenskit.hooks import HookPoint
from lenskit.recording import Recorded

# The classes whose call is their `forward` and nothing else. There are none any more once a call may be more than that:
# anybody registered one of torch's own hooks on a `Module`, gave one a `forward` of its own, or made a `Symbol`.
_plain: list[type["Module"]] = []
_LOCK = Lock()
_calls_need_a_closer_look = False
_torch_hooks_are_used = False


def _look_closer() -> None:
    global _calls_need_a_closer_look
    with _LOCK:
        _calls_need_a_closer_look = True
        while _plain:
            del _plain.pop().__call__  # which leaves `Module.__call__`


def _notice() -> None:
    global _torch_hooks_are_used
    _torch_hooks_are_used = True
    _look_closer()


def _noticed(name: str) -> Any:
    def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _notice()
        return getattr(nn.Module, name)(self, *args, **kwargs)

    return register


class Symbol(ABC):
    """Stands for a tensor that there is not yet: a module called on one says what that means, and computes nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> Self:
        if not _calls_need_a_closer_look:
            _look_closer()
        return super().__new__(cls)

    @abstractmethod
    def through(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """What `module(*args)` gives, where `args[0]` is this symbol."""


class Module(Recorded):
    """An `nn.Module` whose submodules are plain attributes and whose call is a plain call: `__call__` is `forward`.

    Submodules stay registered in `_modules` and are found in `__dict__` as well. Forward and backward hooks
    registered through torch still run: those of one module from the next call on, those of all from the next pass on.

    kept_exact: its parameters that are loaded in float32 at least, whatever dtype the others get.
    """

    kept_exact: ClassVar[tuple[str, ...]] = ()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        self.__dict__[name] = module

    def in_order(self, *names: str) -> None:
        """Put submodules last, in the order in which the forward pass uses them: hook points' places follow it."""
        for name in names:
            self._modules[name] = self._modules.pop(name)

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self.__dict__.pop(name, None)
        super().__delattr__(name)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = (Module.__call__, *(base.__call__ for base in _plain))
        if cls.__call__ in plain and not _calls_need_a_closer_look:  # and not one of the class's own
            cls.__call__ = cls.forward  # type: ignore[method-assign]
            _plain.append(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # accelerate puts its own on a module
            _look_closer()
        try:
            super().__setattr__(name, value)
        except LenskitError as error:  # of a trace: the user's line wrote it
            raise error.with_traceback(None) from None

    def __call__(self, *args: Any) -> Any:
        try:
            return _call(self, args)
        except LenskitError as error:
            if args and isinstance(args[0], Symbol):  # the user's line wrote it: the way from there does not matter
                raise error.with_traceback(None) from None
            raise

    register_forward_hook = _noticed("register_forward_hook")
    register_forward_pre_hook = _noticed("register_forward_pre_hook")
    register_backward_hook = _noticed("register_backward_hook")
    register_full_backward_hook = _noticed("register_full_backward_hook")
    register_full_backward_pre_hook = _noticed("register_full_backward_pre_hook")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks:
            _notice()
        if "forward" in state:
            _look_closer()

    forward: Callable[..., Any]


def _call(module: Module, args: tuple[Any, ...]) -> Any:
    """A module's call where it may be on a symbol, or run torch's hooks."""
    if args and type(args[0]) is not Tensor and isinstance(args[0], Symbol):  # the type first: it is half the cost
        return args[0].through(module, args)
    if (
        _torch_hooks_are_used
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    ):
        return nn.Module.__call__(module, *args)
    return module.forward(*args)


def look_at_classes() -> None:
    """As a pass begins: notices what nobody tells, torch's hooks on all modules and another `forward` of a class."""
    if _calls_need_a_closer_look:  # which a compiled model guards on, as on torch's hooks
        return
    hooks = _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    compiling = torch.compiler.is_compiling()
    if hooks or (not compiling and [cls for cls in _plain if cls.__call__ is not cls.forward]):
        _look_closer()


def calls_are_plain() -> bool:
    """Whether nothing can happen in any call of a `Module` but its class's `forward`, run on tensors."""
    return not _calls_need_a_closer_look


def torch_hooks_are_used() -> bool:
    """Whether anybody may have registered one of torch's own hooks on a module."""
    return bool(_torch_hooks_are_used or _global_forward_hooks or _global_forward_pre_hooks)


class Identity(Module):
    """The part that an architecture does not have: returns its first argument, whatever else it is given."""

    def __call__(self, x: Tensor, *others: object) -> Tensor:
        return x

    forward = __call__


def run_for_readers(module: nn.Module, x: Tensor, *, instead: str) -> None:
    """Run a module whose result is not needed, for those who read points within it.

    Args:
        instead: what is computed in another way at this moment, for the message.

    Raises:
        HookConflictError: somebody edits a point within it, which would be without effect.
    """
    points = [point for point in module.modules() if isinstance(point, HookPoint) and point.used]
    for point in points:
        if not point.only_read:
            raise HookConflictError(
                f"a hook on {point.name!r} would be without effect",
                got=f"hooks on {point.name!r} and on {instead} at once",
                expected="one or the other: that is computed of the weights alone",
                fix=f"edit {point.name!r} in a pass of its own",
            )
    if points:
        module(x)


def empty(*shape: int) -> nn.Parameter:
    """An uninitialised parameter: weights are loaded or drawn later, by the model."""
    return nn.Parameter(torch.empty(*shape))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over a half-precision activation are computed."""
    return torch.promote_types(dtype, torch.float32)
