"""What is said to a server, in which order; no sockets (see `asking.py`)."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final
from urllib.parse import quote

from lenskit.errors import JobUnfinishedError, LenskitError, RemoteError
from lenskit.remote.asking import READING, Asking, Flow, Send
from lenskit.remote.status import Status
from lenskit.remote.watching import UNWATCHED, Watch

INTERRUPTS = (KeyboardInterrupt, asyncio.CancelledError, SystemExit)
LEAVING = 5.0  # seconds for what has to be said yet by those who want to leave
SENT_TWICE = 2**20  # bytes of a job that is sent once more, to find out whether it arrived, when they do


@final
@dataclass(frozen=True, eq=False)
class Order:
    """A job as it is sent.

    kind: the body's. key: of idempotency. read: what becomes of the result's bytes.
    show: whether there is a line about its progress; None for where somebody looks at a terminal.
    """

    body: bytes = field(repr=False)
    kind: str
    key: str
    read: Callable[[bytes], Any] = field(repr=False)
    show: bool | None = None


@final
class Talk:
    """Talking to one server about jobs and models; each method is a flow.

    Args:
        url, patience: as `Asking`'s.
    """

    def __init__(self, url: str, patience: float | None = None) -> None:
        self.url = url
        self._asking = Asking(url, patience)

    # -- jobs

    def run(self, order: Order, watch: Watch, submitted: Callable[[Status], None] = lambda status: None) -> Flow[Any]:
        """Have a job run, and wait for its result; an interrupt cancels it.

        Args:
            submitted: told the job, once it is handed in.
        """
        try:
            job = yield from self.submit(order, watch)
            submitted(job)
            try:
                body = yield from self._fetch(job.id, watch)
            except INTERRUPTS as interrupt:
                yield from self._leave(job.id, interrupt)
                raise
        finally:
            watch.close()
        return order.read(body)

    def submit(self, order: Order, watch: Watch = UNWATCHED) -> Flow[Status]:
        """Hand in a job; an interrupt takes it back."""
        try:
            return Status.of((yield from self._asking.json(_handed_in(order), watch)))
        except INTERRUPTS as interrupt:
            yield from self._take_back(order, interrupt)
            raise

    def look(self, job: str) -> Flow[Status]:
        """How a job is."""
        return Status.of((yield from self._asking.json(Send("GET", _path(job)))))

    def jobs(self, limit: int) -> Flow[list[Status]]:
        """The key's jobs, the newest first."""
        found = yield from self._asking.json(Send("GET", "/v1/jobs", query={"limit": limit}))
        return [Status.of(job) for job in _entry(found, "jobs")]

    def cancel(self, job: str) -> Flow[Status]:
        """End a job; one that is over is left as it is, with its result."""
        status = yield from self.look(job)
        return status if status.over else (yield from self.delete(job))

    def delete(self, job: str) -> Flow[Status]:
        """End a job, or, where it is over, have the server forget its result."""
        return Status.of((yield from self._asking.json(Send("DELETE", _path(job)))))

    def wait(self, job: str, watch: Watch, timeout: float | None = None) -> Flow[Status]:
        """How a job is once it is over, or once so many seconds are; its result is not fetched."""
        clock = _Clock(timeout)
        try:
            while True:
                send = self._result(job, watch, clock)._replace(headers_only=True)
                answer = yield from self._asking.answer(send, watch)
                if answer.status != 202:  # the result, or why there is none
                    return (yield from self.look(job))
                watch.see(status := Status.of(self._asking.said(answer)))
                if clock.over:
                    return status
        finally:
            watch.close()

    def result(self, job: str, watch: Watch, timeout: float | None = None) -> Flow[bytes]:
        """The bytes of a job's result, waited for; an interrupt ends the waiting and leaves the job.

        Raises:
            JobUnfinishedError: the seconds were over before.
            LenskitError: what the job failed with.
        """
        try:
            return (yield from self._fetch(job, watch, timeout))
        except INTERRUPTS as interrupt:
            interrupt.add_note(f"{job} goes on at {self.url}: job.cancel() ends it")
            raise
        finally:
            watch.close()

    def _fetch(self, job: str, watch: Watch, timeout: float | None = None) -> Flow[bytes]:
        clock = _Clock(timeout)
        while True:
            try:
                answer = yield from self._asking.download(self._result(job, watch, clock), watch)
            except LenskitError as error:
                error.add_note(f"{job} at {self.url}")
                raise
            if answer.status != 202:
                return answer.body
            watch.see(status := Status.of(self._asking.said(answer)))
            if clock.over:
                raise JobUnfinishedError(
                    f"{job} is not finished",
                    got=f"{status}, after {timeout:g} seconds",
                    expected="a job that is done by then",
                    fix="wait longer; result() without a timeout waits until it is",
                )

    def _result(self, job: str, watch: Watch, clock: "_Clock") -> Send:
        seconds = min(watch.interval, clock.left)
        query = {"wait": f"{seconds:g}"}
        return Send("GET", f"{_path(job)}/result", query=query, seconds=seconds + READING, seen=watch.seen)

    def _leave(self, job: str, interrupt: BaseException) -> Flow[None]:
        """Cancel a job on the way out: one attempt."""
        answer = yield Send("DELETE", _path(job), seconds=LEAVING)
        done = answer.status == 200 and answer.broken is None
        interrupt.add_note(
            f"{job} {'was cancelled' if done else 'could not be cancelled, and may go on,'} at {self.url}"
        )

    def _take_back(self, order: Order, interrupt: BaseException) -> Flow[None]:
        """Cancel a job of which it is not known whether it arrived: the same key again says which one it became."""
        if len(order.body) <= SENT_TWICE:
            answer = yield _handed_in(order)._replace(seconds=LEAVING)
            if answer.status == 202 and answer.broken is None:
                yield from self._leave(Status.of(self._asking.said(answer)).id, interrupt)
                return
        interrupt.add_note(f"the job may have been handed in: lk.connect({self.url!r}).jobs() lists those that are")

    # -- models, and the key

    def models(self) -> Flow[list[Any]]:
        """What the server has."""
        return _entry((yield from self._asking.json(Send("GET", "/v1/models"))), "models")

    def model(self, name: str) -> Flow[Any]:
        """A model's description.

        Raises:
            CheckpointNotFoundError: the server has none of that name.
        """
        return (yield from self._asking.json(Send("GET", f"/v1/models/{quote(name, safe='')}")))

    def file(self, model: str, path: str) -> Flow[bytes]:
        """A file of a model's."""
        send = Send("GET", f"/v1/models/{quote(model, safe='')}/files/{quote(path)}")
        return (yield from self._asking.download(send)).body

    def limits(self) -> Flow[Any]:
        """What the key may do, and what of it is used."""
        return (yield from self._asking.json(Send("GET", "/v1/limits")))


class _Clock:
    """Args:
    timeout: seconds from now; None for no end.
    """

    def __init__(self, timeout: float | None) -> None:
        self._end = float("inf") if timeout is None else time.monotonic() + timeout

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left == 0


def _handed_in(order: Order) -> Send:
    headers = {"Content-Type": order.kind, "Idempotency-Key": order.key}
    return Send("POST", "/v1/jobs", order.body, headers, seconds=4 * READING)


def _path(job: str) -> str:
    return f"/v1/jobs/{quote(job, safe='')}"


def _entry(data: Any, name: str) -> list[Any]:
    found = data.get(name) if isinstance(data, dict) else None
    if isinstance(found, list):
        return found
    fix = "see that client and server have the same version of lenskit"
    raise RemoteError("the server's answer has no list", got=f"{data}"[:200], expected=f"{name}: [...]", fix=fix)
