"""Loading: every form of checkpoint gives the same model, and what can stay on disk does."""

import gc
import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from folders import (
    FORMS,
    PREFIX,
    contents,
    identical,
    in_a_process,
    same_weights,
    save,
    save_bin,
    tensors,
    write_big,
    write_hf,
)
from parity_table import error, hf_model, ids
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lenskit as lk
from lenskit.checkpoints.files import REOPEN_BYTES, TensorFiles
from lenskit.checkpoints.source import EMBEDDED, embedded_names

load = lk.HookedTransformer.from_pretrained


@pytest.fixture
def folder(tmp_path: Path, model_type: str) -> Path:
    """A tiny random Hugging Face checkpoint of each family in turn."""
    return write_hf(tmp_path / "hf", model_type)


@pytest.mark.parametrize("name", embedded_names())
def test_embedded_checkpoints_are_hugging_face_folders_with_a_tokenizer(name: str) -> None:
    model = load(name)
    prompt = "The Eiffel Tower is in the city of"
    tokens = AutoTokenizer.from_pretrained(EMBEDDED / name)(prompt, return_tensors="pt")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)
    with torch.no_grad():
        assert error(model(prompt), theirs(tokens).logits) < 1e-5
    assert not model.training
    assert model.source == name


@pytest.mark.parametrize("path", [str, Path], ids=["string", "path"])
def test_a_folder_loads_and_computes_what_hugging_face_does(folder: Path, path: type) -> None:
    model, tokens = load(path(folder)), ids(2, 9)
    with torch.no_grad():
        assert error(model(tokens), hf_model(folder)(tokens).logits) < 1e-5
    assert not model.training
    assert model.tokenizer is None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("prefixed", [True, False], ids=["prefixed", "bare"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_gives_the_same_model(folder: Path, model_type: str, form: str, prefixed: bool) -> None:
    whole, weights = load(folder), tensors(folder)
    names = {name: name if prefixed else name.removeprefix(PREFIX[model_type]) for name in weights}
    FORMS[form](folder, {names[name]: tensor for name, tensor in weights.items()})
    for dtype in (None, torch.bfloat16):  # as it lies on disk, and by way of a conversion
        assert same_weights(load(folder, dtype=dtype), whole.to(dtype or torch.float32))


@pytest.mark.parametrize("tied", [True, False])
def test_the_unembedding_is_on_disk_or_the_embedding(tmp_path: Path, model_type: str, tied: bool) -> None:
    folder = write_hf(tmp_path / "hf", model_type, tie_word_embeddings=tied)
    weights = tensors(folder)
    assert ("lm_head.weight" in weights) is not tied
    model = load(folder)
    assert (model.unembed.weight is model.embed.weight) is tied
    if tied:  # as in every .bin file: both names
        save(folder, {**weights, "lm_head.weight": model.embed.weight.detach().clone()})
        again = load(folder)
        assert again.unembed.weight is again.embed.weight
        assert same_weights(model, again)


def test_buffers_of_old_checkpoints_are_left_out(folder: Path, model_type: str) -> None:
    mask = torch.ones(1, 1, 40, 40, dtype=torch.uint8).tril()
    extra: dict[str, Tensor] = {}
    for layer in range(3):
        if model_type == "gpt2":
            extra[f"transformer.h.{layer}.attn.bias"] = mask.clone() if layer else mask.bool()
            extra[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            extra[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    model = load(folder)
    save(folder, {**tensors(folder), **extra})
    assert same_weights(load(folder), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_model_has_the_dtype_asked_for_or_that_on_disk(
    tmp_path: Path, dtype: torch.dtype, asked: torch.dtype | None
) -> None:
    folder = write_hf(tmp_path / "hf", "llama", dtype=dtype)
    model, theirs = load(folder, dtype=asked), tensors(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {asked or dtype}
    assert identical(model.embed.weight, theirs["model.embed_tokens.weight"].to(asked or dtype))
    assert identical(model.blocks[1].mlp.w_out.weight, theirs["model.layers.1.mlp.down_proj.weight"].to(asked or dtype))


def test_mixed_dtypes_become_the_one_of_most_weights(folder: Path) -> None:
    few = ("norm", "ln_", "embed", "wte")  # the embedding, too: which tensor is first decides nothing
    mixed = {n: t if any(part in n for part in few) else t.bfloat16() for n, t in tensors(folder).items()}
    save(folder, mixed)
    model = load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(ids(1, 3))
    assert identical(load(folder, dtype=torch.float32).ln_final.weight, hf_model(folder).base_model.state_dict()[
        "ln_f.weight" if "gpt2" in str(type(model.cfg)).lower() else "norm.weight"
    ])  # fmt: skip


def rss() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("form", ["safetensors", "safetensors, sharded", "bin", "bin, sharded"])
def test_weights_that_fit_are_mapped_into_memory_and_not_read(tmp_path: Path, form: str) -> None:
    folder, n_bytes = write_big(tmp_path / "hf", form, vocab_size=30_000)
    load("demo-gpt2")  # whatever is imported by now does not count
    before = rss()
    model = load(folder)
    assert rss() - before < 0.1 * n_bytes
    mapped = {Path(region.path) for region in psutil.Process().memory_maps()}
    assert mapped >= {path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")}
    with torch.no_grad():
        assert model(ids(1, 5)).isfinite().all()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_writing_weights_in_place_leaves_the_files_alone(folder: Path, form: str) -> None:
    FORMS[form](folder, tensors(folder))
    before, model = contents(folder), load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(1)
    assert contents(folder) == before
    again = load(folder)
    assert not any(identical(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert identical(model.embed.weight, again.embed.weight * 2 + 1)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_loaded_model_outlives_its_folder(folder: Path, form: str) -> None:
    FORMS[form](folder, tensors(folder))
    with torch.no_grad():
        expected = load(folder)(ids(1, 5))
        model = load(folder)
        shutil.rmtree(folder)
        assert torch.equal(model(ids(1, 5)), expected)


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
def test_tensors_that_are_not_aligned_in_the_file_are_copied(folder: Path, shift: int) -> None:
    expected = load(folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip() + b" " * shift
    while (len(header) - shift) % 8:
        header += b" "
    file.unlink()  # written over, it would change under the model that maps it
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    model = load(folder)
    assert same_weights(model, expected)
    assert all(parameter.data_ptr() % 4 == 0 for parameter in model.parameters())


def test_a_large_bin_file_gives_up_its_pages_while_it_is_converted(tmp_path: Path, monkeypatch: Any) -> None:
    folder = write_hf(tmp_path / "hf", "llama")
    save_bin(folder, tensors(folder))
    files, loads = TensorFiles(folder), []
    monkeypatch.setattr(torch, "load", lambda *a, _load=torch.load, **k: loads.append(a) or _load(*a, **k))
    monkeypatch.setattr("lenskit.checkpoints.files.REOPEN_BYTES", 10_000)
    assert REOPEN_BYTES > 10_000
    read = {name: files.alone(name) for name in files.files}
    assert len(loads) == pytest.approx(sum(t.nbytes for t in read.values()) / 10_000, abs=3)
    assert all(identical(read[name], tensor) for name, tensor in files.files["lm_head.weight"]._load().items())


PEAK = """
import resource, sys, torch
import lenskit as lk
lk.HookedTransformer.from_pretrained("demo-llama")  # whatever is imported by now does not count

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
dtype = {"None": None, "bfloat16": torch.bfloat16}[sys.argv[2]]
model = lk.HookedTransformer.from_pretrained(sys.argv[1], dtype=dtype)
print(resident("VmHWM") - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("form", ["safetensors", "safetensors, sharded", "bin"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_loading_needs_no_more_memory_than_the_weights(tmp_path: Path, form: str, dtype: str | None) -> None:
    folder, _ = write_big(tmp_path / "hf", form, vocab_size=16_000, num_hidden_layers=3)
    peak, n_bytes = map(int, in_a_process(PEAK, folder, dtype).split())
    assert n_bytes > (150 if dtype else 300) * 2**20
    assert peak < 1.05 * n_bytes + (80 if dtype else 0) * 2**20
    if dtype is None:
        assert peak < 0.1 * n_bytes  # mapped


@pytest.mark.parametrize("piece_bytes", [1, 300, 4096])
def test_what_is_copied_in_pieces_is_whole(folder: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenskit.checkpoints.files.PIECE_BYTES", piece_bytes)
    for dtype in (torch.bfloat16, torch.float64):
        assert same_weights(load(folder, dtype=dtype), load(folder).to(dtype))


def test_a_tokenizer_of_the_users_own_stands_in_for_the_folders(folder: Path, demo_gpt2: lk.HookedTransformer) -> None:
    (folder / "tokenizer.json").write_text("no tokenizer")
    model = load(folder, tokenizer=demo_gpt2.tokenizer)
    assert model.tokenizer is demo_gpt2.tokenizer


def test_a_checkpoint_without_a_tokenizer_takes_ids_and_refuses_text(folder: Path) -> None:
    model = load(folder)
    model([1, 2, 3])
    with pytest.raises(lk.errors.InputError, match="no tokenizer"):
        model("text")


def test_the_meta_device_gives_a_model_without_weights(folder: Path) -> None:
    model = load(folder, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.hook_names("blocks.0.hook_resid_pre")


def test_a_folder_in_the_way_hides_an_embedded_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "demo-gpt2", "llama")
    monkeypatch.chdir(tmp_path)
    assert load("demo-gpt2").cfg.model_type == "llama"


def test_code_beside_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')"
    (folder / "modeling.py").write_text(trap)
    (folder / "config.json").write_text(json.dumps({
        **json.loads((folder / "config.json").read_text()),
        "auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"},
    }))  # fmt: skip
    load(folder)
    assert not (tmp_path / "sprung").exists()


def test_shards_may_be_links_as_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    expected = load(folder)
    FORMS["safetensors, sharded"](folder, tensors(folder))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()  # without an ending
        path.replace(blob)
        path.symlink_to(Path("..") / "blobs" / blob.name)
    assert same_weights(load(folder), expected)


def test_files_of_other_tools_are_left_alone(folder: Path) -> None:
    expected = load(folder)
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read where there are safetensors")
    (folder / "README.md").write_text("...")
    assert same_weights(load(folder), expected)
