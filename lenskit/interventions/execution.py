"""Execution: one run of a program, and what it keeps. `pass_run.py` is how its passes go through the model."""

from typing import Any

from torch import Tensor

from lenskit.interventions.parts import Part, joined
from lenskit.interventions.program import Program, Resolved, Source
from lenskit.interventions.saved import NeverRan, Saved


class Execution:
    """One run of a program; holds what it reads and saves on the way.

    Args:
        generating: whether steps are those of a generation, and worth naming in an error.
    """

    def __init__(self, program: Program, *, generating: bool) -> None:
        self.program = program
        self.generating = generating
        self.multiple = len(program.passes) > 1
        self.read: dict[tuple[Source, int], list[tuple[Part, Tensor, set[int]]]] = {}
        self.saves: dict[tuple[str, ...], dict[int, list[tuple[Part | None, Tensor]]]] = {}
        self.steps_run = [0] * len(program.geometry.rows)

    def saved(self, n_layers: int) -> Saved:
        """What was saved."""
        values: dict[str, Any] = {}
        for op in self.program.ops:
            for key in op.keys:
                value = self._collected(op, self.saves.get(key, {}))
                if len(key) == 1:
                    values[key[0]] = value
                else:
                    values.setdefault(key[0], {})[key[1]] = value
        return Saved.of(values, n_layers)

    def _collected(self, op: Resolved, steps: dict[int, list[tuple[Part | None, Tensor]]]) -> Any:
        tensors = [joined(steps[step]) for step in sorted(steps)]
        if op.listed:
            return tensors
        return tensors[0] if tensors else NeverRan(op.steps[0], max(self.steps_run[row] for row in op.rows))

    def take(self, step: int, n_layers: int) -> Saved:
        """What one step saved, which then is forgotten: for those who look at a generation step by step."""
        values: dict[str, Any] = {}
        for op in self.program.ops:
            for key in op.keys:
                parts = self.saves.get(key, {}).pop(step, None)
                if parts is not None and len(key) == 1:
                    values[key[0]] = joined(parts)
                elif parts is not None:
                    values.setdefault(key[0], {})[key[1]] = joined(parts)
        return Saved.of(values, n_layers)
