"""Compiling: a plan becomes a program. Everything that can be wrong with an op is found here, before anything runs.

Names become hook points, selectors become index expressions, shapes and dtypes of values are checked (expressions on
the meta device), and prompts are put into passes. The model is not run for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lenskit.errors import (
    AxisError,
    DependencyError,
    ExpressionError,
    LenskitError,
    SelectorError,
    StepError,
    ValueFitError,
)
from lenskit.hooks import HookPoint
from lenskit.interventions import passes
from lenskit.interventions.consistency import check_keys, check_stops, needs
from lenskit.interventions.expressions import Act, Expression, Grad, Leaf, Ref, UnknownShape, leaves, shape_of
from lenskit.interventions.geometry import Geometry
from lenskit.interventions.gradients import check_gradients, collected, fits
from lenskit.interventions.ops import Edit, Numbered, Op, Read, Save, Set
from lenskit.interventions.program import Place, Program, Resolved, Source, selected, signature
from lenskit.interventions.selection import MissingIndexError, Selection, broadcasts
from lenskit.interventions.selectors import Selectors, indices
from lenskit.interventions.sites import resolve
from lenskit.modules.module import at_least_float32


@dataclass(slots=True)
class Compiler:
    """Compiles the ops of one plan.

    points: those that will run, in the order of the forward pass.
    dtype: in which the model computes.
    geometry: of the whole batch.
    n_steps: of the generation; None for a forward pass, where a `Save` keeps a tensor and not a list.
    """

    points: Mapping[str, HookPoint]
    dtype: torch.dtype
    geometry: Geometry
    n_steps: int | None
    selections: dict[Any, Selection] = field(default_factory=dict)
    reads: dict[str, Resolved] = field(default_factory=dict)

    def compile(self, ops: Sequence[Op]) -> Program:
        """The program.

        Raises:
            PlanError, HookError: what is wrong with which op.
        """
        self.reads = {}
        resolved = [self._resolved(Numbered(index, op)) for index, op in enumerate(ops)]
        check_keys(resolved)
        check_stops(resolved)
        chain = [need for op in resolved if op.places for need in needs(op)]
        rows = passes.order(len(self.geometry.rows), chain)
        groups = [self.geometry.subset(some) for some in rows]
        gradients = collected(resolved)
        if gradients:
            check_gradients(gradients, n_passes=len(groups), generating=self.n_steps is not None)
        return Program(resolved, self.geometry, groups, self.n_steps or 1, self.points, self.selections, gradients)

    def _resolved(self, numbered: Numbered) -> Resolved:
        try:
            found = self._resolve(numbered)
            self._check(found)
        except MissingIndexError as missing:
            raise _missing(numbered, missing) from None
        except LenskitError as error:
            if error.what.startswith("hooks["):
                raise
            what = f"{numbered}: {error.what}"
            raise type(error)(what, got=error.got, expected=error.expected, fix=error.fix) from error
        return found

    def _resolve(self, numbered: Numbered) -> Resolved:
        op, selectors = numbered.op, numbered.op.selectors
        places = [] if isinstance(op.at, Expression) else self._find(op.at)
        rows = self._rows(selectors)
        steps = self._steps(selectors)
        found = [leaf for expression in op.expressions for leaf in leaves(expression)]
        acts: dict[Leaf, Source] = {leaf: self._source(leaf) for leaf in found if isinstance(leaf, Act)}
        refs: dict[Leaf, Source] = {leaf: self._ref(leaf, steps) for leaf in found if isinstance(leaf, Ref)}
        grads = {leaf: self._read(leaf).sources[0] for leaf in found if isinstance(leaf, Grad)}
        resolved = Resolved(
            numbered, places, rows, steps, list(acts.values()), list(refs.values()), {**acts, **refs}, grads
        )
        if isinstance(op, Read):
            self._name(op.name, resolved)
        return self._kept(resolved, op) if isinstance(op, Save) else resolved

    def _kept(self, found: Resolved, op: Save) -> Resolved:
        """A `Save`, with the keys that it saves under."""
        places, rows, steps = found.places, found.rows, found.steps
        used = [*found.used, *found.grads.values()]
        listed = not isinstance(op.selectors.steps, int) and (
            self.n_steps is not None or op.selectors.steps is not None
        )
        fixed = [source.step for source in used if source.step is not None]
        if not places and len(fixed) == len(used) and op.selectors.steps is None:  # no step at hand: one value
            steps, listed = [max(fixed, default=0)], False
        names = [point.name for _, point in places]
        keys: list[tuple[str, ...]]
        if op.name is None:
            keys = [(name,) for name in names]
        elif len(names) > 1:
            keys = [(op.name, name) for name in names]
        else:
            keys = [(op.name,)]
        if not places:
            rows = sorted({row for source in used for row in source.rows})
        return replace(found, rows=rows, steps=steps, keys=keys, listed=listed)

    def _name(self, name: str, read: Resolved) -> None:
        if name in self.reads:
            raise ExpressionError(
                "its name is taken",
                got=f"{name!r}, which {self.reads[name].numbered} has already",
                expected="a name of its own for every Read",
                fix="name one of them differently",
            )
        self.reads[name] = read

    def _read(self, leaf: Ref | Grad) -> Resolved:
        if leaf.name not in self.reads:
            raise ExpressionError(
                f"{leaf} is of nothing that was read",
                got=f"the name {leaf.name!r}",
                expected=f"the name of an earlier Read: {', '.join(map(repr, self.reads)) or 'there is none'}",
                fix=f"put lk.Read(lk.Act(point), name={leaf.name!r}) before the op",
            )
        return self.reads[leaf.name]

    def _ref(self, leaf: Ref, steps: Sequence[int]) -> Source:
        read = self._read(leaf)
        [source] = read.sources
        if source.step is None and not set(steps) <= set(read.steps):
            raise StepError(
                f"{leaf} is not read at every step at which it is used",
                got=f"steps from {steps[0]} to {steps[-1]}, and a Read at {len(read.steps)} steps from {read.steps[0]}",
                expected="steps at which the Read runs, too",
                fix="give both the same steps, or read one step (steps=0 on the Act) that all use",
            )
        return source

    def _find(self, at: Any) -> list[Place]:
        if isinstance(at, str) and at in self.points:
            return [(self.points[at].place, self.points[at])]
        return [(point.place, point) for point in resolve(at, self.points)]

    def _source(self, act: Act) -> Source:
        found = self._find(act.at)
        if len(found) != 1:
            raise ExpressionError(
                f"{act} is not one activation",
                got=f"{len(found)} hook points, {found[0][1].name} among them",
                expected="the name of one",
                fix="write an Act for each",
            )
        step = act.selectors.steps
        if step is not None:
            self._steps(act.selectors)
        assert step is None or isinstance(step, int)
        return Source(act, found[0], self._rows(act.selectors), step)

    def _rows(self, selectors: Selectors) -> Sequence[int]:
        rows = len(self.geometry.rows)
        try:
            found = indices(selectors.prompts, rows)
        except IndexError as error:
            raise MissingIndexError("prompts", error.args[0], rows) from None
        if not found:
            raise MissingIndexError("prompts", 0, 0)
        return found

    def _steps(self, selectors: Selectors) -> Sequence[int]:
        n = self.n_steps or 1
        try:
            found = indices(selectors.steps, n)
        except IndexError as error:
            raise self._no_step(f"step {error.args[0]}") from None
        if not found:
            raise self._no_step("no step at all")
        return found if isinstance(found, range) else sorted(set(found))

    def _no_step(self, got: str) -> StepError:
        if self.n_steps is None:
            expected, fix = "steps=0, or nothing: a forward pass has no other step", "use generate for later steps"
        else:
            expected = f"steps from 0 to {self.n_steps - 1}: max_new_tokens={self.n_steps} makes so many"
            fix = "raise max_new_tokens, or choose earlier steps"
        return StepError("the generation does not have these steps", got=got, expected=expected, fix=fix)

    # -- shapes and dtypes

    def _check(self, op: Resolved) -> None:
        """Every selection exists, and every value fits into it, at every step at which that could differ."""
        selectors = op.op.selectors
        seen: set[Any] = set()
        for place in op.places:
            key = signature(place[1])
            if key in seen:
                continue
            seen.add(key)
            self._check_axes(place[1], selectors)
            for step in self._classes(op, place[1]):
                selection = selected(self.selections, self.geometry, place[1], selectors, step, op.rows)
                if isinstance(op.op, Edit):
                    self._check_value(op, op.op, place[1], selection, step)
        for source in op.sources:
            self._check_axes(source.place[1], source.act.selectors)
        if not op.places:
            late = max((source.step for source in op.used if source.step is not None), default=0)
            if late > op.steps[0] and any(source.step is None for source in op.used):
                raise DependencyError(
                    "at its first step it would need a later one",
                    got=f"an activation of step {late}, and that of the step at hand from step {op.steps[0]} on",
                    expected=f"steps from {late} on",
                    fix=f"write steps=slice({late}, None), or give every Act a step",
                )
            for step in self._classes(op, None):
                shapes = [self.shape(op, expression, step) for expression in op.op.expressions]
            fits(op, shapes)

    def _classes(self, op: Resolved, point: HookPoint | None) -> Sequence[int]:
        """The steps that stand for all of the op's."""
        sources = [source for source in op.used if source.step is None]
        points = [*([point] if point else []), *(source.place[1] for source in sources)]
        if any("key_pos" in p.axes for p in points):
            return op.steps
        later = next((step for step in op.steps if step), None)
        return [step for step in (0 if 0 in op.steps else None, later) if step is not None]

    def _check_axes(self, point: HookPoint, selectors: Selectors) -> None:
        if selectors.heads is not None and "head" not in point.axes:
            raise self._no_axis(point, "heads", "head")
        if selectors.tokens is not None and not {"pos", "query_pos"} & set(point.axes):
            raise self._no_axis(point, "tokens", "pos", "query_pos")

    def _no_axis(self, point: HookPoint, selector: str, *axes: str) -> AxisError:
        having = [(abs(p.place - point.place), p.name) for p in self.points.values() if set(axes) & set(p.axes)]
        nearest = min(having)[1] if having else "no point of this model"
        return AxisError(
            f"hook point {point.name!r} has no axis for {selector}=",
            got=f"{selector}= on a point with the axes {', '.join(point.axes)}",
            expected=f"a point with the axis {axes[0]!r}, such as {nearest!r}",
            fix=f"leave {selector} out, or use a point that has that axis",
        )

    def _check_value(self, resolved: Resolved, op: Edit, point: HookPoint, selection: Selection, step: int) -> None:
        value = op.value
        dtype = self.dtype_of(point)
        if not isinstance(value, Tensor | Expression):
            if isinstance(value, float) and not (dtype.is_floating_point or dtype.is_complex):
                raise _unfit(op, point, f"the number {value}", f"an integer: the activation is {dtype}")
            if isinstance(op, Set) and math.isfinite(value) and abs(value) > torch.finfo(dtype).max:
                raise _unfit(
                    op, point, f"the number {value}", f"one that {dtype} has: at most {torch.finfo(dtype).max}"
                )
            return
        if isinstance(value, Expression):
            shape = self.shape(resolved, value, step)
            if shape is None:  # a Python function's: it is checked when it is there
                return
            value = shape
        if not broadcasts(value.shape, selection.shape):
            raise _unfit(
                op,
                point,
                f"a value of shape {tuple(value.shape)}{self._lengths(resolved)}",
                f"one that broadcasts to {selection.shape}: what is selected of {point.name!r} "
                f"[{' '.join(point.axes)}] at step {step}",
            )
        self._check_lengths(resolved, op, point, selection, step, value.shape)
        if value.dtype != dtype and torch.result_type(torch.empty((1,), dtype=dtype, device="meta"), value) != dtype:
            raise _unfit(op, point, f"a value of {value.dtype}", f"{dtype}, in which the model computes there")

    def _check_lengths(
        self, resolved: Resolved, op: Edit, point: HookPoint, selection: Selection, step: int, shape: Sequence[int]
    ) -> None:
        """Row by row, prompts that get others' tokens have as many."""
        targets = selection.lengths
        for source in resolved.used:
            if list(source.rows) == list(resolved.rows):
                continue
            at = step if source.step is None else source.step
            lengths = selected(
                self.selections, self.geometry, source.place[1], source.act.selectors, at, source.rows
            ).lengths
            if lengths is None or targets is None or len(shape) < 2 or 1 in (max(lengths), max(targets)):
                continue
            if max(lengths) not in shape:
                continue
            n = max(len(lengths), len(targets))
            pairs = zip(lengths * (n // len(lengths)), targets * (n // len(targets)), strict=True)
            if any(one != other for one, other in pairs):
                raise _unfit(
                    op, point, f"other prompts' tokens{self._lengths(resolved)}", "as many tokens, prompt by prompt"
                )

    def _lengths(self, op: Resolved) -> str:
        """The prompts' lengths, where the value comes from other prompts: what is mostly wrong then."""
        sources = {row for source in op.used for row in source.rows}
        if not sources or sources == set(op.rows):
            return ""
        tokens = self.geometry.prompt
        lengths = [f"prompt {row} has {len(tokens.of(row))} tokens" for row in sorted(sources | set(op.rows))[:4]]
        return f" ({', '.join(lengths)})"

    def metas(self, op: Resolved, step: int) -> Callable[[Leaf], Tensor]:
        """Meta tensors of the activations, and gradients, that an op's expressions are of."""

        def leaf(node: Leaf) -> Tensor:
            source = op.grads[node] if isinstance(node, Grad) else op.leaves[node]
            at = step if source.step is None else source.step
            rows, point = source.rows, source.place[1]
            selection = selected(self.selections, self.geometry, point, source.act.selectors, at, rows)
            return torch.empty(selection.shape, dtype=self.dtype_of(point), device="meta")

        return leaf

    def shape(self, op: Resolved, expression: Expression, step: int) -> Tensor | None:
        """Of a value, as a meta tensor; None where a Python function has its say."""
        leaf = self.metas(op, step)
        try:
            return leaf(expression) if isinstance(expression, Leaf) else shape_of(expression, leaf)
        except UnknownShape:
            return None

    def dtype_of(self, point: HookPoint) -> torch.dtype:
        """In which an activation is computed."""
        if point.whole_numbers:
            return torch.int64
        return at_least_float32(self.dtype) if point.statistic else self.dtype


def _missing(numbered: Numbered, missing: MissingIndexError) -> LenskitError:
    kind, index, length, row = missing.selector, missing.index, missing.length, missing.row
    if length == 0:
        return SelectorError(
            f"{numbered}: {kind} selects nothing",
            got=f"a slice of {kind} that is empty at a step at which the op runs",
            expected=f"at least one of the {kind}",
            fix="steps=0 is the prompt; every later step processes one token of each row"
            if kind == "tokens"
            else "correct the slice",
        )
    things = {"prompts": "prompts", "tokens": "tokens", "heads": "heads", "dims": "dimensions"}[kind]
    where = "" if row is None else f"prompt {row} has "
    fix = f"choose {kind} that are there; negative ones count from the end"
    if kind == "tokens" and length == 1:
        fix = "say steps=0 for tokens of the prompt: every later step processes one token of each row"
    return SelectorError(
        f"{numbered}: there is no {kind}={index}",
        got=f"{kind}={index}; {where}{length} {things}{'' if row is None else ' in a step at which the op runs'}",
        expected=f"from {-length} to {length - 1}",
        fix=fix,
    )


def _unfit(op: Edit, point: HookPoint, got: str, expected: str) -> ValueFitError:
    return ValueFitError(
        f"the value does not fit {point.name!r}",
        got=got,
        expected=expected,
        fix="select another part (prompts, tokens, heads, dims), reshape the value, or convert it with .to(dtype)",
    )
