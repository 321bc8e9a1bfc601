"""Shapes and dtypes of results without the results: on torch's meta device, where tensors have no values.

What cannot be known without values is a `NotImplementedError` here, as it is where torch says so itself.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lenskit.hooks import hooks_off
from lenskit.interventions.expressions.closed_list import Function

META = torch.device("meta")


def applied(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A function of the closed list on meta tensors and real constants."""
    name = function.name
    if function.pointwise:
        return _pointwise(function, args, kwargs)
    if name in _SHAPES and args and isinstance(args[0], Tensor):
        return _of_a_small_one(function, args, kwargs)
    if name in _PRODUCTS and all(isinstance(arg, Tensor) for arg in args):
        _tried(function, [_small(arg, arg.ndim) for arg in args], {})  # torch's answer does not look at dtypes
    if name == "getitem" and isinstance(args[0], Tensor):
        return _on_meta(args[0])[_index(args[0], args[1])]
    if name == "setitem":
        with suppress(NotImplementedError):  # how much a mask selects does not matter for the whole
            _written(*args)
        return torch.empty(args[0].shape, dtype=args[0].dtype, device=META)
    if name == "one_hot" and (*args[1:], *kwargs.values(), -1)[0] == -1:
        raise NotImplementedError("the number of classes is that of the values: give num_classes")
    if name == "repeat_interleave" and "output_size" not in kwargs:
        repeats = (*args[1:], kwargs.get("repeats"))[0]
        if isinstance(repeats, Tensor):
            raise NotImplementedError("the length is the sum of the repeats: give output_size")
    return function.run(*_on_meta(args), **{key: _on_meta(value) for key, value in kwargs.items()})


def through(module: nn.Module, x: Tensor) -> Any:
    """The module on a meta tensor, its weights wherever they are."""
    with hooks_off(), _RealAsMeta():  # type: ignore[no-untyped-call]
        return module(x)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to(META)
    if type(value) is tuple or type(value) is list:
        return type(value)([_on_meta(entry) for entry in value])
    return value


class _RealAsMeta(TorchDispatchMode):
    """Weights take part as if they were on the meta device: torch would refuse to mix the two."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_on_meta(tuple(args)), **{key: _on_meta(value) for key, value in (kwargs or {}).items()})


# -- functions whose shape is plain: torch's own answer for these takes up to 300 us, because it is written in Python

# Those that keep the shape of their first argument, or have that of another function, which answers sooner.
_SHAPES: dict[str, Callable[..., Tensor] | None] = {
    "argsort": None, "cumprod": None, "cumsum": None, "flip": None, "log_softmax": None, "mean": Tensor.sum,
    "roll": None, "softmax": None, "sort": None, "tril": None, "triu": None,
}  # fmt: skip
_PRODUCTS = frozenset(["bmm", "dot", "linear", "matmul"])
_SMALL: dict[tuple[torch.dtype, int], Tensor] = {}


def _pointwise(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The shape follows from the shapes; the dtype is that of the function of one entry."""
    shape: Sequence[int] | None = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            shape = value.shape if shape is None or shape == value.shape else _broadcast(shape, value.shape)
    # A tensor without axes counts as a number where dtypes are promoted, so the others get one.
    small = [_small(value, min(value.ndim, 1)) if isinstance(value, Tensor) else value for value in args]
    named = {
        k: _small(value, min(value.ndim, 1)) if isinstance(value, Tensor) else value for k, value in kwargs.items()
    }
    return torch.empty(shape or (), dtype=_tried(function, small, named).dtype, device=META)


def _of_a_small_one(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    x, *rest = args
    tried = _tried(function, [_small(x, x.ndim), *rest], kwargs)
    shape_like = _SHAPES[function.name]
    shape = x.shape if shape_like is None else shape_like(_on_meta(x), *rest, **kwargs).shape
    if isinstance(tried, tuple):
        return tuple(torch.empty(shape, dtype=each.dtype, device=META) for each in tried)
    return torch.empty(shape, dtype=tried.dtype, device=META)


def _small(x: Tensor, n_axes: int) -> Tensor:
    """A tensor of one entry on the CPU."""
    key = (x.dtype, n_axes)
    if key not in _SMALL:
        _SMALL[key] = torch.ones((1,) * n_axes, dtype=x.dtype)
    return _SMALL[key]


def _tried(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return function.run(*args, **kwargs)
    except NotImplementedError as error:  # of this dtype: values would not help
        raise TypeError(str(error)) from error


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    length = max(len(a), len(b))
    sizes = zip((1,) * (length - len(a)) + tuple(a), (1,) * (length - len(b)) + tuple(b), strict=True)
    shape = tuple(m if n == 1 else n for m, n in sizes)
    for given in (a, b):
        if any(m not in (1, n) for m, n in zip(reversed(given), reversed(shape), strict=False)):
            raise RuntimeError(f"{list(a)} and {list(b)} do not broadcast together")
    return shape


# -- indexing


def _written(base: Tensor, index: Any, value: Any) -> None:
    """See that the value fits where it is written."""
    part = _on_meta(base)[_index(base, index)]
    if isinstance(value, Tensor) and _broadcast(part.shape, value.shape) != tuple(part.shape):
        raise RuntimeError(f"{list(value.shape)} does not fit into {list(part.shape)}")


def _index(base: Tensor, index: Any) -> Any:
    """The index with its constants on the meta device, and its constant masks as the positions that they select."""
    parts = index if type(index) is tuple else (index,)
    if all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
        return index
    parts = tuple(
        torch.tensor(part, dtype=None if part else torch.long) if type(part) is list else part for part in parts
    )
    axis, made = 0, []
    for place, part in enumerate(parts):
        if part is Ellipsis:
            axis = base.ndim - sum(map(_axes, parts[place + 1 :]))
            made.append(part)
        else:
            made.extend(_positions(base, axis, part) if isinstance(part, Tensor) else [part])
            axis += _axes(part)
    return tuple(made)


def _axes(part: Any) -> int:
    """How many axes of what is indexed a part of the index is for."""
    if part is None or isinstance(part, bool) or part is Ellipsis:
        return 0
    return part.ndim if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _positions(base: Tensor, axis: int, part: Tensor) -> Sequence[Any]:
    is_mask = part.dtype in (torch.bool, torch.uint8)
    if part.is_meta:
        if is_mask:
            raise NotImplementedError("how much a mask selects depends on the values: use torch.where")
        return [part if part.ndim else 0]  # without axes it is an int, whatever its value
    sizes = base.shape[axis : axis + _axes(part)]
    if is_mask:
        if sizes != part.shape:
            raise IndexError(f"a mask {list(part.shape)} on axes {list(sizes)}")
        return [bool(part)] if part.ndim == 0 else [_on_meta(entry) for entry in part.nonzero(as_tuple=True)]
    if not part.ndim and not part.dtype.is_floating_point:
        return [int(part)]
    if sizes and part.numel() and not part.dtype.is_floating_point:
        low, high = part.aminmax()
        if low < -sizes[0] or high >= sizes[0]:
            raise IndexError(f"positions from {int(low)} to {int(high)} on an axis of {sizes[0]}")
    return [_on_meta(part)]
