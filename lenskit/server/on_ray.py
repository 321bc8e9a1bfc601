"""The server as Ray Serve applications: the same HTTP application in front, and one for each model behind it.

Jobs, their results and who runs what are in the shared database and the shared place for results, as they are between
the processes of one machine: what Ray loses is run again. Through Ray go the ids of jobs only. The front makes one
request a job to its model's application, which lasts as long as the job, so that Serve's own autoscaling by requests
is one by jobs.
"""

import asyncio
import logging
import secrets
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import RayServeException

from lenskit.errors import InputError
from lenskit.server.app import application
from lenskit.server.config import Config, Model
from lenskit.server.database import is_shared
from lenskit.server.jobs import Jobs
from lenskit.server.metrics import Metrics
from lenskit.server.service import Service
from lenskit.server.worker_process import hired
from lenskit.server.workers import Note

LOG = logging.getLogger("lenskit.server")
FRONT = "lenskit"  # the front's application; a model's is named after it and the model
LOOK_SECONDS = 0.5  # after which a replica looks how jobs are that another one may have run
MOST_REQUESTS = 100_000  # that wait in a replica: they cost next to nothing, the queue is the database's
SECONDS_TO_END = 20.0


class Replica:
    """A model with its weights, on some machine: a worker, and the requests that wait for jobs."""

    def __init__(self, model: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        served = Model(**model)
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, asyncio.Event] = {}
        self._worker = hired(f"{served.name}-{secrets.token_hex(4)}", served, Config(**config), self._heard)
        self._thread = threading.Thread(target=self._worker.run, name="worker", daemon=True)
        self._thread.start()
        self._looking = self._loop.create_task(self._look())

    async def run(self, job: str) -> None:
        """Lasts until a job is over, whoever runs it."""
        over = self._waiting.setdefault(job, asyncio.Event())
        self._worker.awake.set()
        await over.wait()

    def check_health(self) -> None:
        """Serve asks this: a replica that raises is replaced."""
        if not self._thread.is_alive():
            raise RuntimeError("the worker's loop has ended")

    async def __del__(self) -> None:
        """Serve calls this before it ends a replica: the batch that runs is finished."""
        self._worker.stopping = True
        self._worker.awake.set()
        await asyncio.to_thread(self._thread.join, SECONDS_TO_END)

    def _heard(self, note: Mapping[str, Any]) -> None:
        """From the worker's threads."""
        if note["event"] == "over":
            self._loop.call_soon_threadsafe(self._over, note["job"])

    def _over(self, job: str) -> None:
        waiting = self._waiting.pop(job, None)
        if waiting is not None:
            waiting.set()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._waiting:
                try:
                    for job in await asyncio.to_thread(self._worker.jobs.ended, list(self._waiting)):
                        self._over(job)
                except Exception as error:  # the database is away: it may come back
                    LOG.error("cannot see how jobs are: %s", error)


class RayCrew:
    """The replicas of all models, as the front sees them: by their signs of life in the database."""

    def __init__(self, config: Config, jobs: Jobs, told: Callable[[Model, Note], None]) -> None:
        self._config, self._jobs, self._told = config, jobs, told
        self._loop = asyncio.get_running_loop()
        self._models = {model.name: model for model in config.models}
        self._handles = {name: serve.get_app_handle(application_of(name)) for name in self._models}

    def status(self, model: str) -> str:
        """There is no "failed": Serve goes on trying, and says in its own log why."""
        return "ready" if self.ready(model) else "loading"

    def ready(self, model: str) -> int:
        """How many are alive."""
        return len(self._jobs.alive(model, self._config.silent_seconds))

    def restarts(self, model: str) -> int:
        """Serve counts them."""
        return 0

    def memory(self, model: str) -> list[dict[str, Any]]:
        """What their devices hold, as they last told."""
        return self._jobs.memory(model, self._config.silent_seconds)

    def wake(self, model: str, job: str) -> None:
        """Ask for a job; from any thread."""
        asyncio.run_coroutine_threadsafe(self._ask(model, job), self._loop)

    async def _ask(self, model: str, job: str) -> None:
        try:
            await self._handles[model].run.remote(job)
        except Exception as error:  # a replica that died: others find the job in the database
            first, *_ = str(error).splitlines() or [repr(error)]
            LOG.warning("nobody waits for %s any more: %s", job, first)
            return
        ended = await asyncio.to_thread(self._jobs.ended, [job])
        self._told(self._models[model], {"event": "over", "job": job, "status": ended.get(job, "done")})

    def cancel(self, model: str, job: str) -> None:
        """Whoever runs it sees so in the database, between two steps."""

    def look(self) -> None:
        """They tell without being asked."""

    def stop(self) -> None:
        """Serve ends them."""


def application_of(model: str) -> str:
    """The name of a model's application."""
    return f"{FRONT} {model}"


def deploy(config: Config) -> None:
    """Put the server onto the cluster that this process is connected to, in the place of an earlier one."""
    told = config.model_dump(mode="json")
    serve.start(http_options={"host": config.host, "port": config.port})
    for model in config.models:
        growing = {"min_replicas": model.replicas, "max_replicas": model.max_replicas or model.replicas}
        replica: Any = serve.deployment(
            Replica,
            name=model.name,
            autoscaling_config={**growing, "target_ongoing_requests": config.batch_rows},
            ray_actor_options={"num_cpus": model.cpus, "num_gpus": model.gpus},
            max_ongoing_requests=MOST_REQUESTS,
            graceful_shutdown_timeout_s=SECONDS_TO_END,
        )
        serve.run(replica.bind(model.model_dump(), told), name=application_of(model.name), route_prefix=None)
    serve.run(_front(told), name=FRONT, route_prefix="/")


def _front(told: Mapping[str, Any]) -> Any:
    def build() -> FastAPI:
        metrics = Metrics()
        return application(Service(Config(**told), metrics.count, RayCrew), metrics)

    @serve.deployment(name=FRONT, max_ongoing_requests=MOST_REQUESTS, ray_actor_options={"num_cpus": 0})
    @serve.ingress(build)
    class Front:
        pass

    return Front.bind()  # type: ignore[attr-defined]


def run(config: Config) -> None:
    """Serve on the cluster of RAY_ADDRESS, on one that runs on this machine, or on one made for it, until interrupted.

    Raises:
        InputError: a database that machines cannot share.
    """
    if not is_shared(config.database_url):
        raise InputError(
            "on Ray the database is shared by several machines",
            got="SQLite, which is one machine's",
            expected="Postgres",
            fix='set database = "postgresql://user@host/name", and results to a place that all machines reach',
        )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    ray.init(log_to_driver=False)
    try:
        deploy(config)
        served = ", ".join(model.name for model in config.models)
        LOG.info("lenskit serves %s on Ray, at http://%s:%d on every node", served, config.host, config.port)
        stop.wait()
    finally:
        for name in [FRONT, *(application_of(model.name) for model in config.models)]:
            try:
                serve.delete(name)
            except RayServeException as error:
                LOG.warning("%s is not taken down: %s", name, error)
        ray.shutdown()
