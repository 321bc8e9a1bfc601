"""A small server for the tests of the client: it speaks the HTTP API, runs jobs with models of this process, and fails
on demand. It is no server for anybody else: nothing is checked that a client might do wrong on purpose.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import torch
from torch import Tensor

import lenskit as lk
from lenskit import errors
from lenskit.checkpoints.source import COMPANIONS, EMBEDDED
from lenskit.remote import wire

OVER = ("done", "failed", "cancelled")


@dataclass
class FakeJob:
    """What the server knows of a job; `result` are the bytes."""

    asked: dict[str, Any]
    tensors: dict[str, Tensor]
    told: dict[str, Any]
    result: bytes | None = None
    error: errors.LenskitError | None = None
    over: Event = field(default_factory=Event)


@dataclass
class Fault:
    """What happens instead of an answer.

    kind: "deaf" (the request is lost), "lost" (it is carried out, but its answer is lost), "half" (half the body
        comes), or a status, with headers.
    """

    method: str
    path: str
    kind: str | int
    headers: Mapping[str, str]
    left: int


class FakeServer:
    """Args:
    models: by name; a folder of its own for the files of each, or an embedded one's.
    key: what has to be sent; None for none.
    """

    def __init__(self, models: Mapping[str, tuple[lk.HookedTransformer, Path]], key: str | None = None) -> None:
        self.models, self.key = models, key
        self.jobs: dict[str, FakeJob] = {}
        self.keys: dict[str, str] = {}  # idempotency key -> job
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.go = Event()  # jobs wait for it before they run
        self.go.set()
        self.ranges = True
        self._queue: Queue[FakeJob | None] = Queue()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._threads = [
            Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True),
            Thread(target=self._work, daemon=True),
        ]

    def __enter__(self) -> "FakeServer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._queue.put(None)
        self._http.shutdown()
        self._http.server_close()
        for thread in self._threads:
            thread.join()

    def fail(
        self, method: str, path: str, kind: str | int, *, times: int = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """Let the next requests whose path the pattern matches fail."""
        self.faults.append(Fault(method, path, kind, headers or {}, times))

    def count(self, method: str, path: str) -> int:
        """How many requests there were."""
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.requests)

    # -- jobs

    def submit(self, key: str, asked: dict[str, Any], tensors: dict[str, Tensor]) -> FakeJob:
        if key in self.keys:
            return self.jobs[self.keys[key]]
        if asked["model"] not in self.models:
            raise errors.CheckpointNotFoundError("no such model", got=asked["model"], expected="one", fix="look")
        id = f"job_{len(self.jobs)}"
        told = {
            "id": id, "model": asked["model"], "verb": asked["verb"], "status": "queued", "place": 0, "step": None,
            "steps": asked.get("options", {}).get("max_new_tokens", 1), "rows": len(asked["tokens"]),
            "created": time.time(), "started": None, "finished": None, "error": None, "result": None,
            "cost": {"passes": 1, "tokens": 1, "token_layers": 1, "result_bytes": 0},
        }  # fmt: skip
        job = self.jobs[id] = FakeJob(asked, tensors, told)
        self.keys[key] = id
        self._queue.put(job)
        return job

    def cancel(self, job: FakeJob) -> None:
        if job.told["status"] in OVER:
            job.result, job.told["result"] = None, None
        else:
            job.error = errors.JobCancelledError("it was cancelled", got="a", expected="b", fix="c")
            self._end(job, "cancelled")

    def _end(self, job: FakeJob, status: str) -> None:
        job.told.update(status=status, place=None, finished=time.time())
        if job.error is not None:
            job.told["error"] = wire.error_to_wire(job.error)
        job.over.set()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            while not self.go.wait(0.01):
                pass
            if job.told["status"] in OVER:
                continue
            job.told.update(status="running", place=None, started=time.time(), step=0)
            try:
                job.result = self._run(job)
                job.told["result"] = {"bytes": len(job.result), "until": time.time() + 60}
                self._end(job, "done")
            except errors.LenskitError as error:
                job.error = error
                self._end(job, "failed")

    def _run(self, job: FakeJob) -> bytes:
        asked, model = job.asked, self.models[job.asked["model"]][0]
        tokens, mask = wire.rows_from_wire(asked["tokens"], asked["mask"])
        plan = lk.Plan.from_json(asked["plan"], job.tensors)
        with torch.no_grad():
            found: Any
            if asked["verb"] == "forward":
                found = model.run_with_hooks(tokens, plan, mask=mask)
                if not asked["logits"]:
                    found = lk.Result(found.tokens, found.mask, found.saved, None)
            else:
                how = {**asked["options"], "return_logits": asked["logits"], "progress": False}
                found = model.generate(tokens, hooks=plan, mask=mask, **how)
        return wire.pack(*wire.result_to_wire(found))

    # -- models

    def describe(self, name: str) -> dict[str, Any]:
        model, folder = self.models[name]
        points = [
            {"name": point.name, "axes": list(point.axes), "on_demand": point.on_demand}
            for point in model.hook_points.values()
        ]
        files = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in self.files(name)}
        return {**self.summary(name), "hook_points": points, "files": files, "digest": "of the weights"}

    def files(self, name: str) -> list[str]:
        folder = self.models[name][1]
        found = [path for pattern in ("config.json", *COMPANIONS) for path in folder.glob(pattern)]
        return [str(path.relative_to(folder)) for path in found]

    def summary(self, name: str) -> dict[str, Any]:
        model = self.models[name][0]
        sizes = {size: getattr(model.cfg, size) for size in ("n_layers", "n_heads", "d_model", "d_vocab", "n_ctx")}
        dtype = str(model.embed.weight.dtype).removeprefix("torch.")
        return {
            "name": name, "family": model.cfg.model_type, **sizes, "dtype": dtype, "replicas": 1, "status": "ready",
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the body is written after the headers

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # a client that has gone
            super().handle()

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_DELETE = do_GET

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        self.fake.requests.append((self.command, self.path, headers))
        fault = self._fault()
        if fault is not None and isinstance(fault.kind, int):
            fix = {"error": {"type": "RemoteError", "what": "on demand", "got": "a", "expected": "b", "fix": "c"}}
            self._say(fault.kind, fix, fault.headers)
            return
        if fault is not None and fault.kind == "deaf":
            self.close_connection = True
            return
        try:
            status, said, extra = self._route([unquote(part) for part in path.split("/")[2:]], headers, body)
        except errors.LenskitError as error:
            missing = isinstance(error, errors.NoSuchJobError | errors.CheckpointNotFoundError)
            kinds = {errors.KeyRefusedError: 401, errors.ResultGoneError: 410}
            status, extra = kinds.get(type(error), 404 if missing else 422), {}
            said = {"error": wire.error_to_wire(error)}
        if fault is not None and fault.kind == "lost":
            self.close_connection = True
            return
        self._say(status, said, extra, half=fault is not None)

    def _fault(self) -> Fault | None:
        for fault in self.fake.faults:
            if fault.left and fault.method == self.command and re.search(fault.path, self.path):
                fault.left -= 1
                return fault
        return None

    def _route(self, parts: list[str], headers: Mapping[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        fake, command = self.fake, self.command
        if fake.key is not None and headers.get("authorization") != f"Bearer {fake.key}":
            raise errors.KeyRefusedError("no such key", got="another", expected="one", fix="ask for one")
        match command, parts:
            case "POST", ["jobs"]:
                plain = headers["content-type"] == wire.JSON
                asked, tensors = (json.loads(body), {}) if plain else wire.unpack(body)
                return 202, fake.submit(headers["idempotency-key"], asked, tensors).told, {}
            case "GET", ["jobs"]:
                return 200, {"jobs": [job.told for job in reversed(fake.jobs.values())]}, {}
            case "GET", ["models"]:
                return 200, {"models": [fake.summary(name) for name in fake.models]}, {}
            case "GET", ["limits"]:
                return 200, {"jobs": 10}, {}
            case "GET", ["models", name]:
                return 200, fake.describe(self._known(name)), {}
            case "GET", ["models", name, "files", *path]:
                return 200, (fake.models[self._known(name)][1] / "/".join(path)).read_bytes(), {}
            case "GET", ["jobs", id]:
                return 200, self._job(id).told, {}
            case "DELETE", ["jobs", id]:
                fake.cancel(self._job(id))
                return 200, self._job(id).told, {}
            case "GET", ["jobs", id, "result"]:
                return self._result(self._job(id), headers)
        raise AssertionError(f"{command} {self.path}")

    def _result(self, job: FakeJob, headers: Mapping[str, str]) -> tuple[int, Any, dict[str, str]]:
        seconds = float(parse_qs(urlsplit(self.path).query)["wait"][0])
        assert 0 <= seconds <= 60
        if not job.over.wait(seconds):
            return 202, job.told, {}
        if job.error is not None:
            return 409, {"error": wire.error_to_wire(job.error)}, {}
        if job.result is None:
            raise errors.ResultGoneError("it is gone", got="a", expected="b", fix="c")
        tag = f'"{hashlib.sha256(job.result).hexdigest()}"'
        extra = {"ETag": tag, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        if asked and self.fake.ranges and headers.get("if-range", tag) == tag:
            start = int(asked[1])
            extra["Content-Range"] = f"bytes {start}-{len(job.result) - 1}/{len(job.result)}"
            return 206, job.result[start:], extra
        return 200, job.result, extra

    def _job(self, id: str) -> FakeJob:
        if id not in self.fake.jobs:
            raise errors.NoSuchJobError("no such job", got=id, expected="one", fix="look")
        return self.fake.jobs[id]

    def _known(self, name: str) -> str:
        if name not in self.fake.models:
            raise errors.CheckpointNotFoundError("no such model", got=name, expected="one", fix="look")
        return name

    def _say(self, status: int, said: Any, extra: Mapping[str, str], *, half: bool = False) -> None:
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in extra.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection |= half


@contextlib.contextmanager
def serving(*models: lk.HookedTransformer, key: str | None = None) -> Iterator[FakeServer]:
    """A server of embedded models, each under the name that it was loaded by."""
    with FakeServer({model.source: (model, EMBEDDED / model.source) for model in models}, key) as server:
        yield server
