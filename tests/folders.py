"""Small checkpoints in every form that they are found in, and ways to break them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_table import Row, hf_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lenskit as lk
from lenskit.errors import LenskitError

ROOT = Path(lk.__file__).parents[1]

PREFIX = {"gpt2": "transformer.", "llama": "model."}


def write_hf(folder: Path, model_type: str, *, dtype: torch.dtype = torch.float32, **attributes: Any) -> Path:
    """A tiny random Hugging Face checkpoint in one safetensors file."""
    hf_folder(Row("", model_type, attributes), folder)
    if dtype != torch.float32:
        save(folder, {name: tensor.to(dtype) for name, tensor in tensors(folder).items()})
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, read anew."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}


def save(folder: Path, new: dict[str, Tensor]) -> None:
    """Write the folder's tensors as one safetensors file, instead of what there was."""
    remove_weights(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in new.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def remove_weights(folder: Path) -> None:
    for pattern in ("*.safetensors", "*.bin", "*.index.json"):
        for path in folder.glob(pattern):
            path.unlink()


def save_sharded(folder: Path, new: dict[str, Tensor], ending: str, *, n_shards: int = 3) -> None:
    """Write the folder's tensors as shards with an index, instead of what there was."""
    remove_weights(folder)
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    weight_map = {name: f"{stem}-{i % n_shards + 1:05d}-of-{n_shards:05d}{ending}" for i, name in enumerate(new)}
    for file in set(weight_map.values()):
        shard = {name: tensor.contiguous() for name, tensor in new.items() if weight_map[name] == file}
        if ending == ".bin":
            torch.save(shard, folder / file)
        else:
            save_file(shard, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index))


def save_bin(folder: Path, new: Any, **options: Any) -> None:
    """`torch.save` whatever it is as the folder's weights, instead of what there was."""
    remove_weights(folder)
    torch.save(new, folder / "pytorch_model.bin", **options)


FORMS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "safetensors": save,
    "safetensors, sharded": lambda folder, new: save_sharded(folder, new, ".safetensors"),
    "bin": save_bin,
    "bin, sharded": lambda folder, new: save_sharded(folder, new, ".bin"),
    "bin of parameters": lambda folder, new: save_bin(folder, {k: torch.nn.Parameter(v) for k, v in new.items()}),
    "bin before torch 1.6": lambda folder, new: save_bin(folder, new, _use_new_zipfile_serialization=False),
}


def write_big(folder: Path, form: str, **attributes: Any) -> tuple[Path, int]:
    """A LLaMA of a width of 1024, all of whose weights are 0.01, and how many bytes they are."""
    config = AutoConfig.for_model(
        "llama", hidden_size=1024, intermediate_size=4096, **{"num_hidden_layers": 1, **attributes}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    weights = {name: torch.full(tensor.shape, 0.01) for name, tensor in model.state_dict().items()}
    FORMS[form](folder, weights)
    return folder, sum(tensor.nbytes for tensor in weights.values())


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Bit for bit, and of the same dtype."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(identical(ours[name], theirs[name]) for name in ours)


def identical(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, signs of zeros and payloads of nan included."""
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def in_a_process(script: str, *arguments: object, **environment: str) -> str:
    """What a script prints in a Python of its own, which may use the network as far as tests say nothing else."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT, env={**env, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def told(kind: type[LenskitError], folder: str | Path, *fragments: str, **arguments: Any) -> LenskitError:
    """The error of loading: of exactly this class, complete, with these words in it."""
    with pytest.raises(LenskitError) as caught:
        lk.HookedTransformer.from_pretrained(folder, **arguments)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    for fragment in ("got:", "expected:", "to do:", *fragments):
        assert fragment in message
    return caught.value
