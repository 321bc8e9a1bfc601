"""Finding a checkpoint: an embedded name, a folder, or a hub id becomes a `Source`, a folder with a config."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenskit.errors import CheckpointNotFoundError, CorruptCheckpointError, HubError
from lenskit.extras import load

EMBEDDED = Path(__file__).parent.parent / "demo_checkpoints"
MANIFEST = "lenskit.json"  # marks a checkpoint that lenskit wrote
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "chat_template*",
    "generation_config.json",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder, and where it came from.

    name: as the user wrote it.   revision: the hub's commit, if it came from there.
    manifest: of a checkpoint that lenskit wrote, else None.
    """

    name: str
    folder: Path
    revision: str | None
    manifest: dict[str, Any] | None

    @property
    def where(self) -> str:
        """For messages."""
        return str(self.folder)

    def json(self, file: str) -> dict[str, Any]:
        """A JSON file of the folder.

        Raises:
            CheckpointNotFoundError: it is not there.
            CorruptCheckpointError: it is no JSON object.
        """
        return read_json(self.folder / file)


def find(name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Source:
    """The checkpoint of that name: embedded, a folder, or (reached for over the network) a hub id.

    Raises:
        CheckpointNotFoundError: no such folder, or one without a config.
        HubError: a hub id that cannot be fetched.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if not path.exists() and (EMBEDDED / name).is_dir() and "/" not in name:
        path = EMBEDDED / name
    commit = None
    if not path.exists() and isinstance(name_or_path, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        path = _download(name, revision, token)
        commit = path.name
    if not path.is_dir():
        raise CheckpointNotFoundError(
            f"no checkpoint at {name!r}",
            got=f"a file: {path}" if path.is_file() else "a path where nothing is",
            expected=f"a folder, a hub id (owner/name), or an embedded name: {', '.join(embedded_names())}",
            fix="check the path; give the folder rather than a file in it",
        )
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).exists() else None
    if manifest is None and not (path / "config.json").exists():
        raise CheckpointNotFoundError(
            f"{path} is not a checkpoint",
            got=f"a folder with {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing in it'}",
            expected=f"config.json (Hugging Face) or {MANIFEST} (lenskit) in it",
            fix="give the folder that holds the config and the weights",
        )
    return Source(name, path, commit, manifest)


def embedded_names() -> list[str]:
    """The checkpoints that ship inside the package."""
    return sorted(p.name for p in EMBEDDED.iterdir() if p.is_dir()) if EMBEDDED.is_dir() else []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; see `Source.json` for what raises."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{path} is missing", got="no such file", expected="a JSON file", fix="download the checkpoint again"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _no_object(path, str(error)) from error
    if not isinstance(data, dict):
        raise _no_object(path, f"a {type(data).__name__}")
    return data


def _no_object(path: Path, got: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} cannot be read", got=got, expected="a JSON object", fix="download or write the file again"
    )


def _download(repo: str, revision: str | None, token: str | bool | None) -> Path:
    hub = load("huggingface_hub")
    files = ["*.json", "*.safetensors", "merges.txt", "*.model", "*.tiktoken", "*.jinja"]

    def fetch(patterns: list[str]) -> Path:
        with _hub_errors(repo, revision):
            return Path(
                hub.snapshot_download(
                    repo, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=["*/*"]
                )
            )

    folder = fetch(files)
    return folder if list(folder.glob("*.safetensors")) else fetch([*files, "pytorch_model*.bin"])


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    errors = load("huggingface_hub.errors")

    def hub_error(got: str, fix: str) -> HubError:
        return HubError(
            f"could not fetch {repo!r} from the hub",
            got=got,
            expected=f"a model repository{f' with revision {revision!r}' if revision else ''} that can be reached",
            fix=fix,
        )

    local = f"if a folder was meant, it does not exist; embedded names are {', '.join(embedded_names())}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise hub_error("a gated repository", "accept its terms on the hub and pass token=...") from error
    except errors.RepositoryNotFoundError as error:
        raise hub_error("no such repository, or a private one", f"check the id, pass token=...; {local}") from error
    except errors.LocalEntryNotFoundError as error:
        raise hub_error("no connection, and no local copy", f"connect, or use a local folder; {local}") from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise hub_error(f"{type(error).__name__}: {error}", f"check id and revision; {local}") from error
