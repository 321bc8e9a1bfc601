"""`Proxy`: what stands for a value in a trace. It looks like a tensor: operators, indexing, methods and torch functions
work on it and are written down; its shape and dtype are known at once; its value is there when the block has ended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never, Protocol, final

import torch
from torch import Tensor, nn

from lenskit.errors import ExpressionError, TraceError
from lenskit.interventions.expressions import Call, Expression
from lenskit.interventions.ops import Add, Edit, Scale, Set
from lenskit.models.base import Decoder
from lenskit.modules.module import Symbol
from lenskit.recording import plainly
from lenskit.tracing.cells import Cell, Computed
from lenskit.tracing.indexing import is_basic
from lenskit.tracing.ledger import Ledger


class Tracing(Protocol):
    """What a proxy asks of the trace that it is from; `Trace`'s methods say what each does."""

    model: Decoder
    ledger: Ledger

    def given(self, value: Any) -> Any: ...
    def held(self, key: str | None) -> Tensor | None: ...
    def gradient(self, cell: Cell) -> Cell: ...
    def value(self, key: str | None, proxy: "Proxy") -> Any: ...
    def describe(self, cell: Cell, key: str | None) -> str: ...


def _operator(name: str) -> Any:
    @plainly
    def record(self: "Proxy", other: Any) -> "Proxy":
        return self._made(getattr(self._node, name)(self._given(other)))

    return record


def _unary(name: str) -> Any:
    @plainly
    def record(self: "Proxy") -> "Proxy":
        return self._made(getattr(self._node, name)())

    return record


def _in_place(name: str, kind: type[Edit] = Set) -> Any:
    @plainly
    def change(self: "Proxy", other: Any) -> "Proxy":
        given = self._given(other)
        self.cell.write(given if kind is not Set else self.trace.ledger.learn(Call(name, (self._node, given))), kind)
        return self

    return change


def _refused(wanted: str) -> Any:
    @plainly
    def refuse(self: "Proxy", *_: object, **__: object) -> Never:
        raise TraceError(
            f"a proxy is not {wanted}",
            got=repr(self),
            expected="operators and functions that are written down: there is no value before the block has ended",
            fix="choose between values with torch.where; compute in Python with run.apply(function, proxy); or .save() "
            "it, and read .value after the block",
        )

    return refuse


@final
class Proxy(Symbol):
    """Stands for a value that the model computes when the trace's block has ended.

    In the block: torch's operators, functions and methods, `proxy[index]`, `proxy[index] = value`, `proxy += value`,
    `.t[i]` (or `.token[i]`: each row's own tokens), `.save()`, `.grad` (in a backward block). `.shape`, `.dtype`,
    `.device` and `len` are known at once. After the block: `.value`, of what was saved.

    trace, cell: where it is from, and where its value comes from.
    """

    __slots__ = ("_key", "cell", "trace")

    __array_ufunc__ = None  # NumPy's operators leave it to ours

    def __init__(self, trace: Tracing, cell: Cell, key: str | None = None) -> None:
        self.trace, self.cell, self._key = trace, cell, key

    # -- the value

    @plainly
    def save(self, name: str | None = None) -> "Proxy":
        """Keep the value, as it is here: later edits do not change it. Returns a proxy whose `.value` it will be.

        Args:
            name: the key in `run.saved`; the hook point's name, or a number, if left out.

        Raises:
            PlanError: the name is taken or no text.
        """
        self._key = self.trace.ledger.save(self.cell.node, name)
        return Proxy(self.trace, self.cell, self._key)

    @property
    @plainly
    def value(self) -> Any:
        """What was saved: a tensor, or a list of them where it was saved at several steps.

        Raises:
            NotSavedError: it was not saved, the block has not ended, or its step never ran.
        """
        return self.trace.value(self._key, self)

    @property
    @plainly
    def shape(self) -> torch.Size:
        """Its shape, before anything has run.

        Raises:
            TraceError: it is another one at other steps, or what a Python function returns.
        """
        saved = self.trace.held(self._key)
        return self.trace.ledger.shape(self._node) if saved is None else saved.shape

    @property
    @plainly
    def dtype(self) -> torch.dtype:
        """Its dtype, before anything has run."""
        saved = self.trace.held(self._key)
        return self.trace.ledger.dtype(self._node) if saved is None else saved.dtype

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.trace.model.device

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    def dim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    def numel(self) -> int:
        """The number of its entries."""
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        """Its shape, or the length of one axis."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return self.trace.describe(self.cell, self._key)

    # -- parts

    @property
    def t(self) -> "Tokens":
        """`.t[i]`: tokens, counted over each row's own, so that padding never matters; an int, a slice or a list."""
        return Tokens(self)

    token = t

    @plainly
    def __getitem__(self, index: Any) -> "Proxy":
        index = self._given(index)
        node = self._node
        if is_basic(index) and not (isinstance(node, Call) and node.pair):
            part = Proxy(self.trace, self.cell.part(index))
            _ = part._node  # an index that is not there raises on this line
            return part
        return self._made(node[index])

    @plainly
    def __setitem__(self, index: Any, value: Any) -> None:
        index = self._given(index)
        if is_basic(index):
            if not (isinstance(value, Proxy) and self.cell.is_part(value.cell, index)):  # x[i] += v has written it
                self.cell.part(index).write(self._given(value))
            return
        node = Call("setitem", (self._node, index, self._given(value)))
        self.cell.write(self.trace.ledger.learn(node))

    @plainly
    def __iter__(self) -> Iterator["Proxy"]:
        node = self._node
        if isinstance(node, Call) and node.pair:
            return iter([self._made(node[0]), self._made(node[1])])
        return iter([self[index] for index in range(len(self))])

    @property
    @plainly
    def grad(self) -> "Proxy":
        """The gradient, in a `with run.backward(loss):` block."""
        return Proxy(self.trace, self.trace.gradient(self.cell))

    @grad.setter
    @plainly
    def grad(self, value: Any) -> None:
        cell = self.trace.gradient(self.cell)
        if not (isinstance(value, Proxy) and value.cell == cell):  # x.grad += v has written it
            cell.write(self._given(value))

    # -- what computes

    @classmethod
    @plainly
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> "Proxy":
        found = next(_proxies((args, kwargs or {})))
        given, named = found._given(args), {key: found._given(value) for key, value in (kwargs or {}).items()}
        if func in (torch.rand_like, torch.randn_like) and "seed" not in named:
            return found._made(Call(func.__name__, given, {"seed": int(torch.randint(2**62, ()))}))
        with _in_words_of_traces():
            return found._made(Expression.__torch_function__(func, types, given, named))

    @plainly
    def through(self, module: nn.Module, args: tuple[Any, ...]) -> "Proxy":
        return self._made(self._node.through(module, self._given(args)))

    @plainly
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("cell", "trace"):  # protocols are looked up by asking
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        if name in ("item", "tolist", "numpy"):
            _refused("a number" if name == "item" else "an array")(self)
        if name in ("cpu", "cuda"):
            return lambda *_, **__: self  # values are where the model computes them; `.value.cpu()` moves them
        if name == "backward":
            raise TraceError(
                "a proxy has no backward()",
                got=repr(self),
                expected="a block about its gradients",
                fix="write with run.backward(loss): and read .grad of activations in there",
            )
        with _in_words_of_traces():
            found = getattr(self._node, name)
        if isinstance(found, Expression):
            return self._made(found)

        @plainly
        def method(*args: Any, **kwargs: Any) -> "Proxy":
            given = {key: self._given(value) for key, value in kwargs.items()}
            return self._made(getattr(self._node, name)(*self._given(args), **given))

        return method

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(Expression)})

    def _made(self, node: Expression) -> "Proxy":
        return Proxy(self.trace, Computed(self.trace.ledger, self.trace.ledger.learn(node)))

    def _given(self, value: Any) -> Any:
        """A value with expressions in the place of proxies."""
        return self.trace.given(value)

    @property
    def _node(self) -> Expression:
        return self.cell.node

    __add__, __radd__, __iadd__ = _operator("__add__"), _operator("__radd__"), _in_place("add", Add)
    __sub__, __rsub__, __isub__ = _operator("__sub__"), _operator("__rsub__"), _in_place("sub")
    __mul__, __rmul__, __imul__ = _operator("__mul__"), _operator("__rmul__"), _in_place("mul", Scale)
    __truediv__, __rtruediv__, __itruediv__ = _operator("__truediv__"), _operator("__rtruediv__"), _in_place("div")
    __floordiv__, __rfloordiv__ = _operator("__floordiv__"), _operator("__rfloordiv__")
    __ifloordiv__ = _in_place("floor_divide")
    __mod__, __rmod__, __imod__ = _operator("__mod__"), _operator("__rmod__"), _in_place("remainder")
    __pow__, __rpow__, __ipow__ = _operator("__pow__"), _operator("__rpow__"), _in_place("pow")
    __matmul__, __rmatmul__, __imatmul__ = _operator("__matmul__"), _operator("__rmatmul__"), _in_place("matmul")
    __and__, __rand__, __iand__ = _operator("__and__"), _operator("__rand__"), _in_place("bitwise_and")
    __or__, __ror__, __ior__ = _operator("__or__"), _operator("__ror__"), _in_place("bitwise_or")
    __xor__, __rxor__, __ixor__ = _operator("__xor__"), _operator("__rxor__"), _in_place("bitwise_xor")
    __eq__, __ne__ = _operator("__eq__"), _operator("__ne__")
    __lt__, __gt__, __le__, __ge__ = map(_operator, ("__lt__", "__gt__", "__le__", "__ge__"))
    __neg__, __invert__, __abs__, __pos__ = map(_unary, ("__neg__", "__invert__", "__abs__", "__pos__"))
    __hash__ = object.__hash__

    __bool__, __float__ = _refused("a decision"), _refused("a number")
    __int__, __index__ = _refused("a number"), _refused("a number")
    __array__, __contains__ = _refused("an array"), _refused("a search")
    __format__ = object.__format__


class Tokens:
    """`.t` of a proxy: `x.t[-1]`, `x.t[2:5] = 0`. Called, it is torch's `.t()`, the transpose."""

    __slots__ = ("_proxy",)

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    @plainly
    def __getitem__(self, index: Any) -> Proxy:
        part = Proxy(self._proxy.trace, self._proxy.cell.tokens(index))
        _ = part._node
        return part

    @plainly
    def __setitem__(self, index: Any, value: Any) -> None:
        cell = self._proxy.cell.tokens(index)
        if not (isinstance(value, Proxy) and value.cell == cell):  # x.t[i] += v has written it
            cell.write(self._proxy._given(value))

    @plainly
    def __call__(self, *index: object) -> Proxy:
        if index:
            raise TraceError(
                "tokens are chosen with brackets",
                got=f".t{index!r}".replace(",)", ")"),
                expected=".t[index]",
                fix="write x.t[0], x.t[-1] or x.t[2:5]",
            )
        return self._proxy.mT


@contextmanager
def _in_words_of_traces() -> Iterator[None]:
    """What an expression refuses is said of hooks; a trace has other ways to run Python."""
    try:
        yield
    except ExpressionError as error:
        if "hooks=" not in error.fix:
            raise
        fix = "compute it in Python, when the values are there: run.apply(function, proxy)"
        raise ExpressionError(error.what, got=error.got, expected=error.expected, fix=fix) from None


def _proxies(value: Any) -> Iterator[Proxy]:
    if isinstance(value, Proxy):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _proxies(entry)
    elif isinstance(value, dict):
        yield from _proxies(list(value.values()))
