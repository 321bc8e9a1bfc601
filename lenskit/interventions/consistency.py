"""Consistency: what ops are to each other. Keys that differ, nothing behind a stop, and who needs whose activations."""

from collections.abc import Iterator, Sequence

from lenskit.errors import WithoutEffectError
from lenskit.hooks import HookPoint
from lenskit.interventions import passes
from lenskit.interventions.ops import Numbered, Stop
from lenskit.interventions.program import Resolved, Source


def needs(op: Resolved) -> Iterator[passes.Need]:
    """Whose activations an op uses, for whose."""
    for source in op.used:
        for place, point in op.places:
            strict = [step for step in op.steps if _later(source, step, place)]
            step = strict[0] if strict else op.steps[0]
            at = step if source.step is None else source.step
            yield passes.Need(
                op.rows,
                source.rows,
                bool(strict),
                str(op.numbered),
                use=f"{point.name!r} at step {step} (prompts {_few(op.rows)})",
                source=f"{source.place[1].name!r} at step {at} of prompts {_few(source.rows)}",
            )


def _later(source: Source, step: int, place: int) -> bool:
    return (step if source.step is None else source.step, source.place[0]) > (step, place)


def _few(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:4])) + (", ..." if len(rows) > 4 else "")


def check_keys(ops: Sequence[Resolved]) -> None:
    """Every save has a key of its own."""
    taken: dict[tuple[str, ...], Numbered] = {}
    for op in ops:
        for key in op.keys:
            other = taken.get(key) or taken.get(key[:1])
            if other is not None and other is not op.numbered:
                raise WithoutEffectError(
                    f"{op.numbered}: its result could not be told apart",
                    got=f"the key {key[0]!r}, which {other} has already",
                    expected="a key of its own for every Save",
                    fix=f"name one of them: Save({key[-1]!r}, ..., name='before')",
                )
        for key in op.keys:
            taken[key] = taken[key[:1]] = op.numbered


def check_stops(ops: Sequence[Resolved]) -> None:
    """Nothing is asked for that a `Stop` keeps from being computed."""
    for index, stop in enumerate(ops):
        if not isinstance(stop.op, Stop):
            continue
        if len(stop.places) != 1:
            raise WithoutEffectError(
                f"{stop.numbered}: a pass stops once",
                got=f"{len(stop.places)} hook points",
                expected="one",
                fix="name the point after which nothing is needed",
            )
        end = (stop.steps[0], stop.places[0][0], index)
        for other, op in enumerate(ops):
            for step, place, point in _uses(op):
                spans = op.op.selectors.steps is None or isinstance(op.op.selectors.steps, slice)
                cut_short = spans and step > end[0] >= op.steps[0]  # as it is where a row ends early
                if (step, place, other) > end and not cut_short:
                    raise WithoutEffectError(
                        f"{op.numbered} would never run at {point.name!r}",
                        got=f"{stop.numbered}, which ends everything at step {end[0]}",
                        expected="points and steps that come before it",
                        fix="stop later, or leave out what is not computed",
                    )


def _uses(op: Resolved) -> Iterator[tuple[int, int, HookPoint]]:
    """The steps and points at which an op reads or edits; of steps, those that matter beside a stop."""
    for step in op.steps:
        for place, point in op.places:
            yield step, place, point
    for source in op.used:
        for step in op.steps if source.step is None else [source.step]:
            yield step, *source.place
