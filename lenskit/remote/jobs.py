"""`Job`: a handle of what runs on a server, in this process or another."""

import asyncio
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, final

from lenskit.errors import CheckpointNotFoundError
from lenskit.remote.asking import Flow
from lenskit.remote.runner import result_of
from lenskit.remote.status import Status
from lenskit.remote.structure import Texts, fetched
from lenskit.remote.talk import Talk
from lenskit.remote.transport import Transport
from lenskit.remote.watching import UNWATCHED, Watch, watch_for

Read = Callable[[bytes], Any]


@final
class Job:
    """A job on a server.

    `await job` gives its result as well, without holding up other tasks.

    id: names it, also in another process: `lk.connect(url).job(id)`.
    last: how it was when the server last said so; None if it was not asked.
    """

    def __init__(
        self, talk: Talk, transport: Transport, id: str, *, read: Read | None = None, last: Status | None = None
    ) -> None:
        self.id, self.last = id, last
        self._talk, self._transport, self._read = talk, transport, read
        self._result = list[Any]()  # at most one

    def status(self) -> Status:
        """How it is now.

        Raises:
            NoSuchJobError: the server does not know it, or it is another key's.
        """
        return self._said(self._talk.look(self.id))

    def wait(self, timeout: float | None = None, *, progress: bool | None = None) -> Status:
        """Until it is over, or so many seconds are; how it is then. Nothing is raised where it failed.

        Args:
            timeout: None for as long as it takes.
            progress: a line that says how far it is; None shows one at a terminal.
        """
        return self._said(self._talk.wait(self.id, watch_for(progress), timeout))

    def result(self, timeout: float | None = None, *, progress: bool | None = None) -> Any:
        """What the verb that made it returns, waited for. From another process: a `Result` or a `Generation`.

        Args:
            timeout, progress: as `wait`'s.

        Raises:
            JobUnfinishedError: it is not done by then.
            JobCancelledError, ResultGoneError: there is no result any more.
            LenskitError: what it failed with.
        """
        if not self._result:
            flow = received(self._talk, self.id, self._read, watch_for(progress), timeout)
            self._result = [self._transport.run(flow)]
        return self._result[0]

    taken = result  # for a trace

    def cancel(self) -> Status:
        """End it, between two steps; how it is then. One that is over stays as it is, with its result."""
        return self._said(self._talk.cancel(self.id))

    def delete(self) -> Status:
        """End it, or, where it is over, have the server forget its result."""
        return self._said(self._talk.delete(self.id))

    def _said(self, flow: Flow[Status]) -> Status:
        self.last = self._transport.run(flow)
        return self.last

    def __await__(self) -> Generator[Any, None, Any]:
        return self._awaited().__await__()

    async def _awaited(self) -> Any:
        # Some seconds at a time: the thread that waits cannot be cancelled, and should not be left waiting for long.
        while not (await asyncio.to_thread(self.wait, 5, progress=False)).over:
            pass
        return await asyncio.to_thread(self.result, progress=False)

    def __repr__(self) -> str:
        state = "" if self.last is None else f", {self.last}"
        return f"Job({self.id!r} at {self._talk.url}{state})"


def received(
    talk: Talk, job: str, read: Read | None, watch: Watch = UNWATCHED, timeout: float | None = None
) -> Flow[Any]:
    """A job's result.

    Args:
        read: what becomes of its bytes; None for a job of another process, whose model's tokenizer is fetched.
    """
    body = yield from talk.result(job, watch, timeout)
    if read is None:
        read = partial(result_of, decode=(yield from _decoder(talk, job)))
    return read(body)


def _decoder(talk: Talk, job: str) -> Flow[Texts | None]:
    status = yield from talk.look(job)
    if status.verb != "generate":
        return None
    try:
        return Texts((yield from fetched(talk, status.model)).folder)
    except CheckpointNotFoundError:  # the server has the result, but the model no more
        return None
