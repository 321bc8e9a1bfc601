"""docs/models.md is what the parity table says: every family and every row, and no other."""

import re
from pathlib import Path

from parity_table import ROWS

from lenskit.models.registry import MODULES

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


def test_every_row_is_on_the_page_and_no_other() -> None:
    sections = dict(zip(*[iter(re.split(r"^## (\S+)$", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert sections.keys() == MODULES.keys(), "python scripts/models_table.py writes the page anew"
    for model_type, text in sections.items():
        rows = re.findall(r"^\| ([^|]+) \| .* \| (\S+) \| \d+ \(\d+\) \|$", text, flags=re.MULTILINE)
        assert [name for name, _ in rows] == [row.name for row in ROWS if row.model_type == model_type]
        assert all(float(difference) < 1e-5 for _, difference in rows)


def test_every_family_has_a_row_named_default_and_one_more() -> None:
    for model_type in MODULES:
        names = [row.name for row in ROWS if row.model_type == model_type]
        assert names[0] == "default"
        assert len(names) > 1
