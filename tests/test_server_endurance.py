"""What a server is put through for long: memory that must not grow, and readers that do not read."""

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from server_process import ServerProcess

KIB, MIB = 2**10, 2**20
SAVES = {
    "format": "lenskit-plan", "version": 1, "nodes": [],
    "ops": [{"op": "save", "at": "blocks.*.hook_resid_post"}, {"op": "save", "at": "blocks.*.attn.hook_pattern"}],
}  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path / "server", keys=False).start()
    yield process
    process.stop()


def memory(server: ServerProcess) -> int:
    """Resident bytes of the front process and the workers."""
    assert server.process is not None
    pids = [server.process.pid, *server.workers()]
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def open_files(server: ServerProcess) -> int:
    """Results and connections; what the database's pool keeps open is its own."""
    assert server.process is not None
    front = psutil.Process(server.process.pid)
    results = [file for file in front.open_files() if file.path.endswith(".safetensors")]
    return len(results) + len(front.net_connections())


def job(n_tokens: int = 8, rows: int = 1, **more: Any) -> dict[str, Any]:
    return {"model": "demo-gpt2", "verb": "forward", "tokens": [[1] * n_tokens] * rows, **more}


# -- memory


@pytest.mark.slow
def test_memory_does_not_grow(server: ServerProcess) -> None:
    """Over 3,000 malformed bodies and 400 jobs with results, after as much of both to warm up: less than 4 KiB each."""
    seed = random.Random(0)
    bodies = [b"{", b"[" * 50_000, b"\xff" * 1000, json.dumps(job(plan={"ops": [1] * 500})).encode(), b"x" * 100_000]

    def round_of(n_bad: int, n_good: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for _ in range(n_bad):
                kind = seed.choice(["application/json", "application/octet-stream", "application/x-safetensors"])
                answer = http.post("/v1/jobs", content=seed.choice(bodies), headers={"Content-Type": kind})
                assert 400 <= answer.status_code < 500
            for n in range(n_good):
                id = http.post("/v1/jobs", json=job(16, plan={**SAVES} if n % 2 else None)).json()["id"]
                assert http.get(f"/v1/jobs/{id}/result?wait=30").status_code == 200
                assert http.delete(f"/v1/jobs/{id}").status_code == 200

    round_of(1500, 400)
    round_of(1500, 400)
    before, files = memory(server), open_files(server)
    round_of(3000, 400)
    grown = memory(server) - before
    assert grown < 3400 * 4 * KIB, f"{grown / MIB:.1f} MiB"
    assert open_files(server) <= files + 5


# -- readers


def ask_and_read_nothing(server: ServerProcess, path: str) -> socket.socket:
    """A client with small buffers that has asked, and leaves what comes where it is."""
    asked = socket.socket()
    asked.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
    asked.connect(("127.0.0.1", server.port))
    asked.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return asked


def test_readers_that_do_not_read_hold_up_nobody(server: ServerProcess) -> None:
    """Of a large result and of events; nor do they cost memory, nor stay when they are gone."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        large = http.post("/v1/jobs", json=job(200, rows=16, plan=SAVES)).json()["id"]
        whole = http.get(f"/v1/jobs/{large}/result?wait=60").content
        assert len(whole) > 30 * MIB
        long = http.post("/v1/jobs", json=job(verb="generate", options={"max_new_tokens": 200, "eos_token_id": []}))
        before, files = memory(server), open_files(server)
        lazy = [ask_and_read_nothing(server, f"/v1/jobs/{large}/result") for _ in range(20)]
        lazy += [ask_and_read_nothing(server, f"/v1/jobs/{long.json()['id']}/events") for _ in range(20)]
        time.sleep(1)
        taken = []
        for _ in range(10):
            began = time.monotonic()
            id = http.post("/v1/jobs", json=job()).json()["id"]
            assert http.get(f"/v1/jobs/{id}/result?wait=30").status_code == 200
            taken.append(time.monotonic() - began)
        assert sorted(taken)[5] < 1.0
        assert memory(server) - before < 20 * len(whole) / 4, "what nobody reads is not in memory"
        for one in lazy:
            one.close()
        end = time.monotonic() + 20
        while open_files(server) > files + 5:
            assert time.monotonic() < end, "their files and sockets are closed"
            time.sleep(0.2)


def test_a_result_that_is_deleted_while_it_is_read_ends_somehow(server: ServerProcess) -> None:
    """Whole, or cut off: never another's bytes, and the server goes on."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        id = http.post("/v1/jobs", json=job(200, rows=16, plan=SAVES)).json()["id"]
        whole = http.get(f"/v1/jobs/{id}/result?wait=60").content
        parts: list[bytes] = []
        deleted = threading.Event()

        def read() -> None:
            with httpx.stream("GET", f"{server.url}/v1/jobs/{id}/result", timeout=30) as answer:
                pieces = answer.iter_bytes(64 * KIB)
                parts.append(next(pieces))
                deleted.wait(30)
                parts.extend(pieces)

        reader = threading.Thread(target=read)
        reader.start()
        while not parts:
            time.sleep(0.01)
        assert http.delete(f"/v1/jobs/{id}").status_code == 200
        deleted.set()
        reader.join(60)
        found = b"".join(parts)
        assert found == whole[: len(found)]
        assert http.get(f"/v1/jobs/{id}/result").status_code == 410
