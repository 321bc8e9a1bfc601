"""Writing checkpoints: lenskit's own, which load by memory map, and Hugging Face's, bit for bit.

A lenskit checkpoint is a folder with `lenskit.json` (the manifest: config, source, revision, hashes, version),
`weights*.safetensors` under our names, and the tokenizer's files. The hashes are for those who want to check a
copy; loading does not read every byte. A folder appears whole or not at all: it is written beside its place and
renamed at the end.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lenskit.checkpoints.adapters import merged_parameter
from lenskit.checkpoints.load import Described, Weights, describe, matched
from lenskit.checkpoints.source import COMPANIONS, FORMAT, GENERATION_CONFIG, MANIFEST, Source, find
from lenskit.errors import CheckpointError, InputError, LenskitError
from lenskit.extras import load
from lenskit.models.base import Decoder, Family
from lenskit.models.config import DecoderConfig
from lenskit.models.registry import family
from lenskit.version import __version__
from lenskit.weights import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 2 * 2**30

NamedTensors = Iterable[tuple[str, Callable[[], Tensor]]]


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write any checkpoint as a lenskit checkpoint, tensor for tensor, in its own dtype.

    Args:
        source: an embedded name, a folder, or a hub id; a PEFT adapter's stands for its base with the adapter.
        dest: a folder that does not exist yet, or is empty.
        adapter: a PEFT adapter's folder or hub id, which is merged into the weights.

    Returns:
        The folder.

    Raises:
        CheckpointError, ConfigError: the source cannot be read (see their subclasses), `dest` is in the way or
            cannot be written. Nothing is left.
    """
    found, described, weights = _opened(source, adapter, revision, token)
    with new_folder(Path(dest)) as folder:
        _copy_companions(found, folder)
        _write_lenskit(folder, described, _ours(weights), source=found.described, revision=found.revision)
    return Path(dest)


def export(
    source: str | Path,
    dest: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write any checkpoint in Hugging Face's format; every tensor is bit-exact, but for what an adapter is merged into.
    Arguments as `convert`'s.
    """
    found, described, weights = _opened(source, adapter, revision, token)
    ours = dict(_ours(weights))
    with new_folder(Path(dest)) as folder:
        _copy_companions(found, folder)
        table = described.family.weights(described.cfg)
        tensors = [
            (name, partial(_stored, placement, index, ours))
            for placement in table.placements()
            for index, name in enumerate(placement.on_disk if placement.ours else ())
        ]
        _write_shards(folder, tensors, stem="model")
        _write_json(folder / "config.json", described.hf_config)
    return Path(dest)


def save(
    dest: str | Path,
    model: Decoder,
    *,
    hf_config: dict[str, Any] | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    source: str,
    generation_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model in memory as a lenskit checkpoint, with adapters beside its weights merged into them.

    Args:
        hf_config: what Hugging Face's config said, for a later export; None to derive it from the model's.
        source: what the manifest says the weights come from.
        generation_config: for generation_config.json; None or empty for none.

    Raises:
        CheckpointError: `dest` is in the way, or cannot be written.
        InputError: there are no weights here to write.
    """
    cfg, of = model.cfg, family(model.cfg.model_type, where="the config")
    ours = [name for placement in of.weights(cfg).placements() for name in placement.ours]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_here(ours, parameters)
    dtype = str(parameters[ours[0]].dtype).removeprefix("torch.")
    described = Described(of, cfg, {**(hf_config or _hf_config(of, cfg, tokenizer)), "dtype": dtype})
    described.hf_config.pop("torch_dtype", None)  # the old name of "dtype"
    with new_folder(Path(dest)) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if generation_config:
            _write_json(folder / GENERATION_CONFIG, generation_config)
        tensors = [(name, partial(_on_cpu, model, name)) for name in ours]
        _write_lenskit(folder, described, tensors, source=source, revision=None)
    return Path(dest)


def _check_here(ours: list[str], parameters: Mapping[str, Tensor]) -> None:
    absent = [name for name in ours if parameters[name].is_meta]
    if absent:
        raise InputError(
            "the model's weights are not here to be saved",
            got=f"{len(absent)} of {len(ours)} parameters on the meta device, {absent[0]} among them",
            expected="weights in memory",
            fix="load it without device='meta' and without offload; `lenskit convert` copies a checkpoint as it is",
        )


def _hf_config(family: Family, cfg: DecoderConfig, tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, Any]:
    """A config.json for a model that never had one; without a tokenizer no id has a special meaning."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: None if tokenizer is None else getattr(tokenizer, name) for name in special}
    return {"architectures": [family.hf_class], "model_type": cfg.model_type, **cfg.to_hf(), **ids}


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of `dest` at the end of the block; an error leaves nothing.

    Raises:
        CheckpointError: `dest` is a file or a folder with something in it, or writing failed.
    """
    dest = dest.expanduser().resolve()
    _check_free(dest)
    folder = dest.with_name(f".{dest.name}.partial-{uuid4().hex[:8]}")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.replace(dest)
    except (OSError, SafetensorError) as error:
        if isinstance(error, LenskitError):
            raise
        _check_free(dest)  # somebody else may have written it meanwhile
        raise CheckpointError(
            f"{dest} could not be written",
            got=f"{type(error).__name__}: {error}",
            expected="a place to write to, with room for all the weights",
            fix="free some space, or choose another destination; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_free(dest: Path) -> None:
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise CheckpointError(
            f"{dest} is in the way",
            got=f"a folder with {', '.join(sorted(p.name for p in dest.iterdir())[:5])}" if dest.is_dir() else "a file",
            expected="a path where nothing is, or an empty folder",
            fix="choose another destination, or remove this one first",
        )


def _opened(
    source: str | Path, adapter: str | Path | None, revision: str | None, token: str | bool | None
) -> tuple[Source, Described, Weights]:
    found = find(source, adapter=adapter, revision=revision, token=token)
    described = describe(found)
    with torch.device("meta"):
        model = Decoder(described.cfg, described.family.parts(described.cfg))
    return found, described, matched(found, described, model)


def _ours(weights: Weights) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for placement in weights.placements:
        for index, name in enumerate(placement.ours):
            yield name, partial(_loaded, placement, index, weights)


def _loaded(placement: Placement, index: int, weights: Weights) -> Tensor:
    return weights.merged(placement)[index]


def _stored(placement: Placement, index: int, ours: Mapping[str, Callable[[], Tensor]]) -> Tensor:
    return placement.rule.store([ours[name]() for name in placement.ours])[index]


def _on_cpu(model: Decoder, name: str) -> Tensor:
    return merged_parameter(model, name).cpu()


def _write_lenskit(
    folder: Path, described: Described, tensors: NamedTensors, *, source: str, revision: str | None
) -> None:
    written = _write_shards(folder, tensors, stem="weights")
    manifest = {
        "format": FORMAT,
        "lenskit": __version__,
        "model_type": described.cfg.model_type,
        "source": source,
        "revision": revision,
        "config": described.cfg.to_json(),
        "hf_config": described.hf_config,
        "sha256": {path.name: _sha256(path) for path in written},
    }
    _write_json(folder / MANIFEST, manifest)


def _write_shards(folder: Path, tensors: NamedTensors, *, stem: str) -> list[Path]:
    """Tensors into safetensors files of at most SHARD_BYTES (or one tensor), with an index if there are several."""
    tqdm = load("tqdm.auto").tqdm
    shards: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        path = folder / f"{stem}-{len(shards) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors' own would be readable for its owner alone
        shards.append((path, list(shard)))
        shard.clear()

    for name, read in tqdm(list(tensors), desc="writing", unit="tensor", disable=None, leave=False):
        tensor = read().contiguous()
        if tensor.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in shard.values()}:
            tensor = tensor.clone()  # safetensors refuses tensors that share memory
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        total += tensor.nbytes
        del tensor  # a shard's memory goes with the shard
    flush()
    if len(shards) == 1:
        return [shards[0][0].rename(folder / f"{stem}.safetensors")]
    named = [
        (path.rename(folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"), names)
        for i, (path, names) in enumerate(shards, 1)
    ]
    weight_map = {name: path.name for path, names in named for name in names}
    _write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return [path for path, _ in named]


def _copy_companions(source: Source, folder: Path) -> None:
    for pattern in COMPANIONS:
        place = source.folder if pattern == GENERATION_CONFIG else source.tokenizer_folder
        for path in (path for path in place.glob(pattern) if path.is_file()):
            copy = folder / path.relative_to(place)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
