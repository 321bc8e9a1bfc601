"""The jobs' table on SQLite and on Postgres: who gets which job, and what is left of one whose worker is gone."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lenskit.errors import InputError, QuotaError
from lenskit.server.config import Config, KeyLimits
from lenskit.server.database import connect, only_server_of, workers
from lenskit.server.jobs import Beside, Jobs, Report
from lenskit.server.lease import Lease, put_back
from lenskit.server.results import Results

ERROR = {"type": "RemoteError", "what": "died", "got": "x", "expected": "y", "fix": "z"}
ROOM = {"rows": 64, "tokens": 2**15}


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'server.db'}"
    return request.getfixturevalue("postgres").new()  # type: ignore[no-any-return]


@pytest.fixture
def connected(url: str) -> Iterator[Callable[[], Jobs]]:
    """Makes what each of several servers would have."""
    engines: list[sa.Engine] = []

    def new() -> Jobs:
        engines.append(connect(url))
        return Jobs(engines[-1])

    yield new
    for engine in engines:
        engine.dispose()


@pytest.fixture
def jobs(connected: Callable[[], Jobs]) -> Jobs:
    return connected()


def columns(**changed: Any) -> dict[str, Any]:
    given = {
        "model": "m", "verb": "generate", "rows": 1, "width": 4, "steps": 3, "tokens": 6, "alone": False,
        "idempotency": None, "body": b"x", "cost": "{}", "expected_bytes": 10,
    }  # fmt: skip
    return {**given, **changed}


def send(jobs: Jobs, n: int = 1, key: str = "ada", **changed: Any) -> list[str]:
    return [jobs.accept(key, KeyLimits(), columns(**changed)).id for _ in range(n)]


def claim(jobs: Jobs, worker: str, **changed: Any) -> list[str]:
    return [row.id for row in jobs.claim("m", worker, **{**ROOM, **changed})]


# -- sending


def test_the_same_key_is_one_job_however_many_ask_at_once(connected: Callable[[], Jobs]) -> None:
    both = [connected() for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: send(both[n % 2], idempotency="once")[0], range(16)))
    assert len(set(found)) == 1
    assert send(both[0], key="bob", idempotency="once")[0] not in found, "another's key is another's"


def test_a_limit_holds_however_many_ask_at_once(connected: Callable[[], Jobs]) -> None:
    both = [connected() for _ in range(2)]

    def attempt(n: int) -> bool:
        try:
            both[n % 2].accept("ada", KeyLimits(queued_jobs=5), columns())
        except QuotaError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(20))) == 5


def test_tables_are_made_once_however_many_start_at_once(connected: Callable[[], Jobs]) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: connected(), range(6)))
    assert send(found[0]) == [row.id for row in found[5].listed("ada", 10)]


# -- claiming


def test_no_job_is_claimed_twice(connected: Callable[[], Jobs]) -> None:
    both = [connected() for _ in range(2)]
    sent = send(both[0], 40)

    def work(n: int) -> list[str]:
        mine: list[str] = []
        while found := claim(both[n % 2], f"worker {n}", rows=3):
            mine += found
        return mine

    with ThreadPoolExecutor(4) as pool:
        claimed = [id for mine in pool.map(work, range(4)) for id in mine]
    assert sorted(claimed) == sorted(sent)


def test_keys_take_turns(jobs: Jobs) -> None:
    ada, bob = send(jobs, 3, "ada"), send(jobs, 2, "bob")
    order = [claim(jobs, "w", rows=1)[0] for _ in range(5)]
    assert order == [ada[0], bob[0], ada[1], bob[1], ada[2]]
    assert claim(jobs, "w") == []


def test_a_place_is_how_many_come_before(jobs: Jobs) -> None:
    send(jobs, 3, "ada")
    [own] = send(jobs, 1, "bob")
    row = jobs.get(own, "bob")
    assert row is not None
    assert jobs.place(row) == 1
    claim(jobs, "w", rows=1)
    assert jobs.place(row) == 0, "ada has had her turn"


def test_what_was_begun_before_runs_alone(jobs: Jobs) -> None:
    sent = send(jobs, 3)
    assert claim(jobs, "w") == sent
    jobs.requeue(3, ERROR, worker="w")
    assert [claim(jobs, "v") for _ in range(3)] == [[id] for id in sent]


def test_what_comes_while_a_batch_runs(jobs: Jobs) -> None:
    """Generations join it as far as there is room, passes are a batch of their own; what can do neither is next."""
    beside = Beside(rows=6, columns=20)
    first, second, third = send(jobs, 3)
    passes = send(jobs, 2, verb="forward")
    assert claim(jobs, "w", rows=8, beside=beside) == [first, second]
    assert claim(jobs, "w", rows=9, tokens=100, beside=beside) == [], "7 rows of 20 columns are too many tokens"
    assert claim(jobs, "w", rows=7, beside=beside) == [third]
    assert claim(jobs, "w", rows=6, beside=beside) == passes, "they need no room in it"
    [large], behind = send(jobs, rows=20), send(jobs, 2)
    assert claim(jobs, "w", rows=8, beside=beside) == []
    assert claim(jobs, "w", rows=8) == [large]
    [alone] = send(jobs, alone=True, key="bob")
    assert claim(jobs, "w", rows=8, beside=beside) == [], "bob's turn"
    assert claim(jobs, "w", rows=8) == [alone]
    assert claim(jobs, "w", rows=8, beside=beside) == behind


# -- whose worker is gone


def test_jobs_of_the_silent_are_put_back_and_their_reports_ignored(jobs: Jobs) -> None:
    [id] = send(jobs)
    jobs.beat("slow", "m", [])
    jobs.beat("fast", "m", [{"device": "cpu", "used": 1, "total": 2}])
    assert claim(jobs, "slow") == [id]
    assert jobs.requeue(3, ERROR, silent=10) == []
    with jobs._engine.begin() as connection:
        connection.execute(sa.update(workers).where(workers.c.name == "slow").values(beat=workers.c.beat - 20))
    assert [row.name for row in jobs.alive("m", 10)] == ["fast"]
    assert jobs.requeue(3, ERROR, silent=10) == [(id, "queued")]
    assert claim(jobs, "fast") == [id]
    assert jobs.finish([Report(id, result_bytes=1)], "slow") == ["running"]
    assert jobs.progress({id: 2}, "slow") == set()
    assert jobs.finish([Report(id, result_bytes=5)], "fast") == ["done"]
    assert jobs.finish([Report(id, error=ERROR)], "slow") == ["done"]
    row = jobs.get(id, "ada")
    assert row is not None
    assert (row.result_bytes, row.attempts, row.error) == (5, 2, None)


def test_a_worker_without_a_sign_is_dead(jobs: Jobs) -> None:
    """One that claimed and never signed, or whose entry another has removed."""
    [id] = send(jobs)
    claim(jobs, "nobody")
    assert jobs.requeue(3, ERROR, silent=1000) == [(id, "queued")]


def test_a_job_that_kills_its_workers_is_given_up(jobs: Jobs) -> None:
    [id] = send(jobs)
    for attempt in range(3):
        assert claim(jobs, f"w{attempt}") == [id]
        [(_, status)] = jobs.requeue(3, ERROR, worker=f"w{attempt}")
    assert status == "failed"
    row = jobs.get(id, "ada")
    assert row is not None
    assert json.loads(row.error) == ERROR
    assert claim(jobs, "w") == []


def test_a_lease_beats_and_puts_back(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenskit.server.lease.BEAT_SECONDS", 0.05)
    config = Config(models=[{"name": "m"}], silent_seconds=5)
    lease = Lease("alive", "m", jobs, config, lambda: [{"device": "cpu", "used": 1, "total": 2}])
    [first] = jobs.alive("m", 5)
    try:
        send(jobs)
        claim(jobs, "dead")
        end = time.monotonic() + 20
        while not claim(jobs, "alive"):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert jobs.alive("m", 5)[0].beat > first.beat
    finally:
        lease.stop()
    assert put_back(jobs, config, silent=5) == []


def test_what_is_deleted_while_it_runs_is_told(jobs: Jobs) -> None:
    [id] = send(jobs)
    claim(jobs, "w")
    assert jobs.cancel(id, "ada") is not None
    assert jobs.finish([Report(id, result_bytes=1), Report("gone")], "w") == ["cancelled", None]


# -- the database itself


def test_a_file_is_one_servers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'server.db'}"
    lock = only_server_of(url)
    assert lock is not None
    with pytest.raises(InputError, match=r"another server uses this database(.|\n)*--folder"):
        only_server_of(url)
    lock.release()
    again = only_server_of(url)
    assert again is not None
    again.release()
    assert only_server_of("postgresql://x/y") is None


def test_other_databases_are_refused() -> None:
    with pytest.raises(InputError, match=r"'mysql'(.|\n)*postgresql://"):
        connect("mysql://x/y")


# -- results


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_results_are_there_whole_and_tidied(kind: str, tmp_path: Path) -> None:
    results = Results(str(tmp_path / "results") if kind == "folder" else f"memory://{tmp_path.name}")
    results.tidy(set)
    data = bytes(range(256)) * 5000
    for job in ("kept", "lost"):
        results.write(job, data)
    results.write("kept", data[::-1])
    assert b"".join(results.read("kept", 10, 700_000)) == data[::-1][10:700_000]
    if kind == "folder":
        (tmp_path / "results" / "half.safetensors.partial").write_bytes(b"x")
        (tmp_path / "results" / "kept.safetensors.partial").write_bytes(b"a worker that writes")
    results.tidy(lambda: {"kept"})
    assert b"".join(results.read("kept", 0, len(data))) == data[::-1]
    with pytest.raises(FileNotFoundError):
        list(results.read("lost", 0, 1))
    if kind == "folder":
        assert {path.name for path in (tmp_path / "results").iterdir()} == {
            "kept.safetensors", "kept.safetensors.partial",
        }  # fmt: skip
    results.delete("kept")
    results.delete("kept")
