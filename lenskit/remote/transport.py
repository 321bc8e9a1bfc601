"""The sockets: what drives the flows of `talk.py`, with httpx2's client that waits and with the one that awaits."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, final
from weakref import finalize

from lenskit.errors import RemoteError
from lenskit.extras import load
from lenskit.remote.asking import Answer, Flow, Pause, Send
from lenskit.remote.settings import Settings
from lenskit.version import __version__

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

CONNECTING, WRITING = 10.0, 30.0  # seconds for a connection, and for each piece of what is sent
PIECE = 2**20  # bytes of a body that are sent at once


@final
class Transport:
    """Runs flows, and waits; for any number of threads."""

    def __init__(self, settings: Settings) -> None:
        self._client: httpx2.Client = load("httpx2").Client(**_options(settings))
        self._closing = finalize(self, self._client.close)  # where nobody does: lk.connect(url).model(name)

    def run(self, flow: Flow[T]) -> T:
        """What comes of a flow."""
        step: Callable[[], Send | Pause] = partial(next, flow)
        while True:
            try:
                wish = step()
            except StopIteration as end:
                return end.value
            try:
                step = partial(flow.send, self._done(wish))
            except BaseException as error:  # an interrupt, mostly: the flow may have to say something yet
                step = partial(flow.throw, error)

    def _done(self, wish: Send | Pause) -> Answer:
        if isinstance(wish, Pause):
            time.sleep(wish.seconds)
            return Answer()
        _check_open(self._client)
        came = _Came(wish)
        try:
            content = None if wish.body is None else _pieces(wish.body)
            with self._client.stream(**_request(wish), content=content) as response:
                if came.begins(response):
                    for chunk in response.iter_bytes():
                        came.adds(chunk)
        except load("httpx2").TransportError as error:
            return came.answer(error)
        return came.answer()

    def close(self) -> None:
        """Close all connections."""
        self._closing()


@final
class AsyncTransport:
    """Runs flows, and awaits."""

    def __init__(self, settings: Settings) -> None:
        self._client: httpx2.AsyncClient = load("httpx2").AsyncClient(**_options(settings))

    async def run(self, flow: Flow[T]) -> T:
        """What comes of a flow."""
        step: Callable[[], Send | Pause] = partial(next, flow)
        while True:
            try:
                wish = step()
            except StopIteration as end:
                return end.value
            try:
                step = partial(flow.send, await self._done(wish))
            except BaseException as error:  # as above; a task that is cancelled may await what ends it
                step = partial(flow.throw, error)

    async def _done(self, wish: Send | Pause) -> Answer:
        if isinstance(wish, Pause):
            await asyncio.sleep(wish.seconds)
            return Answer()
        _check_open(self._client)
        came = _Came(wish)
        try:
            content = None if wish.body is None else _awaited_pieces(wish.body)
            async with self._client.stream(**_request(wish), content=content) as response:
                if came.begins(response):
                    async for chunk in response.aiter_bytes():
                        came.adds(chunk)
        except load("httpx2").TransportError as error:
            return came.answer(error)
        return came.answer()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class _Came:
    """What has come of an answer so far."""

    def __init__(self, send: Send) -> None:
        self._send, self._chunks, self._n = send, list[bytes](), 0
        self._status, self._headers = 0, dict[str, str]()

    def begins(self, response: "httpx2.Response") -> bool:
        """Its first line and headers; whether the body is wanted."""
        self._status = response.status_code
        self._headers = {name.lower(): value for name, value in response.headers.items()}
        return not (self._send.headers_only and self._status == 200)

    def adds(self, chunk: bytes) -> None:
        """A piece of the body."""
        self._chunks.append(chunk)
        self._n += len(chunk)
        if self._send.seen is not None and self._status in (200, 206):
            length = self._headers.get("content-length", "")
            self._send.seen(self._n, int(length) if length.isdigit() else None)

    def answer(self, broken: Exception | None = None) -> Answer:
        """It, whole or broken off."""
        return Answer(self._status, self._headers, b"".join(self._chunks), broken)


def _options(settings: Settings) -> dict[str, Any]:
    """Of the clients."""
    httpx2 = load("httpx2")
    headers = {"User-Agent": f"lenskit/{__version__}", "Accept-Encoding": "identity"}  # ranges count bytes as they are
    if settings.api_key is not None:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    return {
        "base_url": settings.url,
        "headers": headers,
        "follow_redirects": False,  # a key goes to nobody else
        "trust_env": not settings.is_here,
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=20),  # each waiting job holds one
    }


def _request(send: Send) -> dict[str, Any]:
    length = {} if send.body is None else {"Content-Length": str(len(send.body))}
    timeout = load("httpx2").Timeout(connect=CONNECTING, read=send.seconds, write=WRITING, pool=None)
    return {
        "method": send.method,
        "url": send.path,
        "params": dict(send.query),
        "headers": {**length, **send.headers},
        "timeout": timeout,
    }


def _pieces(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), PIECE):
        yield body[start : start + PIECE]


async def _awaited_pieces(body: bytes) -> AsyncIterator[bytes]:
    for piece in _pieces(body):
        yield piece


def _check_open(client: "httpx2.Client | httpx2.AsyncClient") -> None:
    if client.is_closed:
        raise RemoteError(
            "the connection is closed",
            got="a connection that was closed, or whose with block is over",
            expected="an open one",
            fix="connect again, or do it within the block",
        )
