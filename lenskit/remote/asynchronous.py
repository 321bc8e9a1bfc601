"""`connect_async`: the same for asyncio: many jobs at a time from one thread."""

import asyncio
from collections.abc import Generator
from types import TracebackType
from typing import Any, NoReturn, Self, final

from lenskit.errors import RemoteError, TraceError
from lenskit.remote.asking import Flow
from lenskit.remote.connection import loaded
from lenskit.remote.jobs import Read, received
from lenskit.remote.runner import JobRunner
from lenskit.remote.settings import settings
from lenskit.remote.status import Status
from lenskit.remote.structure import fetched
from lenskit.remote.talk import Order, Talk
from lenskit.remote.transport import AsyncTransport
from lenskit.remote.watching import UNWATCHED, watch_for
from lenskit.text_access import TextAccess
from lenskit.transformer import HookedTransformer


def connect_async(
    url: str | None = None, api_key: str | None = None, *, patience: float | None = None
) -> "AsyncConnection":
    """A server that runs models, for asyncio; arguments as `connect`'s."""
    found = settings(url, api_key)
    return AsyncConnection(Talk(found.url, patience), AsyncTransport(found))


@final
class AsyncConnection:
    """A server: what `lk.connect_async` returns. It belongs to one event loop; an `async with` block closes it.

    url: the server's address.
    """

    def __init__(self, talk: Talk, transport: AsyncTransport) -> None:
        self.url = talk.url
        self._talk, self._transport = talk, transport

    async def model(self, name: str, *, logits: bool = True) -> HookedTransformer:
        """A model of the server's, whose verbs return an `AsyncJob` each: `await model.generate(...)` is the result.

        Args:
            name, logits: as `Connection.model`'s.
        """
        found = await self._transport.run(fetched(self._talk, name))
        runner = JobRunner(name, self._job_of, logits=logits)
        return await asyncio.to_thread(loaded, found, name, self.url, runner)

    async def models(self) -> list[dict[str, Any]]:
        """What the server has."""
        return await self._transport.run(self._talk.models())

    async def describe(self, name: str) -> dict[str, Any]:
        """One of them: the same, its hook points, and a digest of its weights."""
        return await self._transport.run(self._talk.model(name))

    def job(self, id: str) -> "AsyncJob":
        """A handle of a job, also of one that another process has handed in."""
        return AsyncJob(self._talk, self._transport, id=id)

    async def jobs(self, limit: int = 50) -> "list[AsyncJob]":
        """Your jobs, the newest first; each one's `last` says how it is."""
        return [
            AsyncJob(self._talk, self._transport, last=job) for job in await self._transport.run(self._talk.jobs(limit))
        ]

    async def limits(self) -> dict[str, Any]:
        """What your key may do, and what of it is used."""
        return await self._transport.run(self._talk.limits())

    def attach(self, model: TextAccess, name: str) -> NoReturn:
        """Loading does not await."""
        raise RemoteError(
            "from_pretrained cannot wait for an async connection",
            got=f"remote={self!r}",
            expected="what lk.connect returns",
            fix="write model = await connection.model(name)",
        )

    async def close(self) -> None:
        """Close it; jobs go on."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"AsyncConnection({self.url!r})"

    def _job_of(self, order: Order) -> "AsyncJob":
        return AsyncJob(self._talk, self._transport, order=order)


@final
class AsyncJob:
    """A job that is handed in when it is awaited first, or by `submit`: what the verbs of an async model return.

    `await job` is its result. Where that handed it in, cancelling the task that awaits cancels the job.

    last: how it was when the server last said so; None if it was not asked.
    """

    def __init__(
        self,
        talk: Talk,
        transport: AsyncTransport,
        *,
        order: Order | None = None,
        id: str | None = None,
        last: Status | None = None,
    ) -> None:
        self._talk, self._transport, self._order, self.last = talk, transport, order, last
        self._id = id if last is None else last.id
        self._result = list[Any]()  # at most one

    @property
    def id(self) -> str:
        """Names it, also in another process.

        Raises:
            RemoteError: it is not handed in yet.
        """
        if self._id is None:
            raise RemoteError(
                "the job has no id yet",
                got="a job that nobody has awaited",
                expected="one that is handed in",
                fix="write await job.submit(), or await job for its result",
            )
        return self._id

    async def submit(self) -> Self:
        """Hand it in, and wait for nothing else."""
        if self._id is None:
            assert self._order is not None
            self._submitted(await self._transport.run(self._talk.submit(self._order)))
        return self

    async def status(self) -> Status:
        """How it is now."""
        return await self._said(self._talk.look(self.id))

    async def wait(self, timeout: float | None = None) -> Status:
        """Until it is over, or so many seconds are; how it is then. Nothing is raised where it failed."""
        await self.submit()
        return await self._said(self._talk.wait(self.id, UNWATCHED, timeout))

    async def result(self, timeout: float | None = None) -> Any:
        """What the verb returns; `Job.result` says what is raised."""
        if not self._result:
            if self._id is None and timeout is None:
                assert self._order is not None
                watch = watch_for(bool(self._order.show))
                flow = self._talk.run(self._order, watch, self._submitted)
            else:
                await self.submit()
                read: Read | None = None if self._order is None else self._order.read
                flow = received(self._talk, self.id, read, UNWATCHED, timeout)
            self._result = [await self._transport.run(flow)]
        return self._result[0]

    async def cancel(self) -> Status:
        """End it, between two steps; how it is then. One that is over stays as it is, with its result."""
        return await self._said(self._talk.cancel(self.id))

    async def delete(self) -> Status:
        """End it, or, where it is over, have the server forget its result."""
        return await self._said(self._talk.delete(self.id))

    def taken(self) -> Any:
        """For a trace, which cannot await.

        Raises:
            TraceError: nobody has.
        """
        if not self._result:
            raise TraceError(
                "the values are not there yet",
                got="a trace of an async model, whose job nobody has awaited",
                expected="a job that is done",
                fix="write await run.job after the block",
            )
        return self._result[0]

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    def __repr__(self) -> str:
        return f"AsyncJob({self._id or 'not handed in'!r} at {self._talk.url})"

    def _submitted(self, status: Status) -> None:
        self._id, self.last = status.id, status

    async def _said(self, flow: Flow[Status]) -> Status:
        self.last = await self._transport.run(flow)
        return self.last
