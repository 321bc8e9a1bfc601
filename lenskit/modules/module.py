"""`Module`, the base class of everything below a model, and `Identity`, the part that is absent.

Under 16 tokens and 64 dimensions a forward pass is Python overhead, and most of that is torch.nn's:
looking up a submodule costs 0.5 us (`nn.Module.__getattr__`), calling one 0.5 us more. `Module` keeps
torch.nn's behaviour and pays about a tenth of that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

# Whether anybody ever registered one of torch's own hooks on a `Module`: one look, where torch takes eight a call.
_torch_hooks_are_used = False


def _notice() -> None:
    global _torch_hooks_are_used
    _torch_hooks_are_used = True


def _noticed(name: str) -> Any:
    def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _notice()
        return getattr(nn.Module, name)(self, *args, **kwargs)

    return register


class Module(nn.Module):
    """An `nn.Module` whose submodules are plain attributes and whose call is a plain call.

    Submodules stay registered in `_modules` and are found in `__dict__` as well. Forward and backward hooks
    registered through torch still run.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        self.__dict__[name] = module

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self.__dict__.pop(name, None)
        super().__delattr__(name)

    def __call__(self, *args: Any) -> Any:
        if (
            _torch_hooks_are_used
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
        ):
            return super().__call__(*args)
        return self.forward(*args)

    register_forward_hook = _noticed("register_forward_hook")
    register_forward_pre_hook = _noticed("register_forward_pre_hook")
    register_backward_hook = _noticed("register_backward_hook")
    register_full_backward_hook = _noticed("register_full_backward_hook")
    register_full_backward_pre_hook = _noticed("register_full_backward_pre_hook")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks:
            _notice()

    forward: Callable[..., Any]


class Identity(Module):
    """The part that an architecture does not have: returns its first argument, whatever else it is given."""

    def __call__(self, x: Tensor, *others: object) -> Tensor:
        return x

    forward = __call__


def empty(*shape: int) -> nn.Parameter:
    """An uninitialised parameter: weights are loaded or drawn later, by the model."""
    return nn.Parameter(torch.empty(*shape))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over a half-precision activation are computed."""
    return torch.promote_types(dtype, torch.float32)
