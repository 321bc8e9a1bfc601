"""Which families there are. A family's file is imported when a model of it is asked for."""

import importlib

from lenskit.errors import UnsupportedModelError
from lenskit.models.base import Family

GUIDE = "docs/adding-a-model.md in lenskit's repository"

# Hugging Face's `model_type` -> the module that holds the family's `FAMILY`.
MODULES = {
    "bert": "lenskit.models.bert",
    "bloom": "lenskit.models.bloom",
    "cohere": "lenskit.models.cohere",
    "cohere2": "lenskit.models.cohere2",
    "deepseek_v3": "lenskit.models.deepseek_v3",
    "falcon": "lenskit.models.falcon",
    "gemma": "lenskit.models.gemma",
    "gemma2": "lenskit.models.gemma2",
    "gemma3_text": "lenskit.models.gemma3",
    "gpt2": "lenskit.models.gpt2",
    "gpt_neo": "lenskit.models.gpt_neo",
    "gpt_neox": "lenskit.models.gpt_neox",
    "gpt_oss": "lenskit.models.gpt_oss",
    "gptj": "lenskit.models.gptj",
    "granite": "lenskit.models.granite",
    "llama": "lenskit.models.llama",
    "mistral": "lenskit.models.mistral",
    "mixtral": "lenskit.models.mixtral",
    "mpt": "lenskit.models.mpt",
    "olmo": "lenskit.models.olmo",
    "olmo2": "lenskit.models.olmo2",
    "olmoe": "lenskit.models.olmoe",
    "opt": "lenskit.models.opt",
    "phi": "lenskit.models.phi",
    "phi3": "lenskit.models.phi3",
    "qwen2": "lenskit.models.qwen2",
    "qwen2_moe": "lenskit.models.qwen2_moe",
    "qwen3": "lenskit.models.qwen3",
    "qwen3_moe": "lenskit.models.qwen3_moe",
    "smollm3": "lenskit.models.smollm3",
    "stablelm": "lenskit.models.stablelm",
    "starcoder2": "lenskit.models.starcoder2",
}


def family(model_type: str, *, where: str) -> Family:
    """The family behind a `model_type`.

    Args:
        where: what has that type, for the message.

    Raises:
        UnsupportedModelError: none covers it.
    """
    if model_type not in MODULES:
        raise UnsupportedModelError(
            f"{where}: no architecture family for model_type {model_type!r}",
            got=repr(model_type),
            expected=f"one of {', '.join(sorted(MODULES))}",
            fix=f"add the family, a file under lenskit/models/: {GUIDE} goes through it",
        )
    found: Family = importlib.import_module(MODULES[model_type]).FAMILY
    return found
