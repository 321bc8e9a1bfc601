"""Which families there are. A family's file is imported when a model of it is asked for."""

import importlib

from lenskit.errors import UnsupportedModelError
from lenskit.models.base import Family

# Hugging Face's `model_type` -> the module that holds the family's `FAMILY`.
MODULES = {
    "bert": "lenskit.models.bert",
    "bloom": "lenskit.models.bloom",
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
    "opt": "lenskit.models.opt",
    "phi": "lenskit.models.phi",
    "qwen2": "lenskit.models.qwen2",
    "qwen3": "lenskit.models.qwen3",
    "smollm3": "lenskit.models.smollm3",
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
            fix="add a file under lenskit/models/ and a line to its registry.py (see CONTRIBUTING.md)",
        )
    found: Family = importlib.import_module(MODULES[model_type]).FAMILY
    return found
