"""What `lenskit extract` does: a file of prompts in, a folder with their continuations and hidden states out.

Each prompt runs alone, so what comes of it depends neither on the others nor on whether the run was ever killed: the
same command goes on where the last one stopped (`resumable.py`).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lenskit.checkpoints.load import DTYPES
from lenskit.checkpoints.source import COMPANIONS, Source, find
from lenskit.errors import InputError, LenskitError, NotSavedError
from lenskit.extras import load
from lenskit.generation import Generation
from lenskit.interventions.ops import Save
from lenskit.interventions.plan import Plan
from lenskit.interventions.selectors import Canonical, indices
from lenskit.remote.connection import connect
from lenskit.resumable import Folder
from lenskit.sampling import sampling_from
from lenskit.transformer import HookedTransformer
from lenskit.version import __version__

LAST = "blocks.-1.hook_resid_post"  # what the last layer leaves
MIB = 2**20

Chat = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """An extraction, as it was asked for.

    source, revision, token: the checkpoint. device, device_map, dtype: where its weights go, and as what.
    prompts: a JSONL file, or a .txt file with one prompt a line. out: the folder.
    at: names or globs of hook points. tokens, steps: which of each prompt's: "-1", "0:5" or "all".
    system: a system message for each prompt. chat: texts are users' messages even without one.
    generation_prompt: whether the template opens the answer.
    stacked: all states in one file. options: of `HookedTransformer.generate`; "seed" is an int.
    remote: the address of the server that has the model; None for here.
    """

    source: str
    prompts: Path
    out: Path
    at: Sequence[str]
    tokens: str
    steps: str
    system: str | None
    chat: bool
    generation_prompt: bool
    stacked: bool
    options: dict[str, Any]
    revision: str | None = None
    token: str | None = None
    device: str | None = None
    device_map: str | None = None
    dtype: str | None = None
    remote: str | None = None

    def manifest(self, asked: "Sequence[Asked]", found: "Found") -> dict[str, Any]:
        """What is kept about the folder. Devices are left out, and a server's address: a run may move."""
        return {
            "lenskit": __version__,
            "model": self.source,
            "n_prompts": len(asked),
            "asked": {
                "checkpoint": found.checkpoint,
                "prompts": _digest([prompt.given for prompt in asked]),
                "at": list(self.at),
                "tokens": self.tokens,
                "steps": self.steps,
                "system": self.system,
                "chat": self.chat,
                "generation_prompt": self.generation_prompt,
                "stacked": self.stacked,
                "dtype": self.dtype,
                **self.options,
            },
        }


class Found(NamedTuple):
    """A checkpoint, here or on a server: what tells it from others, and how it becomes a model."""

    checkpoint: str
    load: Callable[[], HookedTransformer]


class Asked(NamedTuple):
    """A prompt as it stands in the file, a text or a chat's messages, and where that is."""

    where: str
    given: str | Chat


class Prompt(NamedTuple):
    """A prompt as ids; `number` counts the file's prompts from 0."""

    number: int
    asked: Asked
    ids: list[int]


@dataclass(frozen=True)
class Ready:
    """A job with everything checked: the hook points by name, and the steps that are kept."""

    model: HookedTransformer
    prompts: list[Prompt]
    plan: Plan
    names: list[str]
    steps: Sequence[int]


def extract(job: Job) -> str:
    """Do the job, or what is left of it.

    Returns:
        What was done, in a line.

    Raises:
        LenskitError: whatever is wrong with the checkpoint, the prompts, the options or the folder. What can be known
            before a prompt runs is raised before, and then nothing is written.
    """
    asked = read_prompts(job.prompts)
    with _found(job) as found:
        folder = Folder(job.out, job.manifest(asked, found))
        left = folder.n_finished() < len(asked)
        ready = _ready(job, asked, found) if left else None
        with folder.opened() as before:
            if ready is not None:
                for prompt in _bar(ready.prompts, before):
                    folder.add(*_run(job, ready, prompt))
            if job.stacked:
                folder.stack()
    return f"{len(asked)} prompts in {job.out}: {len(asked) - before} new, {before} from before"


@contextmanager
def _found(job: Job) -> Iterator[Found]:
    if job.remote is None:
        source = find(job.source, revision=job.revision, token=job.token)
        yield Found(
            source.revision or _fingerprint(source),
            lambda: HookedTransformer.from_pretrained(
                source.folder, device=job.device, device_map=job.device_map, dtype=_dtype(job.dtype)
            ),
        )
        return
    here = {"--device": job.device, "--device-map": job.device_map, "--dtype": job.dtype}
    for option, value in {**here, "--revision": job.revision, "--token": job.token}.items():
        if value is not None:
            fix = f"leave {option} out: the server has loaded its models"
            raise InputError(f"{option} is about weights here", got=f"{option}, and --remote", expected="one", fix=fix)
    with connect(job.remote) as server:
        yield Found(str(server.describe(job.source).get("digest")), lambda: server.model(job.source))


def _bar(prompts: list[Prompt], before: int) -> Any:
    tqdm = load("tqdm.auto").tqdm
    return tqdm(prompts[before:], total=len(prompts), initial=before, unit="prompt", disable=None)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def _fingerprint(found: Source) -> str:
    """Of a checkpoint's files, without reading all of them: training it further changes it, moving it does not."""
    digest = hashlib.sha256()
    patterns = (found.config_file.name, "*.safetensors", "*.bin", *COMPANIONS)
    for path in sorted({path for pattern in patterns for path in found.folder.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(MIB))
            file.seek(max(0, size - MIB))
            digest.update(file.read(MIB))
    return digest.hexdigest()[:16]


# -- prompts


def read_prompts(path: Path) -> list[Asked]:
    """The prompts of a file: JSON lines, or, in a .txt file, lines that are the prompts. Blank lines are none.

    Raises:
        InputError: there is none, or a line is something else.
        OSError: the file cannot be read.
    """
    asked = []
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise _no_prompt(str(path), str(error)) from error
    for number, line in enumerate(map(str.strip, lines), 1):
        if line:
            where = f"{path.name}:{number}"
            asked.append(Asked(where, line if path.suffix == ".txt" else _parsed(line, where)))
    if not asked:
        raise _no_prompt(str(path), "a file without a line that is not blank")
    return asked


def _parsed(line: str, where: str) -> str | Chat:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise _no_prompt(where, f"{line[:60]} ({error})") from error
    match value:
        case str():
            return value
        case {"prompt": str(text)} if "messages" not in value:
            return text
        case {"messages": [_, *_] as chat} if "prompt" not in value and all(map(_is_message, chat)):
            return list(chat)
    raise _no_prompt(where, line[:60])


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _no_prompt(where: str, got: str) -> InputError:
    return InputError(
        f"there is no prompt in {where}",
        got=got,
        expected='a JSON text, {"prompt": text}, or {"messages": [{"role": "user", "content": text}, ...]} in a line',
        fix="write a prompt a line as JSON, in UTF-8; a file of plain texts, one a line, has to be called .txt",
    )


def _ids(asked: Asked, model: HookedTransformer, job: Job) -> list[int]:
    """A prompt's ids: of its text as it is, or of what the tokenizer's chat template makes of its messages."""
    chat = asked.given
    if isinstance(chat, str):
        if job.system is None and not job.chat:
            ids: list[int] = model.to_tokens(chat).tokens[0].tolist()
            return ids
        chat = [{"role": "user", "content": chat}]
    if job.system is not None:
        if chat[0]["role"] == "system":
            raise _no_chat("a system message in the file, and --system", "one of the two", "leave --system out")
        chat = [{"role": "system", "content": job.system}, *chat]
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        lacks = "which has no tokenizer" if tokenizer is None else "whose tokenizer has no chat template"
        fix = "give texts without --system and --chat, which are used as they are, or add a chat_template.jinja to it"
        raise _no_chat(f"{job.source}, {lacks}", "a chat template, which --system, --chat and messages need", fix)
    begun = chat[-1]["role"] == "assistant"  # an answer, which the model goes on with
    opened = job.generation_prompt and not begun
    try:
        made: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=opened, continue_final_message=begun, return_dict=True
        )
    except (ValueError, TypeError, load("jinja2").TemplateError) as error:
        got = f"{type(error).__name__}: {error}"
        fix = "change the messages' roles or their order; some templates know no system message"
        raise _no_chat(got, "messages that the model's chat template takes", fix) from error
    return list(made["input_ids"])


def _no_chat(got: str, expected: str, fix: str) -> InputError:
    return InputError("this cannot be made a chat", got=got, expected=expected, fix=fix)


@contextmanager
def _about(asked: Asked) -> Iterator[None]:
    """Errors that are about a prompt name its line."""
    try:
        yield
    except LenskitError as error:
        what = f"{asked.where}: {error.what}"
        raise type(error)(what, got=error.got, expected=error.expected, fix=error.fix) from error


# -- running


def _ready(job: Job, asked: Sequence[Asked], found: Found) -> Ready:
    """The model and all else that is needed, with everything checked that is wrong from the start."""
    tokens, steps = _selector(job.tokens, "tokens"), _selector(job.steps, "steps")
    plan = Plan([Save(list(job.at), prompts=0, tokens=tokens, steps=steps)])
    model = found.load()
    names = model.hook_names(list(job.at))
    sampling_from(job.options)[0].check(model.cfg.d_vocab)
    prompts = []
    for number, prompt in enumerate(asked):
        with _about(prompt):
            prompts.append(Prompt(number, prompt, _ids(prompt, model, job)))
    for extreme in (min, max):  # what fits the shortest and the longest fits all
        chosen = extreme(prompts, key=lambda prompt: len(prompt.ids))
        with _about(chosen.asked):
            model.prepared(chosen.ids, plan, job.options)  # which checks, and runs nothing
    if job.stacked:
        _check_stackable(job, tokens, prompts, keys=any("key_pos" in model.hook_points[name].axes for name in names))
    return Ready(model, prompts, plan, names, sorted(indices(steps, job.options["max_new_tokens"])))


def _selector(text: str, name: str) -> Canonical:
    """A number, a slice, or None for all, from an option's text."""
    parts = [part.strip() for part in text.split(":")]
    with suppress(ValueError):
        if text == "all":
            return None
        if len(parts) == 1:
            return int(text)
        if len(parts) <= 3:
            return slice(*(int(part) if part else None for part in parts))
    raise InputError(
        f"--{name} selects nothing that there is",
        got=f"--{name} {text}",
        expected="a number, a slice, or all",
        fix=f"write --{name} 0, --{name} 0:5 or --{name} all",
    )


def _dtype(name: str | None) -> torch.dtype | None:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name is None or name in known:
        return known.get(name or "")
    fix = "leave it out for the checkpoint's own"
    raise InputError("no such dtype", got=f"--dtype {name}", expected=f"one of {', '.join(known)}", fix=fix)


def _check_stackable(job: Job, tokens: Canonical, prompts: Sequence[Prompt], *, keys: bool) -> None:
    """See that the states of all prompts will have one shape. keys: whether some have an axis of keys."""
    got, first = f"--steps {job.steps}" if job.steps != "0" else "", len(prompts[0].ids)
    for prompt in prompts:
        n = len(prompt.ids)
        if not isinstance(tokens, int) and len(indices(tokens, n)) != len(indices(tokens, first)):
            got = f"--tokens {job.tokens} of {first} and of {n} tokens ({prompt.asked.where})"
        elif keys and n != first:
            got = f"attention to {first} and to {n} tokens ({prompt.asked.where})"
    if got:
        raise InputError(
            "the states of these prompts cannot be stacked",
            got=got,
            expected="--steps 0, and states of one shape for every prompt",
            fix="say --tokens -1 --steps 0, or leave --stacked out: then each prompt has a file",
        )


def _run(job: Job, ready: Ready, prompt: Prompt) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A prompt's line and states."""
    seed = _seed(job.options["seed"], prompt.number)
    with _about(prompt.asked):
        found = ready.model.generate(prompt.ids, hooks=ready.plan, progress=False, **{**job.options, "seed": seed})
    new, given = found.new_tokens[0].tolist(), prompt.asked.given
    line = {
        "index": prompt.number,
        "prompt" if isinstance(given, str) else "messages": given,
        "text": _plain(ready.model, new),
        "full_text": found.texts[0],
        "tokens": [*prompt.ids, *new],
        "n_prompt_tokens": len(prompt.ids),
        "n_new_tokens": len(new),
        "finished": found.finished[0],
    }
    if job.options["do_sample"]:
        line["seed"] = seed
    return line, dict(_states(found, ready.names, ready.steps))


def _seed(seed: int, number: int) -> int:
    """The prompt's own: what ran before it makes no difference."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") // 2


def _plain(model: HookedTransformer, ids: list[int]) -> str:
    """Text without special tokens."""
    assert model.tokenizer is not None, "the prompts came from it"
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


def _states(found: Generation, names: Sequence[str], steps: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """What was saved, by name, with /step behind where several may be; steps that never ran are left out."""
    for name in names:
        with suppress(NotSavedError):
            value = found.saved[name]
            if isinstance(value, Tensor):
                yield name, value
            else:
                yield from ((f"{name}/{step}", state) for step, state in zip(steps, value, strict=False))
