"""Ops: what an intervention does, as data.

`Save` keeps an activation, `Set`, `Add` and `Scale` replace what they select of it, `Stop` ends the forward pass,
`Read` names an activation for expressions that come later; ops on gradients are in `gradient_ops.py`. A function of the
activation is an op as well, written as a pair (site, function); it is Python, so a plan with one cannot become a file.
"""

from abc import ABC
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lenskit.errors import HookError, PlanError
from lenskit.hooks import HookFunction
from lenskit.interventions.expressions import Act, Expression
from lenskit.interventions.selectors import Selector, Selectors
from lenskit.interventions.sites import Site, describe

Value = float | Tensor | Expression
Hook = tuple[Site, HookFunction]


class Op(ABC):
    """Something done at hook points, at some steps.

    at: a hook point's name, a glob, a list, a predicate on names; `Save` also takes an expression.
    """

    __slots__ = ("at", "selectors")

    at: Any
    selectors: Selectors

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable; make a new one")

    def __setstate__(self, state: tuple[None, dict[str, object]]) -> None:
        self._set(**state[1])

    def _set(self, **fields: object) -> None:
        if "at" in fields:
            fields["at"] = _own(fields["at"])
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def expressions(self) -> Sequence[Expression]:
        """The expressions that the op computes."""
        return ()

    def with_expressions(self, expressions: Sequence[Expression]) -> "Op":
        """The same op with others in the place of its own expressions, as many."""
        raise AssertionError(f"{self!r} has no expression")


@final
class Save(Op):
    """Keep an activation, or what an expression computes of activations: a snapshot, as it is at that moment.

    Args:
        at: hook points, or an expression.
        prompts, tokens, heads, dims: which part of it; an int drops its axis, a slice or list keeps it.
        steps: of a generation: an int saves one tensor, a slice, a list or nothing a list of tensors, one a step
            that ran. Outside of a generation there is only step 0.
        name: the key in `saved`; the hook point's name if left out. An expression needs one. Where `at` names several
            points and there is a name, `saved[name]` is a mapping by point.

    Raises:
        SelectorError: a selector that is no int, slice or list of ints.
        PlanError: an expression without a name, or with selectors of its own.
    """

    __slots__ = ("name",)

    name: str | None

    def __init__(
        self,
        at: Site | Expression,
        *,
        prompts: Selector = None,
        tokens: Selector = None,
        heads: Selector = None,
        dims: Selector = None,
        steps: Selector = None,
        name: str | None = None,
    ) -> None:
        where = f"Save({_at(at)})"
        selectors = Selectors.of(prompts=prompts, tokens=tokens, heads=heads, dims=dims, steps=steps, where=where)
        if name is not None:
            check_name(where, name)
        if isinstance(at, Expression):
            if name is None:
                raise _refused(
                    where,
                    "an expression and no name",
                    "a name: its key in `saved`",
                    'write Save(..., name="difference")',
                )
            if selectors != Selectors(steps=selectors.steps):
                raise _refused(
                    where,
                    f"an expression and selectors{selectors}",
                    "only steps: the expression's own activations have the others",
                    "select within the expression: Act(..., tokens=-1), or index it",
                )
        self._set(at=at, selectors=selectors, name=name)

    @property
    def expressions(self) -> Sequence[Expression]:
        return (self.at,) if isinstance(self.at, Expression) else ()

    def with_expressions(self, expressions: Sequence[Expression]) -> Op:
        return Save(*expressions, steps=self.selectors.steps, name=self.name)

    def __repr__(self) -> str:
        return f"Save({_at(self.at)}{self.selectors}{'' if self.name is None else f', name={self.name!r}'})"


@final
class Read(Op):
    """Name an activation as it is at this place in the list: `lk.Ref(name)` stands for it in expressions that come
    later, whatever is done to the hook point in between.

    Args:
        act: the activation.
        name: for `lk.Ref`.
        steps: at which steps it is read; every step if left out. An Act with a step of its own is read at that one.

    Raises:
        PlanError: no Act, or no name.
    """

    __slots__ = ("name",)

    at: Act
    name: str

    def __init__(self, act: Act, *, name: str, steps: Selector = None) -> None:
        where = f"Read({act})"
        if not isinstance(act, Act):
            raise _refused(where, f"a {type(act).__name__}", "an activation", 'write lk.Read(lk.Act(point), name="x")')
        check_name(where, name)
        self._set(at=act, name=name, selectors=Selectors.of(steps=steps, where=where))

    @property
    def expressions(self) -> Sequence[Expression]:
        return (self.at,)

    def with_expressions(self, expressions: Sequence[Expression]) -> Op:
        [act] = expressions
        assert isinstance(act, Act)
        return Read(act, name=self.name, steps=self.selectors.steps)

    def __repr__(self) -> str:
        return f"Read({self.at}, name={self.name!r}{self.selectors})"


class Edit(Op):
    """An op that computes a new activation from a value."""

    __slots__ = ("value",)

    value: Value

    def __init__(
        self,
        at: Site,
        value: Value,
        *,
        prompts: Selector = None,
        tokens: Selector = None,
        heads: Selector = None,
        dims: Selector = None,
        steps: Selector = None,
    ) -> None:
        kind = type(self).__name__
        where = f"{kind}({_at(at)}, {value_text(value)})"
        value = checked_value(where, value, f"{kind}(name, 0.0)")
        if isinstance(at, Expression):
            raise _refused(where, "an expression", "a hook point's name", "only Save takes an expression there")
        selectors = Selectors.of(prompts=prompts, tokens=tokens, heads=heads, dims=dims, steps=steps, where=where)
        self._set(at=at, value=value, selectors=selectors)

    @property
    def expressions(self) -> Sequence[Expression]:
        return (self.value,) if isinstance(self.value, Expression) else ()

    def with_expressions(self, expressions: Sequence[Expression]) -> Op:
        made = type(self)(self.at, *expressions)
        made._set(selectors=self.selectors)
        return made

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_at(self.at)}, {value_text(self.value)}{self.selectors})"


@final
class Set(Edit):
    """Put a value in the place of an activation, or of the part that is selected.

    Args:
        at: hook points.
        value: a number, a tensor that broadcasts to the selection, or an expression (`lk.Act(...)` and what is
            computed of it).
        prompts, tokens, heads, dims: which part.
        steps: at which steps of a generation; every step if left out.

    Raises:
        SelectorError: a selector that is no int, slice or list of ints.
        PlanError: the value is none of these.
    """

    __slots__ = ()


@final
class Add(Edit):
    """Add a value to an activation, or to the part that is selected; arguments as `Set`'s."""

    __slots__ = ()


@final
class Scale(Edit):
    """Multiply an activation, or the part that is selected, by a value; arguments as `Set`'s."""

    __slots__ = ()


@final
class Stop(Op):
    """Compute nothing after this point: a forward pass returns no logits, a generation ends with the step.

    Args:
        at: one hook point. Ops on it that come earlier in the list still run.
        steps: at which steps; every step if left out, so the first one ends it.

    Raises:
        SelectorError: steps that are no int, slice or list of ints.
    """

    __slots__ = ()

    def __init__(self, at: Site, *, steps: Selector = None) -> None:
        self._set(at=at, selectors=Selectors.of(steps=steps, where=f"Stop({_at(at)})"))

    def __repr__(self) -> str:
        return f"Stop({_at(self.at)}{self.selectors})"


@final
class Function(Op):
    """A Python function of an activation: what a pair (site, function) becomes. It gets a copy and the hook point, and
    what it returns, or has made of the copy if it returns None, goes on.
    """

    __slots__ = ("function",)

    function: HookFunction

    def __init__(self, at: Site, function: HookFunction) -> None:
        self._set(at=at, function=function, selectors=Selectors())

    def __repr__(self) -> str:
        return f"({_at(self.at)}, {getattr(self.function, '__qualname__', repr(self.function))})"


@dataclass(frozen=True, slots=True)
class Numbered:
    """An op with its place in the list, for messages: `hooks[2] Set('blocks.0.hook_q', 0.0)`."""

    index: int
    op: Op

    def __str__(self) -> str:
        return f"hooks[{self.index}] {self.op!r}"


def as_ops(hooks: Sequence[Op | Hook]) -> tuple[Op, ...]:
    """A list of ops and of (site, function) pairs, as ops.

    Raises:
        HookError: an entry is neither.
    """
    if isinstance(hooks, Op) or not isinstance(hooks, Iterable):
        raise _not_a_hook("hooks", hooks)
    made: list[Op] = []
    for index, hook in enumerate(hooks):
        if isinstance(hook, Op):
            made.append(hook)
        elif isinstance(hook, tuple) and len(hook) == 2 and callable(hook[1]):
            made.append(Function(*hook))
        else:
            raise _not_a_hook(f"hooks[{index}]", hook)
    return tuple(made)


def _not_a_hook(where: str, hook: object) -> HookError:
    return HookError(
        f"{where} is not a hook" if "[" in where else f"{where} is not a list",
        got=repr(hook),
        expected="a list of ops (lk.Save, lk.Set, lk.Add, lk.Scale, lk.Stop) and of pairs (name, glob or predicate; "
        "function of (activation, hook))",
        fix='write hooks=[lk.Save("blocks.0.attn.hook_v"), ("blocks.0.attn.hook_v", lambda act, hook: act * 0)]',
    )


def check_name(where: str, name: object) -> None:
    """See that a name is one.

    Raises:
        PlanError: it is no text, or empty.
    """
    if not (isinstance(name, str) and name):
        got = "an empty name" if name == "" else f"name of type {type(name).__name__}"
        raise _refused(where, got, "a name that is a string, and not empty", "name it, and refer to it by that name")


def checked_value(where: str, value: object, example: str) -> Value:
    """What an op may put into an activation.

    Raises:
        PlanError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor | Expression):
        raise _refused(
            where,
            f"a value of type {type(value).__name__}",
            "a number, a tensor, or an expression of lk.Act",
            f"write {example}, or a pair (name, function) for what only Python can say",
        )
    if isinstance(value, int) and abs(value) >= 2**1023:
        raise _refused(where, "a whole number that no float reaches", "a number that a float can be", "write math.inf")
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta):
        raise _refused(
            where,
            f"a {value.layout} tensor on {value.device}",
            "a dense tensor that holds values",
            "pass value.to_dense(), or a tensor that is not on the meta device",
        )
    if isinstance(value, Tensor) and type(value) is not Tensor and not isinstance(value, nn.Parameter):
        return value.as_subclass(Tensor)
    return value


def _refused(where: str, got: str, expected: str, fix: str) -> PlanError:
    return PlanError(f"{where} is no op", got=got, expected=expected, fix=fix)


def _own(at: Any) -> Any:
    """A site whose lists nobody else can change later."""
    if isinstance(at, str | Expression) or callable(at) or not isinstance(at, Iterable):
        return at
    return [_own(entry) for entry in at]


def _at(at: Site | Expression) -> str:
    return str(at) if isinstance(at, Expression) else describe(at)


def value_text(value: object) -> str:
    """A value as it is shown in messages."""
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return str(value) if isinstance(value, Expression) else repr(value)
