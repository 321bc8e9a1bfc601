"""The jobs' table; every method is one transaction.

A job's way: queued, running (claimed by a worker), and done, failed or cancelled. A worker that dies leaves its jobs
running; whoever notices puts them back (`requeue`). What a worker reports of a job that was taken from it is ignored.
Where several servers share a database, workers sign off as alive in it (see `lease`).
"""

import json
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from lenskit.errors import QuotaError
from lenskit.server.config import KeyLimits
from lenskit.server.database import Entry, jobs, now, one_at_a_time, turns, workers

FINAL = ("done", "failed", "cancelled")
UNFINISHED = ("queued", "running")
MINUTE = 60.0
LOOKED_AT = 2000  # jobs of a queue among which those of a batch are found


@dataclass(frozen=True)
class Report:
    """How a job ended: with a result of so many bytes, or an error."""

    job: str
    error: Mapping[str, str] | None = None
    result_bytes: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class Beside:
    """A batch of generations that runs: its rows, and how many columns it will have."""

    rows: int
    columns: int


class Jobs:
    """The jobs' table."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._for_writing = engine.execution_options(writes=True)

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction that writes. The threads of a process take turns: SQLite would have them sleep and try again,
        by which many of them lose more time than the writing takes.
        """
        with self._lock, self._for_writing.begin() as connection:
            yield connection

    # -- clients

    def accept(self, key: str, limits: KeyLimits, job: Mapping[str, Any]) -> Entry:
        """Take a job, unless its idempotency key has one already: then that.

        Args:
            job: columns.

        Raises:
            QuotaError: the key has too much already.
        """
        with self._writing() as connection:
            one_at_a_time(connection, f"jobs of {key}")
            if job.get("idempotency") is not None:
                same = sa.and_(jobs.c.key == key, jobs.c.idempotency == job["idempotency"])
                there = connection.execute(sa.select(jobs).where(same)).first()
                if there is not None:
                    return there
            self._check_limits(connection, key, limits, job)
            values = {"id": f"job_{secrets.token_hex(12)}", "status": "queued", "created": time.time(), "attempts": 0}
            seq = connection.execute(sa.insert(jobs).values(key=key, **values, **job)).inserted_primary_key
            assert seq is not None
            return connection.execute(sa.select(jobs).where(jobs.c.seq == seq[0])).one()

    def _check_limits(self, connection: Connection, key: str, limits: KeyLimits, job: Mapping[str, Any]) -> None:
        used = self._used(connection, key)
        if used["queued_jobs"] >= limits.queued_jobs:
            raise _over("queued_jobs", f"{used['queued_jobs']} jobs in the queue", limits.queued_jobs, "a job is begun")
        if used["tokens_per_minute"] + job["tokens"] > limits.tokens_per_minute:
            got = f"{used['tokens_per_minute']:,} tokens in the last minute, and {job['tokens']:,} more"
            raise _over("tokens_per_minute", got, limits.tokens_per_minute, "in a minute")
        needed = job["expected_bytes"]
        if used["result_bytes"] + needed > limits.result_bytes:
            got = f"{used['result_bytes']:,} bytes of results, and {needed:,} more"
            raise _over("result_bytes", got, limits.result_bytes, "results are deleted (DELETE the jobs) or expire")

    def used(self, key: str) -> dict[str, int]:
        """What of its limits a key uses."""
        with self._engine.begin() as connection:
            return self._used(connection, key)

    def _used(self, connection: Connection, key: str) -> dict[str, int]:
        own = jobs.c.key == key
        unfinished = sa.and_(own, jobs.c.status.in_(UNFINISHED))
        sums = {  # each of what an index finds, not of all that the key ever sent
            "queued_jobs": sa.select(sa.func.count()).where(own, jobs.c.status == "queued"),
            "tokens_per_minute": _sum(jobs.c.tokens).where(own, jobs.c.created > time.time() - MINUTE),
            "expected_bytes": _sum(jobs.c.expected_bytes).where(unfinished),
            "result_bytes": _sum(jobs.c.result_bytes).where(own, jobs.c.result_bytes >= 0),
        }
        found = connection.execute(sa.select(*(each.scalar_subquery() for each in sums.values()))).one()
        used = dict(zip(sums, map(int, found), strict=True))
        return {**used, "result_bytes": used["result_bytes"] + used.pop("expected_bytes")}

    def get(self, id: str, key: str) -> Entry | None:
        """A job of a key."""
        with self._engine.begin() as connection:
            return connection.execute(sa.select(jobs).where(jobs.c.id == id, jobs.c.key == key)).first()

    def ended(self, ids: Iterable[str]) -> dict[str, str]:
        """Those of some jobs that are over, or not there any more, and how they ended."""
        wanted = list(ids)
        with self._engine.begin() as connection:
            chosen = sa.select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(wanted))
            found = {row.id: row.status for row in connection.execute(chosen)}
        return {id: found.get(id, "cancelled") for id in wanted if found.get(id) not in UNFINISHED}

    def listed(self, key: str, limit: int) -> Sequence[Entry]:
        """A key's jobs, the newest first."""
        with self._engine.begin() as connection:
            chosen = sa.select(jobs).where(jobs.c.key == key).order_by(jobs.c.seq.desc()).limit(limit)
            return connection.execute(chosen).all()

    def place(self, row: Entry) -> int:
        """How many jobs of its model come before it."""
        queue = _queue(row.model).subquery()
        own = sa.select(queue.c.nth, queue.c.served, queue.c.seq).where(queue.c.seq == row.seq).subquery()
        first = sa.tuple_(queue.c.nth, queue.c.served, queue.c.seq) < sa.tuple_(own.c.nth, own.c.served, own.c.seq)
        with self._engine.begin() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(queue, own).where(first)).scalar_one()

    def cancel(self, id: str, key: str) -> Entry | None:
        """Cancel a job that is not finished, and forget the result of one that is; None if there is none."""
        own = sa.and_(jobs.c.id == id, jobs.c.key == key)
        with self._writing() as connection:
            values = {"status": "cancelled", "finished": time.time(), "body": None}
            connection.execute(sa.update(jobs).where(own, jobs.c.status.in_(UNFINISHED)).values(values))
            found = connection.execute(sa.select(jobs).where(own)).first()
            connection.execute(sa.update(jobs).where(own).values(result_bytes=None))
        return found

    # -- workers

    def claim(
        self, model: str, worker: str, *, rows: int, tokens: int, beside: Beside | None = None
    ) -> Sequence[Entry]:
        """The next job of a model, and those behind it that fit into its batch, or into one that runs: `batch_of`."""
        with self._writing() as connection:
            one_at_a_time(connection, f"queue of {model}")
            queue = _queue(model).order_by("nth", "served", "seq").limit(LOOKED_AT)
            chosen = batch_of(connection.execute(queue).all(), rows=rows, tokens=tokens, beside=beside)
            if not chosen:
                return []
            self._served(connection, model, {row.key for row in chosen})
            seqs = jobs.c.seq.in_([row.seq for row in chosen])
            values = {"status": "running", "worker": worker, "started": time.time(), "attempts": jobs.c.attempts + 1}
            free = jobs.c.status == "queued"
            connection.execute(sa.update(jobs).where(seqs, free).values({**values, "step": None}))
            mine = sa.and_(seqs, jobs.c.worker == worker, jobs.c.status == "running")
            return connection.execute(sa.select(jobs).where(mine).order_by(jobs.c.seq)).all()

    def _served(self, connection: Connection, model: str, keys: Iterable[str]) -> None:
        for key in keys:
            own, values = sa.and_(turns.c.model == model, turns.c.key == key), {"served": now(connection)}
            if connection.execute(sa.update(turns).where(own).values(values)).rowcount == 0:
                connection.execute(sa.insert(turns).values(model=model, key=key, **values))

    def waiting(self, model: str) -> int:
        """How many jobs of a model wait."""
        with self._engine.begin() as connection:
            queued = sa.select(sa.func.count()).where(jobs.c.model == model, jobs.c.status == "queued")
            return connection.execute(queued).scalar_one()

    def progress(self, steps: Mapping[str, int], worker: str) -> set[str]:
        """Note how far jobs are; gives those that are still the worker's."""
        with self._writing() as connection:
            mine = sa.and_(jobs.c.worker == worker, jobs.c.status == "running")
            for step, ids in by_step(steps).items():
                connection.execute(sa.update(jobs).where(mine, jobs.c.id.in_(ids)).values(step=step))
            return set(connection.execute(sa.select(jobs.c.id).where(mine, jobs.c.id.in_(list(steps)))).scalars())

    def finish(self, reports: Sequence[Report], worker: str) -> list[str | None]:
        """Report how jobs ended.

        Returns:
            How each is now: as reported, or, if it was taken from the worker or cancelled, as it is for others; None
            if it is not there any more.
        """
        with self._writing() as connection:
            return [self._finish(connection, report, worker) for report in reports]

    def _finish(self, connection: Connection, report: Report, worker: str) -> str | None:
        mine = sa.and_(jobs.c.id == report.job, jobs.c.worker == worker, jobs.c.status == "running")
        status = "done" if report.error is None else "failed"
        values = {
            "status": status,
            "finished": time.time(),
            "error": None if report.error is None else json.dumps(report.error),
            "result_bytes": report.result_bytes,
            "step": report.step,
            "body": None,
        }
        if connection.execute(sa.update(jobs).where(mine).values(values)).rowcount == 1:
            return status
        return connection.execute(sa.select(jobs.c.status).where(jobs.c.id == report.job)).scalar()

    def requeue(
        self, attempts: int, error: Mapping[str, str], *, worker: str | None = None, silent: float | None = None
    ) -> list[tuple[str, str]]:
        """Put back what workers that died had begun, or report it as failed if that was often enough.

        Args:
            worker: only this one's.
            silent: only those' that have given no sign of life for so many seconds.

        Returns:
            The jobs' ids, and what has become of them.
        """
        with self._writing() as connection:
            left = jobs.c.status == "running"
            if worker is not None:
                left = sa.and_(left, jobs.c.worker == worker)
                connection.execute(sa.delete(workers).where(workers.c.name == worker))
            if silent is not None:
                connection.execute(sa.delete(workers).where(workers.c.beat < now(connection) - silent))
                left = sa.and_(left, jobs.c.worker.not_in(sa.select(workers.c.name)))
            found = connection.execute(sa.select(jobs.c.id, jobs.c.attempts).where(left)).all()
            for row in found:
                failed = {"status": "failed", "finished": time.time(), "error": json.dumps(error), "body": None}
                queued = {"status": "queued", "worker": None, "step": None}
                values = failed if row.attempts >= attempts else queued
                connection.execute(sa.update(jobs).where(left, jobs.c.id == row.id).values(values))
        return [(row.id, "failed" if row.attempts >= attempts else "queued") for row in found]

    def beat(self, worker: str, model: str, memory: Sequence[Mapping[str, Any]]) -> None:
        """A worker's sign of life."""
        with self._writing() as connection:
            values = {"beat": now(connection), "memory": json.dumps(memory)}
            mine = workers.c.name == worker
            if connection.execute(sa.update(workers).where(mine).values(values)).rowcount == 0:
                connection.execute(sa.insert(workers).values(name=worker, model=model, **values))

    def alive(self, model: str, silent: float) -> Sequence[Entry]:
        """A model's workers that gave a sign of life within so many seconds."""
        with self._engine.begin() as connection:
            recent = workers.c.beat >= now(connection) - silent
            return connection.execute(sa.select(workers).where(workers.c.model == model, recent)).all()

    def memory(self, model: str, silent: float) -> list[dict[str, Any]]:
        """What the devices of a model's workers hold."""
        return [device for row in self.alive(model, silent) for device in json.loads(row.memory)]

    # -- housekeeping

    def expired(self, before: float) -> list[str]:
        """Jobs whose results are older than a time; they are forgotten with this."""
        with self._writing() as connection:
            old = sa.and_(jobs.c.finished < before, jobs.c.result_bytes.is_not(None))
            ids = list(connection.execute(sa.select(jobs.c.id).where(old)).scalars())
            connection.execute(sa.update(jobs).where(old).values(result_bytes=None))
            return ids

    def forget(self, before: float) -> None:
        """Remove jobs that ended before a time."""
        with self._writing() as connection:
            connection.execute(sa.delete(jobs).where(jobs.c.finished < before))

    def with_results(self) -> set[str]:
        """The jobs whose results are kept, or to come."""
        with self._engine.begin() as connection:
            kept = sa.or_(jobs.c.result_bytes.is_not(None), jobs.c.status.in_(UNFINISHED))
            return set(connection.execute(sa.select(jobs.c.id).where(kept)).scalars())

    def counts(self) -> dict[tuple[str, str], int]:
        """How many jobs there are, by model and status."""
        with self._engine.begin() as connection:
            counted = sa.select(jobs.c.model, jobs.c.status, sa.func.count()).group_by(jobs.c.model, jobs.c.status)
            return {(model, status): n for model, status, n in connection.execute(counted)}

    def running(self) -> Sequence[Entry]:
        """Jobs that are running, without whose they are."""
        columns = [jobs.c[name] for name in ("id", "model", "rows", "step", "steps", "started")]
        with self._engine.begin() as connection:
            return connection.execute(sa.select(*columns).where(jobs.c.status == "running").limit(200)).all()

    def failures(self, limit: int) -> Sequence[Entry]:
        """The newest failures, without whose they are."""
        columns = [jobs.c[name] for name in ("model", "error", "finished")]
        newest = sa.select(*columns).where(jobs.c.status == "failed").order_by(jobs.c.finished.desc()).limit(limit)
        with self._engine.begin() as connection:
            return connection.execute(newest).all()


def by_step(steps: Mapping[str, int]) -> dict[int, list[str]]:
    """Which jobs are at each step."""
    found: dict[int, list[str]] = {}
    for id, step in steps.items():
        found.setdefault(step, []).append(id)
    return found


def _sum(column: Any) -> sa.Select[Any]:
    return sa.select(sa.func.coalesce(sa.func.sum(column), 0))


def _queue(model: str) -> sa.Select[Any]:
    """What waits for a model. It is served by `nth`, `served`, `seq`: each key's first job, then each one's second, and
    so on; of those the key's that was not served for longest.
    """
    columns = [jobs.c[name] for name in ("seq", "key", "verb", "rows", "width", "steps", "alone", "attempts")]
    nth = sa.func.row_number().over(partition_by=jobs.c.key, order_by=jobs.c.seq)
    served = sa.func.coalesce(turns.c.served, 0.0)
    turn = sa.and_(turns.c.model == jobs.c.model, turns.c.key == jobs.c.key)
    queue = sa.select(*columns, nth.label("nth"), served.label("served")).select_from(jobs.outerjoin(turns, turn))
    return queue.where(jobs.c.model == model, jobs.c.status == "queued")


def batch_of(queue: Sequence[Entry], *, rows: int, tokens: int, beside: Beside | None = None) -> list[Entry]:
    """The first job, and those behind it that can run beside it, all padded to the longest.

    One that has been begun before runs alone: it may be what its worker died of.

    Args:
        beside: what runs. Generations join it, forward passes are a batch of their own. If the first job can do
            neither, none is chosen: it waits until the batch is over, and those behind it do not keep that from coming.
    """
    chosen: list[Entry] = []
    others = Beside(0, 0) if beside is None or (queue and queue[0].verb == "forward") else beside
    for row in queue:
        n_rows = others.rows + sum(other.rows for other in chosen) + row.rows
        longest = max(others.columns, *(other.width + other.steps for other in (*chosen, row)))
        fits = n_rows <= rows and n_rows * longest <= tokens
        if fits and row.verb == queue[0].verb and not (row.alone or row.attempts):
            chosen.append(row)
        elif row is queue[0]:
            return [row] if beside is None else []
    return chosen


def _over(limit: str, got: str, allowed: int, until: str) -> QuotaError:
    return QuotaError(
        f"this key's limit {limit} is reached",
        got=got,
        expected=f"at most {allowed:,}",
        fix=f"try again when {until}" if not until.startswith("in ") else f"try again {until}",
    )
