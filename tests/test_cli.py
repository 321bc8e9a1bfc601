"""The command line: what it prints, what it writes, how it fails."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import lenskit as lk
from lenskit import cli, commands, demo
from lenskit.checkpoints import write
from lenskit.checkpoints.source import embedded_names
from lenskit.checkpoints.well_known import well_known
from lenskit.models.registry import MODULES

ROOT = Path(__file__).parent.parent


def lenskit(*args: object) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="lenskit")


def ids() -> torch.Tensor:
    return torch.arange(12).unsqueeze(0)


# -- what works


def test_version() -> None:
    result = lenskit("--version")
    assert (result.exit_code, result.stdout) == (0, f"lenskit {lk.__version__}\n")


def test_models_lists_the_families_and_the_embedded_checkpoints() -> None:
    result = lenskit("models")
    assert result.exit_code == 0
    shown = set(result.stdout.split())
    assert set(embedded_names()) | set(MODULES) <= shown
    assert {hub_id for model_type in MODULES for hub_id in well_known(model_type)} <= shown
    assert {"LlamaForCausalLM", "GPT2LMHeadModel"} <= shown


def test_help_names_every_command() -> None:
    result = lenskit("--help")
    assert result.exit_code == 0
    assert {"demo", "convert", "export", "generate", "models"} <= set(result.stdout.split())


def test_a_converted_checkpoint_is_the_same_model(tmp_path: Path, demo_llama: lk.HookedTransformer) -> None:
    result = lenskit("convert", "demo-llama", tmp_path / "ours")
    assert result.exit_code == 0
    assert str(tmp_path / "ours") in result.stdout.replace("\n", "")
    assert torch.equal(lk.HookedTransformer.from_pretrained(tmp_path / "ours")(ids()), demo_llama(ids()))


def test_an_exported_checkpoint_is_hugging_faces(tmp_path: Path, demo_gpt2: lk.HookedTransformer) -> None:
    lenskit("convert", "demo-gpt2", tmp_path / "ours")
    assert lenskit("export", tmp_path / "ours", tmp_path / "theirs").exit_code == 0
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "gpt2"
    assert torch.equal(lk.HookedTransformer.from_pretrained(tmp_path / "theirs")(ids()), demo_gpt2(ids()))


def test_revision_and_token_go_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(write, "convert", lambda source, dest, **how: asked.append((source, dest, how)) or dest)
    lenskit("convert", "owner/name", tmp_path / "ours", "--revision", "main", "--token", "secret")
    assert asked == [("owner/name", tmp_path / "ours", {"revision": "main", "token": "secret"})]


def test_the_demo_writes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(demo, "run", written.append)
    assert lenskit("demo").exit_code == 0
    assert lenskit("demo", "--out", tmp_path / "page.html").exit_code == 0
    assert written == [Path("lenskit-demo.html"), tmp_path / "page.html"]


# -- what goes wrong


@pytest.mark.parametrize("command", ["convert", "export"])
def test_an_error_is_its_message_and_exit_status_1(tmp_path: Path, command: str) -> None:
    result = lenskit(command, "./nowhere", tmp_path / "ours")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no checkpoint at './nowhere'\n  got: ")
    assert "expected:" in result.stderr
    assert "to do:" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_destination_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "thesis.tex").write_text("years of work")
    result = lenskit("convert", "demo-gpt2", tmp_path / "ours")
    assert result.exit_code == 1
    assert "thesis.tex" in result.stderr
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["thesis.tex"]


def test_what_the_system_refuses_is_a_message_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = lenskit("convert", "demo-gpt2", tmp_path / "file" / "ours")
    assert result.exit_code == 1
    assert "file" in result.stderr
    assert "Traceback" not in result.stderr


def test_our_own_bugs_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: object, **kwargs: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(write, "convert", bug)
    assert isinstance(lenskit("convert", "demo-gpt2", tmp_path / "ours").exception, AssertionError)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_an_interrupted_conversion_exits_130_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def interrupted(tensors: object, path: Path, **kwargs: object) -> None:
        path.write_bytes(b"half a tensor")
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "save_file", interrupted)
    result = lenskit(command, "demo-gpt2", tmp_path / "ours")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_failed_conversion_leaves_an_empty_destination_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "ours").mkdir()
    monkeypatch.setattr(write, "save_file", fails)
    result = lenskit("convert", "demo-gpt2", tmp_path / "ours")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert not list((tmp_path / "ours").iterdir())


# -- in processes of their own


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}


def test_python_m_lenskit_is_the_command(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "lenskit", "convert", "./nowhere", "ours"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no checkpoint at './nowhere'")
    assert not list(tmp_path.iterdir())


def test_the_script_converts(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), "demo-gpt2", "ours"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "wrote ours\n"
    assert (tmp_path / "ours" / "lenskit.json").is_file()


SLOW_WRITER = """
import signal
import time
from lenskit import cli
from lenskit.checkpoints import write

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

def slow(tensors, path, **kwargs):
    path.write_bytes(b"half a tensor")
    print("writing", flush=True)
    time.sleep(60)

write.save_file = slow
cli.app(["convert", "demo-gpt2", "ours"])
"""


def test_ctrl_c_exits_130_and_leaves_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "writing\n"
        assert list(tmp_path.iterdir())  # the half-written folder
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=30)
    assert running.returncode == 130
    assert told.endswith("interrupted\n")
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_importing_lenskit_brings_no_command_line(environment: dict[str, str]) -> None:
    check = "import sys, lenskit; print(sorted({'typer', 'rich', 'plotly'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- generating


EIFFEL = "The Eiffel Tower is in the city of"


def test_generate_continues_each_prompt() -> None:
    result = lenskit("generate", "demo-gpt2", EIFFEL, "Hagia Sophia can be found in the city of", "--max-new-tokens", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"{EIFFEL} Paris", "Hagia Sophia can be found in the city of Istanbul"]


def test_generate_reads_prompts_from_a_pipe_and_prints_json() -> None:
    pipe = CliRunner().invoke(
        cli.app,
        ["generate", "demo-llama", "-", "--json", "--max-new-tokens", "9"],
        input=f"{EIFFEL}\n\nNyhavn lies in\n",
    )
    assert pipe.exit_code == 0, pipe.output
    one, other = (json.loads(line) for line in pipe.stdout.splitlines())
    assert one == {"prompt": EIFFEL, "new_text": " Paris.<|endoftext|>", "steps_run": 3, "finished": True}
    assert other["new_text"].startswith(" Copenhagen")


def test_generate_runs_a_plan_and_keeps_what_is_saved(tmp_path: Path, demo_gpt2: lk.HookedTransformer) -> None:
    ops = [lk.Scale("blocks.*.hook_mlp_out", 0.0), lk.Save("blocks.*.hook_resid_post", tokens=-1, steps=0, name="ends")]
    lk.Plan(ops).save(tmp_path / "plan.json")
    out = tmp_path / "saved.safetensors"
    result = lenskit(
        "generate", "demo-gpt2", EIFFEL, "--plan", tmp_path / "plan.json", "--save", "hook_embed", "--out", out,
        "--max-new-tokens", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = demo_gpt2.generate(EIFFEL, max_new_tokens=2, hooks=[*ops, lk.Save("hook_embed")])
    assert expected.texts[0] in result.stdout
    kept = load_file(out)
    assert set(kept) == {f"ends/blocks.{n}.hook_resid_post" for n in range(4)} | {"hook_embed/0", "hook_embed/1"}
    assert torch.equal(kept["hook_embed/1"], expected.saved["hook_embed"][1])
    assert re.search(r"hook_embed/0 +\(1, 11, 128\)", result.stdout)
    assert f"wrote {out}" in result.stdout.replace("\n", "")


def test_generate_names_steps_by_their_number(tmp_path: Path) -> None:
    """Also where only some were saved, or the generation was over before."""
    ops = [
        lk.Save("hook_embed", tokens=-1, steps=[1, 2, 9]), lk.Save("hook_embed", steps=8, name="late"),
        lk.Save("blocks.*.hook_mlp_out", steps=slice(7, None), name="later"),
        lk.Save("blocks.*.hook_attn_out", tokens=-1, steps=slice(1, None), name="all"),
        lk.Save(lk.Act("hook_embed", steps=0).sum(-1), name="one value"),
    ]  # fmt: skip
    lk.Plan(ops).save(tmp_path / "plan.json")
    out = tmp_path / "saved.safetensors"
    result = lenskit(
        "generate", "demo-gpt2", EIFFEL, "--plan", tmp_path / "plan.json", "--out", out, "--max-new-tokens", 12
    )
    assert result.exit_code == 0, result.output
    kept = load_file(out)
    attn = {f"all/blocks.{layer}.hook_attn_out/{step}" for layer in range(4) for step in (1, 2)}
    assert set(kept) == {"hook_embed/1", "hook_embed/2", "one value"} | attn
    table = {cells[0].strip(): cells[1].strip() for cells in map(cut, result.stdout.splitlines()) if len(cells) > 1}
    assert table["late"] == table["later/blocks.0.hook_mlp_out"] == "never ran"
    assert table["hook_embed/1, 2"] == "(1, 128)"
    assert out.stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0o666


def cut(line: str) -> list[str]:
    """A table's line, in cells."""
    return re.split(r" {2,}", line.strip())


def test_generate_shows_what_a_plan_saves_and_nobody_keeps(tmp_path: Path) -> None:
    lk.Plan([lk.Save("blocks.-1.hook_resid_post", tokens=-1)]).save(tmp_path / "plan.json")
    result = lenskit("generate", "demo-gpt2", EIFFEL, "--plan", tmp_path / "plan.json", "--max-new-tokens", 5)
    assert re.search(r"blocks\.3\.hook_resid_post/0 … 2 +\(1, 128\) +float32", result.stdout)
    assert "not kept: --out FILE.safetensors" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_generate_prints_text_as_it_is() -> None:
    """No markup, no wrapping; what stands before the continuation is what was given."""
    odd = r"a [bold]x[/bold] \[y\ " + "long " * 40 + "end\\"
    result = lenskit("generate", "demo-llama", odd, "--max-new-tokens", 1)
    assert result.stdout.startswith(odd)
    assert result.stdout.count("\n") == 1


def test_generate_takes_a_pipe_without_a_word() -> None:
    given = f"{EIFFEL}\r\n\n  \nNyhavn lies in"
    pipes = [
        CliRunner().invoke(cli.app, ["generate", "demo-gpt2", *dash, "--max-new-tokens", "1"], input=given)
        for dash in ([], ["-"])
    ]
    assert pipes[0].exit_code == 0, pipes[0].output
    assert pipes[0].stdout == pipes[1].stdout == f"{EIFFEL} Paris\nNyhavn lies in Copenhagen\n"
    mixed = CliRunner().invoke(cli.app, ["generate", "demo-gpt2", "Rome", "-", "--json"], input=EIFFEL)
    assert [json.loads(line)["prompt"] for line in mixed.stdout.splitlines()] == ["Rome", EIFFEL]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--save", "hook_embed"], "--out, the file that they go to"),
        (["--save", "hook_embd", "--out", "x.safetensors"], "no hook point matches 'hook_embd'"),
        (["--plan", "nothing.json"], "nothing.json"),
        (["--temperature", "0.5"], "pass do_sample=True"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "500"], "at most 256 positions"),
        (["--out", "x.safetensors"], "nothing to save"),
        (["--save", "hook_embed", "--out", "x.npz"], "write --out x.safetensors"),
        (["--save", "hook_embed", "--out", "nowhere/x.safetensors"], "make the folder"),
        (["--save", "hook_embed", "--save", "hook_embed", "--out", "x.safetensors"], "could not be told apart"),
    ],
)
def test_generate_says_what_is_wrong(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = lenskit("generate", "demo-gpt2", EIFFEL, *args)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_generate_does_not_write_over_the_plans_own_tensors(tmp_path: Path) -> None:
    plan = lk.Plan([lk.Add("hook_embed", torch.ones(128)), lk.Save("hook_embed")])
    plan.save(tmp_path / "plan.json")
    result = lenskit(
        "generate", "demo-gpt2", EIFFEL, "--plan", tmp_path / "plan.json", "--out", tmp_path / "plan.safetensors"
    )
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "where the plan's own tensors are" in result.stderr
    assert lk.Plan.load(tmp_path / "plan.json").digest() == plan.digest()


def test_generate_without_a_prompt() -> None:
    result = CliRunner().invoke(cli.app, ["generate", "demo-gpt2"], input="\n \n")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: there is no prompt")


def test_generate_tells_two_tensors_of_one_name_apart_or_says_so(tmp_path: Path) -> None:
    lk.Plan([lk.Save("hook_embed", name="a"), lk.Save("hook_embed", steps=0, name="a/1")]).save(tmp_path / "plan.json")
    result = lenskit(
        "generate", "demo-gpt2", EIFFEL, "--plan", tmp_path / "plan.json", "--out", tmp_path / "x.safetensors"
    )
    assert result.exit_code == 1
    assert "two tensors called 'a/1'" in result.stderr
    assert not (tmp_path / "x.safetensors").exists()


def test_generate_keeps_what_it_cannot_write_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(commands, "save_file", full)
    result = lenskit("generate", "demo-gpt2", EIFFEL, "--save", "hook_embed", "--out", tmp_path / "x.safetensors")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.output


def test_generate_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lk.HookedTransformer, "generate", interrupted)
    result = lenskit("generate", "demo-gpt2", EIFFEL, "--save", "hook_embed", "--out", tmp_path / "x.safetensors")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


class Screen:
    """A console that keeps each piece that is printed."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def print(self, piece: object = "\n", end: str = "") -> None:
        self.pieces.append(str(piece))


def test_tokens_are_shown_as_they_come(demo_gpt2: lk.HookedTransformer) -> None:
    """A character of several tokens when it is whole."""
    screen, tokens = Screen(), demo_gpt2.to_tokens("Rome ünï").tokens[0]
    assert len(tokens) > len("ünï"), "some of them are bytes"
    shown = commands.Shown(demo_gpt2, screen)
    shown.put(tokens[None, :2])
    assert screen.pieces == []
    for token in tokens[2:]:
        shown.put(token[None])
    assert "".join(screen.pieces) == demo_gpt2.to_string(tokens)[len(demo_gpt2.to_string(tokens[:2])) :]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in screen.pieces)
    shown.end()
    assert screen.pieces[-1] == "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_at_a_terminal_one_prompt_streams(tmp_path: Path, environment: dict[str, str]) -> None:
    """With the same file and table as in a pipe, and no progress bar in between."""
    out = tmp_path / "x.safetensors"
    ours, theirs = os.openpty()
    command = [
        sys.executable,
        "-m",
        "lenskit",
        "generate",
        "demo-gpt2",
        EIFFEL,
        "--save",
        "hook_embed",
        "--out",
        str(out),
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**environment, "TERM": "dumb"}, stdin=theirs, stdout=theirs
    ) as run:
        assert run.wait(120) == 0
    os.close(theirs)
    seen = os.read(ours, 100_000).decode()
    os.close(ours)
    assert f"{EIFFEL} Paris.<|endoftext|>" in re.sub(r"\x1b\[[0-9;]*m", "", seen)
    assert set(load_file(out)) == {"hook_embed/0", "hook_embed/1", "hook_embed/2"}


def test_generate_draws_the_same_with_a_seed() -> None:
    drawn = [
        lenskit("generate", "demo-gpt2", "The", "--do-sample", "--temperature", 2, "--seed", seed, "--json").stdout
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
