"""A folder of results that are made one by one; it survives a kill at any moment.

    DIR/manifest.json             what was asked for: written first
    DIR/texts.jsonl               a line for each finished result, in order
    DIR/states/00000.safetensors  tensors of result 0
    DIR/states.safetensors        in the place of these, once they are stacked: [result ...]

Files appear whole, by renaming, and a result's tensors before its line: the line is what makes it finished, and a
line without its end is none. So nothing but that end is to be repaired after a kill, and nothing is done twice.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lenskit.errors import InputError

FORMAT = 1  # of the folder
LOCK = ".lock"
SEPARATORS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"}  # which end lines for str.splitlines


class Folder:
    """A folder of results.

    Args:
        path: where it is, or will be.
        manifest: plain data about what is in it. Where two differ in "asked", their results must not be mixed.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, {"format": FORMAT, **manifest}
        self._manifest, self._lines = path / "manifest.json", path / "texts.jsonl"
        self._pieces, self._stack = path / "states", path / "states.safetensors"

    def n_finished(self) -> int:
        """How many results are finished: so many, from the first on. Writes nothing.

        Raises:
            InputError: the folder is something else, was begun with another manifest, or lacks what it had.
        """
        if not self._manifest.exists():
            self._check_free()
            return 0
        asked, was = {"format": FORMAT, **self.manifest["asked"]}, self._begun_with()
        changed = [name for name in {**asked, **was} if asked.get(name) != was.get(name)]
        if changed:
            raise InputError(
                f"{self.path} was begun with something else",
                got="; ".join(f"{name}: {asked.get(name)!r}" for name in changed),
                expected="; ".join(f"{name}: {was.get(name)!r}" for name in changed),
                fix="repeat the command as it was, to go on with this folder, or choose another one",
            )
        return self._scanned()[0]

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A `with` block in which results may be added, by this process alone; gives how many are finished.

        Raises:
            InputError: another process has it open; or as `n_finished`.
        """
        if not self.path.is_dir():
            self._check_free()
            self.path.mkdir(parents=True)
        with ExitStack() as block:
            try:
                block.enter_context(FileLock(self.path / LOCK, timeout=0))  # a kill opens it, too
            except Timeout as error:
                raise InputError(
                    f"{self.path} is in use",
                    got="another process that writes to it",
                    expected="one at a time",
                    fix="wait until it ends, or choose another folder",
                ) from error
            self.n_finished()
            if not self._manifest.exists():
                self._write(self._manifest, lambda path: path.write_text(json.dumps(self.manifest, indent=2) + "\n"))
            self._pieces.mkdir(exist_ok=True)
            done, size = self._scanned()
            if self._lines.exists():
                os.truncate(self._lines, size)
            yield done

    def add(self, line: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Finish a result: its tensors, then its line, which holds its number as "index"."""
        own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._write(self._piece(line["index"]), lambda path: _save(own, path))
        with self._lines.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).translate(SEPARATORS).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def stack(self) -> None:
        """Put the tensors of all results, which have one shape, into one file [result ...], and remove the others."""
        if not self._stack.exists():
            n, whole = self._scanned()[0], dict[str, Tensor]()
            for index in range(n):
                for name, tensor in load_file(self._piece(index)).items():
                    rows = whole.setdefault(name, tensor.new_empty((n, *tensor.shape)))
                    assert rows.shape[1:] == tensor.shape, "seen to before anything ran"
                    rows[index] = tensor
            self._write(self._stack, lambda path: _save(whole, path))
        shutil.rmtree(self._pieces)

    def _piece(self, index: int) -> Path:
        return self._pieces / f"{index:05d}.safetensors"

    def _scanned(self) -> tuple[int, int]:
        """How many results are finished, and how many bytes their lines have."""
        n, size, stacked = 0, 0, self._stack.exists()
        if self._lines.exists():
            with self._lines.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break  # a kill came while it was written
                    if _index(line) != n:
                        raise self._damaged(f"{line[:60]!r} in line {n + 1} of {self._lines.name}", f"result {n}")
                    if not stacked and not self._piece(n).exists():
                        raise self._damaged(f"no {self._piece(n).relative_to(self.path)}", "the file of a finished one")
                    n, size = n + 1, size + len(line)
        return n, size

    def _begun_with(self) -> dict[str, Any]:
        try:
            was = json.loads(self._manifest.read_text(encoding="utf-8"))
            return {"format": was["format"], **was["asked"]}
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(
                f"a {self._manifest.name} that says nothing: {error!r}", "what was asked for"
            ) from error

    def _damaged(self, got: str, expected: str) -> InputError:
        fix = "put back what was changed there, or choose another folder"
        return InputError(f"{self.path} is not as it was left", got=got, expected=expected, fix=fix)

    def _check_free(self) -> None:
        """A folder without a manifest may hold nothing but what a kill before the manifest has left."""
        own = {LOCK, _partial(self._manifest).name}
        if self.path.exists() and (not self.path.is_dir() or {path.name for path in self.path.iterdir()} - own):
            raise InputError(
                f"{self.path} is in the way",
                got="a folder with something else in it" if self.path.is_dir() else "a file",
                expected="a path where nothing is, an empty folder, or one that the same command has begun",
                fix="choose another folder",
            )

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        """A file that is there whole or not at all, even if the machine stops."""
        partial = _partial(path)
        write(partial)
        partial.chmod(self.path.stat().st_mode & 0o666)  # safetensors' own would be readable for its owner alone
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise InputError(
            f"{path.parent} cannot be written to",
            got=f"{error}",
            expected=f"room for {sum(tensor.nbytes for tensor in tensors.values()):,} bytes",
            fix="make room and repeat the command, which goes on where it stopped",
        ) from error


def _index(line: bytes) -> Any:
    try:
        return json.loads(line)["index"]
    except (ValueError, TypeError, KeyError):
        return None
