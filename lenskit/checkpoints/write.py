"""Writing checkpoints: lenskit's own, which load by memory map, and Hugging Face's, bit for bit.

A lenskit checkpoint is a folder with `lenskit.json` (the manifest: config, source, revision, hashes, version),
`weights*.safetensors` under our names, and the tokenizer's files. A folder appears whole or not at all: it is
written beside its place and renamed at the end.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from lenskit.checkpoints.files import TensorFiles
from lenskit.checkpoints.load import Described, describe, open_tensors, table_of
from lenskit.checkpoints.source import MANIFEST, TOKENIZER_FILES, Source, find
from lenskit.errors import CheckpointError
from lenskit.extras import load
from lenskit.models.base import DecoderConfig, Family
from lenskit.weights import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the manifest
SHARD_BYTES = 2 * 2**30

NamedTensors = Iterable[tuple[str, Callable[[], Tensor]]]


def convert(
    source: str | Path, dest: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Write any checkpoint as a lenskit checkpoint, tensor for tensor, in its own dtype.

    Args:
        source: an embedded name, a folder, or a hub id.
        dest: a folder that does not exist yet, or is empty.

    Returns:
        The folder.

    Raises:
        CheckpointError: the source cannot be read (see its subclasses), or `dest` is in the way. Nothing is left.
    """
    found = find(source, revision=revision, token=token)
    described = describe(found)
    files = open_tensors(found)
    with new_folder(Path(dest)) as folder:
        _copy_tokenizer(found.folder, folder)
        _write_lenskit(folder, described, _ours(found, described, files), source=found.name, revision=found.revision)
    return Path(dest)


def export(
    source: str | Path, dest: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Write any checkpoint in Hugging Face's format; every tensor is bit-exact. Arguments as `convert`'s."""
    found = find(source, revision=revision, token=token)
    described = describe(found)
    files = open_tensors(found)
    ours = dict(_ours(found, described, files))
    with new_folder(Path(dest)) as folder:
        _copy_tokenizer(found.folder, folder)
        table = described.family.weights(described.cfg)
        tensors = [
            (name, partial(_stored, placement, index, ours))
            for placement in table.placements()
            for index, name in enumerate(placement.on_disk if placement.ours else ())
        ]
        _write_shards(folder, tensors, stem="model")
        dtype = str(next(iter(ours.values()))().dtype).removeprefix("torch.")
        _write_json(folder / "config.json", hf_config(described, dtype))
    return Path(dest)


def save(
    dest: str | Path,
    *,
    family: Family,
    cfg: DecoderConfig,
    parameters: Mapping[str, Tensor],
    hf_config: dict[str, Any] | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    source: str,
) -> Path:
    """Write a model in memory as a lenskit checkpoint.

    Args:
        parameters: ours, by name.
        hf_config: what Hugging Face's config said, for a later export; None to derive it from `cfg`.
        source: what the manifest says the weights come from.

    Raises:
        CheckpointError: `dest` is in the way.
    """
    described = Described(family, cfg, hf_config or {})
    ours = [name for placement in family.weights(cfg).placements() for name in placement.ours]
    with new_folder(Path(dest)) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        tensors = [(name, partial(_on_cpu, parameters[name])) for name in ours]
        _write_lenskit(folder, described, tensors, source=source, revision=None)
    return Path(dest)


def hf_config(described: Described, dtype: str) -> dict[str, Any]:
    """The config.json of an export: the original where there is one, else one made from ours."""
    family, cfg = described.family, described.cfg
    made = {"architectures": [family.hf_class], "model_type": cfg.model_type, "dtype": dtype, **cfg.to_hf()}
    return described.hf_config or made


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of `dest` at the end of the block; an error leaves nothing.

    Raises:
        CheckpointError: `dest` is a file or a folder with something in it.
    """
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise CheckpointError(
            f"{dest} is in the way",
            got="a file"
            if dest.is_file()
            else f"a folder with {', '.join(sorted(p.name for p in dest.iterdir())[:5])}",
            expected="a path where nothing is, or an empty folder",
            fix="choose another destination, or remove this one first",
        )
    dest.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{dest.name}.partial-", dir=dest.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(dest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ours(source: Source, described: Described, files: TensorFiles) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for placement in table_of(source, described).match(files.files, source.where):
        for index, name in enumerate(placement.ours):
            yield name, partial(_loaded, placement, index, files)


def _loaded(placement: Placement, index: int, files: TensorFiles) -> Tensor:
    return placement.rule.load([files.mapped(name) for name in placement.on_disk])[index]


def _stored(placement: Placement, index: int, ours: Mapping[str, Callable[[], Tensor]]) -> Tensor:
    return placement.rule.store([ours[name]() for name in placement.ours])[index]


def _on_cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu()


def _write_lenskit(
    folder: Path, described: Described, tensors: NamedTensors, *, source: str, revision: str | None
) -> None:
    written = _write_shards(folder, tensors, stem="weights")
    manifest = {
        "format": FORMAT,
        "lenskit": version("lenskit-interp"),
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
        shards.append((path, list(shard)))
        shard.clear()

    for name, read in tqdm(list(tensors), desc="writing", unit="tensor", disable=None, leave=False):
        tensor = read().contiguous()
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        total += tensor.nbytes
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


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
