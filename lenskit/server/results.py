"""Results: one safetensors file a job, there whole or not at all. A folder, or whatever fsspec reaches."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

SUFFIX = ".safetensors"
PARTIAL = ".partial"
CHUNK = 2**18


class Results:
    """The place of all results.

    Args:
        url: a folder or an fsspec URL (s3://bucket/folder).
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._fs.makedirs(self._root, exist_ok=True)

    def write(self, job: str, data: bytes) -> None:
        """Keep a job's result, in the place of an earlier one.

        Raises:
            OSError: there is no room; nothing is left of it.
        """
        if not self._local:
            self._fs.pipe_file(self._path(job), data)  # a store of objects has it whole, or not at all
            return
        path = Path(self._path(job))
        partial = path.with_name(path.name + PARTIAL)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def read(self, job: str, start: int, end: int) -> "Pieces":
        """The bytes of a result from `start` up to `end`, in pieces.

        Raises:
            FileNotFoundError: there is none.
        """
        return Pieces(self._fs.open(self._path(job), "rb"), start, end)

    def delete(self, job: str) -> None:
        """Remove a result, if there is one."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(job))

    def tidy(self, kept: Callable[[], set[str]]) -> None:
        """Remove what a kill has left: halves and results of jobs that have, and will have, none.

        Args:
            kept: the jobs that do; asked after the place was looked through, so that what is written now stays.
        """
        try:
            found = [str(path) for path in self._fs.ls(self._root, detail=False, refresh=True)]
        except FileNotFoundError:  # a store of objects has no empty folders
            return
        jobs = kept()
        for path in found:
            if path.rpartition("/")[2].removesuffix(PARTIAL).removesuffix(SUFFIX) not in jobs:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(path)

    def _path(self, job: str) -> str:
        return f"{self._root}/{job}{SUFFIX}"


class Pieces:
    """An iterator over a part of an open file, which whoever has it closes."""

    def __init__(self, file: Any, start: int, end: int) -> None:
        self._file, self._left = file, end - start
        file.seek(start)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        piece: bytes = self._file.read(min(CHUNK, self._left)) if self._left > 0 else b""
        if not piece:
            raise StopIteration
        self._left -= len(piece)
        return piece

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
