"""Several servers over one Postgres and one place for results; and the same on a Ray cluster."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import httpx2 as httpx
import pytest
from postgres import Postgres
from server_process import ServerProcess, free_port

import lenskit as lk

EIFFEL = "The Eiffel Tower is in the city of"


def same_as_here(found: lk.Generation, expected: lk.Generation) -> None:
    assert found.texts == expected.texts
    for name, tensors in expected.saved.items():
        for one, other in zip(found.saved[name], tensors, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.fixture
def two(postgres: Postgres, tmp_path: Path) -> Iterator[list[ServerProcess]]:
    given = {"database": postgres.new(), "results": str(tmp_path / "results"), "silent_seconds": 5}
    servers = [ServerProcess(tmp_path / name, keys=False, **given) for name in ("one", "other")]
    yield [server.start() for server in servers]
    for server in servers:
        server.stop()


def test_what_one_server_is_sent_another_can_do(two: list[ServerProcess], demo_gpt2: lk.HookedTransformer) -> None:
    """While both live, and when the one that has most of it is killed with its worker."""
    one, other = two
    save = [lk.Save("blocks.1.hook_resid_post", tokens=-1, name="x")]
    options = {"max_new_tokens": 200, "eos_token_id": []}
    expected = demo_gpt2.generate(EIFFEL, hooks=save, **options)
    with lk.connect(one.url) as connection:
        model = connection.model("demo-gpt2", blocking=False)
        ids = [model.generate(EIFFEL, hooks=save, **options).id for _ in range(12)]
    time.sleep(0.3)
    workers = one.workers()
    one.kill()
    for pid in workers:  # and not by themselves, when they notice
        subprocess.run(["kill", "-9", str(pid)], check=False)
    with lk.connect(other.url) as connection:
        for id in ids:
            same_as_here(connection.job(id).result(timeout=120), expected)
    assert httpx.get(f"{other.url}/metrics").text.count("lenskit_jobs{")


class RayCluster:
    """tests/ray_cluster.py, running."""

    def __init__(self, config: dict[str, object]) -> None:
        self.url = f"http://127.0.0.1:{config['port']}"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_cluster.py")), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        )
        self._told: IO[str] = self._process.stdout  # type: ignore[assignment]
        self._wait_for("ready")

    def kill_a_node(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("kill\n")
        self._process.stdin.flush()
        self._wait_for("killed")

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._told.close()

    def _wait_for(self, word: str) -> None:
        for line in self._told:
            if line.strip() == word:
                return
        raise AssertionError(f"the cluster ended before it was {word}")


@pytest.mark.slow
def test_a_cluster_loses_a_node_and_no_job(postgres: Postgres, tmp_path: Path, demo_gpt2: lk.HookedTransformer) -> None:
    config = {
        "models": [{"name": "demo-gpt2", "replicas": 2}], "port": free_port(), "database": postgres.new(),
        "results": str(tmp_path / "results"), "folder": str(tmp_path), "use_keys": False, "silent_seconds": 5,
        "batch_rows": 4,
    }  # fmt: skip
    cluster = RayCluster(config)
    try:
        with lk.connect(cluster.url, patience=120) as connection:
            model = connection.model("demo-gpt2")
            hooks = [[lk.Save(f"blocks.{n % 4}.hook_resid_post", tokens=-1, name="x")] for n in range(60)]
            options = [{"max_new_tokens": 100 + n % 3, "eos_token_id": []} for n in range(60)]
            same_as_here(
                model.generate(EIFFEL, hooks=hooks[0], max_new_tokens=3),
                demo_gpt2.generate(EIFFEL, hooks=hooks[0], max_new_tokens=3),
            )
            with ThreadPoolExecutor(12) as pool:
                found = [
                    pool.submit(model.generate, EIFFEL, hooks=hooks[n], progress=False, **options[n]) for n in range(60)
                ]
                time.sleep(1.0)
                cluster.kill_a_node()
                for n, future in enumerate(found):
                    same_as_here(future.result(120), demo_gpt2.generate(EIFFEL, hooks=hooks[n], **options[n]))
            overview = httpx.get(f"{cluster.url}/v1/overview").json()
            assert [found["status"] for found in overview["models"]] == ["ready"]
            assert overview["failures"] == []
    finally:
        cluster.stop()


def test_ray_wants_a_database_that_can_be_shared(tmp_path: Path) -> None:
    given = ["serve", "demo-gpt2", "--ray", "--no-keys", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "lenskit", *given], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "SQLite" in done.stderr
    assert 'database = "postgresql://' in done.stderr
    assert "Traceback" not in done.stderr
