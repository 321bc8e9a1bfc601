"""lenskit against Hugging Face and TransformerLens: speed and memory, as ratios, with the bars that must hold.

    make bench                                                # everything, about 20 minutes
    make bench ARGS=--quick                                   # about 2 minutes, fewer sizes and rounds
    make bench ARGS="--only 'speed-small*'"                   # some cases; --list names them
    make bench ARGS="--write-docs docs/benchmarks.md"         # put the tables into the documentation

All speed is CPU time on one thread. How calls are compared is told in benchmark_timing.py, how memory is measured in
benchmark_probe.py. TransformerLens may be missing: its columns then say so. A missed bar is shown and counted, and
fails the run only under --strict.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
import transformers
from benchmark_generation import GENERATION_CASES, generation, planning, shared_prefix
from benchmark_memory import imports, loading, long_forward
from benchmark_models import ABSENT, SPEED_CASES, speed
from benchmark_report import Row, show, summary, write_docs, write_json
from benchmark_timing import hook_point
from benchmark_tracing import tracing
from benchmark_zoo import ZOO_CASES, zoo
from rich.console import Console

OUTPUT = Path(__file__).resolve().parent.parent / "build" / "benchmark.json"


@dataclass(frozen=True)
class Case:
    """Something to measure.

    run: gets what it may spend: seconds where `weight` is given, else how often to repeat.
    weight: the share of the remaining time that it gets, among the cases after it.
    """

    name: str
    run: Callable[[float], list[Row]]
    weight: float = 0
    repeats: int = 2
    quick: bool = True


# What takes as long as it takes comes first, then the cases that share the time that is left.
CASES = (
    Case("import", lambda n: imports(int(n)), repeats=5),
    Case("loading", lambda n: loading(int(n))),
    Case("memory", lambda n: long_forward(int(n))),
    Case("hook-point", hook_point, weight=0.1),
    *(Case(case.name, partial(speed, case), weight=case.weight, quick=case.quick) for case in SPEED_CASES),
    *(Case(case.name, partial(generation, case), weight=case.weight, quick=case.quick) for case in GENERATION_CASES),
    Case("generation-prefix", shared_prefix, weight=0.8, quick=False),
    Case("planning", planning, weight=0.2),
    Case("tracing", tracing, weight=0.4),
    *(Case(name, partial(zoo, name), weight=0.3, quick=False) for name in ZOO_CASES),
)


def measure(cases: list[Case], *, seconds: float, quick: bool, console: Console) -> list[Row]:
    """The cases' rows; those with a weight share what the others leave of the time."""
    rows: list[Row] = []
    deadline = time.monotonic() + seconds
    for index, case in enumerate(cases):
        share = case.weight / (sum(later.weight for later in cases[index:]) or 1)
        left = max(deadline - time.monotonic(), 0) * share
        repeats = 1 + case.repeats // 4 if quick else case.repeats
        with console.status(f"{case.name} ({index + 1} of {len(cases)})"):
            rows += case.run(left if case.weight else repeats)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about 2 minutes: no calls that take seconds")
    parser.add_argument("--seconds", type=float, help="roughly how long all of it may take (1150, or 100)")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name matches this glob, or holds it")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--json", type=Path, default=OUTPUT, metavar="FILE", help="default: build/benchmark.json")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="replace the tables in this page")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args()

    wanted = [c for c in CASES if not args.only or fnmatch(c.name, args.only) or args.only in c.name]
    wanted = [c for c in wanted if c.quick or not args.quick]
    if args.list or not wanted:
        print("\n".join(case.name for case in CASES))
        return
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    start = time.monotonic()
    rows = measure(wanted, seconds=args.seconds or (100 if args.quick else 1150), quick=args.quick, console=console)
    show(rows, ABSENT, console)
    write_json(args.json, rows, time.monotonic() - start)
    if args.write_docs:
        write_docs(args.write_docs, rows, ABSENT)
    if args.strict and any(row.verdict == "MISSED" for row in rows):
        raise SystemExit(summary(rows))


if __name__ == "__main__":
    main()
