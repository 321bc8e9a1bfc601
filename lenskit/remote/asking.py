"""One request, asked until it is answered; no sockets.

What is said to a server is written as generators: each yields a `Send` or a `Pause`, is given the `Answer`, and returns
what came of it. `transport.py` drives them with a client that waits, or with one that awaits, so nothing is written
twice. What has to be said yet after an interrupt is said by the generator too: the interrupt is thrown into it.

Everything that is sent may be sent again without harm: reading changes nothing, a job is known by its idempotency key,
and what was cancelled stays so.
"""

import json
import random
import re
import time
from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, final

from lenskit.errors import LenskitError, RemoteError, UnreachableError
from lenskit.remote.watching import UNWATCHED, Watch
from lenskit.remote.wire import error_from_wire

T = TypeVar("T")

AWAY = (502, 503, 504)  # a proxy without its server, and a server that is shutting down
FIRST_PATIENCE, PATIENCE = 10.0, 120.0  # seconds without an answer: before there ever was one, and after
LONGEST_PAUSE = 15.0
READING = 30.0  # seconds for each part of an answer
NOTHING: Mapping[str, Any] = MappingProxyType({})

Seen = Callable[[int, int | None], None]  # told how many bytes of a body are there, and of how many


class Send(NamedTuple):
    """A request.

    seconds: for each part of its answer. headers_only: the body is not wanted where the answer is status 200.
    """

    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = NOTHING
    query: Mapping[str, Any] = NOTHING
    seconds: float = READING
    seen: Seen | None = None
    headers_only: bool = False


class Pause(NamedTuple):
    """Nothing for so long."""

    seconds: float


class Answer(NamedTuple):
    """What came.

    status: 0 where nothing did. headers: by their names in lower case.
    broken: why it ended early; None for a whole one.
    """

    status: int = 0
    headers: Mapping[str, str] = NOTHING
    body: bytes = b""
    broken: Exception | None = None

    @property
    def away(self) -> bool:
        """Whether it does not come from the server, or not all of it. A 500 in plain words is said by what stands
        before a server that has just died; the server's own are JSON.
        """
        plain = self.status == 500 and "json" not in self.headers.get("content-type", "")
        return self.broken is not None or self.status in AWAY or plain

    def json(self) -> Any:
        """What the body says.

        Raises:
            ValueError: no JSON.
        """
        try:
            return json.loads(self.body)
        except RecursionError as error:
            raise ValueError("too deeply nested") from error


Flow = Generator[Send | Pause, Answer, T]


@final
class Asking:
    """Asks one server.

    Args:
        url: for messages.
        patience: seconds for which a server that does not answer is asked again; None for 10 before its first answer,
            120 after.
    """

    def __init__(self, url: str, patience: float | None = None) -> None:
        self.url, self._patience = url, patience
        self._answered = False  # ever

    def json(self, send: Send, watch: Watch = UNWATCHED) -> Flow[Any]:
        """What the answer says.

        Raises:
            LenskitError: the server's own, if that is its answer.
            UnreachableError: there was none.
        """
        answer = yield from self.answer(send, watch)
        if answer.status >= 300:
            raise self.error(answer)
        return self.said(answer)

    def answer(self, send: Send, watch: Watch = UNWATCHED) -> Flow[Answer]:
        """The first whole answer that is not about being away."""
        retries = self._retries(watch)
        while True:
            answer = yield send
            if not answer.away:
                self._answered = True
                return answer
            yield Pause(retries.pause(answer))

    def download(self, send: Send, watch: Watch = UNWATCHED) -> Flow[Answer]:
        """A whole answer; where it breaks off, the next request is for the rest. An error is raised."""
        retries, got, tag = self._retries(watch), b"", ""
        while True:
            rest = {"Range": f"bytes={len(got)}-", "If-Range": tag} if got else {}
            answer = yield send._replace(headers={**send.headers, **rest}, seen=_beyond(send.seen, len(got)))
            if answer.status == 206 and _is_rest(answer, len(got), tag):
                answer = answer._replace(status=200, body=got + answer.body)
            elif answer.status == 200:  # from the start, also where a part was asked for
                got, tag = b"", answer.headers.get("etag", "")
            elif answer.status in (206, 416):
                got = b""  # what was there is of something else
            if not answer.away and answer.status not in (206, 416):
                self._answered = True
                if answer.status >= 300:
                    raise self.error(answer)
                return answer
            if answer.status == 200 and tag and len(answer.body) > len(got):
                retries, got = self._retries(watch), answer.body  # it comes on
            yield Pause(retries.pause(answer))

    def said(self, answer: Answer) -> Any:
        """What an answer says in JSON.

        Raises:
            RemoteError: it is none.
        """
        try:
            return answer.json()
        except ValueError as error:
            raise self._not_lenskits(answer) from error

    def error(self, answer: Answer) -> LenskitError:
        """The error that an answer is."""
        try:
            error = error_from_wire(answer.json()["error"])
        except (ValueError, KeyError, TypeError):
            return self._not_lenskits(answer)
        if answer.status == 429 and "retry-after" in answer.headers:
            fix = f"{error.fix}; come back in {answer.headers['retry-after']} seconds"
            return type(error)(error.what, got=error.got, expected=error.expected, fix=fix)
        return error

    def _not_lenskits(self, answer: Answer) -> RemoteError:
        there = f" to {answer.headers['location']}" if "location" in answer.headers else ""
        text = " ".join(answer.body[:200].decode("utf-8", "replace").split())
        return RemoteError(
            f"{self.url} did not answer as a lenskit server does",
            got=f"status {answer.status}{there}: {text or 'nothing'}",
            expected="JSON, or safetensors",
            fix="check the URL: it is the server's root, without /v1",
        )

    def _retries(self, watch: Watch) -> "Retries":
        patience = self._patience
        if patience is None:
            patience = PATIENCE if self._answered else FIRST_PATIENCE
        return Retries(self.url, patience, watch)


@final
class Retries:
    """How long to pause before the next attempt: longer each time, and never twice the same for two clients.

    Args:
        patience: seconds from now on, after which there is no next one.
    """

    def __init__(self, url: str, patience: float, watch: Watch) -> None:
        self.url, self._patience, self._watch = url, patience, watch
        self._began, self._n = time.monotonic(), 0

    def pause(self, answer: Answer) -> float:
        """Seconds.

        Raises:
            UnreachableError: no next attempt.
        """
        why = f"status {answer.status}" if answer.broken is None else _line(answer.broken)
        asked = _seconds(answer.headers.get("retry-after", "")) if answer.status == 503 else None
        pause = min(LONGEST_PAUSE, 0.25 * 2**self._n) * random.uniform(0.5, 1.0)
        if asked is not None:
            pause = asked + pause
        self._n += 1
        silent = time.monotonic() - self._began
        if silent + pause > self._patience:
            later = "" if asked is None else f", and to come back in {asked:g} seconds"
            raise UnreachableError(
                f"no answer from {self.url}",
                got=f"{why}{later} ({self._n} attempts in {silent:.0f} seconds)",
                expected="a lenskit server",
                fix="see that it runs and that the URL is right; lk.connect(url, patience=600) asks for longer",
            ) from answer.broken
        self._watch.silent(why)
        return pause


def _seconds(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _beyond(seen: Seen | None, n: int) -> Seen | None:
    """The same, where n bytes are there already."""
    if seen is None or n == 0:
        return seen
    return lambda n_bytes, total: seen(n + n_bytes, None if total is None else n + total)


def _is_rest(answer: Answer, start: int, tag: str) -> bool:
    return answer.headers.get("content-range", "").startswith(f"bytes {start}-") and answer.headers.get("etag") == tag
