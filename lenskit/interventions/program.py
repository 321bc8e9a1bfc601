"""A program: a plan compiled for one model and one batch. `compiler.py` makes it, `execution.py` carries it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lenskit.hooks import HookPoint
from lenskit.interventions.expressions import Act, Grad, Leaf
from lenskit.interventions.geometry import Geometry
from lenskit.interventions.ops import Numbered, Op
from lenskit.interventions.parts import of_logits
from lenskit.interventions.selection import Selection, select
from lenskit.interventions.selectors import Selectors

Place = tuple[int, HookPoint]  # a hook point, and where it comes in the forward pass


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """An activation that an op reads.

    step: at which it is read; None for the step at hand.
    """

    act: Act
    place: Place
    rows: Sequence[int]
    step: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """An op, and what its words stand for in this model and batch.

    rows: of the batch, in the order in which they are selected.
    steps: at which it runs, in order.
    sources: what it reads itself. refs: what it uses of what `Read`s before it have read.
    leaves: of its expressions, the activations: which source each one is.
    grads: of its expressions, the gradients: of which `Read`'s activation each one is.
    keys: of a `Save`, by point (or one, of an expression): its path in `saved`.
    listed: of a `Save`: whether it keeps a list, one tensor a step.
    """

    numbered: Numbered
    places: Sequence[Place]
    rows: Sequence[int]
    steps: Sequence[int]
    sources: Sequence[Source]
    refs: Sequence[Source] = ()
    leaves: Mapping[Leaf, Source] = field(default_factory=dict)
    grads: Mapping[Grad, Source] = field(default_factory=dict)
    keys: Sequence[tuple[str, ...]] = ()
    listed: bool = False

    @property
    def op(self) -> Op:
        return self.numbered.op

    @property
    def used(self) -> Sequence[Source]:
        """All activations that it uses."""
        return [*self.sources, *self.refs]

    @property
    def boundaries(self) -> set[int]:
        """The steps at which what is live of it changes."""
        read = [source.step for source in self.sources if source.step is not None]
        found = {step + more for step in read for more in (0, 1)}
        if isinstance(self.steps, range) and self.steps.step == 1:
            return found | {self.steps.start, self.steps.stop}
        return found | {step + more for step in self.steps for more in (0, 1)}


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """A `Backward`, and the ops that look at its gradients or change them."""

    loss: Resolved
    ops: Sequence[Resolved]
    sources: Sequence[Source]


@dataclass(frozen=True, eq=False)
class Program:
    """What an execution carries out.

    passes: each one's rows and tokens, and how many columns of padding it does without.
    """

    ops: Sequence[Resolved]
    geometry: Geometry
    passes: Sequence[tuple[Geometry, int]]
    n_steps: int
    points: Mapping[str, HookPoint]
    selections: dict[Any, Selection] = field(default_factory=dict)
    gradients: Sequence[Gradients] = ()

    @cached_property
    def logit_points(self) -> list[HookPoint]:
        """Those whose activations are as long as the logits."""
        return [point for point in self.points.values() if of_logits(point)]

    def selection(self, place: Place, selectors: Selectors, step: int, rows: Sequence[int]) -> Selection:
        """Of the whole batch, over all the rows that are selected."""
        return selected(self.selections, self.geometry, place[1], selectors, step, rows)


def step_class(point: HookPoint, step: int) -> int:
    """Steps of one class have the same shapes at a point."""
    return step if step == 0 or "key_pos" in point.axes else 1


def signature(point: HookPoint) -> tuple[Any, ...]:
    """Equal for points whose activations have the same shapes."""
    return (point.axes, tuple(point.sizes.values()))


def selected(
    cache: dict[Any, Selection],
    geometry: Geometry,
    point: HookPoint,
    selectors: Selectors,
    step: int,
    rows: Sequence[int],
) -> Selection:
    """A selection, compiled or remembered: layers that are alike share theirs."""
    parts = (selectors.prompts, selectors.tokens, selectors.heads, selectors.dims)
    hashable = tuple(repr(part) if isinstance(part, slice) else part for part in parts)  # slices have no hash
    key = (signature(point), hashable, step_class(point, step))
    if key not in cache:
        cache[key] = select(point, selectors, geometry, step, rows)
    return cache[key]
