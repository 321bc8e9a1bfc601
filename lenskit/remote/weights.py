"""Weights that are on a server: they have shapes, and refuse to be looked at."""

from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from lenskit.errors import RemoteError


@final
class Absent(Tensor):
    """A weight of a model whose weights are elsewhere: a tensor on the meta device.

    It takes part in finding out shapes. What would need its values is refused, and so are its views.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with DisableTorchFunctionSubclass():
            tensors = list(_tensors([args, kwargs or {}]))
            if not all(tensor.is_meta for tensor in tensors):
                raise _refused(function)
            try:
                result = function(*args, **(kwargs or {}))
            except (NotImplementedError, RuntimeError, TypeError) as error:
                if "meta tensor" in str(error) or "meta device" in str(error):
                    raise _refused(function) from error
                raise
            return _absent(result) if all(isinstance(tensor, cls) for tensor in tensors) else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with DisableTorchFunctionSubclass():
                copy = torch.empty_like(self, requires_grad=False).as_subclass(Absent)
            memo[id(self)] = nn.Parameter(copy, requires_grad=False) if isinstance(self, nn.Parameter) else copy
        return memo[id(self)]


def take_away(model: nn.Module) -> None:
    """Put `Absent` weights in the place of a model's, which are on the meta device."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:  # tied ones stay so
                    made[parameter] = nn.Parameter(parameter.detach().as_subclass(Absent), requires_grad=False)
                module._parameters[name] = made[parameter]


def _absent(value: Any) -> Any:
    """Parts and products of weights are weights."""
    if isinstance(value, tuple):
        return tuple([_absent(entry) for entry in value])
    return value.as_subclass(Absent) if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _refused(function: Any) -> RemoteError:
    return RemoteError(
        "this model's weights are on a server",
        got=f"{getattr(function, '__name__', function)}, which needs their values",
        expected="their shapes only: no weight leaves the server",
        fix="apply modules where the model runs: hooks=[lk.Save(model.unembed(model.ln_final(lk.Act(point))), "
        'name="lens")], or model.unembed(...) of a proxy within model.trace',
    )
