"""Cells: where a proxy's value comes from, and what it means to write into it.

Proxies behave like tensors: a part of an activation is a view of it, writing into a view changes the whole, and what
was computed of an activation before it was written to stays as it was. Expressions are immutable, so a cell says which
expression stands for its value *now*, and what a new value does.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from lenskit.hooks import HookPoint
from lenskit.interventions.expressions import Act, Call, Expression, Grad
from lenskit.interventions.gradient_ops import SetGrad
from lenskit.interventions.ops import Add, Edit, Scale, Set
from lenskit.tracing.indexing import as_index, as_selectors, token_index
from lenskit.tracing.ledger import Ledger, misused
from lenskit.tracing.scope import Prompts, Steps


class Cell(ABC):
    """A place that has a value."""

    ledger: Ledger

    @property
    @abstractmethod
    def node(self) -> Expression:
        """The expression of its present value."""

    @abstractmethod
    def write(self, value: Any, kind: type[Edit] = Set) -> None:
        """Put a value in its place, or (`Add`, `Scale`) combine it with what is there."""

    def part(self, index: Any) -> "Cell":
        """What an index of ints and slices makes of it: a view."""
        return View(self, index)

    def tokens(self, index: Any) -> "Cell":
        """The tokens that an index counts, over each row's own."""
        node = self.node
        return View(self, token_index(index, self.ledger.shape(node), self.ledger.prompts_of(node)))

    def is_part(self, part: object, index: Any) -> bool:
        """Whether a cell is what `part(index)` gives: writing it back there changes nothing."""
        return isinstance(part, Cell) and self.part(index) == part

    def gradient(self, of: str) -> "Cell":
        """Its gradient.

        Raises:
            TraceError: it is no activation.
        """
        raise misused(
            f"{self.node} has no gradient of its own",
            "a value that was computed of activations",
            "an activation: the output of a hook point or module, or a part of one",
            "take the gradient of the activations that it was computed of",
        )


@final
class Computed(Cell):
    """What was computed of others; writing to it changes nothing in the model."""

    def __init__(self, ledger: Ledger, node: Expression) -> None:
        self.ledger, self._node = ledger, node

    @property
    def node(self) -> Expression:
        return self._node

    def write(self, value: Any, kind: type[Edit] = Set) -> None:
        name = {Add: "add", Scale: "mul"}.get(kind)
        made = Call(name, (self._node, value)) if name else Call("setitem", (self._node, ..., value))
        self.ledger.learn(made)
        self._node = made


@final
@dataclass(eq=True)
class View(Cell):
    """A part of a cell, by an index."""

    parent: Cell
    index: Any
    _made: tuple[Expression, Call] | None = field(default=None, compare=False)

    __hash__ = None  # type: ignore[assignment]

    @property
    def ledger(self) -> Ledger:  # type: ignore[override]
        return self.parent.ledger

    @property
    def node(self) -> Expression:
        whole = self.parent.node
        if self._made is None or self._made[0] is not whole:
            self._made = (whole, self.ledger.learn(Call("getitem", (whole, self.index))))
        return self._made[1]

    def write(self, value: Any, kind: type[Edit] = Set) -> None:
        name = {Add: "add", Scale: "mul"}.get(kind)
        new = self.ledger.learn(Call(name, (self.node, value))) if name else value
        self.parent.write(self.ledger.learn(Call("setitem", (self.parent.node, self.index, new))))

    def gradient(self, of: str) -> Cell:
        return self.parent.gradient(of).part(self.index)


@final
class Source:
    """An activation of some prompts at some steps, with the state that its hook point is in.

    state: how many of the trace's ops its point's last edit needs: reads of one state are of one value.
    """

    def __init__(self, ledger: Ledger, point: HookPoint, prompts: Prompts, steps: Steps, state: int) -> None:
        self.ledger, self.point, self.prompts, self.steps, self.state = ledger, point, prompts, steps, state
        self.replaced = False  # by an assignment: what is written into it now would reach nobody
        self._acts: dict[Any, Act] = {}

    def act(self, selectors: Mapping[str, Any]) -> Act:
        """It, or a part of it, as it is in the present state."""
        key = (self.state, repr(selectors))
        if key not in self._acts:
            step = self.steps.selector if isinstance(self.steps.selector, int) else None
            act = Act(self.point.name, prompts=self.prompts.selector, steps=step, **selectors)
            self.ledger.learn_act(act, self.point, self.prompts, self.steps, self.state)
            self._acts[key] = act
        return self._acts[key]


@final
@dataclass(eq=True)
class Activation(Cell):
    """An activation, or the part that selectors choose; writing to it is an op."""

    source: Source
    selectors: Mapping[str, Any]

    __hash__ = None  # type: ignore[assignment]

    @property
    def ledger(self) -> Ledger:  # type: ignore[override]
        return self.source.ledger

    @property
    def node(self) -> Expression:
        return self.source.act(self.selectors)

    def write(self, value: Any, kind: type[Edit] = Set) -> None:
        source = self.source
        if source.replaced:
            raise misused(
                "this activation was replaced",
                f"a write into {source.point.name!r} as it was before it was set",
                "the activation that goes on through the model",
                "read .output again, and write into that",
            )
        where = {"prompts": source.prompts.selector, "steps": source.steps.selector, **self.selectors}
        self.ledger.check_steps(value, source.steps)
        self.ledger.record(kind(source.point.name, value, **where))
        source.state = self.ledger.state(source.point.name)

    def part(self, index: Any) -> Cell:
        if not self.selectors:
            selectors = as_selectors(index, self.source.point.axes, even=self.source.prompts.even)
            if selectors is not None:
                return Activation(self.source, selectors)
        return View(self, index)

    def tokens(self, index: Any) -> Cell:
        axes = self.source.point.axes
        if "pos" in axes or "query_pos" in axes:
            if "tokens" not in self.selectors:
                return Activation(self.source, {**self.selectors, "tokens": index})
            raise misused(
                f"{self.node} has its tokens chosen already",
                "a second choice of tokens",
                "one",
                "index what is left as a tensor: x.t[2:5][:, 0]",
            )
        return super().tokens(index)

    def gradient(self, of: str) -> Cell:
        whole = Gradient(self.ledger, self.ledger.name_of(self.source.act({})), of)
        axes, tokens = self.source.point.axes, self.selectors.get("tokens")
        if not self.selectors:
            return whole
        if axes[1] == "pos" and tokens is not None and not self.source.prompts.even:
            rest = {key: value for key, value in self.selectors.items() if key != "tokens"}
            part = whole.tokens(tokens)
            return part.part((..., *as_index(rest, axes)[2:])) if rest else part
        return whole.part(as_index(self.selectors, axes))


@final
@dataclass(eq=True)
class Gradient(Cell):
    """The gradient of an activation, within a backward block; writing to it is an op."""

    ledger: Ledger
    name: str
    of: str
    _made: tuple[int, Grad] | None = field(default=None, compare=False)

    __hash__ = None  # type: ignore[assignment]

    @property
    def node(self) -> Expression:
        state = self.ledger.state(f"{self.of} {self.name}")
        if self._made is None or self._made[0] != state:
            grad = Grad(self.name, of=self.of)
            self.ledger.learn_grad(grad)
            self._made = (state, grad)
        return self._made[1]

    def write(self, value: Any, kind: type[Edit] = Set) -> None:
        node = self.node
        name = {Add: "add", Scale: "mul"}.get(kind)
        assert isinstance(node, Grad)
        self.ledger.record(SetGrad(node, self.ledger.learn(Call(name, (node, value))) if name else value))
