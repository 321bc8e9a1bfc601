"""Multi-modal checkpoints: the text model in one, where what it computes of text alone is a family's forward pass.

The config becomes the text model's, and tensors are found under its names; those that read pictures and sound are left
out. Which model types these are is a closed list: some classes compute other things of text (a prefix that sees itself
whole, cross attention), and are refused as any unknown type is.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lenskit.checkpoints.files import TensorFiles
from lenskit.errors import CheckpointNotFoundError, UnsupportedConfigError
from lenskit.modules.linear import Unembed
from lenskit.weights import Placement, WeightTable

# Hugging Face's `model_type` of a multi-modal model. The text model's decides whether there is a family for it.
MODEL_TYPES = (
    "deepseek_vl", "gemma3", "got_ocr2", "idefics2", "idefics3", "internvl", "llava", "llava_next",
    "llava_next_video", "llava_onevision", "mistral3", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_vl",
    "smolvlm", "video_llava", "vipllava", "voxtral",
)  # fmt: skip

# Text models of a type of their own, which are another's: their positions have three parts, all the same in text.
SAME_AS = {"qwen2_5_vl_text": "qwen2", "qwen2_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
THREE_PARTS = ("mrope_section", "mrope_interleaved")  # how many frequencies go by which part
# What some releases put into the text model's config, and is about pictures.
ABOUT_PICTURES = (
    "image_token_id", "perceiver_config", "pixel_shuffle_factor", "use_resampler", "video_token_id",
    "vision_end_token_id", "vision_start_token_id", "vision_token_id",
)  # fmt: skip

BASE = ("language_model.model.", "model.language_model.", "model.text_model.")  # before names of the base text model
HEAD = "language_model.lm_head."  # or as in a checkpoint of the text model alone
OTHER_PARTS = (  # behind "model." or not
    "aligner", "audio_tower", "connector", "image_newline", "image_tower", "multi_modal_projector", "video_tower",
    "vision_model", "vision_tower", "visual",
)  # fmt: skip


def text_config(config: Any, folder: Path) -> dict[str, Any]:
    """The text model's config, as its own config.json would have it, with every attribute.

    Args:
        config: transformers' config of the whole.
        folder: of the weights, which say whether the unembedding is the embedding where the config is mistaken.
    """
    text: dict[str, Any] = json.loads(config.get_text_config(decoder=True).to_json_string(use_diff=False))
    whole: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    if text["model_type"] in SAME_AS:
        text["model_type"] = SAME_AS[text["model_type"]]
        rope = text["rope_parameters"]
        text["rope_parameters"] = {name: value for name, value in rope.items() if name not in THREE_PARTS}
    for name in ABOUT_PICTURES:
        text.pop(name, None)
    tied = whole.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    text["tie_word_embeddings"] = tied and not _has_a_head_of_its_own(folder)
    about_weights = ("dtype", "quantization_config")
    return text | {name: whole[name] for name in about_weights if whole.get(name) is not None}


def refuse_changed_logits(unembed: Unembed) -> None:
    """The multi-modal classes multiply by the unembedding and do no more, whatever the text model's own class does.

    Raises:
        UnsupportedConfigError: its family does more.
    """
    if type(unembed) is not Unembed:
        raise UnsupportedConfigError(
            "the text model in this multi-modal one computes other logits than its family",
            got=f"logits from {type(unembed).__name__}: with a cap, a multiplier or a projection",
            expected="a product with the unembedding and no more, as in Hugging Face's multi-modal class",
            fix="save the text model alone, if it was trained with that; take it out of text_config if it was not",
        )


def placements(table: WeightTable, names: Iterable[str], where: str) -> list[Placement]:
    """`WeightTable.match` for the text model of a multi-modal checkpoint.

    Raises:
        MissingTensorError, UnknownTensorError: see there.
    """
    on_disk = text_names(names, base=table.prefix)
    found = table.match(on_disk, where)
    return [replace(p, on_disk=tuple(on_disk[name] for name in p.on_disk)) for p in found]


def text_names(names: Iterable[str], *, base: str = "model.") -> Mapping[str, str]:
    """Names of the text model's tensors, each with what it is called on disk. A name that is neither the text model's
    nor of another part, or comes twice, is left as it is, for the table to refuse.

    Args:
        base: before the names of the base model in a checkpoint of the text model alone.
    """
    found: dict[str, str] = {}
    for name in names:
        if name.removeprefix("model.").split(".")[0] not in OTHER_PARTS:
            ours = _text_name(name, base)
            found[name if ours in found else ours] = name
    return found


def _text_name(name: str, base: str) -> str:
    for prefix in BASE:
        if name.startswith(prefix):
            return base + name.removeprefix(prefix)
    return "lm_head." + name.removeprefix(HEAD) if name.startswith(HEAD) else name


def _has_a_head_of_its_own(folder: Path) -> bool:
    """Whether the weights have an unembedding that is not the embedding: some classes' defaults say that it is, and
    transformers goes by the weights.
    """
    try:
        files = TensorFiles(folder)
    except CheckpointNotFoundError:  # a model without weights
        return False
    names = text_names(files.files)
    if "lm_head.weight" not in names or "model.embed_tokens.weight" not in names:
        return False
    head, embed = (files.mapped(names[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    some = slice(0, 64)  # of equal ones, the rest is compared when they are loaded
    return not torch.equal(head[some], embed[some])
