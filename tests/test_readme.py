"""The README's code runs as it stands there, and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_every_block_runs_and_the_first_prints_something_true() -> None:
    assert len(BLOCKS) >= 2
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for block in BLOCKS:
            exec(block, names)  # one after another, as in a notebook
    first, *lens, ablated = printed.getvalue().splitlines()
    assert first == " Paris"
    assert [line.split()[0] for line in lens] == [str(layer) for layer in range(len(lens))]
    assert lens[-1].endswith(" Paris")
    assert ablated != " Paris"


def test_the_first_script_is_short() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 12
