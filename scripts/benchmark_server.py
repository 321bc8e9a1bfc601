"""What the server does under load, and what is left of it after faults: the figures of docs/server.md.

    python scripts/benchmark_server.py            # load and overhead
    python scripts/benchmark_server.py --faults   # kill -9 under load, ten times, and a full disk where one can be made

Every result is compared with the same job run here.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch

import lenskit as lk
from lenskit.remote import wire

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from server_process import ServerProcess

CLIENTS = 50
PROMPTS = [
    "The Eiffel Tower is in the city of",
    "Paris is the capital of",
    "The Colosseum is located in the city of",
    "Madison Square Garden is located in the city of New",
    "Hagia Sophia is in",
]


class Jobs:
    """Jobs that differ in prompt, layer and edit, and what comes of each here.

    source: the model. each: how many a client sends, one after another. tokens: that each generates.
    kinds: how many differ.
    """

    def __init__(self, source: str = "demo-gpt2", *, each: int = 20, tokens: int = 64, kinds: int = 40) -> None:
        self.source, self.each, self.tokens, self.kinds = source, each, tokens, kinds
        self.model = lk.HookedTransformer.from_pretrained(source)
        self._expected: dict[int, Any] = {}

    def hooks(self, kind: int) -> list[Any]:
        layer = kind % 4
        return [
            lk.Scale(f"blocks.{layer}.attn.hook_z", 0.5, heads=kind % 8),
            lk.Save(f"blocks.{layer}.hook_resid_post", tokens=-1, name="x"),
        ]

    def job(self, kind: int) -> dict[str, Any]:
        tokens = self.model.batch(PROMPTS[kind % len(PROMPTS)]).tokens.tolist()
        options = {"max_new_tokens": self.tokens, "eos_token_id": []}
        plan = lk.Plan(self.hooks(kind)).to_json()
        return {"model": self.source, "verb": "generate", "tokens": tokens, "plan": plan, "options": options}

    def check(self, kind: int, found: Any) -> None:
        """See that a result is the one that the job has here."""
        if kind not in self._expected:
            prompt = PROMPTS[kind % len(PROMPTS)]
            self._expected[kind] = self.model.generate(
                prompt, hooks=self.hooks(kind), max_new_tokens=self.tokens, eos_token_id=[]
            )
        expected = self._expected[kind]
        assert [row.tolist() for row in found.tokens] == [row.tolist() for row in expected.tokens], "mixed up"
        for one, other in zip(found.saved["x"], expected.saved["x"], strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1), "mixed up"


async def one_job(http: httpx.AsyncClient, jobs: Jobs, kind: int, *, patient: bool = False) -> float:
    """Send a job, wait for it, check it; gives the seconds that it took."""
    began = time.perf_counter()
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    sent = await asked(http, "POST", "/v1/jobs", patient=patient, headers=headers, json=jobs.job(kind))
    while True:
        path = f"/v1/jobs/{sent.json()['id']}/result?wait=20"
        answer = await asked(http, "GET", path, patient=patient)
        if answer.status_code == 200:
            break
        assert answer.status_code == 202, answer.text
    seconds = time.perf_counter() - began
    jobs.check(kind, wire.result_from_wire(*wire.unpack(answer.content), None))
    return seconds


async def asked(http: httpx.AsyncClient, method: str, path: str, *, patient: bool, **more: Any) -> httpx.Response:
    """An answer; where the server may be away, after as many attempts as that takes."""
    while True:
        try:
            answer = await http.request(method, path, **more)
            if answer.status_code < 500 or not patient:
                assert answer.status_code in (200, 202), answer.text
                return answer
        except httpx.TransportError:
            if not patient:
                raise
        await asyncio.sleep(0.2)


async def clients(url: str, jobs: Jobs, n_clients: int, n_jobs: int, *, patient: bool = False) -> list[float]:
    """So many clients, each with so many jobs, one after another."""
    limits = httpx.Limits(max_connections=n_clients)

    async def client(number: int, http: httpx.AsyncClient) -> list[float]:
        return [await one_job(http, jobs, (number * n_jobs + k) % jobs.kinds, patient=patient) for k in range(n_jobs)]

    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        found = await asyncio.gather(*(client(number, http) for number in range(n_clients)))
    return [seconds for some in found for seconds in some]


def load(folder: Path, jobs: Jobs, *, batch_rows: int) -> dict[str, float]:
    server = ServerProcess(folder, jobs.source, keys=False, batch_rows=batch_rows).start()
    try:
        asyncio.run(clients(server.url, jobs, jobs.kinds, 1))  # warm, and what is expected is known
        began = time.perf_counter()
        seconds = sorted(asyncio.run(clients(server.url, jobs, CLIENTS, jobs.each)))
        took = time.perf_counter() - began
    finally:
        server.stop()
    return {
        "jobs": len(seconds),
        "jobs/s": len(seconds) / took,
        "p50 ms": 1e3 * statistics.median(seconds),
        "p99 ms": 1e3 * seconds[int(0.99 * len(seconds))],
    }


def small_gpt2(folder: Path) -> str:
    """A checkpoint of GPT-2-small's size, its weights random, with the demo model's tokenizer."""
    demo = lk.HookedTransformer.from_pretrained("demo-gpt2")
    sizes = {"n_layers": 12, "n_heads": 12, "n_key_value_heads": 12, "d_model": 768, "d_head": 64, "d_mlp": 3072}
    cfg = replace(demo.cfg, **sizes, d_vocab=50257, n_ctx=1024)
    lk.HookedTransformer(cfg, tokenizer=demo.tokenizer, seed=0).save_pretrained(folder)
    return str(folder)


def overhead(folder: Path) -> dict[str, float]:
    """A small plan's forward pass: through the client on loopback, less the same here."""
    server = ServerProcess(folder, keys=False).start()
    local = lk.HookedTransformer.from_pretrained("demo-gpt2")
    hooks = [lk.Save("blocks.2.hook_resid_post", tokens=-1)]
    try:
        with lk.connect(server.url) as connection:
            remote = connection.model("demo-gpt2")
            times: dict[str, list[float]] = {"remote": [], "local": []}
            for _ in range(60):
                for name, model in (("remote", remote), ("local", local)):
                    began = time.perf_counter()
                    with torch.no_grad():
                        model.run_with_hooks(PROMPTS[0], hooks)
                    times[name].append(1e3 * (time.perf_counter() - began))
    finally:
        server.stop()
    medians = {name: statistics.median(found[10:]) for name, found in times.items()}
    return {**medians, "overhead": medians["remote"] - medians["local"]}


def faults(folder: Path, jobs: Jobs) -> dict[str, Any]:
    """The server killed ten times under load."""
    server = ServerProcess(folder, keys=False).start()
    random.seed(0)

    async def run() -> int:
        waiting = asyncio.create_task(clients(server.url, jobs, 20, 60, patient=True))
        kills = 0
        while kills < 10 and not waiting.done():
            await asyncio.sleep(random.uniform(0.3, 1.5))
            server.kill()
            kills += 1
            await asyncio.to_thread(server.start)
        await waiting
        return kills

    try:
        kills = asyncio.run(run())
        with httpx.Client(base_url=server.url) as http:
            found = http.get("/v1/jobs?limit=1000").json()["jobs"]
        statuses = {job["status"] for job in found}
    finally:
        server.stop()
    return {"kills": kills, "jobs": 1200, "all answered and right": True, "statuses at the end": sorted(statuses)}


def full_disk(jobs: Jobs) -> dict[str, Any]:
    """Results go to a file system of 1 MiB, which takes root and Linux."""
    with tempfile.TemporaryDirectory() as place:
        small, folder = Path(place) / "small", Path(place) / "server"
        small.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], capture_output=True).returncode:
            return {"full disk": "not tried: no tmpfs can be mounted here"}
        server = ServerProcess(folder, keys=False, results=small).start()
        try:
            with httpx.Client(base_url=server.url, timeout=60) as http:
                large = {**jobs.job(0), "plan": lk.Plan([lk.Save("*")]).to_json()}
                large = {**large, "tokens": [[1] * 60] * 8, "options": {"max_new_tokens": 4, "eos_token_id": []}}
                id = http.post("/v1/jobs", json=large).json()["id"]
                failed = http.get(f"/v1/jobs/{id}/result?wait=30")
                left = [path.name for path in small.iterdir()]
                asyncio.run(clients(server.url, jobs, 2, 2))
            return {"status": failed.status_code, "error": failed.json()["error"]["type"], "left behind": left}
        finally:
            server.stop()
            subprocess.run(["umount", small], check=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    jobs = Jobs()
    with tempfile.TemporaryDirectory() as place:
        if arguments.faults:
            found: dict[str, Any] = {"killed": faults(Path(place) / "kill", jobs), "full disk": full_disk(jobs)}
        else:
            large = Jobs(small_gpt2(Path(place) / "gpt2"), each=2, tokens=16, kinds=10)
            found = {
                f"{name}, batches of up to {rows}": load(Path(place) / f"{name} {rows}", some, batch_rows=rows)
                for name, some in (("demo-gpt2", jobs), ("GPT-2 small's size", large))
                for rows in (64, 1)
            }
            found["a small plan, ms"] = overhead(Path(place) / "overhead")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
