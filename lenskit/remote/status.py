"""`Status`: how a job is, as the server says it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, final

from lenskit.errors import LenskitError, RemoteError
from lenskit.remote.wire import error_from_wire

STATES = ("queued", "running", "done", "failed", "cancelled")


@final
@dataclass(frozen=True, kw_only=True)
class Status:
    """How a job is.

    id, model, verb: which job, of which model, "forward" or "generate".
    state: "queued", "running", "done", "failed" or "cancelled".
    place: how many jobs are before it, while it is queued. step, steps: how far it is, and of how many steps.
    rows: of its batch. created, started, finished: seconds since 1970; None for what has not happened.
    error: why it failed. result_bytes, kept_until: of its result, once there is one; seconds since 1970.
    cost: what it took, in the server's measures.
    """

    id: str
    model: str
    verb: str
    state: str
    place: int | None
    step: int | None
    steps: int
    rows: int
    created: float | None
    started: float | None
    finished: float | None
    error: LenskitError | None = field(repr=False)
    result_bytes: int | None
    kept_until: float | None
    cost: Mapping[str, Any] = field(repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    def __str__(self) -> str:
        if self.state == "queued":
            return "queued" if self.place is None else f"queued, {self.place} before it"
        if self.state == "running" and self.step is not None:
            return f"running, step {self.step} of {self.steps}"
        return self.state

    @classmethod
    def of(cls, data: Any) -> Self:
        """From what the server says.

        Raises:
            RemoteError: that is no job.
        """
        try:
            result = data.get("result") or {}
            made = cls(
                id=str(data["id"]),
                model=str(data["model"]),
                verb=str(data["verb"]),
                state=str(data["status"]),
                place=data.get("place"),
                step=data.get("step"),
                steps=int(data["steps"]),
                rows=int(data.get("rows", 0)),
                created=data.get("created"),
                started=data.get("started"),
                finished=data.get("finished"),
                error=error_from_wire(data["error"]) if data.get("error") else None,
                result_bytes=result.get("bytes"),
                kept_until=result.get("until"),
                cost=data.get("cost") or {},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _no_job(f"{type(error).__name__}: {error}") from error
        if made.state not in STATES:
            raise _no_job(f"status {made.state!r}")
        return made


def _no_job(got: str) -> RemoteError:
    return RemoteError(
        "the server's answer is no job",
        got=got,
        expected=f"a job whose status is one of {', '.join(STATES)}",
        fix="see that client and server have the same version of lenskit",
    )
