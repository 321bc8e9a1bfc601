"""Runs the tutorials, and keeps what they print and draw in their files.

    python scripts/run_tutorials.py                   # all of docs/tutorials/*.ipynb
    python scripts/run_tutorials.py 01-first-steps    # some of them

This is for those who edit one; `tests/test_tutorials.py` runs them again and compares. A picture is kept twice in a
notebook: as plotly's data, which JupyterLab, VS Code and the site draw, and as a PNG, for viewers that run nothing. The
PNG needs lenskit's extra [docs], and Chrome or Chromium (Debian and Ubuntu: apt install chromium); a picture whose data
has not changed keeps the one that it has.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from nbformat import NotebookNode
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
WIDTH, SCALE = 760, 1.5  # of a PNG: as wide as a page's text, and half as sharp again
SETTINGS = {
    "PLOTLY_RENDERER": "plotly_mimetype",  # else plotly's whole script comes with the first picture
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, about a widget that is not needed
}


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def run(notebook: NotebookNode, *, timeout: int = 300) -> NotebookNode:
    """A copy of the notebook, run from top to bottom in a new kernel, with nothing of the run but its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    fresh = copy.deepcopy(notebook)
    with tempfile.TemporaryDirectory() as folder:  # what a cell writes is gone afterwards
        client = nbclient.NotebookClient(
            fresh,
            kernel_name="python3",
            timeout=timeout,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
            # The kernel is spoken to through files, not through ports that others on the machine could see.
            config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),
        )
        client.execute(env={**os.environ, **SETTINGS})
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    fresh.metadata = nbformat.from_dict({"kernelspec": python, "language_info": {"name": "python"}})
    for index, cell in enumerate(fresh.cells):
        cell.id, cell.metadata = f"cell-{index}", nbformat.from_dict({})
    for output in pictures(fresh):
        output.data[PLOTLY] = _rounded(output.data[PLOTLY])
    return fresh


def pictures(notebook: NotebookNode) -> list[NotebookNode]:
    """The outputs that are pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output for output in outputs if PLOTLY in output.get("data", ())]


def draw(new: NotebookNode, old: NotebookNode) -> int:
    """Give each picture a PNG: the one that the same picture had, or a new one. Returns how many are new."""
    kept = [(output.data[PLOTLY], output.data[PNG]) for output in pictures(old) if PNG in output.data]
    missing = []
    for output in pictures(new):
        output.metadata[PNG] = {"width": WIDTH}
        output.data[PNG] = next((png for figure, png in kept if figure == output.data[PLOTLY]), None)
        missing += [output.data] if output.data[PNG] is None else []
    if missing:
        drawn = asyncio.run(_drawn([data[PLOTLY] for data in missing]))
        for data, png in zip(missing, drawn, strict=True):
            data[PNG] = base64.b64encode(png).decode()
    return len(missing)


def _rounded(value: Any) -> Any:
    """Numbers with as many digits as a picture shows, so that the last ones do not make another file."""
    if isinstance(value, dict):
        return nbformat.from_dict({key: _rounded(entry) for key, entry in value.items()})
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


async def _drawn(figures: Sequence[NotebookNode]) -> list[bytes]:
    kaleido = importlib.import_module("kaleido")  # here, because only drawing needs the extra
    options = {"format": "png", "width": WIDTH, "scale": SCALE}
    page = kaleido.PageGenerator(mathjax=False)  # plotly's script is the installed one; MathJax would be fetched
    async with kaleido.Kaleido(n=1, page_generator=page) as browser:
        plain = [{"data": figure["data"], "layout": figure["layout"]} for figure in figures]
        return [
            await browser.calc_fig(figure, opts={**options, "height": figure["layout"].get("height", 450)})
            for figure in plain
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run tutorials and keep their outputs.")
    parser.add_argument("names", nargs="*", help="file names without .ipynb; all if left out")
    names = parser.parse_args().names or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for path in (FOLDER / f"{name}.ipynb" for name in names):
        old = read(path)
        new = run(old)
        drawn = draw(new, old)
        write(new, path)
        print(f"{path.name}: {len(pictures(new))} pictures, {drawn} drawn anew, {path.stat().st_size / 2**20:.2f} MB")


if __name__ == "__main__":
    main()
