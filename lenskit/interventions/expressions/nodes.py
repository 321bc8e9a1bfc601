"""What expressions are made of: leaves (`activations.py`), `Call` (a function of others), `ModuleCall` (the model's own
module on another), `Applied` (a Python function), and how operators and torch's functions record them.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partialmethod
from typing import Any, Never, Self, final

from torch import Tensor, nn

from lenskit.errors import ExpressionError
from lenskit.interventions.expressions.arguments import Held
from lenskit.interventions.expressions.closed_list import (
    BY_CALLABLE,
    FUNCTIONS,
    METHODS,
    RANDOM,
    check,
    gives_pair,
    normalise,
    refusal,
    spelled,
)
from lenskit.interventions.expressions.text import Text, call_text, shortened, value_text
from lenskit.modules.module import Symbol

# -- operators, and what an expression cannot do


def _operator(name: str) -> Callable[..., "Call"]:
    def record(self: "Expression", other: Any) -> "Call":
        return Call(name, (self, other))

    return record


def _reflected(name: str) -> Callable[..., "Call"]:
    def record(self: "Expression", other: Any) -> "Call":
        return Call(name, (other, self))

    return record


def _unary(name: str) -> Callable[..., "Call"]:
    def record(self: "Expression") -> "Call":
        return Call(name, (self,))

    return record


_READ = "keep the expression, or save it with lk.Save and read the result"
_WITHOUT_VALUE = {
    "__bool__": ("a decision", "use torch.where(condition, this, that), and & | ~ in the place of `and`, `or`, `not`"),
    "__float__": ("a number", _READ),
    "__int__": ("a number", _READ),
    "__index__": ("an index into a list, or a size", "use torch.index_select, torch.gather or torch.take_along_dim"),
    "__array__": ("a NumPy array", _READ),
    "__len__": ("a length", "use -1, flatten, unflatten or einsum, which need no sizes"),
    "__iter__": ("a loop over entries", "use indices: act[0], act[1]"),
    "__contains__": ("a search", "use (act == value).any()"),
}


class Expression(Symbol):
    """A value that will be computed from activations; immutable, and a thing of its own: `==` builds a comparison.

    Tensors' operators, indexing, methods (`act.softmax(-1)`) and functions (`torch.where(act > 0, act, 0)`) work on
    it, as far as they are in the closed list. Python cannot ask it for a value: there is none before the model runs.

    inputs: the expressions that it is computed from, in order.
    """

    __slots__ = ("__weakref__", "inputs")
    __array_ufunc__ = None  # NumPy's numbers leave operators to us

    inputs: tuple["Expression", ...]

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise ExpressionError(
            f"{name} of {self} cannot be set",
            got=f"an assignment to {name}",
            expected="nothing to change: an expression is immutable",
            fix="make a new one",
        )

    def __setstate__(self, state: tuple[None, dict[str, object]]) -> None:
        self._set(**state[1])

    def __deepcopy__(self, _: object) -> Self:
        return self

    __hash__ = object.__hash__

    @abstractmethod
    def text(self, known: Callable[[Any], Text | None]) -> Text:
        """Source-like text, given the text of the inputs."""

    def __str__(self) -> str:
        texts: dict[Expression, Text] = {}

        def known(value: Any) -> Text | None:
            return texts[value] if isinstance(value, Expression) else None

        for node in order(self):
            text = node.text(known)
            texts[node] = Text(shortened(text.source), text.binds)
        return texts[self].source

    __repr__ = __str__

    def through(self, module: nn.Module, args: tuple[Any, ...]) -> "ModuleCall":
        if len(args) != 1:
            raise _takes_more(module, f"{len(args)} arguments")
        return ModuleCall(module, self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> "Call":
        name = BY_CALLABLE.get(func)
        if name is None:
            raise refusal(spelled(func))
        return Call(name, *normalise(func, name, args, kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in METHODS:
            return lambda *args, **kwargs: self._method(name, args, kwargs)
        if name in ("T", "mT"):
            return Call(name, (self,))
        if name in ("values", "indices") and isinstance(self, Call) and self.pair:
            return self[0 if name == "values" else 1]
        if name.startswith("_"):  # protocols are looked up by asking
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        raise refusal(f".{name}")

    def _method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        return Call(name, *normalise(getattr(Tensor, name), name, (self, *args), kwargs))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *METHODS, "T", "mT"})

    def __getitem__(self, index: Any) -> "Call":
        return Call("getitem", (self, index))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise refusal("torch.Tensor.__setitem__")

    def _refuse(self, dunder: str, *_: object, **__: object) -> Never:
        wanted, instead = _WITHOUT_VALUE[dunder]
        raise ExpressionError(
            f"an expression is not {wanted}",
            got=f"{dunder} of {self}",
            expected="operators and functions that build expressions: there is no value before the model runs",
            fix=f"{instead}; or write a Python function: hooks=[(name, lambda act, hook: ...)]",
        )

    __bool__ = partialmethod(_refuse, "__bool__")
    __float__ = partialmethod(_refuse, "__float__")
    __int__ = partialmethod(_refuse, "__int__")
    __index__ = partialmethod(_refuse, "__index__")
    __array__ = partialmethod(_refuse, "__array__")
    __len__ = partialmethod(_refuse, "__len__")
    __contains__ = partialmethod(_refuse, "__contains__")

    def __iter__(self) -> Iterator["Call"]:
        self._refuse("__iter__")

    __add__, __radd__ = _operator("add"), _reflected("add")
    __sub__, __rsub__ = _operator("sub"), _reflected("sub")
    __mul__, __rmul__ = _operator("mul"), _reflected("mul")
    __truediv__, __rtruediv__ = _operator("div"), _reflected("div")
    __floordiv__, __rfloordiv__ = _operator("floor_divide"), _reflected("floor_divide")
    __mod__, __rmod__ = _operator("remainder"), _reflected("remainder")
    __pow__, __rpow__ = _operator("pow"), _reflected("pow")
    __matmul__, __rmatmul__ = _operator("matmul"), _reflected("matmul")
    __and__, __rand__ = _operator("bitwise_and"), _reflected("bitwise_and")
    __or__, __ror__ = _operator("bitwise_or"), _reflected("bitwise_or")
    __xor__, __rxor__ = _operator("bitwise_xor"), _reflected("bitwise_xor")
    __eq__, __ne__ = _operator("eq"), _operator("ne")  # type: ignore[assignment]
    __lt__, __gt__, __le__, __ge__ = _operator("lt"), _operator("gt"), _operator("le"), _operator("ge")
    __neg__, __invert__, __abs__ = _unary("neg"), _unary("bitwise_not"), _unary("abs")

    def __pos__(self) -> Self:
        return self


@final
class Call(Expression):
    """A function of the closed list (`interventions/torch_functions.py`), applied.

    pair: whether it gives values and indices, as `topk` does: take one of them, `[0]` or `.values`.

    Raises:
        ExpressionError: a function that is not in the list, or an argument that no expression can hold.
    """

    __slots__ = ("args", "function", "kwargs", "pair")

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pair: bool

    def __init__(self, function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        if function not in FUNCTIONS:
            raise refusal(str(function))
        held = Held(Expression)  # type: ignore[type-abstract]
        args = tuple([held.hold(arg) for arg in args])
        kwargs = {key: held.hold(value) for key, value in kwargs.items()} if kwargs else {}
        check(function, args, kwargs)
        if not (held.inputs or held.has_tensors or function in RANDOM):
            raise ExpressionError(
                f"{function} here is of no activation",
                got="neither an expression nor a tensor",
                expected="an Act, or what is computed of one, among the arguments",
                fix="compute it before, in Python",
            )
        for given in held.inputs:
            if isinstance(given, Call) and given.pair:
                _check_use_of_pair(given, function, args)
        self._set(
            inputs=tuple(held.inputs), function=function, args=args, kwargs=kwargs,
            pair=gives_pair(function, args, kwargs),
        )  # fmt: skip

    def __iter__(self) -> Iterator["Call"]:
        if not self.pair:
            self._refuse("__iter__")
        return iter((self[0], self[1]))

    def text(self, known: Callable[[Any], Text | None]) -> Text:
        return call_text(self.function, self.args, self.kwargs, known)


@final
class ModuleCall(Expression):
    """The model's own module, applied out of order, hooks off: what `model.ln_final(act)` gives.

    module: the module, or, in an expression from a file, its name, which `bind` looks up.

    Raises:
        ExpressionError: the module takes more than one tensor, or the argument is no expression of one.
    """

    __slots__ = ("argument", "module")

    module: nn.Module | str
    argument: Expression

    def __init__(self, module: nn.Module | str, argument: Expression) -> None:
        if not (isinstance(module, nn.Module) or (isinstance(module, str) and module)):
            raise ExpressionError(
                "this is no module",
                got=repr(module)[:200],
                expected="one of the model's modules, or its name",
                fix="write model.ln_final(act), or ModuleCall('ln_final', act)",
            )
        if not isinstance(argument, Expression):
            raise ExpressionError(
                f"{_name(module)} is not applied to an expression",
                got=type(argument).__name__,
                expected="an Act, or what is computed of one",
                fix="call the module on a tensor in Python",
            )
        if isinstance(argument, Call) and argument.pair:
            _check_use_of_pair(argument, _name(module), ())
        if isinstance(module, nn.Module):
            try:
                inspect.signature(module.forward).bind(argument)
            except TypeError as error:
                raise _takes_more(module, str(error)) from error
        self._set(inputs=(argument,), module=module, argument=argument)

    def text(self, known: Callable[[Any], Text | None]) -> Text:
        argument = known(self.argument)
        return Text(f"{_name(self.module)}({argument.source if argument else '?'})")


@final
class Applied(Expression):
    """A Python function of values, called once they are there: what `run.apply` of a trace records. It is no data.

    args: expressions, tensors, plain data. Its shape is not known before it has run.
    """

    __slots__ = ("args", "function")

    function: Callable[..., Any]
    args: tuple[Any, ...]

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        held = Held(Expression)  # type: ignore[type-abstract]
        args = tuple([held.hold(arg) for arg in args])
        for given in held.inputs:
            if isinstance(given, Call) and given.pair:
                _check_use_of_pair(given, "a Python function", ())
        self._set(inputs=tuple(held.inputs), function=function, args=args)

    def text(self, known: Callable[[Any], Text | None]) -> Text:
        inside = ", ".join(value_text(arg, known).source for arg in self.args)
        return Text(f"{getattr(self.function, '__qualname__', repr(self.function))}({inside})")


class Leaf(Expression):
    """An expression that is computed from no other."""

    __slots__ = ()


def _check_use_of_pair(pair: Call, function: str, args: tuple[Any, ...]) -> None:
    if function == "getitem" and args[0] is pair and type(args[1]) is int and -2 <= args[1] < 2:
        return
    raise ExpressionError(
        f"{function} of what is two tensors",
        got=f"{pair}, which gives (values, indices)",
        expected="one of the two",
        fix=f"write values, indices = act.{pair.function}(...), or .values, .indices, [0], [1]",
    )


def _name(module: nn.Module | str) -> str:
    return f"model.{module}" if isinstance(module, str) else type(module).__name__


def _takes_more(module: nn.Module, got: str) -> ExpressionError:
    return ExpressionError(
        f"{_name(module)} cannot be applied in an expression",
        got=got,
        expected="a module that takes one tensor and nothing else: a norm, an MLP, a linear map, embed, unembed",
        fix="read its hook points instead, or run the model again on what you changed",
    )


def order(*expressions: Expression) -> list[Expression]:
    """All that the expressions are computed from, and they themselves: arguments before users, each once."""
    done: dict[Expression, None] = {}
    waiting = list(reversed(expressions))
    while waiting:
        node = waiting[-1]
        missing = [] if node in done else [given for given in node.inputs if given not in done]
        if missing:
            waiting.extend(reversed(missing))
        else:
            done[node] = None
            waiting.pop()
    return list(done)
