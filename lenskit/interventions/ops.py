"""Ops: what an intervention does, as data.

`Save` keeps an activation, `Set`, `Add` and `Scale` replace what they select of it, `Stop` ends the forward pass.
A function of the activation is an op as well, written as a pair (site, function); it is Python, so a plan with one
cannot become a file.
"""

from abc import ABC
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lenskit.errors import HookError, PlanError
from lenskit.hooks import HookFunction
from lenskit.interventions.expressions import Expression
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

    def with_expression(self, expression: Expression) -> "Op":
        """The same op with another expression in the place of its own."""
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
        if not (name is None or (isinstance(name, str) and name)):
            raise _refused(
                where,
                f"name of type {type(name).__name__}",
                "a name that is a string, and not empty",
                "name what you save",
            )
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

    def with_expression(self, expression: Expression) -> Op:
        return Save(expression, steps=self.selectors.steps, name=self.name)

    def __repr__(self) -> str:
        return f"Save({_at(self.at)}{self.selectors}{'' if self.name is None else f', name={self.name!r}'})"


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
        where = f"{kind}({_at(at)}, {_value(value)})"
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor | Expression):
            raise _refused(
                where,
                f"a value of type {type(value).__name__}",
                "a number, a tensor, or an expression of lk.Act",
                f"write {kind}(name, 0.0), or a pair (name, function) for what only Python can say",
            )
        if isinstance(value, int) and abs(value) >= 2**1023:
            raise _refused(
                where, "a whole number that no float reaches", "a number that a float can be", "write math.inf"
            )
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta):
            raise _refused(
                where,
                f"a {value.layout} tensor on {value.device}",
                "a dense tensor that holds values",
                "pass value.to_dense(), or a tensor that is not on the meta device",
            )
        if isinstance(at, Expression):
            raise _refused(where, "an expression", "a hook point's name", "only Save takes an expression there")
        selectors = Selectors.of(prompts=prompts, tokens=tokens, heads=heads, dims=dims, steps=steps, where=where)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            value = value.as_subclass(Tensor) if type(value) is not Tensor else value
        self._set(at=at, value=value, selectors=selectors)

    @property
    def expressions(self) -> Sequence[Expression]:
        return (self.value,) if isinstance(self.value, Expression) else ()

    def with_expression(self, expression: Expression) -> Op:
        made = type(self)(self.at, expression)
        made._set(selectors=self.selectors)
        return made

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_at(self.at)}, {_value(self.value)}{self.selectors})"


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


def _refused(where: str, got: str, expected: str, fix: str) -> PlanError:
    return PlanError(f"{where} is no op", got=got, expected=expected, fix=fix)


def _own(at: Any) -> Any:
    """A site whose lists nobody else can change later."""
    if isinstance(at, str | Expression) or callable(at) or not isinstance(at, Iterable):
        return at
    return [_own(entry) for entry in at]


def _at(at: Site | Expression) -> str:
    return str(at) if isinstance(at, Expression) else describe(at)


def _value(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return str(value) if isinstance(value, Expression) else repr(value)
