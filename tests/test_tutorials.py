"""The tutorials read well where nothing runs, and run, and then show what they showed."""

import math
import re
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest
from nbformat import NotebookNode

from scripts.run_tutorials import FOLDER, PLOTLY, PNG, pictures, read, run

TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
EVERY_TUTORIAL = pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
DIGITS = 0.011  # of what is printed with two digits, the last may differ from one machine to another


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> list[str]:
    """What a cell wrote and returned, in order; pictures apart."""
    texts = [out.text if out.output_type == "stream" else out.get("data", {}).get("text/plain") for out in cell.outputs]
    return [text for text in texts if text]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two values of JSON are not the same: numbers, in texts too, may differ by their last digit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, pair in pairs for found in differences(*pair, f"{where}[{index}]")]
    if isinstance(one, str) and isinstance(other, str) and NUMBER.split(one) == NUMBER.split(other):
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (one, other)]
        return differences(*numbers, where) if numbers[0] else []
    if isinstance(one, float | int) and isinstance(other, float | int):
        return [] if math.isclose(one, other, rel_tol=DIGITS, abs_tol=DIGITS) else [f"{where}: {one} and {other}"]
    if isinstance(one, str) and isinstance(other, str):
        return [
            f"{where}: {line}"
            for line in unified_diff(one.splitlines(), other.splitlines(), "kept", "now", n=0, lineterm="")
        ]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"]


# -- as they lie there


def test_there_are_tutorials_and_their_numbers_differ() -> None:
    numbers = [re.match(r"\d\d(?=-)", path.stem) for path in TUTORIALS]
    assert len({number[0] for number in numbers if number}) == len(TUTORIALS) >= 3


@EVERY_TUTORIAL
def test_outputs_are_kept(path: Path) -> None:
    notebook = read(path)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1)), (
        "the cells did not run once each, in order: python scripts/run_tutorials.py"
    )
    kinds = {(out.output_type, out.get("name")) for cell in code(notebook) for out in cell.outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}, "an error or a warning"
    assert len(pictures(notebook)) >= 2


@EVERY_TUTORIAL
def test_every_picture_shows_where_nothing_runs(path: Path) -> None:
    for picture in pictures(read(path)):
        assert picture.data[PNG]
        # A viewer would take HTML first, and where no script may run that is nothing.
        assert set(picture.data) == {PLOTLY, PNG}


@EVERY_TUTORIAL
def test_every_picture_is_followed_by_what_is_to_be_seen_in_it(path: Path) -> None:
    cells = read(path).cells
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        if any(PLOTLY in output.get("data", ()) for output in cell.get("outputs", ())):
            assert following is not None
            assert following.cell_type == "markdown", cell.source
            assert not following.source.startswith("#"), cell.source


@EVERY_TUTORIAL
def test_a_tutorial_is_small(path: Path) -> None:
    assert path.stat().st_size < 2**20


@EVERY_TUTORIAL
def test_links_lead_somewhere(path: Path) -> None:
    for cell in read(path).cells:
        for target in re.findall(r"\]\(([^)#\s]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert (FOLDER / target).exists(), target


def test_differences_are_seen() -> None:
    assert not differences({"a": [0.501, "99.7%, head 3.2"]}, {"a": [0.502, "99.7%, head 3.2"]})
    assert differences("accuracy 0.50", "accuracy 0.60")
    assert differences("head 3.2", "head 3.6")
    assert differences(["Paris 1"], ["London 1"])
    assert differences([1.0], [1.0, 2.0])
    assert differences({"z": None}, {"z": 0.0})


# -- run again


@pytest.mark.slow
@EVERY_TUTORIAL
def test_a_tutorial_runs_and_shows_what_it_showed(path: Path) -> None:
    kept = read(path)
    again = run(kept)
    for old, new in zip(code(kept), code(again), strict=True):
        found = differences(printed(old), printed(new), "printed")
        assert not found, "\n".join([old.source, "", *found, f"python scripts/run_tutorials.py {path.stem}"])
    figures = [[picture.data[PLOTLY] for picture in pictures(notebook)] for notebook in (kept, again)]
    assert not differences(*figures), f"pictures differ: python scripts/run_tutorials.py {path.stem}"
