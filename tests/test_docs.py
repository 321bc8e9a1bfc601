"""The code in the documentation runs, and gives what the page says it gives."""

import ast
import re
from pathlib import Path

import pytest
import torch

PAGES = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (PAGES / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(block: str, names: dict[str, object]) -> int:
    """Run a block, statement by statement; a line `expression  # -> value` is compared. Returns how many were."""
    lines, compared = block.splitlines(), 0
    for statement in ast.parse(block).body:
        said = re.search(r"# -> (.*)$", lines[(statement.end_lineno or 0) - 1])
        source = ast.unparse(statement)
        if isinstance(statement, ast.Expr) and said:
            assert repr(eval(source, names)) == said[1], source
            compared += 1
        else:
            exec(source, names)
    return compared


@pytest.mark.parametrize("page", ["interventions.md", "tracing.md"])
def test_a_page_does_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.no_grad():
        compared = sum(run(block, names) for block in blocks(page))
    assert compared > 5
    assert str(names["message"]) in (PAGES / page).read_text(encoding="utf-8"), "an error's text is as it is shown"


def test_a_wrong_value_would_be_seen() -> None:
    assert run("1 + 1  # -> 2", {}) == 1
    with pytest.raises(AssertionError):
        run("1 + 1  # -> 3", {})


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    text = (PAGES / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("http") or (PAGES / target).exists(), target
