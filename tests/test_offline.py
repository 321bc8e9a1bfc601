"""The network: nothing reaches for it unless a hub id was named; then a hub that is there, is not, or will not."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from folders import FORMS, in_a_process, tensors, told, write_hf
from huggingface_hub import errors

import lenskit as lk
from lenskit.checkpoints import source
from lenskit.checkpoints.source import EMBEDDED, Source, find
from lenskit.errors import HubError

COMMIT = "c0ffee" * 6 + "c0de"

NO_NETWORK = """
import socket, sys

reached = []
def refuse(*args, **kwargs):
    reached.append(args)
    raise OSError("this test allows no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse

import lenskit as lk
from lenskit.checkpoints.source import embedded_names

names = embedded_names()
assert len(names) >= 2
for name in [*names, sys.argv[1]]:
    dest = f"{sys.argv[2]}/{name.replace('/', '-')}"
    sources = [name, lk.convert(name, dest + " converted"), lk.export(name, dest + " exported")]
    sources.append(lk.HookedTransformer.from_pretrained(name).save_pretrained(dest + " saved"))
    for source in sources:
        model = lk.HookedTransformer.from_pretrained(source, device_map="auto")
        tokens = model.to_tokens("The Eiffel Tower is in the city of").tokens
        model.run_with_cache(["The Eiffel Tower", "Paris"])
        model.to_str_tokens("Paris"), model.to_string(tokens[0])
print("reached", reached)
"""


def test_embedded_names_and_folders_need_no_network(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", "gpt2", vocab_size=2000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED / "demo-gpt2" / name).read_bytes())
    assert in_a_process(NO_NETWORK, folder, tmp_path) == "reached []\n"


# -- a hub on this machine


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client needs to download from `server.repos`."""

    def do_GET(self) -> None:
        repos: dict[str, dict[str, bytes]] = self.server.repos  # type: ignore[attr-defined]
        path = self.path.split("?")[0]
        info = re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/revision/(.*))?", path)
        tree = re.fullmatch(rf"/api/models/(\w+/[\w-]+)/tree/{COMMIT}", path)
        file = re.fullmatch(rf"/(\w+/[\w-]+)/resolve/{COMMIT}/(.*)", path)
        if info and info[1] == "some/gated":
            self.answer(b"", 403, **{"X-Error-Code": "GatedRepo"})
        elif info and info[1] not in repos:
            self.answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})
        elif info and info[2] not in (None, "main", COMMIT):
            self.answer(b"", 404, **{"X-Error-Code": "RevisionNotFound"})
        elif info:
            self.answer(json.dumps({"id": info[1], "sha": COMMIT, "siblings": []}).encode())
        elif tree:
            listed = repos[tree[1]].items()
            entries = [{"type": "file", "path": n, "size": len(b), "oid": digest(b)} for n, b in listed]
            self.answer(json.dumps(entries).encode())
        elif file:
            content = repos[file[1]][file[2]]
            self.answer(content, **{"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(b"", 404)

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub(repos: dict[str, dict[str, bytes]]) -> Iterator[str]:
    """Its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repos = repos  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


FROM_HUB = """
import json, sys, time
import lenskit as lk
from lenskit.checkpoints import source
from lenskit.checkpoints.source import find

source.HUB_SECONDS = 0.5
told = {}
for name, revision in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        model = lk.HookedTransformer.from_pretrained(name, revision=revision)
        found = find(name, revision=revision)
        told[name] = [sorted(path.name for path in found.folder.iterdir()), found.revision, model.tokenizer is not None]
    except lk.errors.HubError as error:
        told[name] = str(error)
    told[name + " seconds"] = time.monotonic() - start
print(json.dumps(told))
"""


def from_hub(home: Path, endpoint: str, *names: tuple[str, str | None]) -> dict[str, Any]:
    """What a user sees who names these, with a hub of that address and a cache in `home`."""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    told: dict[str, Any] = json.loads(in_a_process(FROM_HUB, json.dumps(names), **environment).splitlines()[-1])
    return told


def test_hub_ids_are_downloaded_once_and_then_found_in_the_cache(tmp_path: Path) -> None:
    demo = {path.name: path.read_bytes() for path in (EMBEDDED / "demo-gpt2").iterdir()}
    folder = write_hf(tmp_path / "bin", "llama")
    FORMS["bin, sharded"](folder, tensors(folder))
    sharded = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = dict.fromkeys(
        ("README.md", "onnx/model.onnx", "consolidated.safetensors", "tf_model.h5"), b"not asked for"
    )
    repos = {"some/demo": {**demo, **others, "pytorch_model.bin": b"not needed"}, "some/old": {**sharded, **others}}
    names = [("some/demo", None), ("some/old", "main"), ("some/gated", None), ("some/none", None)]
    home = tmp_path / "home"
    with hub(repos) as endpoint:
        told = from_hub(home, endpoint, *names)
        revision = from_hub(home, endpoint, ("some/demo", "v2"))["some/demo"]
    assert told["some/demo"] == [sorted(demo), COMMIT, True]
    assert told["some/old"] == [sorted(sharded), COMMIT, False]
    assert "could not fetch 'some/gated' from the hub\n  got:      a gated repository" in told["some/gated"]
    assert "token=" in told["some/gated"]
    assert "got:      no such repository, or a private one" in told["some/none"]
    assert "got:      a repository without revision 'v2'" in revision
    # The hub has gone: what was downloaded is there, the rest is an error at once.
    told = from_hub(home, endpoint, ("some/demo", None), ("some/old", "main"), ("gpt2", None))
    assert told["some/demo"] == [sorted(demo), COMMIT, True]
    assert told["some/old"] == [sorted(sharded), COMMIT, False]
    assert "no answer from the hub, and no copy in its cache" in told["gpt2"]
    assert told["gpt2 seconds"] < 5


def test_a_hub_that_does_not_answer_is_given_up_soon(tmp_path: Path) -> None:
    """Its client would wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told = from_hub(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", ("gpt2", None))
    assert "could not fetch 'gpt2' from the hub" in told["gpt2"]
    assert "no answer from the hub, and no copy in its cache: ReadTimeout" in told["gpt2"]
    assert "embedded names are demo-gpt2, demo-llama" in told["gpt2"]
    assert told["gpt2 seconds"] < 10
    assert 1 < source.HUB_SECONDS <= 10


# -- the client's errors


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Make the hub's client answer with a folder, or an error; what it was asked for is listed."""

    def play(answer: Path | Exception, *, first: Exception | None = None) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def model_info(repo: str, **options: Any) -> object:
            if first is not None:
                raise first
            return SimpleNamespace(sha=COMMIT)

        def snapshot_download(repo: str, **options: Any) -> str:
            asked.append({"repo": repo, **options})
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return play


def response(kind: type[Exception]) -> Exception:
    """The client's error, which wants a response."""
    error = kind.__new__(kind)
    error.args = ("403 Forbidden\n\nfor url",)
    return error


def test_a_hub_id_is_a_name_that_is_no_path(tmp_path: Path, snapshot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_hf(tmp_path / "elsewhere" / COMMIT, "gpt2")
    asked = snapshot(folder)
    for name in ("gpt2", "owner/name", "owner/na-me_1.5"):
        assert find(name, token="secret") == Source(name, folder, COMMIT, None)
        assert (asked[-1]["repo"], asked[-1]["token"], asked[-1]["revision"]) == (name, "secret", None)
    assert len(asked) == 3
    for path in (Path("owner/name"), "./gpt2", "owner/name/", "a/b/c", "/gpt2", "~/gpt2", "owner /name", "../gpt2"):
        with pytest.raises(lk.errors.CheckpointNotFoundError):
            find(path)
    write_hf(tmp_path / "owner" / "name", "gpt2")
    assert find("owner/name").revision is None
    assert len(asked) == 3


def test_bin_files_are_asked_for_where_there_are_no_safetensors(tmp_path: Path, snapshot: Any) -> None:
    folder = write_hf(tmp_path / COMMIT, "gpt2")
    asked = snapshot(folder)
    find("gpt2")
    assert [any("bin" in pattern for pattern in request["allow_patterns"]) for request in asked] == [False]
    FORMS["bin"](folder, tensors(folder))
    asked = snapshot(folder)
    find("gpt2")
    assert [any("bin" in pattern for pattern in request["allow_patterns"]) for request in asked] == [False, True]
    assert not any(pattern in ("*", "*.py") for request in asked for pattern in request["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "fragments"),
    [
        (response(errors.GatedRepoError), ("a gated repository", "token=")),
        (response(errors.RepositoryNotFoundError), ("no such repository", "token=")),
        (response(errors.RevisionNotFoundError), ("without revision 'v2'", "branch, tag or commit")),
        (errors.LocalTokenNotFoundError("Token is required"), ("LocalTokenNotFoundError: Token is required",)),
        (errors.LocalEntryNotFoundError("not in the cache"), ("no copy in its cache", "connect to the network")),
        (errors.HFValidationError("Repo id must be"), ("HFValidationError: Repo id must be", "check the id")),
        (OSError(28, "No space left on device"), ("No space left on device",)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("at_first", [True, False], ids=["asked", "downloading"])
def test_errors_of_the_client_become_ours(
    error: Exception, fragments: tuple[str, ...], at_first: bool, snapshot: Any
) -> None:
    snapshot(error, first=error if at_first and not isinstance(error, errors.LocalEntryNotFoundError) else None)
    caught = told(HubError, "some/model", "'some/model'", "with revision 'v2'", *fragments, revision="v2")
    assert caught.__cause__ is error
    assert "demo-gpt2" in str(caught)


@pytest.mark.parametrize("silence", [errors.HTTPError("timed out"), errors.OfflineModeIsEnabled("offline mode")])
def test_a_hub_that_is_not_reached_is_no_reason_to_fail_if_there_is_a_copy(
    silence: Exception, tmp_path: Path, snapshot: Any
) -> None:
    folder = write_hf(tmp_path / COMMIT, "gpt2")
    asked = snapshot(folder, first=silence)
    assert find("gpt2").folder == folder
    assert [request["local_files_only"] for request in asked] == [True]
    snapshot(errors.LocalEntryNotFoundError("not in the cache"), first=silence)
    caught = told(HubError, "gpt2", f"no copy in its cache: {type(silence).__name__}: {silence}")
    assert caught.__cause__ is silence
