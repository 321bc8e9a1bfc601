"""The reference has every public name; `make docs` sees to the rest."""

import re
from pathlib import Path

import pytest

import lenskit as lk

PAGES = Path(__file__).parent.parent / "docs" / "reference"
ENTRIES = {entry for page in PAGES.glob("*.md") for entry in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.M)}


@pytest.mark.parametrize("name", sorted(set(lk.__all__) - {"__version__", "LenskitError"}))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert f"lenskit.{name}" in ENTRIES, f"add `::: lenskit.{name}` to the page of docs/reference that it belongs to"


def test_pages_of_modules_have_all_of_them() -> None:
    assert {"lenskit.errors", "lenskit.analysis", "lenskit.viz"} <= ENTRIES
