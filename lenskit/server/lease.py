"""Signs of life, where several servers share a database: who gives none for a while has lost its jobs to others.

On one machine nobody needs them: whoever starts a worker process sees it end.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lenskit.errors import RemoteError
from lenskit.remote.wire import error_to_wire
from lenskit.server.config import Config
from lenskit.server.jobs import Jobs

LOG = logging.getLogger("lenskit.server")
BEAT_SECONDS = 2.0


class Lease:
    """A thread that says that a worker is alive, as long as its process is, and puts back the jobs of dead ones.

    memory: gives what its devices hold, for whoever watches.
    """

    def __init__(
        self, worker: str, model: str, jobs: Jobs, config: Config, memory: Callable[[], Sequence[Mapping[str, Any]]]
    ) -> None:
        self._worker, self._model, self._jobs, self._config, self._memory = worker, model, jobs, config, memory
        self._over = threading.Event()
        self._beat()  # before the first job is claimed, or that would be a dead worker's
        threading.Thread(target=self._keep_beating, name="lease", daemon=True).start()

    def stop(self) -> None:
        """Give no more signs: what the worker still runs goes to others when it has been silent for long enough."""
        self._over.set()

    def _keep_beating(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._beat()
                put_back(self._jobs, self._config, silent=self._config.silent_seconds)
            except Exception as error:  # the database is away: if for too long, others take the jobs
                LOG.error("%s cannot say that it is alive: %s", self._worker, error)

    def _beat(self) -> None:
        self._jobs.beat(self._worker, self._model, self._memory())


def put_back(
    jobs: Jobs, config: Config, *, worker: str | None = None, silent: float | None = None
) -> list[tuple[str, str]]:
    """`Jobs.requeue`, with what is told of a job that is not run once more."""
    error = RemoteError(
        "the job's worker died each time that it ran",
        got=f"{config.attempts} attempts",
        expected="a job that a worker survives",
        fix="send fewer prompts, or save less: most often it is memory that is missing",
    )
    found = jobs.requeue(config.attempts, error_to_wire(error), worker=worker, silent=silent)
    if found and worker is None:
        LOG.warning("of %d jobs whose worker was gone, %d are queued again", len(found), _queued(found))
    return found


def _queued(found: Sequence[tuple[str, str]]) -> int:
    return sum(status == "queued" for _, status in found)
