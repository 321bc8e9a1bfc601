"""Finding a checkpoint: an embedded name, a folder, or a hub id becomes a `Source`, a folder with a config."""

import json
import os.path
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lenskit.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, HubError, InputError
from lenskit.extras import load

EMBEDDED = Path(__file__).parent.parent / "demo_checkpoints"
ADAPTER_CONFIG = "adapter_config.json"  # marks an adapter that PEFT wrote
MANIFEST = "lenskit.json"  # marks a checkpoint that lenskit wrote
FORMAT = 1  # of the manifest
GENERATION_CONFIG = "generation_config.json"  # which tokens end a row, and how its makers would draw them
COMPANIONS = (  # what goes with the weights from folder to folder, besides the config
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates/*",
    GENERATION_CONFIG,
)
ONE_BY_ONE = "merge adapters one after the other: load with the first, save_pretrained, and load that with the next"
HUB_SECONDS = 10  # for the hub's first answer


@dataclass(frozen=True)
class AdapterSource:
    """A PEFT adapter's folder.

    name: as the user wrote it.   revision: the hub's commit, if it came from there.   config: adapter_config.json.
    """

    name: str
    folder: Path
    revision: str | None
    config: dict[str, Any]

    @property
    def where(self) -> str:
        """For messages."""
        return str(self.folder)

    @property
    def config_file(self) -> Path:
        """What `config` was read from."""
        return self.folder / ADAPTER_CONFIG


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder, and where it came from.

    name: as the user wrote it.   revision: the hub's commit, if it came from there.
    manifest: of a checkpoint that lenskit wrote, else None.   adapter: to be put on it, if any.
    """

    name: str
    folder: Path
    revision: str | None
    manifest: dict[str, Any] | None
    adapter: AdapterSource | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return str(self.folder)

    @property
    def config_file(self) -> Path:
        """The file that says what model it is."""
        return self.folder / ("config.json" if self.manifest is None else MANIFEST)

    @property
    def described(self) -> str:
        """Where a model of it comes from, in words."""
        return self.name if self.adapter is None else f"{self.name}, with the adapter {self.adapter.name}"

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's, if it has a tokenizer of its own, else the checkpoint's."""
        return self.adapter.folder if self.adapter and has_tokenizer(self.adapter.folder) else self.folder


def find(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Source:
    """The checkpoint of that name: a folder if there is one, else an embedded name, else a hub id, for which alone
    the network is reached for.

    An adapter's name stands for the checkpoint that it was trained on, with the adapter.

    Args:
        adapter: a PEFT adapter to put on the checkpoint: a folder or a hub id.

    Raises:
        CheckpointNotFoundError: no such folder, or one without a config.
        HubError: a hub id that cannot be fetched.
        InputError: a revision of something that is not on the hub; more than one adapter.
    """
    name = str(name_or_path)
    path, commit = _located(name_or_path, revision, token)
    if adapter is None and not _is_adapter(path):
        return _checkpoint(name, path, commit)
    if adapter is None:
        found = _adapter(name, path, commit)
        return replace(_base(found, token), adapter=found)
    source = _checkpoint(name, path, commit, adapter=_one(adapter))
    return replace(source, adapter=_adapter(str(adapter), *_located(adapter, None, token)))


def _located(name_or_path: str | Path, revision: str | None, token: str | bool | None) -> tuple[Path, str | None]:
    """The folder, downloaded if need be, and the hub's commit."""
    if not isinstance(name_or_path, str | os.PathLike):
        raise CheckpointNotFoundError(
            "this is no checkpoint",
            got=f"a {type(name_or_path).__name__}",
            expected="a folder, a hub id (owner/name), or an embedded name",
            fix="write a model to a folder first, with its save_pretrained, and give that",
        )
    name = str(name_or_path)
    path, commit = Path(os.path.expanduser(name)), None
    if not os.path.exists(path):
        if "/" not in name and name in embedded_names():
            path = EMBEDDED / name
        elif isinstance(name_or_path, str) and re.fullmatch(r"[\w-][\w.-]{0,95}(/[\w.-]{1,96})?", name):
            path = _download(name, revision, token)
            commit = path.name
    if not os.path.isdir(path):
        raise CheckpointNotFoundError(
            f"no checkpoint at {name!r}",
            got=f"a file: {path}" if os.path.isfile(path) else "a path where nothing is",
            expected=f"a folder, a hub id (owner/name), or an embedded name: {', '.join(embedded_names())}",
            fix="check the path; give the folder rather than a file in it",
        )
    if revision is not None and commit is None:
        raise InputError(
            f"{name!r} has no revisions",
            got=f"revision={revision!r} for the folder {path}",
            expected="a revision for hub ids only",
            fix="leave revision out, or give a hub id that no folder hides",
        )
    return path, commit


def _checkpoint(name: str, path: Path, commit: str | None, *, adapter: str | Path | None = None) -> Source:
    """The folder as a checkpoint, of which nothing is read yet but a manifest.

    adapter: that it is to carry; it cannot be one itself then.
    """
    if adapter is not None and (path / ADAPTER_CONFIG).exists() and _is_adapter(path):
        raise InputError(
            "an adapter goes on a model, not on an adapter",
            got=f"the adapter {adapter} for {path}, which is one",
            expected="one adapter",
            fix=ONE_BY_ONE,
        )
    if not (path / MANIFEST).exists() and not (path / "config.json").exists():
        raise CheckpointNotFoundError(
            f"{path} is not a checkpoint",
            got=f"a folder with {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing in it'}",
            expected=f"config.json (Hugging Face), {MANIFEST} (lenskit) or {ADAPTER_CONFIG} (PEFT) in it",
            fix="give the folder that holds the config and the weights",
        )
    return Source(name, path, commit, _manifest(path / MANIFEST))


def _is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's alone; weights of a model beside an adapter's make it ambiguous.

    Raises:
        InputError: they do.
    """
    weights = ("model*.safetensors", "pytorch_model*.bin", MANIFEST)
    models = sorted(found.name for pattern in weights for found in path.glob(pattern))
    if not (path / ADAPTER_CONFIG).exists() or (models and not list(path.glob("adapter_model*"))):
        return False
    if models:
        raise InputError(
            f"{path} holds a model and an adapter",
            got=f"{models[0]} and {ADAPTER_CONFIG}",
            expected="one of them",
            fix=f"say which: from_pretrained({str(path)!r}, adapter={str(path)!r}) for both; or move {ADAPTER_CONFIG} "
            "away for the model alone",
        )
    return True


def _adapter(name: str, path: Path, commit: str | None) -> AdapterSource:
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointNotFoundError(
            f"{path} is not an adapter",
            got=f"a folder with {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing in it'}",
            expected=f"{ADAPTER_CONFIG} and adapter_model.safetensors in it, as PEFT's save_pretrained writes them",
            fix="give the adapter's own folder; PEFT puts an adapter with a name into a folder of that name",
        )
    return AdapterSource(name, path, commit, read_json(path / ADAPTER_CONFIG))


def _base(adapter: AdapterSource, token: str | bool | None) -> Source:
    """The checkpoint that an adapter's config says it was trained on."""
    name, revision = (adapter.config.get(key) for key in ("base_model_name_or_path", "revision"))
    fix = f"name it: from_pretrained(base, adapter={adapter.name!r})"
    if not isinstance(name, str) or not name:
        raise CheckpointNotFoundError(
            f"{adapter.config_file} does not say what the adapter is for",
            got=f"base_model_name_or_path={name!r}",
            expected="the folder or hub id of the model that it was trained on",
            fix=fix,
        )
    try:
        path, commit = _located(
            name, revision if isinstance(revision, str) and not os.path.exists(name) else None, token
        )
        return _checkpoint(name, path, commit, adapter=adapter.folder)
    except CheckpointError as error:
        raise type(error)(
            f"{error.what}, which {adapter.config_file} names as the adapter's base",
            got=error.got,
            expected=error.expected,
            fix=fix,
        ) from error


def _one(adapter: object) -> str | Path:
    if not isinstance(adapter, str | Path):
        raise InputError(
            "one adapter at a time",
            got=f"adapter={adapter!r}",
            expected="the folder or hub id of one",
            fix=ONE_BY_ONE,
        )
    return adapter


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any(list(folder.glob(name)) for name in ("tokenizer*", "vocab.json", "vocab.txt"))


def embedded_names() -> list[str]:
    """The checkpoints that ship inside the package."""
    return sorted(p.name for p in EMBEDDED.iterdir() if p.is_dir()) if EMBEDDED.is_dir() else []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointNotFoundError: it is not there.
        CorruptCheckpointError: it is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{path} is missing", got="no such file", expected="a JSON file", fix="download the checkpoint again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no JSON
        raise _no_object(path, str(error)) from error
    if not isinstance(data, dict):
        raise _no_object(path, f"a {type(data).__name__}")
    return data


def _no_object(path: Path, got: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} cannot be read", got=got, expected="a JSON object", fix="download or write the file again"
    )


def _manifest(path: Path) -> dict[str, Any] | None:
    """lenskit's own description of a checkpoint. Its hashes are for users: loading does not read every byte."""
    if not path.exists():
        return None
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise CorruptCheckpointError(
            f"{path} is of another format",
            got=f"format {manifest.get('format')!r}, written by lenskit {manifest.get('lenskit')}",
            expected=f"format {FORMAT}",
            fix="load it with the lenskit that wrote it or a newer one, or convert the original again",
        )
    kinds = {"model_type": str, "config": dict, "hf_config": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind)]
    if wrong:
        raise CorruptCheckpointError(
            f"{path} is incomplete",
            got=", ".join(f"{name}={manifest.get(name)!r}" for name in wrong),
            expected="model_type (a name), config and hf_config (objects)",
            fix="convert the original again",
        )
    return manifest


def _download(repo: str, revision: str | None, token: str | bool | None) -> Path:
    """The repository's snapshot in the hub's cache, or, where the hub does not answer, the one that is there."""
    hub, errors = load("huggingface_hub"), load("huggingface_hub.errors")
    files = ["config.json", MANIFEST, ADAPTER_CONFIG, "adapter_model.*", "*.index.json", *COMPANIONS]
    silence: Exception | None = None

    def fetch(*weights: str) -> Path:
        return Path(
            hub.snapshot_download(
                repo,
                revision=revision,
                token=token,
                allow_patterns=[*files, *weights],
                local_files_only=silence is not None,
            )
        )

    with _hub_errors(repo, revision):
        try:  # snapshot_download would wait for an answer without end
            hub.model_info(repo, revision=revision, token=token, timeout=HUB_SECONDS)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
            silence = error
        try:
            folder = fetch("model*.safetensors", "weights*.safetensors")
            found = [*folder.glob("model*.safetensors"), *folder.glob("weights*.safetensors")]
            return folder if found else fetch("pytorch_model*.bin")
        except errors.LocalEntryNotFoundError as error:
            raise _hub_error(
                repo,
                revision,
                got=f"no answer from the hub, and no copy in its cache: {_line(silence or error)}",
                fix="connect to the network, or give the folder of a checkpoint",
            ) from (silence or error)


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    errors = load("huggingface_hub.errors")
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError as error:
        fix = "accept its terms on its page, then pass token=... or log in: hf auth login"
        raise _hub_error(repo, revision, got="a gated repository", fix=fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the id; for a private repository, pass token=... or log in: hf auth login"
        raise _hub_error(repo, revision, got="no such repository, or a private one", fix=fix) from error
    except errors.RevisionNotFoundError as error:
        fix = "check the branch, tag or commit on the repository's page"
        raise _hub_error(repo, revision, got=f"a repository without revision {revision!r}", fix=fix) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        raise _hub_error(repo, revision, got=_line(error), fix="check the id, and try again later") from error


def _hub_error(repo: str, revision: str | None, *, got: str, fix: str) -> HubError:
    return HubError(
        f"could not fetch {repo!r} from the hub",
        got=got,
        expected=f"a model repository{f' with revision {revision!r}' if revision else ''} that can be reached",
        fix=f"{fix}. No folder of that name exists; embedded names are {', '.join(embedded_names())}",
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
