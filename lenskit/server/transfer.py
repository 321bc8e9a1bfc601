"""Bodies that may be large or slow, both ways, and parts of files."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.concurrency import iterate_in_threadpool
from fastapi.responses import StreamingResponse

from lenskit.errors import InputError, LenskitError, LimitError


class RefusedError(Exception):
    """An error that has a status of its own."""

    def __init__(self, status: int, error: LenskitError) -> None:
        super().__init__(status, error)
        self.status, self.error = status, error


class Stream(StreamingResponse):
    """A body that is made while it is sent, and let go of when that ends: when whoever asked is gone, too.

    Args:
        body: made in the loop that serves, or, if it is a plain iterator, in a thread.
    """

    def __init__(self, body: Any, status: int = 200, *, media_type: str, headers: Mapping[str, str]) -> None:
        self._body = body
        made = body if isinstance(body, AsyncIterator) else iterate_in_threadpool(body)
        super().__init__(made, status, headers=headers, media_type=media_type)

    async def __call__(
        self,
        scope: Any,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self._body, AsyncIterator):
                await self._body.aclose()  # type: ignore[attr-defined]  # a generator's
            else:
                self._body.close()


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """A request's body, if it is neither too large nor too slow.

    Raises:
        RefusedError: it is.
    """
    parts: list[bytes] = []
    size, stream = 0, request.stream().__aiter__()
    while True:
        try:
            part = await asyncio.wait_for(anext(stream), seconds)
        except StopAsyncIteration:
            return b"".join(parts)
        except TimeoutError:
            raise RefusedError(
                408,
                InputError(
                    "the upload stopped",
                    got=f"nothing for {seconds:g} s, after {size:,} bytes",
                    expected="a body to its end",
                    fix="send it again",
                ),
            ) from None
        size += len(part)
        if size > most:
            raise RefusedError(
                413,
                LimitError(
                    "the body is too large",
                    got=f"more than {size:,} bytes",
                    expected=f"at most {most:,}",
                    fix="send tensors that are smaller, or several jobs",
                ),
            )
        parts.append(part)


def span(asked: str | None, size: int) -> tuple[int, int]:
    """`bytes=N-` or `bytes=N-M` as a range; everything for what is no range of this kind."""
    unit, _, span = (asked or "").partition("=")
    first, dash, last = span.strip().partition("-")
    if unit.strip().lower() != "bytes" or not dash or not first.isdecimal() or not (last == "" or last.isdecimal()):
        return 0, size
    if len(first) > 20 or len(last) > 20:
        return 0, size
    end = size if last == "" else min(int(last) + 1, size)
    return (int(first), end) if int(first) < end or int(first) >= size else (0, size)
