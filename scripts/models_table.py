"""Writes docs/models.md: every architecture and variant of the parity table, and how far it is from Hugging Face's.

    python scripts/models_table.py                 # all rows; a minute or two
    python scripts/models_table.py --family llama  # look at some, write nothing

For each row a tiny model with random weights is written by transformers, loaded by lenskit, and both compute logits of
the same batch in float32. The number is the largest difference, relative to the largest logit; tests/test_parity.py
fails from 1e-5 on, and compares much more.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from parity_table import ROWS, Row, error, hf_folder, hf_model, ids  # noqa: E402

import lenskit as lk  # noqa: E402
from lenskit.checkpoints.multimodal import MODEL_TYPES  # noqa: E402
from lenskit.models.registry import MODULES, family  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
HEAD = """# Models

Every architecture that lenskit has, with the variants that the tests compare with Hugging Face's own code. The table
is written by [scripts/models_table.py](../scripts/models_table.py) from the parity table that the tests run over; none
of it is written by hand. Each row is a tiny model with random weights; *difference* is the largest between the two
logits, relative to the largest logit, in float32. *Points* are the hook points of a block, and in brackets of it all.

A checkpoint is found by the `model_type` in its config.json, so a fine-tune of any of these needs no entry. How to add
one: [adding a model](adding-a-model.md).
"""
MULTIMODAL = f"""A multi-modal checkpoint loads as the text model in it, if that is one of these and Hugging Face's
multi-modal class computes the same of text: of `model_type` {", ".join(f"`{name}`" for name in MODEL_TYPES)}. The
tensors that read pictures or sound are left out. `save_pretrained`, `lenskit convert` and `lenskit export` then write
the text model, and nothing of the rest."""


@torch.no_grad()
def measured(row: Row) -> tuple[float, int, int]:
    """The difference, and how many hook points a block and the model have."""
    with tempfile.TemporaryDirectory() as folder:
        hf_folder(row, Path(folder))
        model, hf = lk.HookedTransformer.from_pretrained(folder), hf_model(Path(folder))
    worst = 0.0
    for length in row.lengths:
        tokens = ids(2, length)
        hf(tokens[:, :1])  # rotary embeddings that remember the longest sequence forget it at a short one
        worst = max(worst, error(model(tokens), hf(tokens, use_cache=False).logits))
    block = sum(name.startswith("blocks.0.") for name in model.hook_points)
    return worst, block, len(model.hook_points)


def section(model_type: str, rows: list[Row]) -> str:
    """One family: what its file says of it, and its rows."""
    found = family(model_type, where="the registry")
    doc = inspect.getdoc(sys.modules[found.parts.__module__]) or ""
    file = Path(*MODULES[model_type].split(".")).with_suffix(".py")
    lines = [f"## {model_type}", "", f"`{found.hf_class}`, in [{file.name}](../{file}).", "", doc, ""]
    lines += ["| variant | attributes | difference | points |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        worst, block, points = measured(row)
        attributes = ", ".join(f"`{name}={_short(value)}`" for name, value in row.attributes.items()) or "–"
        lines.append(f"| {row.name} | {attributes} | {worst:.0e} | {block} ({points}) |")
    return "\n".join(lines) + "\n"


def _short(value: object) -> str:
    text = repr(value).replace("|", "\\|")
    return text if len(text) <= 60 else f"{text[:57]}..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", help="only this one, printed and not written")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    made = []
    for model_type in [args.family] if args.family else sorted(MODULES):
        made.append(section(model_type, [row for row in ROWS if row.model_type == model_type]))
        print(made[-1] if args.family else f"{model_type} done", flush=True)
    if not args.family:
        multimodal = textwrap.fill(MULTIMODAL, width=120, break_on_hyphens=False)
        PAGE.write_text("\n".join([HEAD, f"{multimodal}\n", *made]), encoding="utf-8")


if __name__ == "__main__":
    main()
