"""What the server does, without HTTP: takes jobs, says how they are, gives results, keeps house."""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lenskit.checkpoints.load import describe, matched
from lenskit.checkpoints.source import COMPANIONS, MANIFEST, find
from lenskit.errors import (
    CheckpointNotFoundError,
    JobCancelledError,
    KeyRefusedError,
    NoSuchJobError,
    ResultGoneError,
)
from lenskit.remote.wire import error_from_wire, pack
from lenskit.server.admission import admit
from lenskit.server.config import Config, KeyLimits, Model
from lenskit.server.database import Entry, connect, is_shared, only_server_of
from lenskit.server.hub import Hub
from lenskit.server.jobs import FINAL, Jobs
from lenskit.server.keys import Keys
from lenskit.server.lease import BEAT_SECONDS, put_back
from lenskit.server.results import Results
from lenskit.server.workers import Note, Workers
from lenskit.transformer import HookedTransformer

LOG = logging.getLogger("lenskit.server")
NOBODY = "everybody"  # whose jobs are those of a server without keys
HOUR, MINUTE = 3600.0, 60.0
LOOK_SECONDS = 0.5  # after which who waits looks into the database, though nobody told him to
FORGOTTEN_HOURS = 24 * 7.0  # after which a job that has ended is not known any more


@dataclass(frozen=True)
class Caller:
    """Who asks.

    key: its name. limits: what it may have.
    """

    key: str
    limits: KeyLimits


class Served:
    """A model as jobs are checked against, and as clients see it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        source = find(model.where, revision=model.revision)
        described = describe(source)
        with torch.device("meta"):
            bare = HookedTransformer(described.cfg, seed=None)
        dtype = matched(source, described, bare).dtype() if model.dtype is None else getattr(torch, model.dtype)
        self.structure = HookedTransformer.from_pretrained(
            model.where, device="meta", dtype=dtype, revision=model.revision
        )
        self.structure.inputs_on = torch.device("cpu")
        self.files = _files(source.folder, MANIFEST if source.manifest is not None else "config.json")
        self.lock = threading.Lock()  # compiling plans is not for two threads at once

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Of the files that a client downloads, by name."""
        return {name: sha256(path.read_bytes()).hexdigest() for name, path in self.files.items()}

    def summary(self) -> dict[str, Any]:
        """What it is."""
        cfg, dtype = self.structure.cfg, self.structure.embed.weight.dtype
        sizes = {name: getattr(cfg, name) for name in ("n_layers", "n_heads", "d_model", "d_vocab", "n_ctx")}
        named = {"name": self.model.name, "family": cfg.model_type, **sizes}
        return {**named, "dtype": str(dtype).removeprefix("torch."), "replicas": self.model.replicas}

    def description(self) -> dict[str, Any]:
        """What a client needs to build its structure."""
        points = [
            {"name": point.name, "axes": list(point.axes), "on_demand": point.on_demand}
            for point in self.structure.hook_points.values()
        ]
        digest = sha256(json.dumps(self.hashes, sort_keys=True).encode()).hexdigest()
        return {**self.summary(), "hook_points": points, "files": self.hashes, "digest": digest}


def _files(folder: Path, config: str) -> dict[str, Path]:
    """Of a checkpoint, what is not its weights."""
    found = {path for pattern in (config, *COMPANIONS) for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


class Crew(Protocol):
    """The workers of all models, wherever they are; `Workers` are processes on this machine."""

    def status(self, model: str) -> str: ...
    def ready(self, model: str) -> int: ...
    def restarts(self, model: str) -> int: ...
    def memory(self, model: str) -> list[dict[str, Any]]: ...
    def wake(self, model: str, job: str) -> None: ...
    def cancel(self, model: str, job: str) -> None: ...
    def look(self) -> None: ...
    def stop(self) -> None: ...


class Service:
    """All of it.

    told: takes what happens, for whoever counts: a model's name and the note.
    crew: makes the workers.

    Raises:
        LenskitError: a database that cannot be used, or is another server's; a model that cannot be described.
    """

    def __init__(
        self,
        config: Config,
        told: Callable[[str, Note], None] = lambda *_: None,
        crew: Callable[[Config, Jobs, Callable[[Model, Note], None]], Crew] = Workers,
    ) -> None:
        config.folder.mkdir(parents=True, exist_ok=True)
        self._owned = only_server_of(config.database_url)
        self.config, self._told, self._new_crew = config, told, crew
        self.served = {model.name: Served(model) for model in config.models}
        engine = connect(config.database_url)
        self.jobs = Jobs(engine)
        self.keys = Keys(engine if config.keys_url == config.database_url else connect(config.keys_url))
        self.results = Results(config.results_url)
        self.hub = Hub()
        self.crew: Crew | None = None
        self._closing = threading.Event()

    # -- its life

    def start(self) -> None:
        """Put back what an earlier server had begun, and start the workers; within the loop that will serve."""
        self.hub.start()
        put_back(self.jobs, self.config, silent=self.config.silent_seconds if self.shared else None)
        self.results.tidy(self.jobs.with_results)
        self.crew = self._new_crew(self.config, self.jobs, self._heard)
        threading.Thread(target=self._keep_house, name="housekeeping", daemon=True).start()

    def stop(self) -> None:
        """End the workers; what they do not finish in time is queued again at the next start."""
        self._closing.set()
        if self.crew is not None:
            self.crew.stop()
        if self._owned is not None:
            self._owned.release()

    @property
    def shared(self) -> bool:
        """Whether other servers may use the same database."""
        return is_shared(self.config.database_url)

    @property
    def look_seconds(self) -> float:
        """After which who waits for a job's end looks into the database, though nobody told him to: other servers
        do not tell.
        """
        return LOOK_SECONDS if self.shared else 4 * LOOK_SECONDS

    def _heard(self, model: Model, note: Note) -> None:
        self._told(model.name, note)
        for job in [*note.get("jobs", ()), *([note["job"]] if "job" in note else ())]:
            self.hub.publish(job, note)

    def _keep_house(self) -> None:
        expired = time.monotonic()
        while not self._closing.wait(BEAT_SECONDS if self.shared else MINUTE):
            try:
                if self.shared:
                    put_back(self.jobs, self.config, silent=self.config.silent_seconds)
                if time.monotonic() - expired >= MINUTE - 1:
                    expired = time.monotonic()
                    self.expire()
            except Exception as error:  # a full disk, a database that is away: next time
                LOG.error("housekeeping failed: %s", error)

    def expire(self) -> None:
        """Remove the results that have been kept long enough."""
        now = time.time()
        for job in self.jobs.expired(now - self.config.keep_hours * HOUR):
            self.results.delete(job)
        self.jobs.forget(now - max(FORGOTTEN_HOURS, 2 * self.config.keep_hours) * HOUR)

    # -- keys

    def caller(self, key: str | None) -> Caller:
        """Who asks.

        Raises:
            KeyRefusedError: nobody that is known.
        """
        if not self.config.use_keys:
            return Caller(NOBODY, self.config.key)
        found = None if not key else self.keys.find(key)
        if found is None:
            raise KeyRefusedError(
                "this server takes requests with an API key only",
                got="none" if not key else "a key that it does not know",
                expected="Authorization: Bearer lk_...",
                fix="ask whoever runs the server for one (lenskit keys add NAME), and pass api_key= or LENSKIT_API_KEY",
            )
        name, own = found
        return Caller(name, KeyLimits(**{**self.config.key.model_dump(), **own}))

    # -- jobs

    def model(self, name: Any) -> Served:
        """A model by its name.

        Raises:
            CheckpointNotFoundError: there is none.
        """
        if not isinstance(name, str) or name not in self.served:
            raise CheckpointNotFoundError(
                "the server has no such model",
                got=repr(name)[:200],
                expected=f"one of {', '.join(self.served)}",
                fix="choose one of these, or ask whoever runs the server",
            )
        return self.served[name]

    def accept(self, caller: Caller, job: Any, tensors: Mapping[str, Tensor], idempotency: str | None) -> Entry:
        """Take a job: once this returns, it will be finished or reported as failed.

        Raises:
            LenskitError: what is wrong with it, or that it is too much.
        """
        served = self.model(job.get("model") if isinstance(job, Mapping) else None)
        with served.lock:
            ready = admit(served.structure, job, tensors, limits=self.config.job)
        options = job.get("options") or {}
        if options.get("do_sample") and options.get("seed") is None:  # so that it can be run again, and is the same
            job = {**job, "options": {**options, "seed": secrets.randbits(63)}}
        columns = {
            "model": served.model.name,
            "verb": job["verb"],
            "rows": ready.rows,
            "width": ready.width,
            "steps": ready.steps,
            "tokens": ready.cost.tokens,
            "alone": ready.alone,
            "idempotency": idempotency,
            "body": pack(job, tensors),
            "cost": json.dumps(ready.cost.as_json()),
            "expected_bytes": ready.cost.result_bytes,
        }
        row = self.jobs.accept(caller.key, caller.limits, columns)
        if self.crew is not None:
            self.crew.wake(served.model.name, row.id)
        return row

    def job(self, caller: Caller, id: str) -> Entry:
        """A job of the caller's.

        Raises:
            NoSuchJobError: it is not there, or another's.
        """
        row = self.jobs.get(id, caller.key)
        if row is None:
            raise _no_job(id)
        return row

    def cancel(self, caller: Caller, id: str) -> Entry:
        """Cancel a job, between two steps if it runs; delete the result of one that is finished.

        Raises:
            NoSuchJobError: it is not there, or another's.
        """
        before = self.job(caller, id)
        row = self.jobs.cancel(id, caller.key)
        if row is None:
            raise _no_job(id)
        if before.status in FINAL:
            self.results.delete(id)
        elif self.crew is not None:
            self.crew.cancel(row.model, id)
            self.hub.publish(id, {"event": "over", "job": id, "status": "cancelled"})
        return self.job(caller, id)

    def as_json(self, row: Entry) -> dict[str, Any]:
        """A job as its owner sees it."""
        kept = row.status == "done" and row.result_bytes is not None
        until = (row.finished or 0) + self.config.keep_hours * HOUR
        return {
            **{name: getattr(row, name) for name in ("id", "model", "verb", "status", "steps", "rows")},
            **{name: getattr(row, name) for name in ("created", "started", "finished")},
            "step": self.hub.steps.get(row.id, row.step) if row.status == "running" else row.step,
            "place": self.jobs.place(row) if row.status == "queued" else None,
            "error": None if row.error is None else json.loads(row.error),
            "result": {"bytes": row.result_bytes, "until": until} if kept else None,
            "cost": json.loads(row.cost),
        }

    def check_result(self, row: Entry) -> None:
        """See that a job that is over has a result.

        Raises:
            LenskitError: what the job failed with; JobCancelledError; ResultGoneError.
        """
        if row.status == "failed":
            raise error_from_wire(json.loads(row.error))
        if row.status == "cancelled":
            raise JobCancelledError(
                f"{row.id} was cancelled", got="a DELETE", expected="a job that may end", fix="send it again"
            )
        if row.result_bytes is None:
            raise ResultGoneError(
                f"the result of {row.id} is gone",
                got=f"a job that ended {time.time() - row.finished:,.0f} s ago, or whose result was deleted",
                expected=f"one that ended less than {self.config.keep_hours:g} hours ago",
                fix="send the job again",
            )

    # -- for whoever watches

    def overview(self, caller: Caller) -> dict[str, Any]:
        """What the page shows: of others' jobs, only what they do to the queue."""
        counts = self.jobs.counts()
        models = []
        for name, served in self.served.items():
            models.append(
                {
                    **served.summary(),
                    "status": self.status(name),
                    "queued": counts.get((name, "queued"), 0),
                    "running": counts.get((name, "running"), 0),
                    "restarts": self.crew.restarts(name) if self.crew else 0,
                    "memory": self.crew.memory(name) if self.crew else [],
                }
            )
        if self.crew is not None:
            self.crew.look()
        running = [
            {
                **{name: getattr(row, name) for name in ("model", "rows", "steps", "started")},
                "step": self.hub.steps.get(row.id, row.step),
            }
            for row in self.jobs.running()
        ]
        failures = [
            {"model": row.model, "type": json.loads(row.error)["type"], "finished": row.finished}
            for row in self.jobs.failures(10)
        ]
        own = [self.as_json(row) for row in self.jobs.listed(caller.key, 20)]
        return {"time": time.time(), "models": models, "running": running, "failures": failures, "jobs": own}

    def status(self, model: str) -> str:
        """Of a model: "loading", "ready" or "failed"."""
        return "loading" if self.crew is None else self.crew.status(model)


def _no_job(id: str) -> NoSuchJobError:
    return NoSuchJobError(
        "there is no such job",
        got=repr(id)[:100],
        expected="the id of a job of this key",
        fix="look at GET /v1/jobs; jobs are forgotten a week after their end",
    )
