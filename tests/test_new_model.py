"""scripts/new_model.py: a renamed architecture works straight away, and what is new is listed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "new_model.py"

# A LLaMA that transformers knows under another name, from a checkpoint, through lenskit and through transformers.
RENAMED = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
class RenamedConfig(LlamaConfig):
    model_type = "renamed"
class RenamedForCausalLM(LlamaForCausalLM):
    config_class = RenamedConfig
AutoConfig.register("renamed", RenamedConfig)
AutoModelForCausalLM.register(RenamedConfig, RenamedForCausalLM)
import lenskit as lk
torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=44)
hf = RenamedForCausalLM(RenamedConfig(**sizes, vocab_size=59, max_position_embeddings=40)).eval()
hf.save_pretrained(sys.argv[1])
if len(sys.argv) > 2:
    model = lk.HookedTransformer.from_pretrained(sys.argv[1])
    assert model.cfg.model_type == "renamed" and type(model.cfg).__name__ == "RenamedConfig"
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        theirs = hf(tokens).logits
        assert (model(tokens) - theirs).abs().max() < 1e-5 * theirs.abs().max()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the script changes and reads."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "lenskit", root / "lenskit", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "parity_table.py", root / "tests")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def run(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process that imports the copy."""
    command, environment = [sys.executable, *map(str, arguments)], {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)


def test_a_renamed_llama_works_straight_away(root: Path, tmp_path: Path) -> None:
    program = root / "renamed.py"
    program.write_text(RENAMED)
    made = run(root, program, tmp_path / "hf")
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "hf"
    arguments = ["--config", folder / "config.json", "--tensors", folder / "model.safetensors", "--root", root]
    written = run(root, SCRIPT, "renamed", *arguments)
    assert written.returncode == 0, written.stderr
    assert "from llama" in written.stdout
    assert written.stdout.count("to do:") == 1, "nothing but the paper"
    loaded = run(root, program, tmp_path / "again", "load")
    assert loaded.returncode == 0, loaded.stderr
    checked = run(root, "-m", "ruff", "check", "lenskit/models/renamed.py", "lenskit/models/registry.py")
    assert checked.returncode == 0, checked.stdout
    table = (root / "tests" / "parity_table.py").read_text()
    assert 'Row("default", "renamed")' in table
    compile(table, "parity_table.py", "exec")
    before = (root / "lenskit" / "models" / "renamed.py").read_bytes()
    again = run(root, SCRIPT, "renamed", *arguments)
    assert again.returncode == 1
    assert "already" in again.stderr
    assert (root / "lenskit" / "models" / "renamed.py").read_bytes() == before


def test_what_is_new_is_listed(root: Path, tmp_path: Path) -> None:
    config = {
        "architectures": ["NovelForCausalLM"], "model_type": "novel", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0,
        "sliding_window": 16, "novel_temperature": 2.5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = [f"model.layers.{n}.self_attn.{x}_proj.weight" for n in range(2) for x in "qkvo"]
    names = [*layer, "model.embed_tokens.weight", *(f"model.layers.{n}.self_attn.sparkle.weight" for n in range(2))]
    (tmp_path / "names.txt").write_text("\n".join(names))
    arguments = ["--config", tmp_path / "config.json", "--tensors", tmp_path / "names.txt", "--root", root]
    written = run(root, SCRIPT, "novel", *arguments)
    assert written.returncode == 0, written.stderr
    assert "novel_temperature = 2.5" in written.stdout
    assert "the tensor model.layers.{l}.self_attn.sparkle.weight" in written.stdout
    assert "no tensor model.layers.{l}.mlp.down_proj.weight" in written.stdout
    skeleton = (root / "lenskit" / "models" / "novel.py").read_text()
    compile(skeleton, "novel.py", "exec")
    assert "class NovelConfig(" in skeleton
    assert "novel_temperature" in skeleton


@pytest.mark.parametrize(
    ("name", "said"), [("llama", "already"), ("No-Name", "no model_type"), ("../x", "no model_type")]
)
def test_what_cannot_be_written_changes_nothing(root: Path, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in (root / "lenskit" / "models").glob("*.py")}
    refused = run(root, SCRIPT, name, "--config", tmp_path / "config.json", "--root", root)
    assert refused.returncode == 1
    assert said in refused.stderr
    assert {path: path.read_bytes() for path in (root / "lenskit" / "models").glob("*.py")} == before
