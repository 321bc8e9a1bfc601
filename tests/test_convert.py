"""Writing: converted, exported and saved checkpoints have every bit of what they come from."""

import hashlib
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import (
    FORMS,
    contents,
    edit_json,
    identical,
    same_weights,
    save,
    tensors,
    write_hf,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from parity_table import ROWS, Row, hf_folder, hf_model, ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lenskit as lk
from lenskit.checkpoints import write
from lenskit.checkpoints.source import EMBEDDED, embedded_names, read_json
from lenskit.errors import InputError
from lenskit.models.llama import LlamaConfig
from lenskit.models.registry import family
from lenskit.weights import Drop

load = lk.HookedTransformer.from_pretrained

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def folder(tmp_path: Path, model_type: str) -> Path:
    """A tiny random Hugging Face checkpoint of each family in turn."""
    return write_hf(tmp_path / "hf", model_type)


def same_tensors(a: Path, b: Path) -> bool:
    ours, theirs = tensors(a), tensors(b)
    return ours.keys() == theirs.keys() and all(identical(ours[name], theirs[name]) for name in ours)


def manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / "lenskit.json")


# -- what is written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard_bytes", [2**31, 10_000])
def test_to_lenskit_and_back_is_bit_for_bit(
    tmp_path: Path, model_type: str, dtype: torch.dtype, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", shard_bytes)
    source = write_hf(tmp_path / "hf", model_type, dtype=dtype)
    converted = lk.convert(source, tmp_path / "converted")
    exported = lk.export(converted, tmp_path / "exported")
    for folder in (converted, exported):
        files = list(folder.glob("*.safetensors"))
        assert (len(files) > 2) is (shard_bytes < 2**31)
        assert all(file.stat().st_size < shard_bytes + 2_000 for file in files)  # no tensor here is larger
    assert same_weights(load(converted), load(source))
    assert same_tensors(exported, source)
    assert read_json(exported / "config.json") == read_json(source / "config.json")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=dtype)(ids(2, 7)).logits
        assert torch.equal(theirs, hf_model(source, attention="sdpa", dtype=dtype)(ids(2, 7)).logits)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_converts_and_exports(folder: Path, tmp_path: Path, form: str) -> None:
    original = shutil.copytree(folder, tmp_path / "original")
    FORMS[form](folder, tensors(folder))
    assert same_weights(load(lk.convert(folder, tmp_path / "converted")), load(original))
    assert same_tensors(lk.export(folder, tmp_path / "exported"), original)


def test_mixed_dtypes_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    save(folder, {name: t if "norm" in name or "ln_" in name else t.half() for name, t in tensors(folder).items()})
    converted = lk.convert(folder, tmp_path / "converted")
    assert {tensor.dtype for tensor in tensors(converted).values()} == {torch.float16, torch.float32}
    assert same_tensors(lk.export(converted, tmp_path / "exported"), folder)


def test_a_manifest_says_where_the_weights_come_from(folder: Path, tmp_path: Path) -> None:
    converted = lk.convert(str(folder), tmp_path / "converted")
    found = manifest(converted)
    assert found["format"] == 1
    assert found["lenskit"] == lk.__version__
    assert found["source"] == str(folder)
    assert found["revision"] is None
    assert found["hf_config"] == read_json(folder / "config.json")
    assert found["config"] == load(folder).cfg.to_json()
    weights = converted / "weights.safetensors"
    assert found["sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}


def test_hashes_are_for_users_and_not_checked_at_every_load(folder: Path, tmp_path: Path) -> None:
    converted = lk.convert(folder, tmp_path / "converted")
    data = bytearray((converted / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (converted / "weights.safetensors").write_bytes(data)
    assert not same_weights(load(converted), load(folder))


def test_a_manifest_of_a_hub_checkpoint_has_its_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = folder.rename(tmp_path / ("c0ffee" * 6))
    monkeypatch.setattr("lenskit.checkpoints.source._download", lambda *_: commit)
    found = manifest(lk.convert("some/model", tmp_path / "converted", revision="main"))
    assert (found["source"], found["revision"]) == ("some/model", commit.name)


def test_a_converted_checkpoint_is_mapped_into_memory(folder: Path, tmp_path: Path) -> None:
    converted = lk.convert(folder, tmp_path / "converted")
    model = load(converted)
    assert str(converted / "weights.safetensors") in Path("/proc/self/maps").read_text()
    before = contents(converted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert contents(converted) == before


def test_files_are_as_readable_as_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    mode = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    for path in lk.convert(folder, tmp_path / "converted").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


# -- what goes with the weights


@pytest.mark.parametrize("name", embedded_names())
def test_tokenizer_and_generation_config_survive_both_ways(name: str, tmp_path: Path) -> None:
    source = shutil.copytree(EMBEDDED / name, tmp_path / "source")
    template = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "shout.jinja").write_text("{{ messages[0].content | upper }}")
    GenerationConfig(max_new_tokens=7, eos_token_id=3).save_pretrained(source)
    converted = lk.convert(source, tmp_path / "converted")
    exported = lk.export(converted, tmp_path / "exported")
    saved = load(converted).save_pretrained(tmp_path / "saved")
    files = {path for path in contents(source) if "token" in path or "template" in path or "generation" in path}
    assert {path: contents(converted)[path] for path in files} == {path: contents(source)[path] for path in files}
    assert {path: contents(exported)[path] for path in contents(source) if path != "model.safetensors"} == {
        path: content for path, content in contents(source).items() if path != "model.safetensors"
    }
    expected, chat = AutoTokenizer.from_pretrained(source), [{"role": "user", "content": "Hello"}]
    for folder in (converted, exported, saved):
        tokenizer = load(folder).tokenizer
        assert type(tokenizer) is type(expected)
        for text in ("The Eiffel Tower is in the city of Paris.", "  two  spaces\n", "naïve 東京"):
            assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>Hello"
        assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template="shout") == "HELLO"
    assert GenerationConfig.from_pretrained(exported).max_new_tokens == 7


@pytest.mark.parametrize("files", [["vocab.json", "merges.txt"], ["tokenizer.json"]], ids=["of 2019", "alone"])
def test_a_tokenizer_that_does_not_name_its_class(tmp_path: Path, files: list[str]) -> None:
    """Its class follows from the model's config then, which a converted checkpoint has in its manifest."""
    source = write_hf(tmp_path / "hf", "gpt2")
    demo = json.loads((EMBEDDED / "demo-gpt2" / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(demo))
    (source / "vocab.json").write_text(json.dumps({**demo["model"]["vocab"], "<|endoftext|>": 0}))
    (source / "merges.txt").write_text("\n".join(" ".join(pair) for pair in demo["model"]["merges"]))
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - set(files):
        (source / name).unlink()
    expected = load(source).tokenizer
    actual = load(lk.convert(source, tmp_path / "converted")).tokenizer
    assert type(actual) is type(expected)
    assert expected is not None
    text = "The Eiffel Tower is in Paris"
    assert actual(text)["input_ids"] == expected(text)["input_ids"] != []


# -- models in memory


def test_a_model_from_a_config_saves_loads_and_exports(tmp_path: Path, demo_llama: lk.HookedTransformer) -> None:
    cfg = LlamaConfig(d_model=32, n_layers=2, n_heads=4, n_key_value_heads=2, d_head=8, d_mlp=40, d_vocab=60, n_ctx=20)
    for tokenizer in (None, demo_llama.tokenizer):
        model = lk.HookedTransformer(cfg, tokenizer=tokenizer, seed=3)
        saved = model.save_pretrained(tmp_path / f"saved {tokenizer is None}")
        exported = lk.export(saved, tmp_path / f"exported {tokenizer is None}")
        again = load(saved)
        assert again.cfg == cfg
        assert same_weights(again, model)
        assert same_weights(load(exported), model)
        assert (again.tokenizer is None) is (tokenizer is None)
        config = AutoConfig.from_pretrained(exported)
        assert config.architectures == ["LlamaForCausalLM"]
        assert config.eos_token_id == (None if tokenizer is None else tokenizer.eos_token_id)
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(exported)(ids(2, 5)).logits
            torch.testing.assert_close(again(ids(2, 5)), theirs, rtol=1e-5, atol=1e-5)
        assert manifest(saved)["source"] == "new weights"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_saved_model_says_its_own_dtype(folder: Path, tmp_path: Path, key: str) -> None:
    edit_json(folder / "config.json", **{"dtype": ..., "torch_dtype": ..., key: "float32"})
    model = load(folder, dtype=torch.float16)
    exported = lk.export(model.save_pretrained(tmp_path / "saved"), tmp_path / "exported")
    assert AutoModelForCausalLM.from_pretrained(exported).dtype == torch.float16
    config = read_json(exported / "config.json")
    assert (config["dtype"], "torch_dtype" in config) == ("float16", False)
    assert model.hf_config == read_json(folder / "config.json")


def test_saving_writes_the_weights_as_they_are_now(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    saved = model.save_pretrained(tmp_path / "saved")
    assert same_weights(load(saved), model)
    assert not same_weights(load(folder), model)


def test_a_model_whose_layers_share_weights_can_be_saved(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.blocks[1].mlp = model.blocks[0].mlp
    model.blocks[2].attn.o.weight = model.blocks[0].attn.o.weight
    again = load(model.save_pretrained(tmp_path / "saved"))
    for name, parameter in again.named_parameters():
        assert identical(parameter, model.get_parameter(name))


def test_a_model_without_weights_cannot_be_saved(folder: Path, tmp_path: Path) -> None:
    model = load(folder, device="meta")
    with pytest.raises(InputError, match=r"not here to be saved\n(.|\n)*embed.weight(.|\n)*lenskit convert"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# -- round trips


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Any variant of the parity table, or a tiny model of either family in any shape."""
    if draw(st.booleans()):
        return draw(st.sampled_from(ROWS))
    n_groups, group, d_head = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    n_layers, d_vocab, d_mlp = draw(st.integers(1, 3)), draw(st.integers(7, 70)), draw(st.integers(1, 50))
    shared = {"vocab_size": d_vocab, "tie_word_embeddings": draw(st.booleans())}
    if draw(st.booleans()):
        n_heads = n_groups * group
        return Row("random", "gpt2", {
            **shared, "n_layer": n_layers, "n_head": n_heads, "n_embd": n_heads * d_head, "n_inner": d_mlp,
        })  # fmt: skip
    return Row("random", "llama", {
        **shared, "num_hidden_layers": n_layers, "num_attention_heads": n_groups * group, "head_dim": d_head,
        "num_key_value_heads": n_groups, "hidden_size": n_groups * group * draw(st.integers(1, 8)),
        "intermediate_size": d_mlp, "attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans()),
    })  # fmt: skip


@given(rows(), st.sampled_from(DTYPES), st.sampled_from(list(FORMS)), st.integers(1_000, 60_000), st.booleans())
def test_there_and_back_over_every_variant(
    tmp_path_factory: pytest.TempPathFactory, row: Row, dtype: torch.dtype, form: str, shard_bytes: int, by_way: bool
) -> None:
    """Hugging Face -> a model -> saved (and converted, and loaded) -> exported: every bit is the same."""
    tmp = tmp_path_factory.mktemp("trip")
    source = hf_folder(row, tmp / "hf")
    exact = "e_score_correction_bias"  # float32 in every checkpoint, and in every model
    save(source, {name: t if name.endswith(exact) else t.to(dtype) for name, t in tensors(source).items()})
    original = tensors(source)
    with torch.no_grad():
        theirs = hf_model(source, attention="sdpa", dtype=dtype)(torch.arange(6)[None]).logits
    FORMS[form](source, original)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "SHARD_BYTES", shard_bytes)
        saved = load(source).save_pretrained(tmp / "saved")
        if by_way:
            saved = load(lk.convert(saved, tmp / "converted")).save_pretrained(tmp / "again")
        exported = lk.export(saved, tmp / "exported")
    back, model = tensors(exported), load(source)
    table = family(model.cfg.model_type, where="the test").weights(model.cfg)
    unread = {p.on_disk[0] for p in table.match(original, "the test") if isinstance(p.rule, Drop)}
    assert back.keys() == original.keys() - unread
    assert all(identical(back[name], original[name]) for name in back)
    named = {"dtype": str(dtype).removeprefix("torch.")}
    assert read_json(exported / "config.json") == {**read_json(source / "config.json"), **named}
    with torch.no_grad():
        found = hf_model(exported, attention="sdpa", dtype=dtype)(torch.arange(6)[None]).logits
    torch.testing.assert_close(found, theirs)  # a kernel's last bit depends on where in memory a weight begins
