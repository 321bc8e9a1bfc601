"""A pass: some of a program's rows, on their way through the model. Attaches, step by step, the actions of the ops that
are live in that step.

Whoever runs the model asks for each pass (`passes`) and wraps each of its steps in `PassRun.at(step)`. Nothing stays
attached between steps, so a generation may be left at any moment.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from lenskit.errors import LenskitError, StepError
from lenskit.hooks import THREAD, Attachment, HookFunction, HookPoint, attach, detach, nothing_attached
from lenskit.interventions.actions import CHANGES, Action, Stopped, calling, chain, check_fit, snapshot, stop
from lenskit.interventions.execution import Execution
from lenskit.interventions.expressions import Expression, Leaf, evaluate, is_python
from lenskit.interventions.geometry import Geometry
from lenskit.interventions.gradients import Tape
from lenskit.interventions.ops import Edit, Function, Read, Save, Set
from lenskit.interventions.parts import Part, merged, token_dims, wider
from lenskit.interventions.program import Place, Resolved, Source, step_class
from lenskit.interventions.selection import select
from lenskit.interventions.selectors import Selectors
from lenskit.modules.module import torch_hooks_are_used


class PassRun:
    """Some of the rows, on their way through the model.

    geometry: which rows, and their tokens. trimmed: columns of padding that they do without.
    active: for each row whether it still generates; None while all do.
    n_logits: how many of the last positions need logits in the present step; None for all.
    runs_python: whether a user's Python function will see an activation.
    """

    def __init__(self, execution: Execution, number: int, geometry: Geometry, trimmed: int) -> None:
        self.execution, self.number, self.geometry, self.trimmed = execution, number, geometry, trimmed
        self.program = execution.program
        self.active: list[bool] | None = None
        self.step = 0
        self.n_logits: int | None = 1
        self._local = {row: index for index, row in enumerate(geometry.rows)}
        self._at_hand: dict[Source, Tensor] = {}
        self._attached: list[tuple[HookPoint, Attachment]] = []
        self._rebuild = True
        self._thread = get_ident()  # that the attachments are for: another one may take the next step
        self._depth = 0  # of the pass under way, among those that functions start within each other
        self.runs_python = any(
            isinstance(op.op, Function) or any(map(is_python, op.op.expressions)) for op in self.program.ops
        )
        self._applied: dict[Expression, Any] = {}  # what Python functions in expressions returned in this step
        self._tape = Tape(self.program.gradients) if self.program.gradients else None
        self._boundaries = {0, 1}
        for op in self.program.ops:
            self._boundaries |= op.boundaries
        self._parts: dict[Any, Part] = {}

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """The length of one step: what is live in it is attached, whoever else is there."""
        attached = self.begin(step)
        try:
            attach(attached)
            yield
            self._compute_values()
        except Stopped:
            self._compute_values()
            raise
        except BaseException as error:
            if self.execution.generating or self.execution.multiple:
                error.add_note(self.where())
            raise
        finally:
            detach(attached)
            self._forget()

    def begin(self, step: int) -> list[tuple[HookPoint, Attachment]]:
        """What is live in a step, for who attaches it by himself; `end` is to be called once the step is over."""
        self.step = step
        self._depth = THREAD.depth + 1
        if self._rebuild or step in self._boundaries or self._thread != get_ident():
            self._build(step)
        return self._attached

    def end(self) -> None:
        """Compute what is saved of a whole step."""
        self._compute_values()
        self._forget()

    def _forget(self) -> None:
        self._at_hand.clear()
        self._applied.clear()

    @property
    def data_only(self) -> bool:
        """Whether no Python function will see an activation: this program's, or one that is attached by others now."""
        if self.runs_python or torch_hooks_are_used():
            return False
        return nothing_attached() or all(point.attachments is None for point in self.program.points.values())

    def where(self) -> str:
        """The present step and its prompts, for a note on an error."""
        rows = ", ".join(map(str, self.geometry.rows[:8])) + (", ..." if len(self.geometry.rows) > 8 else "")
        return f"at step {self.step} of at most {self.program.n_steps}, prompts {rows}"

    def finished(self, steps_run: Sequence[int]) -> None:
        """Tell how many steps each row took, once the pass is over."""
        for row, steps in zip(self.geometry.rows, steps_run, strict=True):
            self.execution.steps_run[row] = steps

    # -- what is live

    def _build(self, step: int) -> None:
        actions: dict[HookPoint, list[Action]] = {}
        edited: set[HookPoint] = set()  # the others are only read, which some points allow where they allow no edit
        columns: int | None = 1
        for op in self.program.ops:
            here = step in op.steps
            for source in op.sources:
                if (here if source.step is None else step == source.step) and self._some(source.rows):
                    part = self._part(source.place, source.act.selectors, source.rows, step)
                    there = actions.setdefault(source.place[1], [])
                    if self._tape is not None and isinstance(op.op, Read) and source in self._tape.sources:
                        there.append(self._tape.tracking(source, part))
                        edited.add(source.place[1])
                    there.append(self._reading(source, part))
                    columns = wider(columns, source.place[1], part)
            if here and op.places and self._some(op.rows):
                for index, place in enumerate(op.places):
                    actions.setdefault(place[1], []).append(self._action(op, index, place, step))
                    if isinstance(op.op, Edit | Function):
                        edited.add(place[1])
                    whole = isinstance(op.op, Function)
                    seen = None if whole else self._part(place, op.op.selectors, op.rows, step)
                    columns = wider(columns, place[1], seen)
            if here and self._at_once(op):
                last = max(op.used, key=lambda source: source.place[0])
                actions.setdefault(last.place[1], []).append(self._computing(op))
        self._thread = get_ident()
        self._attached = [
            (point, Attachment(self._own_pass(chain(some)), "plan" if point in edited else "read", self._thread))
            for point, some in actions.items()
        ]
        self._rebuild = any("key_pos" in point.axes for point in actions)
        of_others = not nothing_attached() and any(point.attachments for point in self.program.logit_points)
        self.n_logits = None if of_others else columns

    def _own_pass(self, function: HookFunction) -> HookFunction:
        """The function, but not in a pass that a user's function starts within this one."""
        return lambda x, hook: function(x, hook) if THREAD.depth == self._depth else x

    def _some(self, rows: Sequence[int]) -> bool:
        return not self.execution.multiple or any(row in self._local for row in rows)

    def _part(self, place: Place, selectors: Selectors, rows: Sequence[int], step: int) -> Part:
        """The selection, as this pass sees it."""
        full = self.program.selection(place, selectors, step, rows)
        if not self.execution.multiple:
            return Part(full, full, None, rows, [])
        key = (id(full), step_class(place[1], step))
        if key not in self._parts:
            sub = [index for index, row in enumerate(rows) if row in self._local]
            local = [self._local[rows[index]] for index in sub]
            selection = select(place[1], selectors, self.geometry, step, local)
            dims = token_dims(place[1], selection)
            self._parts[key] = Part(selection, full, sub, local, dims)
        return self._parts[key]

    # -- actions

    def _action(self, resolved: Resolved, index: int, place: Place, step: int) -> Action:
        op, point = resolved.op, place[1]
        if isinstance(op, Function):
            return calling(op, point)
        if isinstance(op, Save | Edit):
            part = self._part(place, op.selectors, resolved.rows, step)
            if isinstance(op, Save):
                return self._saving(resolved.keys[index], part)
            return self._editing(resolved, op, part)
        return stop

    def _saving(self, key: tuple[str, ...], part: Part) -> Action:
        kept = self.execution.saves.setdefault(key, {})

        def save(x: Tensor) -> Tensor:
            value = self._without_finished(part, part.selection.read(x))
            if value is not None:
                kept.setdefault(self.step, []).append((part, snapshot(value)))
            return x

        return save

    def _at_once(self, op: Resolved) -> bool:
        """Whether it saves what is computed of activations at hand: that can be done when the last of them is there, so
        that no other has to be kept.
        """
        if op.places or op.grads or not op.used or self.execution.multiple or not isinstance(op.op, Save):
            return False
        return all(source.step is None for source in op.used)

    def _computing(self, op: Resolved) -> Action:
        def compute(x: Tensor) -> Tensor:
            self._save_value(op)
            self._let_go(op)
            return x

        return compute

    def _let_go(self, op: Resolved) -> None:
        """What only this op has read is needed no more."""
        for source in op.sources:
            self._at_hand.pop(source, None)

    def _reading(self, source: Source, part: Part) -> Action:
        later = self.execution.multiple or source.step is not None

        def read(x: Tensor) -> Tensor:
            value = part.selection.read(x)
            if not later:  # a function may keep what it returned, and write into it
                self._at_hand[source] = value.clone() if self.runs_python else value
            else:
                ended = {self.geometry.rows[row] for row in part.rows if not self._is_active(row)}
                entry = (part, value.clone(), ended)
                self.execution.read.setdefault((source, self.step), []).append(entry)
            return x

        return read

    def _editing(self, resolved: Resolved, op: Edit, part: Part) -> Action:
        change = CHANGES[type(op)]
        value, selection = op.value, part.selection
        if not isinstance(value, Expression):
            constant: Any = part.value(float(value) if isinstance(value, int) else value)  # torch's ints end at 2**63
            if isinstance(constant, Tensor) and type(op) is Set:
                return lambda x: selection.edit(x, lambda _: constant.to(x.device, copy=selection.whole))
            if isinstance(constant, Tensor):
                return lambda x: selection.edit(x, lambda old: change(old, constant.to(x.device)))
            return lambda x: selection.edit(x, lambda old: change(old, constant))

        python = is_python(value)

        def edit(x: Tensor) -> Tensor:
            if self.active is not None and not any(self.active[row] for row in self._rows_here(resolved.rows)):
                return x
            new: Any = self._value(resolved, value, x)
            if python:
                check_fit(new, part.full.shape, str(resolved.numbered))
            new = part.value(new)
            if type(op) is Set and selection.whole:  # what was read is another point's tensor
                new = new.clone()
            if len(resolved.places) == 1:
                self._let_go(resolved)
            return selection.edit(x, lambda old: change(old, new))

        return edit

    # -- expressions

    def _value(
        self,
        op: Resolved,
        expression: Expression,
        like: Tensor | None,
        gradient: Callable[[Leaf], Tensor | None] = lambda _: None,
    ) -> Any:
        def leaf(node: Leaf) -> Tensor:
            value = gradient(node)
            if value is None:
                value = self._read(op, op.leaves[node])
            return value if like is None else value.to(like.device)

        try:
            if isinstance(expression, Leaf):
                return leaf(expression)
            return evaluate(expression, leaf, like=like, applied=self._applied)
        except LenskitError as error:
            error.add_note(f"in {op.numbered}")
            raise

    def _read(self, op: Resolved, source: Source) -> Tensor:
        """A source's activation, of this pass or an earlier one."""
        step = self.step if source.step is None else source.step
        if source in self._at_hand:
            if self.active is not None:
                rows = [row for row in self._rows_here(source.rows) if not self.active[row]]
                self._refuse_ended(op, source, step, {self.geometry.rows[row] for row in rows})
            return self._at_hand[source]
        parts = self.execution.read.get((source, step), [])
        there = {row for part, _, _ in parts for row in self._sources_of(part, source)}
        ended = {row for _, _, rows in parts for row in rows}
        self._refuse_ended(op, source, step, ended | (set(source.rows) - there))
        return merged([(part, tensor) for part, tensor, _ in parts])

    def _sources_of(self, part: Part, source: Source) -> Sequence[int]:
        return source.rows if part.sub is None else [source.rows[index] for index in part.sub]

    def _refuse_ended(self, op: Resolved, source: Source, step: int, ended: set[int]) -> None:
        """A row that has ended computes nothing that a row that goes on could use."""
        if not op.places:
            return
        ended -= set(op.rows)
        if ended:
            raise StepError(
                f"{op.numbered} needs what prompt {min(ended)} does not compute",
                got=f"{source.act} at step {step}: prompt {min(ended)} ended before",
                expected="a prompt that still generates at that step",
                fix="name the steps (steps=slice(0, 3)), or keep rows from ending with eos_token_id=[]",
            )

    def _compute_values(self) -> None:
        """Saves of expressions, at the end of the step in which the last of what they read was computed; gradients."""
        for op in self.program.ops:
            if op.places or op.grads or not isinstance(op.op, Save) or self._at_once(op):
                continue
            if op.listed or any(source.step is None for source in op.used):
                if self.step in op.steps and self._is_last(op):
                    self._save_value(op)
            elif op.keys[0] not in self.execution.saves and all(self._is_there(source) for source in op.used):
                self._save_value(op)
        if self._tape is not None:
            self._tape.run(self._value, self.execution.saves)

    def _is_there(self, source: Source) -> bool:
        """Whether all rows of a source that is of one step have been read."""
        parts = self.execution.read.get((source, source.step or 0), [])
        return sum(len(part.rows) for part, _, _ in parts) == len(source.rows)

    def _save_value(self, op: Resolved) -> None:
        here = self._rows_here(op.rows)
        if any(source.step is None for source in op.used) and not any(self._is_active(row) for row in here):
            return
        value = self._value(op, op.op.expressions[0], None)
        value = snapshot(value) if isinstance(value, Tensor) else value  # a Python function may return anything
        self.execution.saves.setdefault(op.keys[0], {})[self.step] = [(None, value)]

    def _is_last(self, op: Resolved) -> bool:
        """Whether no later pass has a row that the op reads."""
        later = self.program.passes[self.number + 1 :]
        return not any(row in geometry.rows for geometry, _ in later for row in op.rows)

    # -- rows that have ended

    def _rows_here(self, rows: Sequence[int]) -> list[int]:
        return [self._local[row] for row in rows if row in self._local]

    def _is_active(self, row: int) -> bool:
        return self.active is None or self.active[row]

    def _without_finished(self, part: Part, value: Tensor) -> Tensor | None:
        """Zeros where a row has ended; None where all have."""
        if self.active is None:
            return value
        going = [self.active[row] for row in part.rows]
        if not any(going):
            return None
        if all(going) or 0 in part.selection.dropped:
            return value
        shape = [-1] + [1] * (value.dim() - 1)
        return value.masked_fill(~torch.tensor(going, device=value.device).view(shape), 0)


def passes(execution: Execution) -> Iterator[PassRun]:
    """The passes of a run, in their order; each is to be run to its end before the next one is asked for."""
    for number, (geometry, trimmed) in enumerate(execution.program.passes):
        yield PassRun(execution, number, geometry, trimmed)
