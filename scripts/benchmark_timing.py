"""CPU time of calls, compared fairly on a machine that does other things as well.

Times are CPU time of this process, never of the wall clock. All calls that are compared run in one process, in
rounds: every call gets a block of a few consecutive runs, after one that is thrown away (it pays for the caches
that the call before it left cold). Which call comes first, and which way round the list is gone through, changes
from round to round, so that no call always follows the same one. What is reported is the median over the rounds of the
ratio within a round: a machine that gets slower or faster meanwhile does so for both sides of a ratio.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from statistics import median, quantiles

from benchmark_report import LENSKIT, Bar, Row
from torch import nn, zeros

from lenskit import HookPoint

# Whose call, and which: ("lenskit", "forward").
Key = tuple[str, str]
Samples = dict[Key, list[float]]

BLOCK_S = 0.012  # about what a block of consecutive calls takes
MIN_CALLS, MAX_CALLS = 3, 8  # in a block
LONG_S = 0.1  # a call this long fills the caches itself: its block is one call, nothing is thrown away


@dataclass(frozen=True)
class Ratio:
    """Of two calls' times: the median over the rounds, and the quartiles."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A row of the table: an operation's time over that of `base_operation`.

    base: whose time is 1.00; None for each contender's own.
    barred: whether the bar for the operation applies to this row.
    """

    measurement: str
    operation: str
    unit: str
    base: str | None
    base_operation: str
    barred: bool = True

    def row(self, samples: Samples, *, section: str, bar: Bar | None) -> Row:
        """The row, of those contenders that have both times."""
        pairs = {
            contender: ((contender, operation), (self.base or contender, self.base_operation))
            for contender, operation in samples
            if operation == self.operation
        }
        pairs = {contender: pair for contender, pair in pairs.items() if pair[1] in samples}
        ratios = {contender: ratio(samples, *pair) for contender, pair in pairs.items()}
        ours = ratios.get(LENSKIT)
        timed = [key for pair in pairs.values() for key in pair]
        return Row(
            section=section,
            measurement=self.measurement,
            unit=self.unit,
            values={contender: found.value for contender, found in ratios.items()},
            bar=bar if self.barred else None,
            spread=(ours.low, ours.high) if ours else None,
            details={
                "rounds": max(len(taken) for taken in samples.values()),
                "microseconds": {" ".join(key): round(median(samples[key]), 3) for key in timed},
            },
        )


def ratio(samples: Samples, over: Key, under: Key) -> Ratio:
    """Of two calls that took part in the same rounds."""
    ratios = [a / b for a, b in zip(samples[over], samples[under], strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(median(ratios), low, high)


def interleave(
    calls: Mapping[Key, Callable[[], object]], *, seconds: float, min_rounds: int = 3, max_rounds: int = 300
) -> Samples:
    """Microseconds of CPU time a call: each round's median.

    Args:
        seconds: on the wall clock, after which no new round starts.
    """
    start = time.monotonic()
    sizes = {key: _calls_in_block(call) for key, call in calls.items()}
    samples: Samples = {key: [] for key in calls}
    keys = list(calls)
    gc.collect()
    gc.freeze()  # later collections look at what the calls made, not at the models and libraries
    try:
        for number in range(max_rounds):
            first = number % len(keys)
            order = keys[first:] + keys[:first]
            for key in order if number % 2 else reversed(order):
                samples[key].append(_block(calls[key], sizes[key]))
            spent = time.monotonic() - start
            if number + 1 >= min_rounds and spent + spent / (number + 2) > seconds:
                break
    finally:
        gc.unfreeze()
    return samples


def _calls_in_block(call: Callable[[], object]) -> int:
    """How many timed calls make a block; 0 for one long call without another before it."""
    duration = _timed(call)
    if duration < 3 * LONG_S:  # else what a first call does besides makes no difference
        duration = _timed(call)
    return 0 if duration > LONG_S else max(MIN_CALLS, min(MAX_CALLS, round(BLOCK_S / duration)))


def _block(call: Callable[[], object], size: int) -> float:
    if size:
        call()
    return median(_timed(call) for _ in range(size or 1)) * 1e6


def _timed(call: Callable[[], object]) -> float:
    start = time.process_time_ns()
    call()
    return (time.process_time_ns() - start) / 1e9


def hook_point(seconds: float) -> list[Row]:
    """An unused HookPoint against torch's own identity, called the same way, loop included."""
    x = zeros(1, 16, 64)

    def spin(module: nn.Module) -> None:
        for _ in repeat(None, 5000):
            module(x)

    point, identity = HookPoint("batch pos d_model"), nn.Identity()
    samples = interleave(
        {(LENSKIT, "HookPoint"): lambda: spin(point), ("torch", "Identity"): lambda: spin(identity)}, seconds=seconds
    )
    comparison = Comparison("an unused HookPoint, called", "HookPoint", "nn.Identity", "torch", "Identity")
    return [comparison.row(samples, section="Hook points and import", bar=Bar(0.25))]
