"""The server's page, in a headless Chromium where there is one."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from server_process import ServerProcess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = Path(__file__).parent.parent / "lenskit" / "server" / "page"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path_factory.mktemp("page"), "demo-gpt2", keys=False).start()
    yield process
    process.stop()


def test_the_page_needs_nothing_from_elsewhere(server: ServerProcess) -> None:
    answer = httpx.get(server.url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for part in ("page.js", "page.css"):
        assert f"/page/{part}" in answer.text
        assert httpx.get(f"{server.url}/page/{part}").content == (PAGE / part).read_bytes()
    for path in PAGE.iterdir():
        assert "http://" not in path.read_text()
        assert "https://" not in path.read_text()
        assert "innerHTML" not in path.read_text(), "what comes from jobs is text"
    assert httpx.get(f"{server.url}/page/other").status_code == 404


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_shows_models_jobs_and_failures(server: ServerProcess, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    base = {"model": "demo-gpt2", "verb": "generate", "tokens": [[1, 2, 3]]}
    fine = {**base, "options": {"max_new_tokens": 3, "eos_token_id": []}}
    nothing = {"op": "set", "at": "hook_logits", "value": {"float": "nan"}, "selectors": {"tokens": -1}}
    plan = {"format": "lenskit-plan", "version": 1, "ops": [nothing], "nodes": []}
    broken = {**base, "options": {"max_new_tokens": 3, "do_sample": True}, "plan": plan}
    ids = [httpx.post(f"{server.url}/v1/jobs", content=json.dumps(job)).json()["id"] for job in (fine, broken)]
    for id in ids:
        httpx.get(f"{server.url}/v1/jobs/{id}/result?wait=30")
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom",
         "--virtual-time-budget=4000", server.url],
        capture_output=True, text=True, timeout=90,
    ).stdout  # fmt: skip
    for text in (*ids, "demo-gpt2", "idle", "GenerationError", "no token can be drawn", "3 of 3"):
        assert text in shown
    assert '<main hidden=""' not in shown
