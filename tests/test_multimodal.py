"""Multi-modal checkpoints: the text model in one is loaded, and is what Hugging Face's whole class computes of text."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import edit_json, same_weights, save, tensors, told
from parity_table import COMMON, LENGTH, TINY, error, hf_model, ids, perturb
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel

import lenskit as lk
from lenskit.checkpoints.load import describe
from lenskit.checkpoints.multimodal import MODEL_TYPES, OTHER_PARTS
from lenskit.checkpoints.source import find
from lenskit.errors import MissingTensorError, UnknownTensorError, UnsupportedConfigError, UnsupportedModelError
from lenskit.modules.rope_types import RopeConfig

SIZES = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES = {**SIZES, "image_size": 8, "patch_size": 4}
CLIP = {**PICTURES, "model_type": "clip_vision_model", "projection_dim": 8}
SIGLIP = {**PICTURES, "model_type": "siglip_vision_model"}
BLOCKS = {"depth": 1, "num_heads": 2, "patch_size": 4}
SOUND = {"num_mel_bins": 4, "max_source_positions": 8}
IMAGE, VIDEO, START, END = 58, 57, 56, 55  # ids that stand for pictures
PICTURE_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
THREE_PARTS = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def text(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TINY[model_type], **NO_TOKENS, **changes}


# Hugging Face's config of a small model, by its `model_type`.
WHOLE: dict[str, dict[str, Any]] = {
    "deepseek_vl": {"text_config": text("llama"), "vision_config": SIGLIP, "image_token_id": IMAGE},
    "gemma3": {
        "text_config": text("gemma3_text"), "vision_config": SIGLIP, "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "got_ocr2": {
        "text_config": text("qwen2"), "image_token_index": IMAGE, "vision_config": {
            "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 20,
            "image_size": 16, "patch_size": 4, "window_size": 2, "global_attn_indexes": [0],
        },
    },
    "idefics2": {
        "text_config": text("mistral"), "vision_config": PICTURES, "image_token_id": IMAGE, "perceiver_config": {
            "hidden_size": 32, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8,
            "num_key_value_heads": 1, "resampler_n_latents": 3,
        },
    },
    "idefics3": {"text_config": text("llama"), "vision_config": PICTURES, "image_token_id": IMAGE, "scale_factor": 2},
    "internvl": {
        "text_config": text("qwen2"), "image_token_id": IMAGE,
        "vision_config": {**SIZES, "image_size": [8, 8], "patch_size": [4, 4]},
    },
    "llava": {"text_config": text("llama"), "vision_config": CLIP, "image_token_index": IMAGE},
    "llava_next": {"text_config": text("mistral"), "vision_config": CLIP, "image_token_index": IMAGE},
    "llava_next_video": {
        "text_config": text("llama"), "vision_config": CLIP, "image_token_index": IMAGE, "video_token_index": VIDEO,
    },
    "llava_onevision": {
        "text_config": text("qwen2"), "vision_config": SIGLIP, "image_token_index": IMAGE, "video_token_index": VIDEO,
    },
    "mistral3": {
        "text_config": text("mistral"), "image_token_index": IMAGE, "tie_word_embeddings": False,
        "vision_config": {**PICTURES, "head_dim": 8, "model_type": "pixtral"},
    },
    "qwen2_5_vl": {
        "text_config": {**COMMON, **NO_TOKENS, **THREE_PARTS}, **PICTURE_IDS,
        "vision_config": {**BLOCKS, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 20},
    },
    "qwen2_audio": {
        "text_config": text("qwen2"), "audio_token_index": IMAGE, "audio_config": {
            **SOUND, "d_model": 16, "encoder_ffn_dim": 20, "encoder_layers": 1, "encoder_attention_heads": 2,
        },
    },
    "qwen2_vl": {
        "text_config": {**COMMON, **NO_TOKENS, **THREE_PARTS, "sliding_window": 7, "use_sliding_window": True,
                        "max_window_layers": 1}, **PICTURE_IDS,
        "vision_config": {**BLOCKS, "embed_dim": 16, "hidden_size": 32}, "tie_word_embeddings": True,
    },
    "qwen3_vl": {
        "text_config": {**COMMON, **NO_TOKENS, **THREE_PARTS, "head_dim": 8}, **PICTURE_IDS, "vision_config": {
            **BLOCKS, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 20, "num_position_embeddings": 4,
            "deepstack_visual_indexes": [0],
        },
    },
    "smolvlm": {"text_config": text("llama"), "vision_config": PICTURES, "image_token_id": IMAGE, "scale_factor": 2},
    "video_llava": {
        "text_config": text("llama"), "vision_config": CLIP, "image_token_index": IMAGE, "video_token_index": VIDEO,
    },
    "vipllava": {
        "text_config": text("llama"), "vision_config": CLIP, "image_token_index": IMAGE, "vision_feature_layers": [-1],
    },
    "voxtral": {"text_config": text("llama"), "audio_config": {**SIZES, **SOUND}, "audio_token_id": IMAGE},
}  # fmt: skip

Whole = Callable[..., Path]


def whole_class(config: Any) -> Any:
    known = [
        auto for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM) if type(config) in auto._model_mapping
    ]
    return known[0]._model_mapping[type(config)]


@pytest.fixture
def whole(tmp_path: Path) -> Whole:
    """Writes a tiny multi-modal checkpoint with random weights."""

    def write(model_type: str, *, original: bool = True, name: str = "whole", **changes: Any) -> Path:
        config = AutoConfig.for_model(model_type, **json.loads(json.dumps({**WHOLE[model_type], **changes})))
        model = whole_class(config)(config)
        perturb(model, 0)
        model.save_pretrained(tmp_path / name, save_original_format=original)
        return tmp_path / name

    return write


def whole_model(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    return whole_class(config).from_pretrained(folder, attn_implementation="eager").eval()


def text_ids(rows: int, length: int) -> Tensor:
    """Without those that stand for pictures."""
    return ids(rows, length) % END


# -- the same numbers


def test_every_type_has_a_row() -> None:
    assert tuple(WHOLE) == MODEL_TYPES


@pytest.mark.parametrize("model_type", WHOLE)
@torch.no_grad()
def test_logits_of_text_equal_the_whole_classes(model_type: str, whole: Whole) -> None:
    folder = whole(model_type)
    model, hf, tokens = lk.HookedTransformer.from_pretrained(folder), whole_model(folder), text_ids(3, LENGTH)
    assert error(model(tokens), hf(input_ids=tokens).logits) < 1e-5
    mask = torch.ones_like(tokens)
    mask[0, :5], mask[1, :17] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = hf(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    assert error(model(tokens, mask)[mask.bool()], theirs[mask.bool()]) < 1e-5
    new = hf.generate(input_ids=tokens[:1], max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    assert model.generate(tokens[:1], max_new_tokens=20, eos_token_id=[]).tokens[0].tolist() == new[0].tolist()


@pytest.mark.parametrize("model_type", WHOLE)
def test_names_are_read_in_either_layout(model_type: str, whole: Whole) -> None:
    one, other = whole(model_type), whole(model_type, original=False, name="other")
    assert same_weights(*(lk.HookedTransformer.from_pretrained(folder) for folder in (one, other)))


@pytest.mark.parametrize("family", ["mixtral", "gemma", "olmo2", "starcoder2", "gpt_neox"])
@torch.no_grad()
def test_the_text_model_may_be_of_any_family(family: str, whole: Whole) -> None:
    folder = whole("llava", text_config=text(family))
    model, hf = lk.HookedTransformer.from_pretrained(folder), whole_model(folder)
    assert model.cfg.model_type == family
    assert error(model(text_ids(2, 9)), hf(input_ids=text_ids(2, 9)).logits) < 1e-5


# -- what is written is the text model


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_vl", "smolvlm"])
@pytest.mark.parametrize("way", ["save", "convert", "export"])
@torch.no_grad()
def test_what_is_written_is_the_text_model(model_type: str, way: str, whole: Whole, tmp_path: Path) -> None:
    folder, tokens = whole(model_type), text_ids(2, 9)
    model = lk.HookedTransformer.from_pretrained(folder)
    if way == "save":
        model.save_pretrained(tmp_path / "own")
    own = tmp_path / "own" if way == "save" else lk.convert(folder, tmp_path / "own")
    assert same_weights(lk.HookedTransformer.from_pretrained(own), model)
    exported = lk.export(folder if way == "export" else own, tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text())["model_type"] == model.cfg.model_type
    names = safe_open(exported / "model.safetensors", "pt").keys()
    assert all(name == "lm_head.weight" or re.match(r"model\.(embed_tokens|layers|norm)\.", name) for name in names)
    hf = hf_model(exported)
    assert type(hf).__name__ == json.loads((exported / "config.json").read_text())["architectures"][0]
    assert error(model(tokens), hf(tokens).logits) < 1e-5
    on_disk = tensors(folder)
    assert all(any(torch.equal(mine, theirs) for theirs in on_disk.values()) for mine in tensors(exported).values())


# -- everything else stays closed


@pytest.mark.parametrize("part", OTHER_PARTS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_other_parts_are_left_out_by_name(part: str, prefix: str, whole: Whole) -> None:
    folder = whole("llava")
    plain = lk.HookedTransformer.from_pretrained(folder)
    names = [name for name in tensors(folder) if name.startswith("language_model.")]
    save(folder, {**{name: tensors(folder)[name] for name in names}, f"{prefix}{part}.x": torch.ones(1)})
    assert same_weights(lk.HookedTransformer.from_pretrained(folder), plain)


def test_a_tensor_that_is_there_twice_is_refused(whole: Whole) -> None:
    folder = whole("llava")
    save(folder, {**tensors(folder), "model.language_model.norm.weight": torch.ones(32)})
    told(UnknownTensorError, folder, "language_model.norm.weight")


@pytest.mark.parametrize("name", ["vision.x", "language_model.x", "model.layers.0.x", "visual_x.y", "lm_head.bias"])
def test_a_tensor_of_no_known_part_is_refused(name: str, whole: Whole) -> None:
    folder = whole("llava")
    save(folder, {**tensors(folder), name: torch.ones(1)})
    told(UnknownTensorError, folder, name)


def test_a_tensor_of_the_text_model_that_is_missing_is_told(whole: Whole) -> None:
    folder = whole("llava")
    save(folder, {name: tensor for name, tensor in tensors(folder).items() if "layers.1.mlp.up" not in name})
    told(MissingTensorError, folder, "model.layers.1.mlp.up_proj.weight")


def test_a_text_models_own_checkpoint_has_no_other_parts(whole: Whole, tmp_path: Path) -> None:
    """Only a config that says so makes a checkpoint multi-modal."""
    exported = lk.export(whole("llava"), tmp_path / "exported")
    save(exported, {**tensors(exported), "vision_tower.x": torch.ones(1)})
    told(UnknownTensorError, exported, "vision_tower.x")


def test_an_unembedding_of_its_own_counts_for_more_than_the_config(whole: Whole) -> None:
    """As in transformers: this class's default is that there is none, and published checkpoints do not say."""
    folder = whole("mistral3")
    edit_json(folder / "config.json", tie_word_embeddings=...)
    model = lk.HookedTransformer.from_pretrained(folder)
    assert not model.cfg.tie_embeddings
    assert error(model(text_ids(2, 9)), whole_model(folder)(input_ids=text_ids(2, 9)).logits) < 1e-5
    copied = {
        **tensors(folder),
        "language_model.lm_head.weight": tensors(folder)["language_model.model.embed_tokens.weight"],
    }
    save(folder, copied)
    assert lk.HookedTransformer.from_pretrained(folder).cfg.tie_embeddings


def test_without_weights_the_config_is_believed(whole: Whole) -> None:
    folder = whole("gemma3")
    save(folder, {})
    (folder / "model.safetensors").unlink()
    assert lk.HookedTransformer.from_pretrained(folder, device="meta").cfg.tie_embeddings


# -- refused

OTHERS = {
    "a text model that the zoo does not have": {"model_type": "llava", "text_config": {"model_type": "persimmon"}},
    "a class that computes something else of text": {
        "model_type": "paligemma", "text_config": {"model_type": "gemma"}, "vision_config": SIGLIP,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_refused_as_unknown_types_are(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OTHERS[name]))
    refused = OTHERS[name]["text_config"]["model_type"] if "zoo" in name else OTHERS[name]["model_type"]
    told(UnsupportedModelError, tmp_path, f"no architecture family for model_type '{refused}'", "config.json")


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma3", {"text_config": text("gemma3_text", final_logit_softcapping=3.0)}),
        ("llava", {"text_config": text("gemma2")}),
        ("llava", {"text_config": text("granite")}),
    ],
    ids=str,
)
def test_logits_that_the_whole_class_changes_are_refused(model_type: str, changes: Any, whole: Whole) -> None:
    told(UnsupportedConfigError, whole(model_type, **changes), "computes other logits", "config.json")


@pytest.mark.parametrize(
    "attributes", [{"quantization_config": {"quant_method": "fp8"}}, {"text_config": {"x": 1}}], ids=str
)
def test_the_configs_are_read_closed(attributes: dict[str, Any], whole: Whole) -> None:
    folder = whole("llava")
    config = json.loads((folder / "config.json").read_text())
    merged = {k: {**config[k], **v} if k in config else v for k, v in attributes.items()}
    edit_json(folder / "config.json", **merged)
    told(UnsupportedConfigError, folder, next(iter(attributes[next(iter(attributes))])))


# -- published

SMOLVLM = {
    "_flash_attn_2_enabled": True, "_name_or_path": "None", "architectures": ["VLlama3ForCausalLM"], "head_dim": 64,
    "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
    "model_type": "llama", "neftune_noise_alpha": 0.0, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "perceiver_config": {"attention_dropout": 0.0},
    "pixel_shuffle_factor": 4, "qk_layer_norms": False, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_theta": 100000, "torch_dtype": "bfloat16", "use_resampler": False, "vocab_size": 49280,
}  # fmt: skip
QWEN_2_VL = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 1536,
    "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2_vl", "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
QWEN_3_VL = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936,
}  # fmt: skip
PIXTRAL = {
    "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "is_composition": True,
    "max_position_embeddings": 1024000, "model_type": "mistral", "num_hidden_layers": 40, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None, "vocab_size": 131072,
}  # fmt: skip
VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
    "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
}  # fmt: skip
GEMMA_3_4B = {
    "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
}  # fmt: skip

# config.json, and some of the fields that the text model's must become.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava-1.5-7b": (
        {"model_type": "llava", "text_config": VICUNA, "ignore_index": -100, "pad_token_id": 32001,
         "tie_word_embeddings": False, "vocab_size": 32064, "torch_dtype": "float16",
         "vision_config": {"model_type": "clip_vision_model"}},
        {"d_model": 4096, "d_vocab": 32064, "tie_embeddings": False},
    ),
    "pixtral-12b": (
        {"model_type": "llava", "text_config": PIXTRAL, "vision_config": {"model_type": "pixtral"}},
        {"model_type": "mistral", "d_head": 128, "n_heads": 32, "window": None},
    ),
    "gemma-3-4b": (
        {"model_type": "gemma3", "text_config": GEMMA_3_4B, "eos_token_id": [1, 106],
         "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}},
        {"n_heads": 8, "window": 1024, "tie_embeddings": True, "local_rope": RopeConfig(),
         "rope": RopeConfig(rope_type="linear", theta=1_000_000.0, factor=8.0)},
    ),
    "qwen2-vl-2b": (QWEN_2_VL, {"model_type": "qwen2", "rope": RopeConfig(theta=1e6), "tie_embeddings": True}),
    "qwen3-vl-2b": (
        {"model_type": "qwen3_vl", "text_config": QWEN_3_VL, "tie_word_embeddings": True},
        {"model_type": "qwen3", "rope": RopeConfig(theta=5_000_000), "d_head": 128, "tie_embeddings": True},
    ),
    "a fine-tune of qwen2-vl": (
        {**QWEN_2_VL, "text_config": {k: v for k, v in QWEN_2_VL.items() if k != "vision_config"}},
        {"model_type": "qwen2", "d_model": 1536, "tie_embeddings": True},
    ),
    "smolvlm-256m": (
        {"model_type": "smolvlm", "text_config": SMOLVLM, "tie_word_embeddings": False, "scale_factor": 4},
        {"n_heads": 9, "rope": RopeConfig(theta=100000), "tie_embeddings": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str, tmp_path: Path) -> None:
    raw, fields = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    described = describe(find(tmp_path))
    assert {field: getattr(described.cfg, field) for field in fields} == fields
    assert described.hf_config["model_type"] == described.cfg.model_type
