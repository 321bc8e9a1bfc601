"""What `make docs` does to the pages on their way into the site; mkdocs calls the functions named `on_...`.

- A notebook becomes a page like the others: its prose and code are Markdown already, what a cell printed becomes a
  block, and a picture is its PNG until plotly draws it from the data beside it. plotly's script lies in the site once.
  (A converter such as mkdocs-jupyter brings half a megabyte of JupyterLab's styles into each page, wants MathJax from
  elsewhere, and does not know links between pages.)
- CONTRIBUTING.md and CHANGELOG.md, which lie outside docs/, become pages. A link to another file of the repository
  becomes its text, with the path where the mouse rests on it.
- `<!-- README: a heading -->` is replaced by that section of the README, `<!-- README: the beginning -->` by what comes
  before its first block of code; `<!-- the closed list -->` by the functions that expressions may hold.

All this is checked: a heading, link or file that is not there is a warning, and a warning fails the build.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbformat import NotebookNode
from plotly.offline import get_plotlyjs

import lenskit as lk
from lenskit.interventions.expressions.closed_list import FUNCTIONS, SIGNS

LOG = logging.getLogger("mkdocs.hooks.lenskit")
ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md", "README.md": "index.md"}
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


# -- files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no Markdown in docs/, and plotly's script."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        for name, content in converted(notebook):
            files.append(File.generated(config, name, content=content))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = moved((ROOT / name).read_text(encoding="utf-8"), name, OUTSIDE[name])
        files.append(File.generated(config, OUTSIDE[name], content=text))
    files.append(File.generated(config, "assets/plotly.min.js", content=get_plotlyjs()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what a page takes from elsewhere, and turn links to files that are no pages of docs/."""
    del config, files
    markdown = re.sub(r"<!-- README: (.+?) -->", lambda found: from_readme(found[1], page.file.src_uri), markdown)
    markdown = markdown.replace("<!-- the closed list -->", closed_list())
    return relinked(markdown, page.file.src_uri)


# -- notebooks


def converted(file: File) -> Iterable[tuple[str, str | bytes]]:
    """The page of a notebook, and the files of its pictures, each with its path in the site's sources."""
    stem = file.src_uri.removesuffix(".ipynb")
    notebook = nbformat.reads(file.content_string, as_version=4)
    parts: list[str] = []
    drawn: list[NotebookNode] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if PLOTLY in output.get("data", ()):
                drawn.append(output.data)
                parts.append(picture(output.data, f"{posixpath.basename(stem)}-{len(drawn)}.png", len(drawn)))
            else:
                parts.append(printed(output))
    title, *rest = parts
    name = posixpath.basename(file.src_uri)
    offer = f'<p>This page is a <a href="{name}" download>notebook</a>, and shows what its cells printed and drew.</p>'
    script = '<script src="../assets/plotly.min.js" defer></script>\n<script src="../assets/figures.js" defer></script>'
    heading, _, lead = title.partition("\n")
    yield f"{stem}.md", "\n\n".join([heading, offer, lead, *rest, *([script] if drawn else [])])
    for index, data in enumerate(drawn, start=1):
        yield f"{stem}-{index}.png", base64.b64decode(data[PNG])


def picture(data: NotebookNode, name: str, number: int) -> str:
    figure = json.dumps({"data": data[PLOTLY]["data"], "layout": data[PLOTLY]["layout"]}, separators=(",", ":"))
    return (
        f'<figure class="plot" data-figure="{html.escape(figure)}">'
        f'<img src="{name}" width="760" alt="Picture {number}, described below" loading="lazy"></figure>'
    )


def printed(output: NotebookNode) -> str:
    text = output.text if output.output_type == "stream" else output.data["text/plain"]
    return f'<div class="printed" markdown>\n\n```text\n{text.rstrip()}\n```\n\n</div>'


# -- links


def moved(markdown: str, source: str, target: str) -> str:
    """The text of a file, `source` from the repository's root, with links as from the page `target`."""

    def link(found: re.Match[str]) -> str:
        if not found[3] or "://" in found[3]:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[3]))
        path = posixpath.relpath(path, posixpath.join("docs", posixpath.dirname(target)))
        return f"{found[1]}[{found[2]}]({path}{found[4] or ''})"

    return LINK.sub(link, markdown)


def relinked(markdown: str, page: str) -> str:
    """Links to notebooks lead to their pages; links out of docs/ to a page if the file is one, or say which file."""

    def link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if not target or "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        if not (ROOT / path).exists() and path != f"docs/{page}":
            LOG.warning("%s links to %s, which is not there", page, target)
        if path.startswith("docs/") and not (ROOT / path).is_dir():
            return f"{mark}[{text}]({re.sub(r'[.]ipynb$', '.md', target)}{anchor})"
        if path in OUTSIDE:
            return f"{mark}[{text}]({posixpath.relpath(OUTSIDE[path], posixpath.dirname(page))}{anchor})"
        return text if text.strip("`/") == path else f'<abbr title="{path}">{text}</abbr>'

    return LINK.sub(link, markdown)


# -- what pages take from elsewhere


def from_readme(heading: str, page: str) -> str:
    """A section of the README, without its heading."""
    found = sections(moved((ROOT / "README.md").read_text(encoding="utf-8"), "README.md", page))
    if heading == "the beginning":
        return next(iter(found.values())).partition("```")[0].strip()
    if heading not in found:
        LOG.warning("%s takes the README's section %r, which is not there", page, heading)
    return found.get(heading, "").strip()


def sections(markdown: str) -> dict[str, str]:
    """By heading, what stands under it."""
    found: dict[str, str] = {}
    heading, code = "", False
    for line in markdown.splitlines():
        code ^= line.startswith("```")
        if line.startswith("#") and not code:
            heading = line.lstrip("#").strip()
        else:
            found[heading] = found.get(heading, "") + line + "\n"
    return found


def closed_list() -> str:
    """The functions that expressions may hold, by how one writes them."""
    written: dict[str, list[str]] = {}
    for name, function in FUNCTIONS.items():
        style = "trace" if function.style == "lk" and name not in lk.__all__ else function.style
        sign = "[...]" if name == "getitem" else SIGNS[name][0] if name in SIGNS else name
        written.setdefault(style, []).append(f"`{sign}`")
    how = {
        "sign": "operators (torch's functions for them too)",
        "method": "methods (those that torch has as functions, so too)",
        "torch": "functions of `torch`",
        "F": "functions of `torch.nn.functional`",
        "lk": "functions of `lenskit`",
        "property": "properties",
        "trace": "what a trace writes for `act[...] = value`",
    }
    return "\n".join(f"- {how[style]}: {' '.join(dict.fromkeys(names))}" for style, names in written.items())
