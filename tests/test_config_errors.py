"""Configs: those that are found in the wild load; what would change the computation, or makes no sense, is told."""

import dataclasses
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import edit_json, remove_weights, save, tensors, told, write_hf
from hypothesis import given
from hypothesis import strategies as st
from parity_table import ids

import lenskit as lk
from lenskit.checkpoints.load import describe
from lenskit.checkpoints.source import Source
from lenskit.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    InputError,
    LenskitError,
    UnknownTensorError,
    UnsupportedConfigError,
    UnsupportedModelError,
)
from lenskit.models.config import DecoderConfig
from lenskit.models.gpt2 import GPT2Config
from lenskit.models.hf_config import HARMLESS, NEUTRAL, HFConfig
from lenskit.models.llama import LlamaConfig
from lenskit.models.registry import MODULES
from lenskit.modules.rope_types import RopeConfig

load = lk.HookedTransformer.from_pretrained


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA's folder, not to be written to."""
    return write_hf(tmp_path_factory.mktemp("pristine"), "llama")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return shutil.copytree(pristine, tmp_path / "hf")


# -- configs as they are published

GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
GPT2_MEDIUM = {**GPT2, "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True}
DISTILGPT2 = {**GPT2, "_num_labels": 1, "n_layer": 6, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
LLAMA_1 = {
    "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
LLAMA_2 = {
    **LLAMA_1, "max_position_embeddings": 4096, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "_name_or_path": "meta-llama/Llama-2-7b-hf",
}  # fmt: skip
LLAMA_3_1 = {
    **LLAMA_2, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "num_key_value_heads": 8,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008], "vocab_size": 128256, "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip
LINEAR = {**LLAMA_2, "rope_scaling": {"type": "linear", "factor": 4.0}, "unsloth_version": "2024.9"}

LLAMA_7B = LlamaConfig(
    d_model=4096, n_layers=32, n_heads=32, n_key_value_heads=32, d_head=128, d_mlp=11008, d_vocab=32000, n_ctx=2048
)
GPT2_SMALL = GPT2Config(
    d_model=768, n_layers=12, n_heads=12, n_key_value_heads=12, d_head=64, d_mlp=3072, d_vocab=50257, n_ctx=1024
)


def changed(cfg: DecoderConfig, **fields: Any) -> DecoderConfig:
    return dataclasses.replace(cfg, **fields)


GPT2_MEDIUM_CFG = changed(GPT2_SMALL, d_model=1024, n_heads=16, n_key_value_heads=16, n_layers=24, d_mlp=4096)

PUBLISHED: dict[str, tuple[dict[str, Any], DecoderConfig]] = {
    "gpt2": (GPT2, GPT2_SMALL),
    "gpt2-medium": (GPT2_MEDIUM, GPT2_MEDIUM_CFG),
    "distilgpt2": (DISTILGPT2, changed(GPT2_SMALL, n_layers=6)),
    "llama-1": (LLAMA_1, LLAMA_7B),
    "llama-2": (LLAMA_2, changed(LLAMA_7B, n_ctx=4096, eps=1e-5)),
    "llama-3.1": (
        LLAMA_3_1,
        changed(
            LLAMA_7B, n_ctx=131072, eps=1e-5, n_key_value_heads=8, d_vocab=128256,
            rope=RopeConfig(
                rope_type="llama3", theta=500000.0, factor=8.0, original_max_position_embeddings=8192,
                low_freq_factor=1.0, high_freq_factor=4.0,
            ),
        ),
    ),
    "smollm2": (
        SMOLLM2,
        LlamaConfig(
            d_model=576, n_layers=30, n_heads=9, n_key_value_heads=3, d_head=64, d_mlp=1536, d_vocab=49152, n_ctx=8192,
            eps=1e-5, tie_embeddings=True, init_range=0.041666666666666664, rope=RopeConfig(theta=100000),
        ),
    ),
    "linear": (
        LINEAR,
        changed(LLAMA_7B, n_ctx=4096, eps=1e-5, rope=RopeConfig(rope_type="linear", theta=10000.0, factor=4.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str, tmp_path: Path) -> None:
    raw, cfg = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    described = describe(Source(name, tmp_path, None, None))
    assert described.cfg == cfg
    assert described.hf_config == raw


def test_what_is_harmless_is_listed_once_and_read_by_no_family() -> None:
    assert not HARMLESS & NEUTRAL.keys()


def test_a_config_is_closed() -> None:
    hf = {"model_type": "x", "width": 3, "depth": 2, "gate": None, "architectures": ["X"], "pruned_heads": {}}
    with HFConfig(hf) as read:
        assert (read("width"), read("depth")) == (3, 2)  # gate asks for nothing, the others change nothing
    with pytest.raises(UnsupportedConfigError, match=r"not handled: depth\n.*depth=2"), HFConfig(hf) as read:
        read("width")
    with HFConfig(hf) as read:
        read.ignore("width", "depth")
    with pytest.raises(ConfigError, match=r"the config has no 'height'"), HFConfig(hf) as read:
        read("height")
    with pytest.raises(UnsupportedConfigError, match=r"width=3(.|\n)*width=4: because"), HFConfig(hf) as read:
        read.refuse_unless("width", 4, "because")
    with pytest.raises(UnsupportedConfigError, match="pruned_heads"):
        HFConfig({**hf, "pruned_heads": {"0": [1]}}).__enter__()


# -- configs that are refused


def test_a_config_that_makes_no_model(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=-1)
    told(ConfigError, folder, f"{folder}/config.json: ", "describes no model", "-1")


BAD_JSON = {b"": "Expecting value", b"{": "line 1", b"[1]": "a list", b"\xff\xfe": "utf-8", b"[" * 10**5: "recursion"}


@pytest.mark.parametrize(("content", "shown"), BAD_JSON.items(), ids=BAD_JSON.values())
def test_a_config_that_is_no_json_object(folder: Path, content: bytes, shown: str) -> None:
    (folder / "config.json").write_bytes(content)
    told(CorruptCheckpointError, folder, f"{folder}/config.json cannot be read", shown, "a JSON object")


@pytest.mark.parametrize("model_type", [..., None, 3])
def test_no_model_type(folder: Path, model_type: Any) -> None:
    edit_json(folder / "config.json", model_type=model_type)
    told(UnsupportedModelError, folder, f"{folder}/config.json has no model_type", "architectures, attention_bias")


def test_an_unsupported_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mamba")
    told(UnsupportedModelError, folder, str(folder), "'mamba'", *MODULES, "lenskit/models/")


@pytest.mark.parametrize(
    ("attributes", "fragments"),
    [
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, ("spiral", "llama3")),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, ("spiral", "llama3")),
        ({"sliding_window": 4096}, ("sliding_window=4096", "llama reads", "learn")),
        ({"logit_cap": 3.0, "gate": "x" * 999}, ("gate, logit_cap", "logit_cap=3.0")),
        ({"hidden_act": "sine"}, ("'sine'", "silu")),
        ({"rope_interleaved": True}, ("rope_interleaved=True", "halves apart")),
    ],
)
def test_an_attribute_that_would_change_the_computation(
    folder: Path, attributes: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    edit_json(folder / "config.json", **attributes)
    error = told(UnsupportedConfigError, folder, f"{folder}/config.json: ", *fragments)
    assert len(str(error)) < 700


QUANTISED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bitsandbytes, 4 bits": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_8bit": False},
        ("with bitsandbytes in 4 bits", ".dequantize() of transformers, then save_pretrained"),
    ),
    "bitsandbytes, before methods had names": (
        {"load_in_8bit": True, "llm_int8_threshold": 6.0},
        ("with bitsandbytes in 8 bits", ".dequantize()"),
    ),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
        ("with torchao", "load the checkpoint that it was made from", "cannot undo torchao"),
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("with gptq in 4 bits", "cannot undo gptq")),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, ("with awq in 4 bits", "cannot undo awq")),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        ("with fp8", "quantization_config=FineGrainedFP8Config(dequantize=True)", "then save_pretrained"),
    ),
    "mxfp4": (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        ("with mxfp4", "quantization_config=Mxfp4Config(dequantize=True)"),
    ),
    "no name": ({"dtype": "int3"}, ("with an unnamed method", "load the checkpoint that it was made from")),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_checkpoint_is_refused_with_its_methods_name_and_what_to_do(folder: Path, name: str) -> None:
    said, fragments = QUANTISED[name]
    edit_json(folder / "config.json", quantization_config=said)
    where = f"{folder}/config.json: the weights are quantised"
    error = told(UnsupportedConfigError, folder, where, "quantization_config={", "not quantised", *fragments)
    assert len(str(error)) < 700
    for command in (lk.convert, lk.export):
        with pytest.raises(UnsupportedConfigError, match="quantised"):
            command(folder, folder / "out")


def test_what_a_quantised_checkpoint_was_made_from_is_named_where_the_config_says_it(folder: Path) -> None:
    said = {"quant_method": "gptq", "bits": 4}
    edit_json(folder / "config.json", quantization_config=said, _name_or_path="meta-llama/Llama-3.2-1B")
    told(UnsupportedConfigError, folder, "made from, meta-llama/Llama-3.2-1B")


def test_a_quantised_checkpoint_by_the_older_attribute(folder: Path) -> None:
    edit_json(folder / "config.json", compression_config={"quant_method": "compressed-tensors", "format": "pack"})
    told(UnsupportedConfigError, folder, "with compressed-tensors", "CompressedTensorsConfig(dequantize=True)")


@pytest.mark.parametrize(
    ("ending", "method"),
    [
        ("q_proj.qweight", "gptq or awq"),
        ("q_proj.SCB", "bitsandbytes"),
        ("q_proj.weight.absmax", "bitsandbytes"),
        ("q_proj.weight_scale_inv", "fp8"),
        ("q_proj.weight_packed", "compressed-tensors"),
    ],
)
def test_tensors_that_are_quantised_though_the_config_says_nothing(folder: Path, ending: str, method: str) -> None:
    name = f"model.layers.0.self_attn.{ending}"
    save(folder, {**tensors(folder), name: torch.ones(2, dtype=torch.uint8)})
    told(UnknownTensorError, folder, f"{folder}: the weights are quantised, with {method}", name, "made from")


@pytest.mark.parametrize(
    ("attributes", "fragments"),
    [
        ({"num_attention_heads": 7}, ("multiple", "(7)")),
        ({"hidden_size": "wide"}, ("hidden_size", "'wide'")),
        ({"rope_parameters": [1]}, ("rope_parameters",)),
    ],
)
def test_a_config_that_hugging_face_refuses(
    folder: Path, attributes: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    edit_json(folder / "config.json", **attributes)
    error = told(ConfigError, folder, f"{folder}/config.json is refused", "a valid llama config", *fragments)
    assert error.__cause__ is not None


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=5), st.just([1]), st.just({})
)


@given(st.data())
def test_whatever_a_config_says_the_error_is_ours(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any value for any attribute: the model loads and runs, or says what is wrong."""
    folder = shutil.copytree(pristine, tmp_path_factory.mktemp("any") / "hf")
    names = sorted(json.loads((folder / "config.json").read_text()).keys() - {"max_position_embeddings"})
    edit_json(folder / "config.json", **{data.draw(st.sampled_from(names)): data.draw(VALUES)})
    with suppress(LenskitError):
        load(folder)(ids(1, 3))


# -- lenskit's own


@pytest.fixture
def converted(pristine: Path, tmp_path: Path) -> Path:
    return lk.convert(pristine, tmp_path / "converted")


@pytest.mark.parametrize("format", [..., 0, 2, "1"])
def test_a_manifest_of_another_format(converted: Path, format: Any) -> None:
    edit_json(converted / "lenskit.json", format=format, lenskit="9.9")
    told(CorruptCheckpointError, converted, f"{converted}/lenskit.json", "format", "9.9", "newer", "convert")


@pytest.mark.parametrize("key", ["model_type", "config", "hf_config"])
def test_a_manifest_without_a_key(converted: Path, key: str) -> None:
    edit_json(converted / "lenskit.json", **{key: ...})
    told(CorruptCheckpointError, converted, "lenskit.json is incomplete", f"{key}=None", "convert")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"d_mdoel": 4}, "d_mdoel"),
        ({"d_model": ...}, "d_model"),
        ({"rope": {"rope_type": "spiral"}}, "spiral"),
        ({"rope": {}}, "rope_theta"),
    ],
)
def test_a_manifest_whose_config_makes_no_sense(converted: Path, change: dict[str, Any], shown: str) -> None:
    config = {**json.loads((converted / "lenskit.json").read_text())["config"], **change}
    edit_json(converted / "lenskit.json", config={key: value for key, value in config.items() if value is not ...})
    with pytest.raises(ConfigError, match=shown) as caught:
        load(converted)
    assert f"{converted}/lenskit.json" in str(caught.value)


def test_a_converted_checkpoint_without_weights(converted: Path) -> None:
    remove_weights(converted)
    told(CheckpointNotFoundError, converted, "lenskit.json", "weights.safetensors")


# -- tokenizers


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}'])
def test_a_tokenizer_that_cannot_be_loaded(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    error = told(CorruptCheckpointError, folder, f"{folder}: the tokenizer cannot be loaded", "tokenizer=")
    assert error.__cause__ is not None


def test_a_tokenizer_that_wants_its_own_code_run(folder: Path, tmp_path: Path) -> None:
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nclass Tokenizer: pass")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["trap.Tokenizer", None]}}))
    told(CorruptCheckpointError, folder, "the tokenizer cannot be loaded", "never runs code")
    assert not (tmp_path / "sprung").exists()


# -- arguments


@pytest.mark.parametrize("dtype", ["float16", torch.int8, torch.complex64, torch.float8_e4m3fn, torch.bool, 16, float])
def test_a_dtype_that_weights_cannot_have(folder: Path, dtype: Any) -> None:
    told(InputError, folder, f"dtype={dtype!r}", "torch.bfloat16", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", 1.5, 99])
def test_a_device_that_is_not_there(folder: Path, device: Any) -> None:
    told(InputError, folder, f"device {device!r} cannot be used", '"cpu"', device=device)
