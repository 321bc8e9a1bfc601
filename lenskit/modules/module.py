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


class Module(nn.Module):
    """An `nn.Module` whose submodules are plain attributes and whose call is a plain call.

    Submodules stay registered in `_modules` and are found in `__dict__` as well. Forward and backward hooks
    registered through torch still run.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self.__dict__.pop(name, None)
        super().__delattr__(name)

    def __call__(self, *args: Any) -> Any:
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
        ):
            return super().__call__(*args)
        return self.forward(*args)

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
