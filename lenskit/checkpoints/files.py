"""Tensor files: safetensors (single or sharded) and `pytorch_model*.bin`, opened lazily, never unpickled unsafely."""

import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lenskit.checkpoints.source import read_json
from lenskit.errors import CheckpointNotFoundError, CorruptCheckpointError, LenskitError

REOPEN_BYTES = 64 * 2**20  # a .bin file is mapped anew when so much of it was read: that is what frees its pages
PIECE_BYTES = 32 * 2**20  # of a copy, how much is read from disk at once


class TensorFile(ABC):
    """One file of tensors. Both ways of reading give private memory: writing into it never changes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Of its tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read."""

    @abstractmethod
    def mapped(self, name: str) -> Tensor:
        """A tensor as it lies on disk, read when it is first touched; all of them share one map of the file."""

    @abstractmethod
    def alone(self, name: str) -> Tensor:
        """A tensor whose pages leave memory with it, or soon after: to be copied and dropped."""

    def copied(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor copied into memory of its own, in a dtype of its own."""
        return self.alone(name).to(dtype=dtype, copy=True)


class SafetensorsFile(TensorFile):
    """The header says everything but the values; a map of the file costs nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with _reading(path):
            self._file: Any = safe_open(path, framework="pt")

    def names(self) -> Sequence[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def mapped(self, name: str) -> Tensor:
        with _reading(self.path):
            tensor: Tensor = self._file.get_tensor(name)
            return tensor

    def alone(self, name: str) -> Tensor:
        return SafetensorsFile(self.path).mapped(name)

    def copied(self, name: str, dtype: torch.dtype) -> Tensor:
        # In pieces, each through a map of its own: an embedding's pages beside its copy would be too much.
        copy = torch.empty(self.shape(name), dtype=dtype)
        rows = len(copy) if copy.dim() else 0
        pieces = -(-copy.numel() * copy.itemsize // PIECE_BYTES)
        if rows < 2 or pieces < 2:
            return copy.copy_(self.alone(name))
        step = -(-rows // pieces)
        for start in range(0, rows, step):
            with _reading(self.path):
                copy[start : start + step] = SafetensorsFile(self.path)._file.get_slice(name)[start : start + step]
        return copy


class TorchFile(TensorFile):
    """What `torch.save` wrote. The format before torch 1.6 cannot be mapped and is read as a whole."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._mappable = True
        self._n_read = 0
        self._tensors = self._load()

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def mapped(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def alone(self, name: str) -> Tensor:
        if self._mappable and self._n_read > REOPEN_BYTES:
            self._tensors, self._n_read = self._load(), 0
        self._n_read += self._tensors[name].nbytes
        return self.mapped(name)

    def _load(self) -> dict[str, Tensor]:
        with _reading(self.path):
            try:
                found = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                self._mappable = False
                found = torch.load(self.path, map_location="cpu", weights_only=True)
        entries = found if isinstance(found, dict) else {"the file": found}
        others = {name: value for name, value in entries.items() if not _is_named_tensor(name, value)}
        if others or entries is not found:
            raise CorruptCheckpointError(
                f"{self.path} is no table of tensors",
                got=", ".join(f"{name}: {type(value).__name__}" for name, value in list(others.items())[:3])
                or type(found).__name__,
                expected="a dictionary from names to dense tensors, as a model's state_dict is",
                fix="save the inner state_dict alone, or use a safetensors version of the checkpoint",
            )
        return entries


class TensorFiles:
    """The tensors of a folder, by name.

    Args:
        folder: holds one safetensors file, shards with an index, or pytorch_model*.bin files.
        stem: "model" for Hugging Face's folders, "weights" for lenskit's, "adapter_model" for PEFT's.
        pickled: the file that may be there instead.

    Raises:
        CheckpointNotFoundError: no weights, or a shard is missing.
        CorruptCheckpointError: a file that cannot be read.
    """

    def __init__(self, folder: Path, *, stem: str = "model", pickled: str = "pytorch_model.bin") -> None:
        kinds = {".bin": TorchFile, ".safetensors": SafetensorsFile}
        opened = [kinds[path.suffix](path) for path in _weight_files(folder, stem, pickled)]
        self.files: dict[str, TensorFile] = {name: file for file in opened for name in file.names()}

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.files[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorFile`; the same for the others."""
        return self.files[name].shape(name)

    def mapped(self, name: str) -> Tensor:
        return self.files[name].mapped(name)

    def alone(self, name: str) -> Tensor:
        return self.files[name].alone(name)

    def copied(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.files[name].copied(name, dtype)


def _weight_files(folder: Path, stem: str, pickled: str) -> list[Path]:
    for whole in (folder / f"{stem}.safetensors", folder / pickled):
        index = whole.with_name(whole.name + ".index.json")
        if whole.exists():
            return [whole]
        if index.exists():
            return _shards(index, whole.suffix)
    raise CheckpointNotFoundError(
        f"{folder} has no weights that lenskit reads",
        got=", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "an empty folder",
        expected=f"{stem}.safetensors or {pickled}, whole or sharded with an index",
        fix="download the weights; other formats can be converted with Hugging Face's save_pretrained",
    )


def _shards(index: Path, suffix: str) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(n, str) and Path(n).name == n and n.endswith(suffix) for n in names):
        raise CorruptCheckpointError(
            f"{index} cannot be used",
            got=f"weight_map={str(weight_map)[:80]}",
            expected=f"weight_map, from tensors' names to {suffix} files beside the index",
            fix="download the index again",
        )
    shards = [index.with_name(name) for name in sorted(set(names))]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise CheckpointNotFoundError(
            f"{index.parent}: {len(missing)} of {len(shards)} weight files are missing",
            got=f"no {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            expected=f"every file that {index.name} names",
            fix="download the missing files into the folder",
        )
    return shards


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a library raises over a file's bytes is about that file: a damaged one can raise anything."""
    try:
        yield
    except LenskitError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CorruptCheckpointError:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return CorruptCheckpointError(
            f"{path} holds more than tensors",
            got=f"a pickle that calls for {refused[1]}, which was not run",
            expected="a file of tensors; lenskit never runs code from a checkpoint",
            fix="use a safetensors version of the checkpoint; distrust this file in other tools too",
        )
    if not path.is_file():
        got, fix = "a folder or a special file", "put the file of weights in its place"
    elif _head(path).startswith(b"version https://git-lfs"):
        got, fix = "a git-lfs pointer, which stands for the file", "fetch the file itself: git lfs pull"
    else:
        # A first sentence is enough: torch's go on to recommend unpickling the file unsafely.
        said = (
            "no PyTorch file"
            if isinstance(error, pickle.UnpicklingError)
            else re.split(r"[.:]?\s*\n|\.\s", str(error))[0]
        )
        got = f"{path.stat().st_size:,} bytes: {said or type(error).__name__}"
        fix = "the file is truncated, damaged or of another kind: download or convert it again"
    return CorruptCheckpointError(f"{path} cannot be read", got=got, expected="a whole file of tensors", fix=fix)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)
