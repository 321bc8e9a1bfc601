"""The worker processes of a server: started, listened to, and started again when they die."""

import json
import logging
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lenskit.server.config import Config, Model
from lenskit.server.jobs import Jobs
from lenskit.server.lease import put_back

LOG = logging.getLogger("lenskit.server")
SECONDS_TO_END = 20.0
LONGEST_PAUSE = 30.0  # between two attempts to start a worker that dies at once

Note = dict[str, Any]


class Replica:
    """One worker process, and those that take its place.

    status: "loading", "ready", "failed" (the model cannot be loaded: trying again would not help), or "stopped".
    told: takes what the worker says.
    """

    def __init__(self, model: Model, config: Config, jobs: Jobs, told: Callable[[Note], None]) -> None:
        self.model, self.config, self.jobs, self.told = model, config, jobs, told
        self.status, self.restarts = "loading", 0
        self.error: dict[str, str] | None = None
        self.memory: list[dict[str, Any]] = []
        self.name = ""
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._keep_alive, name=f"worker of {model.name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return None if self._process is None else self._process.pid

    def send(self, note: Note) -> None:
        """Tell the worker something."""
        with self._lock:
            process = self._process
            if process is None or process.stdin is None or process.stdin.closed:
                return
            try:
                process.stdin.write(json.dumps(note) + "\n")
                process.stdin.flush()
            except (OSError, ValueError):
                pass  # it is dying: its successor will look into the database

    def stop(self) -> None:
        """End the process after its batch; at once if that takes long."""
        self._stopping = True
        self.send({"stop": True})
        process = self._process
        if process is not None:
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join(SECONDS_TO_END)
        self.status = "stopped"

    def _keep_alive(self) -> None:
        pause = 0.2
        while not self._stopping and self.status != "failed":
            began = time.monotonic()
            self._live()
            if self._stopping or self.status == "failed":
                return
            pause = 0.2 if time.monotonic() - began > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
            self.status = "loading"
            self.restarts += 1
            self.told({"event": "restart"})
            time.sleep(pause)

    def _live(self) -> None:
        """One process, from its start to its end."""
        self.name = f"{self.model.name}-{secrets.token_hex(4)}"
        process = subprocess.Popen(
            [sys.executable, "-m", "lenskit.server.worker_process", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._process = process
        self.send({"config": self.config.model_dump(mode="json"), "model": self.model.model_dump()})
        assert process.stdout is not None
        for line in process.stdout:
            self._heard(json.loads(line))
        code = process.wait()
        if not self._stopping and self.status != "failed":
            LOG.warning("the worker %s ended with status %s; what it had begun is queued again", self.name, code)
        self._put_back()

    def _heard(self, note: Note) -> None:
        if note["event"] == "ready":
            self.status = "ready"
        if note["event"] == "failed":
            self.status, self.error = "failed", note["error"]
            LOG.error(
                "the model %s cannot be loaded: %s (%s)", self.model.name, note["error"]["what"], note["error"]["got"]
            )
        self.memory = note.get("memory", self.memory)
        self.told(note)

    def _put_back(self) -> None:
        while True:
            try:
                found = put_back(self.jobs, self.config, worker=self.name)
                break
            except Exception as problem:  # the database is away, or its disk full
                LOG.error("cannot put back the jobs of %s: %s", self.name, problem)
                time.sleep(1)
        for job, status in found:
            event = "over" if status == "failed" else "queued"
            self.told({"event": event, "job": job, "status": status})


class Workers:
    """All replicas of all models."""

    def __init__(self, config: Config, jobs: Jobs, told: Callable[[Model, Note], None]) -> None:
        def telling(model: Model) -> Callable[[Note], None]:
            return lambda note: told(model, note)

        self.replicas = [
            Replica(model, config, jobs, telling(model)) for model in config.models for _ in range(model.replicas)
        ]

    def of(self, model: str) -> list[Replica]:
        """A model's."""
        return [replica for replica in self.replicas if replica.model.name == model]

    def status(self, model: str) -> str:
        """The best of them counts."""
        found = [replica.status for replica in self.of(model)]
        return next(status for status in ("ready", "loading", "failed", "stopped") if status in found)

    def ready(self, model: str) -> int:
        """How many have their weights."""
        return sum(replica.status == "ready" for replica in self.of(model))

    def restarts(self, model: str) -> int:
        """How often one died."""
        return sum(replica.restarts for replica in self.of(model))

    def memory(self, model: str) -> list[dict[str, Any]]:
        """What their devices hold, as they last told."""
        return [device for replica in self.of(model) for device in replica.memory]

    def wake(self, model: str, job: str) -> None:
        """There is work for a model."""
        for replica in self.of(model):
            replica.send({"wake": True})

    def cancel(self, model: str, job: str) -> None:
        """Whoever runs this job is to let it go."""
        for replica in self.of(model):
            replica.send({"cancel": job})

    def look(self) -> None:
        """Have every worker tell what its devices hold."""
        for replica in self.replicas:
            replica.send({"memory": True})

    def stop(self) -> None:
        """End all of them."""
        threads = [threading.Thread(target=replica.stop) for replica in self.replicas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
