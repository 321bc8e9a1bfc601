"""What the benchmark says: rows of ratios with their bars, as a table, as JSON and in the documentation."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

LENSKIT, SDPA, EAGER, TL = CONTENDERS = ("lenskit", "HF sdpa", "HF eager", "TransformerLens")

BEGIN, END = "<!-- results: written by scripts/benchmark.py -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Bar:
    """What lenskit's ratio must not exceed; `noise` is the share by which a measurement may be off."""

    limit: float
    noise: float = 0.0
    text: str = ""

    def met(self, ratio: float) -> bool:
        return ratio <= self.limit * (1 + self.noise)

    def __str__(self) -> str:
        tolerance = f" (+ {self.noise:.0%} noise)" if self.noise else ""
        return f"≤ {self.limit:.2f}{tolerance}" + (f" ({self.text})" if self.text else "")


@dataclass(frozen=True)
class Row:
    """One measurement of every contender, as multiples of one thing.

    unit: that thing, so what 1.00 stands for.
    spread: of lenskit's ratio: the quartiles of many rounds, or the least and the largest of a few.
    details: what the ratios come from, for the JSON file.
    """

    section: str
    measurement: str
    unit: str
    values: dict[str, float]
    bar: Bar | None = None
    spread: tuple[float, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        if LENSKIT not in self.values:
            return "not measured"
        return "met" if self.bar.met(self.values[LENSKIT]) else "MISSED"

    def cells(self, absent: Collection[str]) -> list[str]:
        """The row as text; `absent` are the contenders that are not installed."""
        ratios = [
            f"{self.values[name]:.2f}" if name in self.values else "not installed" if name in absent else "–"
            for name in CONTENDERS
        ]
        spread = f"{self.spread[0]:.2f} – {self.spread[1]:.2f}" if self.spread else ""
        return [self.measurement, self.unit, *ratios, spread, str(self.bar or ""), self.verdict]


HEADER = ["measurement", "1.00 is", *CONTENDERS, "lenskit's spread", "bar", "verdict"]
NUMBERS = range(2, 2 + len(CONTENDERS))  # their columns


def sections(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by section, in the order in which sections first come up."""
    for section in dict.fromkeys(row.section for row in rows):
        yield section, [row for row in rows if row.section == section]


def show(rows: Sequence[Row], absent: Collection[str], console: Console) -> None:
    """The tables, and the bars that are missed."""
    styles = {"met": "green", "MISSED": "bold red", "not measured": "yellow"}
    for section, members in sections(rows):
        table = Table(title=section, title_justify="left", title_style="bold")
        for index, heading in enumerate(HEADER):
            table.add_column(heading, justify="right" if index in NUMBERS else "left")
        for row in members:
            *cells, verdict = row.cells(absent)
            table.add_row(*cells, f"[{styles[verdict]}]{verdict}[/]" if verdict else "")
        console.print(table)
    console.print(summary(rows))


def summary(rows: Sequence[Row]) -> str:
    """How many bars are met, in one sentence."""
    verdicts = [row.verdict for row in rows if row.bar]
    counts = [f"{verdicts.count(kind)} {kind.lower()}" for kind in dict.fromkeys(verdicts)]
    return f"Bars: {', '.join(counts) or 'none'}."


def machine() -> dict[str, str]:
    """What the numbers depend on: the kind of processor and the versions, nothing that names this computer."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    cores = len(re.findall(r"^processor\s*:", _read("/proc/cpuinfo"), re.MULTILINE))
    packages = ("torch", "transformers", "transformer-lens", "safetensors")
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "instruction set used by torch": torch.backends.cpu.get_cpu_capability(),
        "cores": str(cores or "unknown"),
        "threads used": "1",
        "system": platform.system(),
        "Python": platform.python_version(),
        "lenskit": _version("lenskit-interp"),
        **{name: _version(name) for name in packages},
    }


def write_json(path: Path, rows: Sequence[Row], seconds: float) -> None:
    """Everything, with the microseconds and megabytes that the ratios come from."""
    data = {
        "machine": machine(),
        "seconds": round(seconds),
        "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_docs(path: Path, rows: Sequence[Row], absent: Collection[str]) -> None:
    """The tables between the two markers of a page; its prose is written by hand and stays."""
    page = path.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{path} has no place for results: it needs the lines {BEGIN!r} and {END!r}")
    before, rest = page.split(BEGIN)
    results = "\n\n".join(_markdown(rows, absent))
    path.write_text(f"{before}{BEGIN}\n\n{results}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _markdown(rows: Sequence[Row], absent: Collection[str]) -> Iterator[str]:
    yield "Measured on: " + "; ".join(f"{what} {value}" for what, value in machine().items()) + ".  \n" + summary(rows)
    rule = ["---:" if index in NUMBERS else "---" for index in range(len(HEADER))]
    for section, members in sections(rows):
        lines = [[*HEADER], rule, *(row.cells(absent) for row in members)]
        emphasised = [[f"**{cell}**" if cell == "MISSED" else cell for cell in line] for line in lines]
        yield f"### {section}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in emphasised)


def _version(package: str) -> str:
    try:
        return metadata.version(package).split("+")[0]
    except metadata.PackageNotFoundError:
        return "not installed"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
