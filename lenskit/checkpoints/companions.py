"""What goes with the weights: the tokenizer, and how generations end."""

from typing import TYPE_CHECKING, Any

from lenskit.checkpoints.load import hf_config_of
from lenskit.checkpoints.nearest import known
from lenskit.checkpoints.source import GENERATION_CONFIG, Source, has_tokenizer, read_json
from lenskit.errors import CorruptCheckpointError
from lenskit.extras import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(source: Source) -> "PreTrainedTokenizerBase | None":
    """The folder's tokenizer, or the adapter's, if there is one; code from the checkpoint is never run.

    Raises:
        CorruptCheckpointError: it has one that cannot be loaded.
    """
    folder, manifest = source.tokenizer_folder, source.manifest
    if not has_tokenizer(folder):
        return None
    raw = read_json(source.config_file) if manifest is None else manifest["hf_config"]
    raw = {**raw, "model_type": (manifest or raw)["model_type"]}
    in_folder = manifest is None and folder == source.folder and known(raw["model_type"])
    try:
        tokenizer: PreTrainedTokenizerBase = load("transformers").AutoTokenizer.from_pretrained(
            folder,
            # Which class a tokenizer is depends on the model's config too, which transformers reads if it can.
            config=None if in_folder else hf_config_of(raw),
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever transformers raises, it is about these files
        raise CorruptCheckpointError(
            f"{folder}: the tokenizer cannot be loaded",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            expected="a tokenizer of transformers; lenskit never runs code from a checkpoint",
            fix="pass tokenizer=..., repair its files, or remove them for a model that takes ids only",
        ) from error
    return tokenizer


def generation_config_of(source: Source) -> dict[str, Any]:
    """The folder's generation_config.json; empty where there is none.

    Raises:
        CorruptCheckpointError: it is no JSON object.
    """
    path = source.folder / GENERATION_CONFIG
    return read_json(path) if path.exists() else {}
