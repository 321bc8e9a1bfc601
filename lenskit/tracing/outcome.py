"""`Outcome`: what a trace's run gave, or the job elsewhere that will give it: then it is asked for when it is read."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, Protocol, final

from lenskit.errors import LenskitError
from lenskit.generation import Generation
from lenskit.interventions.forward import Result
from lenskit.tracing.lowering import Record, blame


class Handle(Protocol):
    """A job that runs elsewhere."""

    def taken(self) -> Any:
        """Its result, which is waited for where that can be."""


@final
class Outcome:
    """Args:
    found: what the run gave.
    records: where the plan's ops were written down, for errors.
    """

    def __init__(self, found: Result | Generation | Handle, records: Sequence[Record]) -> None:
        self._records = records
        self.there: Result | Generation | None = None
        self.job: Handle | None = None
        if isinstance(found, Result | Generation):
            self.there = found
        else:
            self.job = found

    def get(self) -> Result | Generation:
        """What the run gave."""
        if self.there is None:
            assert self.job is not None
            with blamed(self._records):
                self.there = self.job.taken()
        return self.there


@contextmanager
def blamed(records: Sequence[Record]) -> Any:
    """Errors about an op say which line of the user's wrote it down."""
    try:
        yield
    except LenskitError as error:
        blame(error, records)
        raise
