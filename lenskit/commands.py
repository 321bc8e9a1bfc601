"""What the command `lenskit generate` does with its arguments: prompts in, continuations and saved activations out."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from lenskit.errors import InputError
from lenskit.generation import Generation
from lenskit.interventions.ops import Op, Save
from lenskit.interventions.plan import Plan
from lenskit.transformer import HookedTransformer


def generate(
    source: str,
    prompts: Sequence[str],
    *,
    plan: Path | None,
    save: Sequence[str],
    out: Path | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Continue prompts and print what comes; keep what was saved in a file.

    Args:
        source: a checkpoint's name, folder or hub id.
        prompts: texts; "-" stands for the lines of standard input.
        plan: a file that `Plan.save` wrote.
        save: names or globs of hook points to save, at every step.
        out: a .safetensors file for what is saved; keys are the names, with /step behind where there is one a step.
        as_json: print one JSON object a prompt instead of text.
        options: of `HookedTransformer.generate`.

    Raises:
        LenskitError: whatever is wrong with the checkpoint, the plan or the options; nothing is written.
    """
    texts = list(_texts(prompts))
    hooks: list[Op] = [*(Plan.load(plan).ops if plan else ()), *(Save(name) for name in save)]
    if out is None and save:
        raise InputError(
            "--save keeps activations in a file",
            got="no file",
            expected="--out, the file that they go to",
            fix="add --out activations.safetensors",
        )
    model = HookedTransformer.from_pretrained(source)
    streamed = len(texts) == 1 and not as_json and sys.stdout.isatty()
    if streamed:
        _stream(model, texts[0], hooks, options, out)
        return
    found = model.generate(texts, hooks=hooks, **options)
    for text, new, steps, finished in zip(texts, found.new_texts, found.steps_run, found.finished, strict=True):
        if as_json:
            print(json.dumps({"prompt": text, "new_text": new, "steps_run": steps, "finished": finished}))
        else:
            Console(soft_wrap=True, highlight=False).print(f"[dim]{_plain(text)}[/dim]{_plain(new)}")
    _keep(found, out, quiet=as_json)


def _texts(prompts: Sequence[str]) -> Iterator[str]:
    for prompt in prompts:
        if prompt == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield prompt


def _stream(
    model: HookedTransformer, text: str, hooks: Sequence[Op], options: dict[str, Any], out: Path | None
) -> None:
    """One prompt at a terminal: tokens as they come."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[dim]{_plain(text)}[/dim]", end="")
    tensors: dict[str, Tensor] = {}
    for step in model.generate_steps([text], hooks=hooks, **options):
        console.print(_plain(step.texts[0]), end="")
        for key, value in step.saved.items():
            tensors |= _flat(key, [value], first=step.index)
    console.print()
    _write(tensors, out)


def _keep(found: Generation, out: Path | None, *, quiet: bool) -> None:
    tensors: dict[str, Tensor] = {}
    for key, value in found.saved.items():
        tensors |= _flat(key, value)
    _write(tensors, out, quiet=quiet)


def _write(tensors: dict[str, Tensor], out: Path | None, *, quiet: bool = False) -> None:
    """The file, and a table of what is in it."""
    if out is not None:
        save_file(tensors, out)
    if not tensors or quiet:
        return
    table = Table("saved", "shape", "dtype", box=None, header_style="dim")
    for key, tensor in tensors.items():
        table.add_row(key, str(tuple(tensor.shape)), str(tensor.dtype).removeprefix("torch."))
    console = Console()
    console.print(table)
    console.print(f"wrote {out}" if out else "not kept: --out FILE.safetensors writes these", highlight=False)


def _flat(key: str, value: Any, first: int = 0) -> dict[str, Tensor]:
    """Tensors by name: lists by step, dictionaries by point."""
    if isinstance(value, Tensor):
        return {key: value.contiguous()}
    parts = value.items() if isinstance(value, dict) else enumerate(value, first)
    flat: dict[str, Tensor] = {}
    for name, part in parts:
        flat |= _flat(f"{key}/{name}", part)
    return flat


def _plain(text: str) -> str:
    """Text in which rich sees no markup."""
    return text.replace("[", r"\[")
