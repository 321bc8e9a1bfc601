"""Blocks: the `with` blocks within a trace."""

from collections.abc import Callable

from lenskit.recording import plainly


class Block:
    """A `with` block of a trace: about a prompt, some steps, or gradients."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    @plainly
    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, *_: object) -> None:
        self._end()
