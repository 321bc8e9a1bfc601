"""Watching a job: a line that says how far it is, for those who sit at a terminal."""

import sys
import time
from typing import Any, Protocol, final

from lenskit.extras import load
from lenskit.remote.status import Status

MIB = 2**20
BETWEEN = 0.1  # seconds, between two drawings of what is downloaded


class Watch(Protocol):
    """Who is told how a job goes.

    interval: seconds after which the next news is wanted.
    """

    interval: float

    def see(self, status: Status) -> None:
        """The job, as it is now."""

    def seen(self, n_bytes: int, total: int | None) -> None:
        """So much of its result is there."""

    def silent(self, why: str) -> None:
        """The server did not answer, and is asked again."""

    def close(self) -> None:
        """Nothing more is to be seen."""


@final
class Unwatched:
    """Nobody looks."""

    interval = 25.0  # below the half minute after which proxies lose patience

    def see(self, status: Status) -> None: ...
    def seen(self, n_bytes: int, total: int | None) -> None: ...
    def silent(self, why: str) -> None: ...
    def close(self) -> None: ...


UNWATCHED = Unwatched()


@final
class Line:
    """A progress bar. There is none for what takes less than a second.

    Args:
        after: seconds.
    """

    interval = 1.0

    def __init__(self, after: float = 1.0) -> None:
        self._from = self._next = time.monotonic() + after
        self._bar: Any = None

    def see(self, status: Status) -> None:
        bar = self._shown()
        if bar is not None:
            bar.total = status.steps
            bar.n = status.step or 0
            bar.set_description_str(status.state if status.state == "running" else str(status), refresh=False)
            bar.refresh()

    def seen(self, n_bytes: int, total: int | None) -> None:
        bar = self._shown()
        if bar is not None and (n_bytes == total or time.monotonic() >= self._next):
            self._next = time.monotonic() + BETWEEN
            of = "" if total is None else f" of {total / MIB:.1f}"
            bar.set_description_str(f"result: {n_bytes / MIB:.1f}{of} MiB", refresh=True)

    def silent(self, why: str) -> None:
        bar = self._shown()
        if bar is not None:
            bar.set_description_str(f"no answer ({why[:60]}), asking again", refresh=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _shown(self) -> Any:
        if self._bar is None and time.monotonic() >= self._from:
            self._bar = load("tqdm.auto").tqdm(total=None, unit="step", leave=False)
        return self._bar


def watch_for(show: bool | None) -> Watch:
    """A line where there is to be one; None for where somebody looks at a terminal."""
    if show is None:
        return Line() if sys.stderr is not None and sys.stderr.isatty() else UNWATCHED
    return Line(after=0) if show else UNWATCHED
