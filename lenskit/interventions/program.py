"""A program: a plan compiled for one model and one batch. `compiler.py` makes it, `execution.py` carries it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lenskit.hooks import HookPoint
from lenskit.interventions.expressions import Act
from lenskit.interventions.geometry import Geometry
from lenskit.interventions.ops import Numbered, Op
from lenskit.interventions.selection import Selection, select
from lenskit.interventions.selectors import Selectors

Place = tuple[int, HookPoint]  # a hook point, and where it comes in the forward pass


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """An activation that an op's expression reads.

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
    keys: of a `Save`, by point (or one, of an expression): its path in `saved`.
    listed: of a `Save`: whether it keeps a list, one tensor a step.
    """

    numbered: Numbered
    places: Sequence[Place]
    rows: Sequence[int]
    steps: Sequence[int]
    sources: Sequence[Source]
    keys: Sequence[tuple[str, ...]] = ()
    listed: bool = False

    @property
    def op(self) -> Op:
        return self.numbered.op


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
