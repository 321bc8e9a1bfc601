"""What the command `lenskit generate` does with its arguments: prompts in, continuations and saved activations out."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lenskit.errors import InputError, NotSavedError
from lenskit.generation import Generation
from lenskit.interventions.ops import Op, Save
from lenskit.interventions.plan import Plan
from lenskit.interventions.plan_file import tensors_file
from lenskit.interventions.selectors import indices
from lenskit.remote.connection import connect
from lenskit.transformer import HookedTransformer

Key = tuple[str, int | None]  # of a saved tensor: its name, and its step where there is one a step


def generate(
    source: str,
    prompts: Sequence[str],
    *,
    plan: Path | None,
    save: Sequence[str],
    out: Path | None,
    as_json: bool,
    options: dict[str, Any],
    remote: str | None = None,
) -> None:
    """Continue prompts and print what comes; keep what was saved in a file.

    Args:
        source: a checkpoint's name, folder or hub id.
        prompts: texts; "-" stands for the lines of standard input, and so does nothing at all, where that is a pipe.
        plan: a file that `Plan.save` wrote.
        save: names or globs of hook points to save, at every step.
        out: a .safetensors file for what is saved; keys are the names, with /step behind where there is one a step.
        as_json: print one JSON object a prompt instead of text.
        options: of `HookedTransformer.generate`.
        remote: the address of the server that has the model; None for here.

    Raises:
        LenskitError: whatever is wrong with the checkpoint, the plan or the options; nothing is written.
    """
    texts = _texts(prompts)
    hooks: list[Op] = [*(Plan.load(plan).ops if plan else ()), *(Save(name) for name in save)]
    saves = [op for op in hooks if isinstance(op, Save)]
    _check_out(out, saves, plan, asked=bool(save))
    console = Console(soft_wrap=True, highlight=False)
    with loaded(source, remote) as model:
        if len(texts) == 1 and not as_json and sys.stdout.isatty() and remote is None:
            console.print(Text(texts[0], "dim"), end="")
            found = model.generate(texts, hooks=hooks, streamer=Shown(model, console), progress=False, **options)
        else:
            found = model.generate(texts, hooks=hooks, **options)
            _tell(texts, found, console, as_json=as_json)
    tensors = dict(_tensors(found, saves, model, options["max_new_tokens"]))
    if out is not None:
        _write(tensors, out)
    if saves and not as_json:
        _show(tensors, out)


@contextmanager
def loaded(source: str, remote: str | None) -> Iterator[HookedTransformer]:
    """A model, here or on a server."""
    if remote is None:
        yield HookedTransformer.from_pretrained(source)
    else:
        with connect(remote) as server:
            yield server.model(source)


class Shown:
    """A streamer that prints each new token of one prompt as it comes, once its characters are whole."""

    def __init__(self, model: HookedTransformer, console: Console) -> None:
        self.model, self.console = model, console
        self.ids: list[int] = []
        self.shown = 0  # characters, those of the prompt included

    def put(self, tokens: Tensor) -> None:
        """Take ids: first the prompt's, which are not printed, then one at a time."""
        prompt = not self.ids
        self.ids += tokens.flatten().tolist()
        text = self.model.to_string(self.ids)
        if prompt:
            self.shown = len(text)
        elif not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the next token has the rest of a character
            self._print(text)

    def end(self) -> None:
        """Print what is left, and end the line."""
        self._print(self.model.to_string(self.ids))
        self.console.print()

    def _print(self, text: str) -> None:
        self.console.print(Text(text[self.shown :]), end="")
        self.shown = len(text)


def _texts(prompts: Sequence[str]) -> list[str]:
    texts: list[str] = []
    piped = not prompts and not sys.stdin.isatty()
    for prompt in ["-"] if piped else prompts:
        texts += [line for line in sys.stdin.read().splitlines() if line.strip()] if prompt == "-" else [prompt]
    if texts:
        return texts
    raise InputError(
        "there is no prompt",
        got="no text, and none on standard input",
        expected="texts to continue, or a pipe with one a line",
        fix='write lenskit generate demo-gpt2 "The Eiffel Tower is in"',
    )


def _check_out(out: Path | None, saves: Sequence[Save], plan: Path | None, *, asked: bool) -> None:
    """See, before anything runs, that what is saved has a place to go to, and that the place has something to keep."""
    if out is None:
        if asked:
            raise _bad_out("no file", "--out, the file that they go to", "add --out activations.safetensors")
        return
    if not saves:
        fix = "add --save with a hook point's name, a Save to the plan, or leave --out out"
        raise _bad_out(f"--out {out}, and nothing to save", "something to keep", fix)
    if out.suffix != ".safetensors":
        raise _bad_out(
            f"--out {out}", "a name that ends in .safetensors", f"write --out {out.with_suffix('.safetensors')}"
        )
    if plan is not None and out.resolve() == tensors_file(plan.resolve()):
        raise _bad_out(f"--out {out}, where the plan's own tensors are", "another file", "choose another name")
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise _bad_out(f"--out {out}", "a file in a folder that is there", "make the folder, or choose another name")


def _bad_out(got: str, expected: str, fix: str) -> InputError:
    return InputError("activations are kept in a file", got=got, expected=expected, fix=fix)


def _tell(texts: Sequence[str], found: Generation, console: Console, *, as_json: bool) -> None:
    for text, new, steps, finished in zip(texts, found.new_texts, found.steps_run, found.finished, strict=True):
        if as_json:
            print(json.dumps({"prompt": text, "new_text": new, "steps_run": steps, "finished": finished}))
        else:
            console.print(Text.assemble((text, "dim"), new))


# -- what was saved


def _tensors(
    found: Generation, saves: Sequence[Save], model: HookedTransformer, n_steps: int
) -> Iterator[tuple[Key, Tensor | None]]:
    """All tensors; None for a name of which no step ran."""
    for op in saves:
        steps = sorted(set(indices(op.selectors.steps, n_steps)))
        for key in model.hook_names(op.at) if op.name is None else [op.name]:
            for name, value in _by_point(key, found.saved):
                if isinstance(value, list) and value:
                    yield from (((name, step), tensor) for step, tensor in zip(steps, value, strict=False))
                else:
                    yield (name, None), value if isinstance(value, Tensor) else None


def _by_point(key: str, saved: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        value = saved[key]
    except NotSavedError:  # its step never ran
        value = None
    if isinstance(value, Mapping):
        yield from ((f"{key}/{point}", part) for point in value for _, part in _by_point(point, value))
    else:
        yield key, value


def _write(tensors: Mapping[Key, Tensor | None], out: Path) -> None:
    named: dict[str, Tensor] = {}
    for (name, step), tensor in tensors.items():
        if tensor is None:
            continue
        key = name if step is None else f"{name}/{step}"
        if key in named:
            raise _bad_out(f"two tensors called {key!r}", "a name for each", "name the saves of the plan differently")
        named[key] = tensor.contiguous()
    try:
        save_file(named, out)
        # As the folder lets others; safetensors' own would be readable for its owner alone.
        out.chmod(out.absolute().parent.stat().st_mode & 0o666)
    except SafetensorError as error:
        raise _bad_out(f"{error}", f"to be able to write {out}", "choose another place") from error


def _show(tensors: Mapping[Key, Tensor | None], out: Path | None) -> None:
    """What was saved, as a table: a row for each name, or for the steps of it that are alike."""
    table = Table("saved", "shape", "dtype", box=None, header_style="dim")
    for (name, shape, dtype), alike in groupby(tensors, key=lambda key: (key[0], *_kind(tensors[key]))):
        steps = [step for _, step in alike if step is not None]
        table.add_row(f"{name}/{_span(steps)}" if steps else name, shape, dtype)
    console = Console(highlight=False)
    console.print(table)
    console.print(Text(f"wrote {out}" if out else "not kept: --out FILE.safetensors writes these"))


def _span(steps: Sequence[int]) -> str:
    whole = len(steps) > 2 and list(steps) == list(range(steps[0], steps[-1] + 1))
    return f"{steps[0]} … {steps[-1]}" if whole else ", ".join(map(str, steps))


def _kind(tensor: Tensor | None) -> tuple[str, str]:
    return ("never ran", "") if tensor is None else (f"{tuple(tensor.shape)}", f"{tensor.dtype}".removeprefix("torch."))
