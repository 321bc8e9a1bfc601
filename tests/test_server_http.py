"""The HTTP application in this process: what it tells of itself, and who may ask it."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI
from server_process import ServerProcess

from lenskit.errors import KeyRefusedError, RemoteError
from lenskit.remote import wire
from lenskit.server.app import application
from lenskit.server.config import Config
from lenskit.server.metrics import Metrics
from lenskit.server.service import Service

JOB = {"model": "demo-gpt2", "verb": "forward", "tokens": [[1, 2, 3]]}


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(Config(models=[{"name": "demo-gpt2"}], folder=tmp_path_factory.mktemp("keyless"), use_keys=False))
    yield service
    service.stop()


def ask(app: FastAPI, method: str, path: str, **given: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            return await http.request(method, path, **given)

    return asyncio.run(asked())


def test_a_defect_is_an_error_without_its_details(keyless: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(keyless.jobs, "listed", broken)
    answer = ask(application(keyless, Metrics()), "GET", "/v1/jobs")
    assert answer.status_code == 500
    error = wire.error_from_wire(answer.json()["error"])
    assert isinstance(error, RemoteError)
    assert "a secret" not in answer.text


# -- a server without keys is for programs of its machine


FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Origin": "null"},
    {"Origin": "http://[::1"},
    {"Host": "evil.example"},  # a name that its owner has pointed at 127.0.0.1
    {"Host": "evil.example:8000"},
    {"Host": ""},
]
OWN = [
    {}, {"Origin": "http://127.0.0.1:8000"}, {"Origin": "http://localhost:8000"}, {"Host": "localhost:8000"},
    {"Host": "127.0.0.1"}, {"Host": "[::1]:8000"}, {"Origin": "http://[::1]:8000"},
]  # fmt: skip


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_pages_of_other_sites_are_kept_out(keyless: Service, headers: dict[str, str]) -> None:
    app = application(keyless, Metrics())
    before = len(keyless.jobs.listed("everybody", 1000))
    for method, path in (("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/models"), ("DELETE", "/v1/jobs/x")):
        answer = ask(app, method, path, headers=headers, **({"json": JOB} if method == "POST" else {}))
        assert answer.status_code == 403
        assert isinstance(wire.error_from_wire(answer.json()["error"]), KeyRefusedError)
        assert "access-control-allow-origin" not in answer.headers
    assert len(keyless.jobs.listed("everybody", 1000)) == before


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_programs_and_the_servers_own_page_get_in(keyless: Service, headers: dict[str, str]) -> None:
    assert ask(application(keyless, Metrics()), "POST", "/v1/jobs", json=JOB, headers=headers).status_code == 202


def test_with_keys_names_and_origins_do_not_matter(tmp_path: Path) -> None:
    service = Service(Config(models=[{"name": "demo-gpt2"}], folder=tmp_path))
    key = {"Authorization": f"Bearer {service.keys.add('ada', {})}"}
    app = application(service, Metrics())
    assert ask(app, "GET", "/v1/models", headers={**key, "Host": "lens.example.org"}).status_code == 200
    service.stop()


# -- one key's are not another's


def test_two_keys_see_nothing_of_each_other(tmp_path: Path) -> None:
    """Every route, also by an idempotency key that both chose."""
    service = Service(Config(models=[{"name": "demo-gpt2"}], folder=tmp_path))
    app = application(service, Metrics())
    ada, bob = ({"Authorization": f"Bearer {service.keys.add(name, {})}"} for name in ("ada", "bob"))
    once = {"Idempotency-Key": "the same"}
    one = ask(app, "POST", "/v1/jobs", json=JOB, headers={**ada, **once}).json()
    other = ask(app, "POST", "/v1/jobs", json=JOB, headers={**bob, **once}).json()
    assert one["id"] != other["id"]
    assert ask(app, "POST", "/v1/jobs", json=JOB, headers={**ada, **once}).json()["id"] == one["id"]
    for path in ("", "/events", "/result"):
        assert ask(app, "GET", f"/v1/jobs/{one['id']}{path}", headers=bob).status_code == 404
    assert ask(app, "DELETE", f"/v1/jobs/{one['id']}", headers=bob).status_code == 404
    for path in ("/v1/jobs", "/v1/overview", "/v1/limits", "/v1/models", "/metrics"):
        assert one["id"] not in ask(app, "GET", path, headers=bob).text
    assert ask(app, "GET", "/v1/limits", headers=bob).json()["used"]["queued_jobs"] == 1
    assert ask(app, "GET", f"/v1/jobs/{one['id']}", headers=ada).json()["status"] == "queued"
    for path in ("", "/events", "/result"):
        assert ask(app, "GET", f"/v1/jobs/{one['id']}{path}").status_code == 401
    service.stop()


# -- files of a model


@pytest.mark.parametrize(
    "path", ["../../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "/etc/passwd", "model.safetensors", "%00"]
)
def test_no_file_but_those_that_are_told(keyless: Service, path: str) -> None:
    answer = ask(application(keyless, Metrics()), "GET", f"/v1/models/demo-gpt2/files/{path}")
    assert answer.status_code == 404
    assert "root:" not in answer.text


# -- the OpenAPI document tells the truth


CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "unsupported_method", "missing_required_header",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("keys", [False, True], ids=["without keys", "with keys"])
def test_answers_are_those_of_the_document(tmp_path: Path, keys: bool) -> None:
    """schemathesis: thousands of requests drawn from the document, and requests that break it. Nothing above 499,
    nothing that the document does not tell, and the server goes on."""
    server = ServerProcess(tmp_path / "server", keys=keys).start()
    try:
        header = ["--header", f"Authorization: Bearer {server.key('ada')}"] if keys else []
        done = subprocess.run(
            [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json", *header, "--no-color",
             "--checks", ",".join(CHECKS), "--max-examples", "100", "--seed", "1", "--request-timeout", "90"],
            capture_output=True, text=True, timeout=900, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
        assert int(re.findall(r"(\d+) generated", done.stdout)[-1]) > 1000
        assert server.is_ready()
    finally:
        server.stop()
