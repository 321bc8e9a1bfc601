"""Scope: about which prompts, and at which steps, a trace writes down what it is told."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Steps:
    """At which steps of a generation something happens.

    selector: as an op has it; None in a forward pass, and for every step.
    series: it is something at each of several steps, so that what is saved is a list.
    classes: steps that stand for all where shapes are asked for.
    """

    selector: int | slice | Sequence[int] | None
    series: bool
    classes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The rows of one invoke, as the whole batch numbers them, and how many tokens of its own each has."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    alone: bool

    @property
    def selector(self) -> list[int] | None:
        """As an op has it."""
        return None if self.alone else list(self.rows)

    @property
    def even(self) -> bool:
        """Whether all rows have as many tokens, so that columns are tokens."""
        return len(set(self.lengths)) == 1
