"""Tensor files: safetensors (single or sharded) and `pytorch_model*.bin`, opened lazily, never unpickled unsafely."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lenskit.checkpoints.source import read_json
from lenskit.errors import CheckpointNotFoundError, CorruptCheckpointError


class TensorFiles:
    """The tensors of a folder, by name.

    Args:
        folder: holds one safetensors file, shards with an index, or pytorch_model*.bin files.
        stem: "model" for Hugging Face's folders, "weights" for lenskit's.

    Raises:
        CheckpointNotFoundError: no weights, or a shard is missing.
        CorruptCheckpointError: a file that cannot be read.
    """

    def __init__(self, folder: Path, *, stem: str = "model") -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self.files: dict[str, Path] = {}
        for path in _weight_files(folder, stem):
            with _readable(path):
                for name in self._file(path).keys():  # noqa: SIM118 (safe_open is no mapping)
                    self.files[name] = path

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header where the format has one."""
        file = self._file(self.files[name])
        return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())

    def mapped(self, name: str) -> Tensor:
        """The tensor as it lies on disk: private, copy-on-write memory, read when it is first touched."""
        path = self.files[name]
        with _readable(path):
            file = self._file(path)
            tensor: Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
            return tensor

    @contextmanager
    def once(self, name: str) -> Iterator[Tensor]:
        """The tensor for as long as it takes to copy it: its pages leave memory with the block."""
        path = self.files[name]
        with _readable(path):
            if path.suffix == ".bin":
                yield self.mapped(name)
            else:
                with safe_open(path, framework="pt") as file:
                    yield file.get_tensor(name)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _load_bin(path) if path.suffix == ".bin" else safe_open(path, framework="pt")
        return self._open[path]


def _weight_files(folder: Path, stem: str) -> list[Path]:
    for whole in (folder / f"{stem}.safetensors", folder / "pytorch_model.bin"):
        index = whole.with_name(whole.name + ".index.json")
        if whole.exists():
            return [whole]
        if index.exists():
            shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            missing = [shard.name for shard in shards if not shard.exists()]
            if missing or not shards:
                raise CheckpointNotFoundError(
                    f"{folder}: shards are missing",
                    got=f"no {', '.join(missing) or 'shard at all'}",
                    expected=f"every file that {index.name} names",
                    fix="download the missing files",
                )
            return shards
    raise CheckpointNotFoundError(
        f"{folder} has no weights that lenskit reads",
        got=", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "an empty folder",
        expected=f"{stem}.safetensors or pytorch_model.bin, whole or sharded with an index",
        fix="download the weights; other formats can be converted with Hugging Face's save_pretrained",
    )


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:  # the format before torch 1.6 cannot be mapped
        if "mmap" not in str(error):
            raise
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CorruptCheckpointError(
            f"{path} holds more than tensors, or is damaged",
            got=str(error).splitlines()[0],
            expected="a file of tensors; lenskit never runs code from a checkpoint",
            fix="use a safetensors version of the checkpoint, or download the file again",
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise CorruptCheckpointError(
            f"{path} cannot be read",
            got=f"{path.stat().st_size:,} bytes: {str(error).splitlines()[0]}",
            expected="a whole file of tensors",
            fix="the file is truncated or damaged: download or convert it again",
        ) from error
