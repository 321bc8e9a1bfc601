"""`lenskit extract`: texts and hidden states of many prompts, in a folder that survives a kill."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import lenskit as lk
from lenskit import cli, resumable
from lenskit.checkpoints.source import EMBEDDED

SYSTEM = "Answer."
ASKED = ["What is the capital of France?", "Where is Nyhavn?", "Do you know where the Beehive is?"]
LAST = "blocks.3.hook_resid_post"  # of both demo models
FOLDER = ("--out", "out")


def extract(*args: object, model: object = "demo-llama", prompts: str = "prompts.jsonl") -> Result:
    line = ["extract", model, "--prompts", prompts, *FOLDER, *args]
    return CliRunner().invoke(cli.app, [str(arg) for arg in line], prog_name="lenskit")


def done(*args: object, **where: Any) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """The lines and the states that a run makes."""
    result = extract(*args, **where)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in Path("out/texts.jsonl").read_text(encoding="utf-8").splitlines()]
    return lines, [load_file(path) for path in sorted(Path("out/states").glob("*.safetensors"))]


def contents(folder: Path = Path("out")) -> dict[str, bytes]:
    """Every file of it that says something."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of prompts."""
    monkeypatch.chdir(tmp_path)
    write(*ASKED)
    return tmp_path


def write(*prompts: object, to: str = "prompts.jsonl") -> None:
    Path(to).write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, demo_llama: lk.HookedTransformer) -> None:
    """The model is not loaded anew by every run."""
    monkeypatch.setattr(lk.HookedTransformer, "from_pretrained", lambda *args, **how: demo_llama)


def copied(name: str, **attributes: object) -> Path:
    """A copy of a demo checkpoint whose tokenizer differs."""
    folder = Path(name)
    shutil.copytree(EMBEDDED / "demo-llama", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config = {key: value for key, value in {**config, **attributes}.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# -- what comes out


@pytest.mark.parametrize("opened", [False, True])
def test_texts_and_states_are_those_of_hugging_face(opened: bool, demo_llama: lk.HookedTransformer) -> None:
    """Each prompt through the chat template and the model alone; the state that the last layer leaves at its end."""
    lines, states = done(
        "--system", SYSTEM, "--at", "blocks.-1.hook_resid_post", "--tokens", -1, "--max-new-tokens", 8,
        *([] if opened else ["--no-generation-prompt"]),
    )  # fmt: skip
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(EMBEDDED / "demo-llama"), demo_llama.tokenizer
    for prompt, line, state in zip(ASKED, lines, states, strict=True):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=opened, return_dict=True, return_tensors="pt"
        )
        kept = []
        hook = theirs.model.layers[-1].register_forward_hook(lambda *args, kept=kept: kept.append(args[2]))
        out = theirs.generate(**ids, max_new_tokens=8, do_sample=False)[0]
        hook.remove()
        n = ids["input_ids"].shape[1]
        assert line["text"] == tokenizer.decode(out[n:], skip_special_tokens=True)
        assert line["tokens"] == out.tolist()
        assert line["full_text"] == tokenizer.decode(out)
        assert (line["n_prompt_tokens"], line["n_new_tokens"]) == (n, len(out) - n)
        assert state.keys() == {LAST}
        torch.testing.assert_close(state[LAST], kept[0][0, -1], rtol=1e-4, atol=1e-4)
    if opened:
        assert [line["text"] for line in lines] == [" Paris.", " Copenhagen.", " Wellington."]
        assert all(line["finished"] for line in lines)
        assert [(line["index"], line["prompt"]) for line in lines] == list(enumerate(ASKED))


def test_a_text_alone_is_used_as_it_is(demo_gpt2: lk.HookedTransformer) -> None:
    write("The Eiffel Tower is in the city of", {"prompt": "Nyhavn lies in", "label": 3})
    lines, states = done("--max-new-tokens", 1, model="demo-gpt2")
    assert [line["full_text"] for line in lines] == [
        "The Eiffel Tower is in the city of Paris",
        "Nyhavn lies in Copenhagen",
    ]
    assert [line["finished"] for line in lines] == [False, False]
    alone = demo_gpt2.run_with_hooks("Nyhavn lies in", [lk.Save(LAST, tokens=-1)]).saved[LAST]
    assert torch.equal(states[1][LAST], alone[0])


def test_chat_makes_texts_a_users_messages() -> None:
    lines, _ = done("--chat", "--max-new-tokens", 1)
    assert lines[0]["full_text"] == "<|user|> What is the capital of France?<|assistant|> Paris"


def test_messages_go_through_the_template_and_a_begun_answer_goes_on() -> None:
    begun = [{"role": "user", "content": ASKED[0]}, {"role": "assistant", "content": "Paris"}]
    write({"messages": begun[:1]}, {"messages": begun})
    lines, _ = done("--max-new-tokens", 1)
    assert lines[0]["full_text"] == f"<|user|> {ASKED[0]}<|assistant|> Paris"
    assert lines[1]["full_text"] == f"<|user|> {ASKED[0]}<|assistant|> Paris."
    assert lines[1]["messages"] == begun


def test_a_checkpoints_own_template_is_used() -> None:
    model = copied("mine", chat_template="{% for m in messages %}[{{ m['role'] }}: {{ m['content'] }}]{% endfor %}")
    lines, _ = done("--system", "S", "--max-new-tokens", 1, model=model)
    assert lines[0]["full_text"].startswith(f"[system: S][user: {ASKED[0]}]")


def test_without_a_template_texts_work_and_chats_are_refused() -> None:
    model = copied("plain", chat_template=None)
    for args in (["--system", "S"], ["--chat"]):
        result = extract(*args, model=model)
        assert result.exit_code == 1
        assert "got:      plain, whose tokenizer has no chat template" in result.stderr
        assert "to do:    give texts without --system and --chat" in result.stderr
        assert not Path("out").exists()
    write("a text", {"messages": [{"role": "user", "content": "hello"}]})
    assert "error: prompts.jsonl:2: this cannot be made a chat" in extract(model=model).stderr
    write("a text")
    assert done("--max-new-tokens", 1, model=model)[0][0]["full_text"].startswith("a text")


def test_what_the_template_refuses_is_told() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    result = extract("--system", "S", model=copied("strict", chat_template=strict))
    assert result.exit_code == 1
    assert "prompts.jsonl:1: this cannot be made a chat" in result.stderr
    assert "System role not supported" in result.stderr


def test_every_way_to_write_prompts() -> None:
    Path("some.txt").write_bytes("\ufeffNyhavn lies in\r\n\n  The café \n".encode())
    lines, _ = done("--max-new-tokens", 1, prompts="some.txt")
    assert [line["prompt"] for line in lines] == ["Nyhavn lies in", "The café"]
    shutil.rmtree("out")
    separators = "a\u2028b"  # which ends a line for str.splitlines
    Path("prompts.jsonl").write_text(f'\n"one"\r\n\n{{"prompt": "two"}}\n"{separators}"', encoding="utf-8")
    lines, _ = done("--max-new-tokens", 1)
    assert [line["prompt"] for line in lines] == ["one", "two", separators]


@pytest.mark.usefixtures("loaded")
def test_which_points_tokens_and_steps(demo_llama: lk.HookedTransformer) -> None:
    lines, states = done(
        "--at", "blocks.*.hook_attn_out", "--at", "blocks.0.hook_*_out", "--tokens", "0:2", "--max-new-tokens", 2
    )  # fmt: skip
    assert set(states[0]) == {f"blocks.{n}.hook_attn_out" for n in range(4)} | {"blocks.0.hook_mlp_out"}
    for line, state in zip(lines, states, strict=True):
        _, cache = demo_llama.run_with_cache(line["tokens"][: line["n_prompt_tokens"]])
        torch.testing.assert_close(state["blocks.2.hook_attn_out"], cache["attn_out", 2][0, :2], rtol=1e-4, atol=1e-4)

    shutil.rmtree("out")
    lines, states = done("--chat", "--tokens", "all", "--steps", "all", "--max-new-tokens", 9)
    for line, state in zip(lines, states, strict=True):
        assert set(state) == {f"{LAST}/{step}" for step in range(line["n_new_tokens"])}
        whole = torch.cat([state[f"{LAST}/{step}"] for step in range(line["n_new_tokens"])])
        _, cache = demo_llama.run_with_cache([line["tokens"][:-1]])
        torch.testing.assert_close(whole, cache["resid_post", -1][0], rtol=1e-3, atol=1e-3)

    shutil.rmtree("out")
    lines, states = done("--chat", "--steps", "2:5", "--max-new-tokens", 9)
    assert [set(state) for state in states] == [{f"{LAST}/2"}] * 3, "each is over after three steps"

    shutil.rmtree("out")
    assert [set(state) for state in done("--chat", "--steps", "8", "--max-new-tokens", 9)[1]] == [set()] * 3


def test_weights_may_be_loaded_in_another_dtype() -> None:
    assert done("--max-new-tokens", 1, "--dtype", "bfloat16")[1][0][LAST].dtype == torch.bfloat16


@pytest.mark.usefixtures("loaded")
def test_stacked_states_are_those_of_the_files() -> None:
    _, alone = done("--at", "blocks.*.hook_resid_post", "--at", "hook_embed", "--max-new-tokens", 2)
    shutil.rmtree("out")
    _, none = done("--at", "blocks.*.hook_resid_post", "--at", "hook_embed", "--max-new-tokens", 2, "--stacked")
    together = load_file("out/states.safetensors")
    assert none == []
    assert not Path("out/states").exists()
    for name, states in together.items():
        assert torch.equal(states, torch.stack([state[name] for state in alone]))
    assert together.keys() == alone[0].keys()
    assert Path("out/states.safetensors").stat().st_mode == Path("out/texts.jsonl").stat().st_mode


def test_drawn_tokens_can_be_drawn_again(demo_llama: lk.HookedTransformer) -> None:
    """Each prompt has a seed of its own, so that it does not matter what ran before it."""
    write(*["The"] * 4)
    how = ("--do-sample", "--temperature", 2, "--top-k", 50, "--top-p", 0.9, "--max-new-tokens", 12)
    lines, _ = done(*how, "--seed", 7)
    assert len({line["text"] for line in lines}) == 4
    options = {"do_sample": True, "temperature": 2.0, "top_k": 50, "top_p": 0.9, "max_new_tokens": 12}
    for line in lines:
        assert demo_llama.generate("The", seed=line["seed"], **options).tokens[0].tolist() == line["tokens"]
    shutil.rmtree("out")
    write(*["The"] * 2)
    assert done(*how, "--seed", 7)[0] == lines[:2]
    shutil.rmtree("out")
    assert done(*how, "--seed", 8)[0] != lines[:2]


def test_the_guide_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "extract.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    said = [text for kind, text in blocks if kind == "text"]
    told = []
    for kind, text in blocks:
        if kind == "json":
            Path("prompts.jsonl").write_text(text, encoding="utf-8")
        elif kind == "sh":
            command, *args = shlex.split(text.replace("\\\n", ""))
            assert command == "lenskit"
            result = CliRunner().invoke(cli.app, args)
            assert result.exit_code == 0, result.output
            told.append(result.stdout)
        elif kind == "python":
            exec(text, {})
    assert capsys.readouterr().out.splitlines()[0] == " Copenhagen. torch.Size([128])"
    assert told[1] == said[1]
    for path in re.findall(r"^(answers/\S+)", said[0], re.MULTILINE):
        assert Path(path).is_file()
    table = re.findall(r"^\| (`.*?) \|", page[page.index("## Lines of") :], re.MULTILINE)
    keys = re.findall(r"`(\w+)`", " ".join(table))
    lines = map(json.loads, Path("answers/texts.jsonl").read_text(encoding="utf-8").splitlines())
    assert {key for line in lines for key in line} | {"seed"} == set(keys)


# -- killed, and run again

KILLED = """
import os, shutil, signal, sys
from pathlib import Path

import lenskit as lk
from lenskit import cli, resumable

model = lk.HookedTransformer.from_pretrained("demo-llama")
lk.HookedTransformer.from_pretrained = lambda *args, **how: model
events = 0

def moment(*half):
    "One of the moments at which the disk changes; at the one that is looked at, the process is killed."
    global events
    events += 1
    if events == fatal:
        for cut in half:
            cut()
        os.kill(os.getpid(), signal.SIGKILL)

def halved(path):
    "The file as it is when half of what came last to it has been written."
    lines = Path(path).read_bytes().splitlines(keepends=True)
    Path(path).write_bytes(b"".join([*lines[:-1], lines[-1][: len(lines[-1]) // 2]]))

def whole_or_half(write, path_of):
    def wrapped(*args, **how):
        made = write(*args, **how)
        moment(lambda: halved(path_of(args)))
        return made
    return wrapped

def before(call):
    def wrapped(*args, **how):
        moment()
        return call(*args, **how)
    return wrapped

def one_file_less(folder, *args):
    next(Path(folder).iterdir()).unlink()
    moment()
    rmtree(folder)

def synced(file):
    if os.readlink(f"/proc/self/fd/{file}").endswith(".jsonl"):
        moment(lambda: halved("texts.jsonl"))
    moment()
    fsync(file)

rmtree, fsync = shutil.rmtree, os.fsync
resumable.save_file = whole_or_half(resumable.save_file, lambda args: args[1])
Path.write_text = whole_or_half(Path.write_text, lambda args: args[0])
Path.replace, os.truncate, shutil.rmtree = before(Path.replace), before(os.truncate), one_file_less
os.fsync = synced

fatal = 0
while True:
    fatal += 1
    child = os.fork()
    if child == 0:
        events = 0
        os.mkdir(f"{fatal}")
        os.mkdir(f"{fatal}/out")
        os.chdir(f"{fatal}/out")
        cli.app(["extract", "demo-llama", "--prompts", "../../prompts.jsonl", "--out", ".", *sys.argv[1:]])
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
"""

NO_PROC = not Path("/proc/self/fd").exists()


@pytest.mark.skipif(NO_PROC, reason="needs fork, and /proc to tell which file is written")
@pytest.mark.usefixtures("loaded")
def test_a_kill_at_any_moment_loses_and_repeats_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(*ASKED[:2])
    how = ["--chat", "--max-new-tokens", "2", "--stacked"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, *how],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    moments = sorted(int(path.name) for path in folder.glob("[0-9]*"))
    whole = contents(folder / str(moments.pop()) / "out")  # the last one was not killed
    assert len(moments) > 18, "each file, each of its renamings, each line"

    ran, generate = [], lk.HookedTransformer.generate
    monkeypatch.setattr(lk.HookedTransformer, "generate", lambda *a, **how: ran.append(1) or generate(*a, **how))
    committed = []
    for moment in moments:
        monkeypatch.chdir(folder / str(moment))
        ran.clear()
        lines = Path("out/texts.jsonl").read_bytes() if Path("out/texts.jsonl").exists() else b""
        result = extract(*how, prompts="../prompts.jsonl")
        assert result.exit_code == 0, (moment, result.output)
        assert contents() == whole, moment
        assert len(ran) == 2 - lines.count(b"\n"), "what has its line is not run again"
        assert f"{len(ran)} new, {2 - len(ran)} from before" in result.stdout
        committed.append(len(ran))
    assert set(committed) == {0, 1, 2}


def test_a_run_that_is_killed_from_outside_goes_on(folder: Path) -> None:
    write(*["The"] * 12)
    how = ["--do-sample", "--temperature", "5", "--max-new-tokens", "80"]
    command = [sys.executable, "-m", "lenskit", "extract", "demo-llama", "--prompts", "prompts.jsonl", *FOLDER, *how]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as running:
        texts = Path("out/texts.jsonl")
        while running.poll() is None and not (texts.exists() and texts.read_bytes().count(b"\n")):
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        _, told = running.communicate(timeout=30)
    assert running.returncode == -signal.SIGKILL
    assert told == b"", "no progress bar in a pipe"
    before = texts.read_bytes()
    assert 0 < before.count(b"\n") < 12
    lines, states = done(*how)
    assert texts.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert [line["index"] for line in lines] == list(range(12))
    assert [set(state) for state in states] == [{LAST}] * 12


def test_what_is_finished_needs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    done("--max-new-tokens", 2)
    before = contents()
    monkeypatch.setattr(lk.HookedTransformer, "from_pretrained", None)
    assert extract("--max-new-tokens", 2).stdout == "3 prompts in out: 0 new, 3 from before\n"
    assert contents() == before


def test_ctrl_c_exits_130_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    add = resumable.Folder.add

    def interrupted(self: resumable.Folder, line: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if line["index"] == 1:
            raise KeyboardInterrupt
        add(self, line, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(resumable.Folder, "add", interrupted)
        stopped = extract("--max-new-tokens", 2)
    assert (stopped.exit_code, stopped.stderr) == (130, "interrupted\n")
    assert extract("--max-new-tokens", 2).stdout == "3 prompts in out: 2 new, 1 from before\n"


def test_a_full_disk_is_a_message_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(resumable, "save_file", full)
        result = extract("--max-new-tokens", 2)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "repeat the command, which goes on where it stopped" in result.stderr
    assert extract("--max-new-tokens", 2).stdout == "3 prompts in out: 3 new, 0 from before\n"


# -- what is refused


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--max-new-tokens", 3], "max_new_tokens: 3"),
        (["--system", "S"], "system: 'S'"),
        (["--chat"], "chat: True"),
        (["--no-generation-prompt"], "generation_prompt: False"),
        (["--at", "hook_embed"], "at: ['hook_embed']"),
        (["--tokens", "0"], "tokens: '0'"),
        (["--steps", "1"], "steps: '1'"),
        (["--seed", "1"], "seed: 1"),
        (["--do-sample"], "do_sample: True"),
        (["--stacked"], "stacked: True"),
        (["--dtype", "float32"], "dtype: 'float32'"),
    ],
)
def test_another_command_in_the_same_folder_is_refused(changed: list[object], said: str) -> None:
    assert extract("--max-new-tokens", 2).exit_code == 0
    before = contents()
    result = extract("--max-new-tokens", 2, *changed)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: out was begun with something else\n  got:      {said}\n  expected: ")
    assert "repeat the command as it was" in result.stderr
    assert contents() == before


@pytest.mark.usefixtures("loaded")
def test_other_prompts_or_weights_in_the_same_folder_are_refused() -> None:
    model = copied("mine")
    assert extract("--max-new-tokens", 2, model=model).exit_code == 0
    write(*ASKED, "one more")
    assert "got:      prompts: " in extract("--max-new-tokens", 2, model=model).stderr
    write(*ASKED)
    model = model.rename("elsewhere")
    assert extract("--max-new-tokens", 2, model=model).exit_code == 0, "the same model in another place"
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "got:      checkpoint: " in extract("--max-new-tokens", 2, model=model).stderr


def remove_a_states_file() -> None:
    Path("out/states/00001.safetensors").unlink()


def swap_lines() -> None:
    lines = Path("out/texts.jsonl").read_bytes().splitlines(keepends=True)
    Path("out/texts.jsonl").write_bytes(b"".join(lines[::-1]))


def write_nonsense() -> None:
    Path("out/texts.jsonl").write_bytes(b"\x00\n" + Path("out/texts.jsonl").read_bytes())


def empty_the_manifest() -> None:
    Path("out/manifest.json").write_text("[]")


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_a_states_file, "no states/00001.safetensors"),
        (swap_lines, "in line 1 of texts.jsonl"),
        (write_nonsense, "in line 1 of texts.jsonl"),
        (empty_the_manifest, "a manifest.json that says nothing"),
    ],
)
def test_a_folder_that_somebody_changed_is_left_alone(damage: Callable[[], None], said: str) -> None:
    assert extract("--max-new-tokens", 2).exit_code == 0
    damage()
    before = contents()
    result = extract("--max-new-tokens", 2)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: out is not as it was left")
    assert said in result.stderr
    assert contents() == before


def test_a_folder_or_file_in_the_way_is_left_alone() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work")
    result = extract()
    assert result.exit_code == 1
    assert "out is in the way" in result.stderr
    assert contents() == {"thesis.tex": b"years of work"}
    shutil.rmtree("out")
    Path("out").write_text("a file")
    assert "got:      a file" in extract().stderr
    assert Path("out").read_text() == "a file"


def test_two_runs_in_one_folder_at_a_time_are_refused() -> None:
    assert extract("--max-new-tokens", 2).exit_code == 0
    with FileLock("out/.lock"):
        result = extract("--max-new-tokens", 2)
    assert result.exit_code == 1
    assert "out is in use" in result.stderr


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--at", "blocks.9.hook_resid_post"], "error: no hook point matches"),
        (["--tokens", "last"], "write --tokens 0, --tokens 0:5 or --tokens all"),
        (["--tokens", "0:1:2:3"], "--tokens selects nothing"),
        (["--tokens", "9"], "prompts.jsonl:2: hooks[0] Save("),
        (["--steps", "20"], "steps=20"),
        (["--steps=-1"], "steps cannot count from the end"),
        (["--temperature", "0.5"], "error: temperature would be without effect"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--stacked", "--tokens", "all"], "--tokens all of 10 and of 12 tokens (prompts.jsonl:3)"),
        (["--stacked", "--at", "blocks.0.attn.hook_pattern"], "attention to 10 and to 12 tokens (prompts.jsonl:3)"),
        (["--stacked", "--steps", "all"], "got:      --steps all"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(args: list[str], said: str) -> None:
    result = extract(*args)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output
    assert not Path("out").exists()


def test_a_prompt_that_is_too_long_is_named_before_any_runs() -> None:
    write("short", "long " * 250, "short")
    result = extract(model="demo-gpt2")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: prompts.jsonl:2: the generation would be longer than the model's context")
    assert not Path("out").exists()


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"not JSON", "got:      not JSON"),
        (b"3", "got:      3"),
        (b'{"text": "a"}', 'got:      {"text": "a"}'),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "there is no prompt in prompts.jsonl:2"),
        (b'{"messages": []}', "there is no prompt in prompts.jsonl:2"),
        (b'{"messages": [{"role": "user"}]}', "there is no prompt in prompts.jsonl:2"),
        (b'"\\ud800"', "there is no prompt in prompts.jsonl:2"),
        (b'""', "prompts.jsonl:2: the model cannot take this input"),
        (b"\xff", "there is no prompt in prompts.jsonl\n"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: bytes, said: str) -> None:
    Path("prompts.jsonl").write_bytes(b'"a text"\n' + line)
    result = extract()
    assert result.exit_code == 1
    assert said in result.stderr
    assert not Path("out").exists()


def test_a_file_without_prompts() -> None:
    Path("prompts.jsonl").write_text("\n \n")
    assert "a file without a line that is not blank" in extract().stderr
    result = extract(prompts="nothing.jsonl")
    assert result.exit_code == 1
    assert "nothing.jsonl" in result.stderr


@pytest.mark.usefixtures("loaded")
def test_two_system_messages_are_one_too_many() -> None:
    write({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "hello"}]})
    assert "leave --system out" in extract("--system", "T").stderr
    assert done("--max-new-tokens", 1)[0][0]["full_text"].startswith("<|system|> S<|user|> hello")


def test_at_a_terminal_there_is_a_progress_bar() -> None:
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-m", "lenskit", "extract", "demo-llama", "--prompts", "prompts.jsonl", *FOLDER]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    seen = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "3/3" in seen
