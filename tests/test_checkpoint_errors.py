"""What a user sees when a checkpoint cannot be loaded: which class, and a message that names the file."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import FORMS, edit_json, remove_weights, save, save_bin, save_sharded, tensors, told, write_hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lenskit as lk
from lenskit.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InputError,
    LenskitError,
    MissingTensorError,
    TensorShapeError,
    UnknownTensorError,
)

load = lk.HookedTransformer.from_pretrained

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA's folder, not to be written to."""
    return write_hf(tmp_path_factory.mktemp("pristine"), "llama")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return shutil.copytree(pristine, tmp_path / "hf")


def weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    found = tensors(folder)
    change(found)
    save(folder, found)


# -- tensors


def test_a_missing_tensor(folder: Path) -> None:
    weights(folder, lambda found: found.pop(Q))
    told(MissingTensorError, folder, str(folder), "1 tensor missing", f"without {Q}", "config.json")


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=5)
    told(MissingTensorError, folder, "18 tensors missing", "model.layers.3.", "and 15 more")


def test_a_renamed_tensor_is_shown_beside_the_one_that_is_missing(folder: Path) -> None:
    weights(folder, lambda found: found.update({"model.layers.1.attention.query": found.pop(Q)}))
    told(MissingTensorError, folder, f"without {Q}", "it has model.layers.1.attention.query, which nothing reads")


def test_an_unknown_tensor(folder: Path) -> None:
    weights(folder, lambda found: found.update({"model.layers.1.self_attn.q_proj.lora_A": torch.ones(2)}))
    told(UnknownTensorError, folder, str(folder), "1 tensor that nothing reads", "q_proj.lora_A", "adapters")


def test_layers_that_the_config_does_not_have(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=2)
    told(UnknownTensorError, folder, "9 tensors that nothing reads", "model.layers.2.")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(32, 33), (32,), (2, 2, 2), ()], ids=str)
def test_a_wrong_shape(folder: Path, form: str, shape: tuple[int, ...]) -> None:
    FORMS[form](folder, {**tensors(folder), Q: torch.ones(shape)})
    error = told(TensorShapeError, folder, Q, str(shape), "(32, 32) as blocks.1.attn.qkv.q.weight", "config")
    assert Path(error.what.split(":")[0]).is_file()


def test_a_config_of_another_width(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size=64, head_dim=8)
    told(TensorShapeError, folder, "model.embed_tokens.weight", "(59, 32)", "(59, 64)")


def test_a_transposed_gpt2(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", "gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    for wrong in (torch.ones(96, 24), torch.ones(24), torch.ones(4, 6, 96)):  # the last cannot even be transposed
        weights(folder, lambda found, wrong=wrong: found.update({name: wrong}))
        shown = str(tuple(wrong.shape))
        told(TensorShapeError, folder, name, shown, "what becomes (96, 24) as blocks.0.mlp.w_in.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_numbers_that_nobody_computes_with(folder: Path, dtype: torch.dtype) -> None:
    save_bin(folder, {**tensors(folder), Q: torch.ones(32, 32).to(dtype)})
    told(UnknownTensorError, folder, "pytorch_model.bin", Q, str(dtype), "torch.bfloat16", "not quantised")


def test_an_unembedding_that_is_not_the_embedding_though_the_config_says_so(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    told(UnknownTensorError, folder, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype", "untied"])
def test_nothing_is_placed_unless_everything_fits(folder: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    last = "lm_head.weight"
    found: dict[str, Tensor] = {name: tensor for name, tensor in tensors(folder).items() if name != last}
    found |= {
        "missing": {}, "unknown": {last: torch.ones(59, 32), "zzz": torch.ones(1)}, "shape": {last: torch.ones(58, 32)},
        "dtype": {last: torch.ones(59, 32, dtype=torch.int32)}, "untied": {last: torch.ones(59, 32)},
    }[change]  # fmt: skip
    edit_json(folder / "config.json", tie_word_embeddings=change == "untied")
    save_sharded(folder, found, ".bin")
    monkeypatch.setattr("lenskit.checkpoints.load._read", lambda *_: pytest.fail("a tensor was placed"))
    with pytest.raises(lk.errors.CheckpointError):
        load(folder)


# -- files


def ends(n_bytes: int) -> list[int]:
    """Where to cut a file: nothing left, in its header, behind it, in the data, just before the end."""
    return [0, 1, 4, 8, 9, 100, n_bytes // 2, n_bytes - 1]


@pytest.mark.parametrize("form", ["safetensors", "safetensors, sharded", "bin", "bin, sharded", "bin before torch 1.6"])
@pytest.mark.parametrize("place", range(8))
def test_a_truncated_file(folder: Path, form: str, place: int) -> None:
    FORMS[form](folder, tensors(folder))
    file = max(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    whole = file.read_bytes()
    left = ends(len(whole))[place]
    file.write_bytes(whole[:left])
    told(CorruptCheckpointError, folder, str(file), f"{left:,} bytes", "truncated", "again")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"\x93NUMPY" + bytes(range(256)) * 40, ("cannot be read", "10,246 bytes")),
        (b"<!DOCTYPE html><html>Not found</html>", ("cannot be read", "37 bytes")),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:5e\nsize 548\n", ("git-lfs pointer", "git lfs pull")),
    ],
    ids=["garbage", "a web page", "a git-lfs pointer"],
)
def test_a_file_of_another_kind(folder: Path, name: str, content: bytes, fragments: tuple[str, ...]) -> None:
    remove_weights(folder)
    (folder / name).write_bytes(content)
    told(CorruptCheckpointError, folder, name, *fragments)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_folder_where_a_file_should_be(folder: Path, name: str) -> None:
    if name != "config.json":
        remove_weights(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    told(CorruptCheckpointError, folder, str(folder / name), "cannot be read")


@given(st.data())
def test_whatever_a_file_holds_the_error_is_ours(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """One byte of the header changed, or the file cut anywhere: it loads, or says what is wrong."""
    folder = tmp_path_factory.mktemp("any")
    write_hf(folder, "llama", num_hidden_layers=1)
    FORMS[data.draw(st.sampled_from(["safetensors", "bin", "bin before torch 1.6"]))](folder, tensors(folder))
    file = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    whole = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        whole[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
    else:
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    file.write_bytes(whole)
    with suppress(LenskitError):  # and nothing else
        load(folder)


class Trap:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch.save", "before torch 1.6", "pickle", "sharded"])
@pytest.mark.parametrize("where", ["beside the tensors", "alone"])
def test_a_pickle_with_code_is_refused_and_not_run(folder: Path, tmp_path: Path, form: str, where: str) -> None:
    sprung, found = tmp_path / "sprung", tensors(folder)
    content = {**found, "x": Trap(sprung)} if where == "beside the tensors" else Trap(sprung)
    save_bin(folder, content, _use_new_zipfile_serialization=form != "before torch 1.6")
    file = folder / "pytorch_model.bin"
    if form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    elif form == "sharded":
        shard = file.read_bytes()
        save_sharded(folder, found, ".bin")
        file = folder / "pytorch_model-00003-of-00003.bin"
        file.write_bytes(shard)
    fragments = ("holds more than tensors", f"{os.name}.mkdir, which was not run", "never runs code", "safetensors")
    error = told(CorruptCheckpointError, folder, str(file), *(() if form == "pickle" else fragments))
    assert "weights_only" not in str(error)  # torch's message recommends to turn it off
    assert not sprung.exists()
    if form != "pickle":  # the trap is one
        torch.load(file, weights_only=False)
        assert sprung.exists()


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (lambda found: {"state_dict": found, "epoch": 3}, "state_dict: dict, epoch: int"),
        (lambda found: list(found.values()), "list"),
        (lambda found: found[Q], "Tensor"),
        (lambda found: dict(enumerate(found.values())), "0: Tensor"),
        (lambda found: {**found, Q: found[Q].to_sparse()}, f"{Q}: Tensor"),
    ],
    ids=["a training state", "a list", "a tensor", "numbered tensors", "a sparse tensor"],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_bin_file_of_something_else(folder: Path, content: Callable[[dict[str, Tensor]], Any], shown: str) -> None:
    save_bin(folder, content(tensors(folder)))
    told(CorruptCheckpointError, folder, "pytorch_model.bin is no table of tensors", shown, "state_dict")


def test_a_missing_shard(folder: Path) -> None:
    for ending in (".safetensors", ".bin"):
        save_sharded(folder, tensors(folder), ending)
        shard = next(path for path in folder.iterdir() if "00002-of" in path.name)
        shard.unlink()
        told(CheckpointNotFoundError, folder, str(folder), "1 of 3 weight files", shard.name, "download")


@pytest.mark.parametrize("weight_map", [None, ["a"], {}, {"a": 3}, {"a": "../b.safetensors"}, {"a": "b.bin"}])
def test_an_index_that_names_no_shards(folder: Path, weight_map: Any) -> None:
    remove_weights(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    told(CorruptCheckpointError, folder, "model.safetensors.index.json cannot be used", "weight_map")


# -- places


def test_no_such_folder(tmp_path: Path) -> None:
    for name in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c", "no such name", "a\0b", "x" * 5000):
        told(CheckpointNotFoundError, name, "a path where nothing is", "hub id", "demo-gpt2")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    told(CheckpointNotFoundError, folder / "config.json", "a file", "give the folder")


def test_an_empty_folder(tmp_path: Path) -> None:
    told(CheckpointNotFoundError, tmp_path, f"{tmp_path} is not a checkpoint", "nothing in it", "config.json")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("{}")
    told(CheckpointNotFoundError, tmp_path, "a folder with notes.txt", "lenskit.json", "adapter_config.json")


def test_a_folder_without_weights(folder: Path) -> None:
    remove_weights(folder)
    (folder / "tf_model.h5").touch()
    told(CheckpointNotFoundError, folder, str(folder), "tf_model.h5", "model.safetensors or pytorch_model.bin")


def test_a_revision_of_what_has_none(folder: Path) -> None:
    for name in (folder, "demo-gpt2"):
        told(InputError, name, "has no revisions", "revision='main'", "hub id", revision="main")


def test_a_model_is_no_checkpoint(shared: lk.HookedTransformer, tmp_path: Path) -> None:
    with pytest.raises(lk.errors.CheckpointNotFoundError, match=r"a HookedTransformer(.|\n)*save_pretrained"):
        lk.export(shared, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
