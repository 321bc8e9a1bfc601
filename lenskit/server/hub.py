"""Who waits for what happens to which job, within one process. What happens is a hint: the database is asked then."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Note = dict[str, Any]


class Hub:
    """Notes about jobs, passed to who waits for them. `publish` may be called from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, set[asyncio.Queue[Note]]] = {}
        self.steps: dict[str, int] = {}  # of the jobs that run

    def start(self) -> None:
        """Deliver in the loop that is running."""
        self._loop = asyncio.get_running_loop()

    def publish(self, job: str, note: Note) -> None:
        """Tell who waits for a job."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, job, note)

    def _deliver(self, job: str, note: Note) -> None:
        if note["event"] == "step":
            self.steps[job] = note["step"]
        elif note["event"] in ("over", "queued"):
            self.steps.pop(job, None)
        for queue in self._waiting.get(job, ()):
            queue.put_nowait(note)

    @contextmanager
    def listening(self, job: str) -> Iterator[asyncio.Queue[Note]]:
        """A `with` block in which what is told of a job is put into a queue."""
        queue: asyncio.Queue[Note] = asyncio.Queue()
        self._waiting.setdefault(job, set()).add(queue)
        try:
            yield queue
        finally:
            self._waiting[job].discard(queue)
            if not self._waiting[job]:
                del self._waiting[job]
