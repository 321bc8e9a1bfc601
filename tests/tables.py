"""Tables in the documentation whose every row is held by a test: the pages for those who come from other libraries."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PAGES = Path(__file__).parent.parent / "docs"


class Row(NamedTuple):
    """A row of a table whose last cell links a test.

    test: its name, without "test_". spellings: the code in the second cell, which is lenskit's.
    """

    test: str
    spellings: list[str]
    cells: list[str]


def rows(page: str, tests: str) -> list[Row]:
    """The rows of a page that link a test of this file."""
    found = []
    for line in (PAGES / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        linked = re.fullmatch(rf"\[`(\w+)`\]\(\.\./tests/{re.escape(tests)}\)", cells[-1] if cells else "")
        if linked:
            found.append(Row(linked[1], re.findall(r"`([^`]+)`", cells[1]), cells))
    return found


def check(page: str, names: Mapping[str, Any], *, but: str) -> list[Row]:
    """See that every row has its test, every test its row, and that a test runs what its row says.

    Args:
        names: the globals of the tests' file.
        but: the one test without a row, which calls this.
    """
    found = rows(page, Path(names["__file__"]).name)
    assert {f"test_{row.test}" for row in found} == {name for name in names if name.startswith("test_")} - {but}
    for row in found:
        source = "".join(inspect.getsource(names[f"test_{row.test}"]).split())
        for spelling in row.spellings:
            assert "".join(spelling.split()) in source, f"{spelling} is not what test_{row.test} runs"
    return found
