"""A server's model without its weights: config and tokenizer in a cache folder, downloaded once.

The folder's name is made of the digests of all files in it, and each file is held to its digest, so what is in the
cache is what the server says it has, whoever put it there. A folder appears whole or not at all.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lenskit.checkpoints.companions import tokenizer_of
from lenskit.checkpoints.load import DTYPES
from lenskit.checkpoints.source import find
from lenskit.errors import RemoteError
from lenskit.remote.asking import Flow
from lenskit.remote.talk import Talk
from lenskit.text_access import TextAccess

SIZES = ("n_layers", "n_heads", "d_model", "d_vocab")


class Structure(NamedTuple):
    """A model's description, and the folder with its config and tokenizer."""

    described: Mapping[str, Any]
    folder: Path


def fetched(talk: Talk, name: str) -> Flow[Structure]:
    """A model of the server's, with its files in the cache.

    Raises:
        CheckpointNotFoundError: the server has none of that name.
        RemoteError: a file is not the one that the server described.
    """
    described = yield from talk.model(name)
    files = _files_of(described)
    folder = cache_folder() / hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:32]
    if not _is_whole(folder, files):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
            whole = Path(partial) / "files"
            for path, digest in files.items():
                content = yield from talk.file(name, path)
                if hashlib.sha256(content).hexdigest() != digest:
                    raise _other(f"{path} of {name}", "another digest", f"a file with the SHA-256 {digest}")
                (whole / path).parent.mkdir(parents=True, exist_ok=True)
                (whole / path).write_bytes(content)
            _put(whole, folder, files)
    return Structure(described, folder)


def cache_folder() -> Path:
    """Where structures are kept: in $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lenskit" / "remote"


def dtype_of(described: Mapping[str, Any]) -> torch.dtype:
    """In which the server computes.

    Raises:
        RemoteError: it does not say.
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    name = str(described.get("dtype")).removeprefix("torch.")
    if name not in known:
        raise _other("the model's description", f"dtype {described.get('dtype')!r}", f"one of {', '.join(known)}")
    return known[name]


def check_same(model: TextAccess, described: Mapping[str, Any], name: str, url: str) -> None:
    """See that a model is the one that the server has, as far as can be told without weights.

    Raises:
        RemoteError: it is not.
    """
    ours = {"family": model.cfg.model_type, **{size: getattr(model.cfg, size) for size in SIZES}}
    wrong = [key for key, value in ours.items() if described.get(key) != value]
    if wrong:
        raise RemoteError(
            f"{name!r} is another model at {url}",
            got=", ".join(f"{key} {described.get(key)!r} there" for key in wrong),
            expected=", ".join(f"{key} {ours[key]!r}" for key in wrong),
            fix="take the server's own: lk.connect(url).model(name)",
        )


@final
class Texts:
    """Makes text of ids, with the tokenizer of a folder, which is loaded when the first text is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer_of(find(self._folder))

    def __call__(self, tokens: Tensor) -> str:
        return str(self._tokenizer.decode(tokens))


def _files_of(described: Any) -> dict[str, str]:
    """Each file's digest. A name is a path below the folder: nothing that a server says leads out of it."""
    files = described.get("files") if isinstance(described, dict) else None
    if not isinstance(files, dict) or not files:
        raise _other("the model's description", f"{described}"[:200], "files: each one's SHA-256")
    for path, digest in files.items():
        parts = path.split("/")
        fine = len(parts) <= 3 and all(re.fullmatch(r"\w[\w.-]{0,100}", part, re.ASCII) for part in parts)
        if not fine or not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise _other("the model's description", f"file {path!r}, digest {digest!r}"[:200], "names and SHA-256s")
    return files


def _is_whole(folder: Path, files: Mapping[str, str]) -> bool:
    for path, digest in files.items():
        try:
            if hashlib.sha256((folder / path).read_bytes()).hexdigest() != digest:
                return False
        except OSError:
            return False
    return True


def _put(whole: Path, folder: Path, files: Mapping[str, str]) -> None:
    """Give a complete folder its name; another process may have been faster."""
    for _ in range(2):
        with suppress(OSError):
            whole.rename(folder)
            return
        if _is_whole(folder, files):
            return
        shutil.rmtree(folder, ignore_errors=True)  # it was damaged
    raise _other(f"{folder}", "a folder in the way that cannot be removed", "to be able to write there")


def _other(what: str, got: str, expected: str) -> RemoteError:
    fix = "see that client and server have the same version of lenskit, and that nothing between them changes files"
    return RemoteError(f"{what} cannot be used", got=got, expected=expected, fix=fix)
