"""Lowering: what a trace wrote down becomes the ops of a plan.

An activation that is used after its hook point was edited gets a `Read` where it was taken; all others stay the `Act`s
that they are. Where there is one invoke only, its rows are not named, so that the plan fits any prompts.
"""

import linecache
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lenskit.errors import LenskitError
from lenskit.interventions.expressions import Act, Expression, Grad, Leaf, Ref, leaves, rewritten
from lenskit.interventions.ops import Edit, Op, Read, Save

_OURS = ("lenskit.tracing", "lenskit.recording", "lenskit.modules.module", "torch", "jaxtyping", "beartype")


@dataclass(frozen=True, slots=True)
class Record:
    """An op, and the line of the user's that wrote it down."""

    op: Op
    file: str
    line: int

    @classmethod
    def of(cls, op: Op) -> "Record":
        """The op, at the line that is being executed."""
        frame = sys._getframe(1)
        while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        return cls(op, frame.f_code.co_filename, frame.f_lineno)

    def __str__(self) -> str:
        source = linecache.getline(self.file, self.line).strip()
        return f'written down in "{self.file}", line {self.line}' + (f": {source}" if source else "")


def _is_ours(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in _OURS)


@dataclass(frozen=True)
class Taken:
    """How an `Act` was taken: when (before which record), and at which steps."""

    state: int
    steps: object


def lowered(
    records: Sequence[Record],
    taken: Mapping[Act, Taken],
    edits: Mapping[str, Sequence[int]],
    names: dict[Act, str],
    *,
    alone: bool,
) -> tuple[list[Op], list[Record]]:
    """The ops, and for each the record that it comes from.

    Args:
        taken: how each act was taken.
        edits: by hook point, how many records there were after each edit.
        names: of acts whose gradients were asked for; the others that need a `Read` are added.
        alone: there is one invoke only.
    """
    tracked = set(names)
    uses: dict[Act, Record] = {}
    stale: list[set[Act]] = []  # by record: the acts that are used after an edit
    for place, record in enumerate(records):
        acts = [leaf for e in record.op.expressions for leaf in leaves(e) if isinstance(leaf, Act)]
        stale.append({act for act in acts if any(taken[act].state < edit <= place for edit in edits.get(act.at, ()))})
        for act in stale[-1]:
            uses.setdefault(act, record)
            names.setdefault(act, new_name(act.at, names.values()))
    ops: list[tuple[Op, Record]] = []
    waiting = sorted(names, key=lambda act: (taken[act].state, act not in tracked))
    for place, record in enumerate(records):
        while waiting and taken[waiting[0]].state <= place:
            act = waiting.pop(0)
            steps = None if act.selectors.steps is not None else taken[act].steps
            read = Read(_act(act, alone=alone, step=None), name=names[act], steps=steps)  # type: ignore[arg-type]
            ops.append((read, uses.get(act, record)))
        ops.append((_lowered(record.op, {act: names[act] for act in stale[place]}, alone), record))
    return [op for op, _ in ops], [record for _, record in ops]


def new_name(point: str, names: object) -> str:
    """A name for a `Read` that no other has."""
    taken = set(names)  # type: ignore[call-overload]
    return next(name for name in (f"{point}#{n}" for n in range(len(taken) + 1)) if name not in taken)


def _lowered(op: Op, names: Mapping[Act, str], alone: bool) -> Op:
    """The op with `Ref`s in the place of acts that have names, and without selectors that say nothing."""
    step = _own_step(op)
    made: dict[Act, Act] = {}

    def leaf(given: Leaf) -> Expression:
        if not isinstance(given, Act):
            return given
        if given in names:
            return Ref(names[given])
        if given not in made:
            made[given] = _act(given, alone=alone, step=step)
        return made[given]

    if isinstance(op, Save) and isinstance(op.at, Act) and op.at not in names:
        s = op.at.selectors
        return Save(
            op.at.at, prompts=None if alone else s.prompts, tokens=s.tokens, heads=s.heads, dims=s.dims,
            steps=op.selectors.steps if s.steps is None else s.steps, name=None if op.name == op.at.at else op.name,
        )  # fmt: skip
    expressions = [rewritten(expression, leaf) for expression in op.expressions]
    if any(new is not old for new, old in zip(expressions, op.expressions, strict=True)):
        op = op.with_expressions(expressions)
    if isinstance(op, Save) and step is not None:
        return Save(op.at, steps=step, name=op.name)
    if isinstance(op, Edit) and op.selectors.prompts is not None and alone:
        s = op.selectors
        return type(op)(op.at, op.value, tokens=s.tokens, heads=s.heads, dims=s.dims, steps=s.steps)
    return op


def _own_step(op: Op) -> int | None:
    """The one step of a generation that it is about: that of all its acts, which then need not name it."""
    steps = {leaf.selectors.steps for e in op.expressions for leaf in leaves(e) if isinstance(leaf, Act)}
    step = next(iter(steps)) if len(steps) == 1 else None
    if not isinstance(step, int) or any(isinstance(leaf, Ref | Grad) for e in op.expressions for leaf in leaves(e)):
        return None
    if isinstance(op, Save):
        return step if op.selectors.steps is None else None
    return step if isinstance(op, Edit) and op.selectors.steps == step else None


def _act(act: Act, *, alone: bool, step: int | None) -> Act:
    s = act.selectors
    prompts = None if alone else s.prompts
    steps = None if step is not None else s.steps
    if (prompts, steps) == (s.prompts, s.steps):
        return act
    return Act(act.at, prompts=prompts, tokens=s.tokens, heads=s.heads, dims=s.dims, steps=steps)  # type: ignore[arg-type]


def blame(error: LenskitError, records: Sequence[Record]) -> None:
    """Add to an error the line of the user's that wrote down the op that it is about."""
    texts = [str(error), *getattr(error, "__notes__", ())]
    for text in texts:
        found = re.search(r"hooks\[(\d+)\]", text)
        if found and int(found[1]) < len(records):
            error.add_note(str(records[int(found[1])]))
            return
