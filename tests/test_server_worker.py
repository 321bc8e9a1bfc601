"""A worker in this process: jobs that come while it runs others, too little memory, a model in parts, a full disk."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx2 as httpx
import pytest
import torch
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError
from torch import Tensor

import lenskit as lk
from lenskit.errors import GenerationError, LenskitError, OutOfRoomError
from lenskit.modules.kv_cache import KVCache
from lenskit.modules.linear import Embed
from lenskit.remote import wire
from lenskit.server import worker
from lenskit.server.app import application
from lenskit.server.config import Config, KeyLimits, Model
from lenskit.server.database import connect
from lenskit.server.jobs import Jobs
from lenskit.server.metrics import Metrics
from lenskit.server.results import Results
from lenskit.server.service import Caller, Service
from lenskit.server.worker import Worker
from lenskit.server.worker_process import load

EIFFEL = "The Eiffel Tower is in the city of"
ADA = Caller("ada", KeyLimits())


class Greedy(Embed):
    """An embedding of a model that has memory for a few rows only."""

    most = 2

    def forward(self, tokens: Tensor) -> Tensor:
        if len(tokens) > self.most:
            raise torch.OutOfMemoryError(f"tried to allocate {len(tokens)} rows")
        return super().forward(tokens)


@pytest.fixture
def greedy() -> lk.HookedTransformer:
    model = lk.HookedTransformer.from_pretrained("demo-gpt2")
    model.embed.__class__ = Greedy
    return model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(models=[{"name": "demo-gpt2"}], folder=tmp_path, use_keys=False)


@pytest.fixture
def service(config: Config) -> Iterator[Service]:
    """One that takes jobs, without workers."""
    found = Service(config)
    yield found
    found.stop()


def worker_of(config: Config, model: lk.HookedTransformer, told: list[Any] | None = None) -> Worker:
    tell = (lambda note: None) if told is None else told.append
    jobs, results = Jobs(connect(config.database_url)), Results(config.results_url)
    return Worker("w", "demo-gpt2", model, jobs, results, config, tell)


def send(service: Service, model: lk.HookedTransformer, prompts: Any = EIFFEL, hooks: Any = (), **options: Any) -> str:
    verb = {"verb": "generate", "options": options} if options else {"verb": "forward"}
    plan = {"plan": lk.Plan(hooks).to_json()} if hooks else {}
    batch = model.batch(prompts)
    mask = {} if batch.mask is None else {"mask": batch.mask.int().tolist()}
    job = {"model": "demo-gpt2", **verb, "tokens": batch.tokens.tolist(), **mask, **plan}
    return str(service.accept(ADA, job, {}, None).id)


def outcome(service: Service, model: lk.HookedTransformer, id: str) -> Any:
    """A job's result, or its error."""
    row = service.job(ADA, id)
    assert row.status in ("done", "failed")
    if row.status == "failed":
        return wire.error_from_wire(json.loads(row.error))
    data = b"".join(service.results.read(id, 0, row.result_bytes))
    return wire.result_from_wire(*wire.unpack(data), model.to_string)


# -- memory


def test_a_batch_that_does_not_fit_is_run_one_by_one(
    config: Config, service: Service, greedy: lk.HookedTransformer, demo_gpt2: lk.HookedTransformer
) -> None:
    """Each gets what it gets alone, those that draw random numbers too; the one that never fits fails alone."""
    sampled = {"max_new_tokens": 8, "do_sample": True, "seed": 3}
    greedily = {"max_new_tokens": 4, "eos_token_id": []}
    save = [lk.Save("blocks.1.hook_resid_post", tokens=-1, name="x")]
    ids = [send(service, demo_gpt2, **sampled), send(service, demo_gpt2, hooks=save, **greedily)]
    too_many = send(service, demo_gpt2, [EIFFEL] * 3, **greedily)
    ids += [send(service, demo_gpt2, "Paris is", **sampled)]
    told: list[Any] = []
    assert worker_of(config, greedy, told).once()
    assert [note["event"] for note in told].count("begun") == 1, "one batch"
    error = outcome(service, demo_gpt2, too_many)
    assert isinstance(error, OutOfRoomError)
    assert "3 rows" in str(error)
    first, second, third = (outcome(service, demo_gpt2, id) for id in ids)
    assert first.texts == demo_gpt2.generate(EIFFEL, **sampled).texts
    assert third.texts == demo_gpt2.generate("Paris is", **sampled).texts
    expected = demo_gpt2.generate(EIFFEL, hooks=save, **greedily)
    assert second.texts == expected.texts
    for one, other in zip(second.saved["x"], expected.saved["x"], strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_memory_that_runs_out_halfway_loses_nobody(
    config: Config, service: Service, greedy: lk.HookedTransformer, demo_gpt2: lk.HookedTransformer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is over by then is not run again; what was drawn by then is drawn again."""
    calls = 0

    def forward(self: Embed, tokens: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError("at the fifth pass")
        return Embed.forward(self, tokens)

    monkeypatch.setattr(Greedy, "forward", forward)
    options = [{"max_new_tokens": n, "do_sample": True, "seed": n, "eos_token_id": []} for n in (2, 9, 9)]
    ids = [send(service, demo_gpt2, **given) for given in options]
    assert worker_of(config, greedy).once()
    for id, given in zip(ids, options, strict=True):
        assert outcome(service, demo_gpt2, id).texts == demo_gpt2.generate(EIFFEL, **given).texts
    assert calls == 5 + 9 + 9


# -- what comes while a batch runs


class Watched(Embed):
    """An embedding that tells of each pass, before it."""

    told: Callable[[int], None]
    passes = 0

    def forward(self, tokens: Tensor) -> Tensor:
        type(self).passes += 1
        self.told(self.passes)
        return super().forward(tokens)


class Running:
    """A worker with a long generation; at some passes of the model, something happens."""

    LONG: ClassVar[dict[str, Any]] = {"max_new_tokens": 40, "eos_token_id": []}

    def __init__(self, config: Config, service: Service, plain: lk.HookedTransformer) -> None:
        self.service, self.plain, self.config = service, plain, config
        model = lk.HookedTransformer.from_pretrained("demo-gpt2")
        model.embed.__class__ = type("Watched", (Watched,), {"told": lambda _, n: self.at.get(n, lambda: None)()})
        self.at: dict[int, Callable[[], Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.worker = worker_of(config, model, self.events)
        self.long = send(service, plain, EIFFEL, [SAVE], **self.LONG)

    def send(self, *args: Any, **options: Any) -> str:
        id = send(self.service, self.plain, *args, **options)
        self.worker.awake.set()
        return id

    def over(self) -> list[str]:
        """Jobs in the order in which they ended."""
        return [event["job"] for event in self.events if event["event"] == "over"]

    def check(self, id: str, prompt: Any = EIFFEL, hooks: Any = (), **options: Any) -> None:
        """See that a generation's result is what it is alone."""
        found, expected = outcome(self.service, self.plain, id), self.plain.generate(prompt, hooks=hooks, **options)
        assert found.texts == expected.texts
        for name in expected.saved:
            for one, other in zip(found.saved[name], expected.saved[name], strict=True):
                assert (one - other).abs().max() <= 1e-5 * other.abs().max()


SAVE = lk.Save("blocks.1.hook_resid_post", tokens=-1, name="x")
SHORT: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": []}


@pytest.fixture
def running(
    config: Config, service: Service, demo_gpt2: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> Running:
    for name, value in {"NEWCOMERS": 1e9, "COPYING": 1e9, "CLOSED_SECONDS": 0.0}.items():
        monkeypatch.setattr(worker, name, value)  # at every step, however long it takes
    return Running(config, service, demo_gpt2)


def test_generations_join_and_passes_run_in_between(running: Running) -> None:
    edit = lk.Scale("blocks.2.attn.hook_z", 0.5, heads=1)
    drawn = {"max_new_tokens": 6, "do_sample": True, "seed": 5}
    ids: list[str] = []
    running.at[5] = lambda: ids.extend([running.send("Paris is", [edit, SAVE], **SHORT), running.send(**drawn)])
    running.at[9] = lambda: ids.append(running.send(["Nyhavn lies in the very old city of", "Rome"], [SAVE]))
    running.at[20] = lambda: ids.append(running.send(["Nyhavn lies in", "The Beehive is in the city of"], **SHORT))
    assert running.worker.once()
    short, sampled, forward, late = ids
    assert set(running.over()[:4]) == set(ids)
    assert running.over()[4:] == [running.long]
    begun = [(event["rows"], event["joined"]) for event in running.events if event["event"] == "begun"]
    assert begun[0] == (1, False)
    assert begun.count((2, False)) == 1, "the passes"
    assert sum(joined for _, joined in begun) >= 2
    running.check(running.long, EIFFEL, [SAVE], **running.LONG)
    running.check(short, "Paris is", [edit, SAVE], **SHORT)
    running.check(sampled, **drawn)
    running.check(late, ["Nyhavn lies in", "The Beehive is in the city of"], **SHORT)
    saved = running.plain.run_with_hooks(["Nyhavn lies in the very old city of", "Rome"], [SAVE]).saved["x"]
    found = outcome(running.service, running.plain, forward).saved["x"]
    assert (found - saved).abs().max() <= 1e-5 * saved.abs().max()


def test_what_cannot_join_is_next(running: Running) -> None:
    """It is not overtaken by those who come after it, and the long one is not begun again."""
    on_demand = [lk.Save("blocks.1.attn.hook_result", tokens=-1, name="x")]
    ids: list[str] = []
    running.at[5] = lambda: ids.append(running.send("Paris is", on_demand, **SHORT))
    running.at[8] = lambda: ids.append(running.send("Rome", **SHORT))
    assert running.worker.once()
    running.worker.once()
    assert running.over() == [running.long, *ids]
    running.check(running.long, EIFFEL, [SAVE], **running.LONG)
    running.check(ids[0], "Paris is", on_demand, **SHORT)
    running.check(ids[1], "Rome", **SHORT)


def test_without_memory_for_more_they_come_later(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(KVCache, "joined", none_left)
    ids: list[str] = []
    drawn = {"max_new_tokens": 6, "do_sample": True, "seed": 5}
    running.at[5] = lambda: ids.append(running.send(**drawn))
    assert running.worker.once()
    assert running.over() == [running.long, *ids]
    running.check(running.long, EIFFEL, [SAVE], **running.LONG)
    running.check(ids[0], **drawn)


def test_one_that_joined_is_cancelled_or_fails_alone(running: Running) -> None:
    ids: list[str] = []
    broken = [lk.Set("hook_logits", float("nan"), tokens=-1, steps=2)]
    drawn = {"max_new_tokens": 30, "do_sample": True, "seed": 5}
    running.at[5] = lambda: ids.extend([running.send(**running.LONG), running.send(EIFFEL, broken, **drawn)])
    running.at[12] = lambda: (running.service.cancel(ADA, ids[0]), running.worker.cancelled.add(ids[0]))
    assert running.worker.once()
    running.check(running.long, EIFFEL, [SAVE], **running.LONG)
    assert running.service.job(ADA, ids[0]).status == "cancelled"
    assert isinstance(outcome(running.service, running.plain, ids[1]), GenerationError)
    assert running.worker.cancelled == set()


def test_a_worker_that_is_to_stop_lets_nobody_in(running: Running) -> None:
    ids: list[str] = []

    def stop() -> None:
        running.worker.stopping = True
        ids.append(running.send(**SHORT))

    running.at[5] = stop
    running.worker.run()
    running.check(running.long, EIFFEL, [SAVE], **running.LONG)
    assert running.service.job(ADA, ids[0]).status == "queued"


# -- a model larger than its device


def test_a_model_whose_parts_are_offloaded_serves_batches(
    config: Config, service: Service, demo_gpt2: lk.HookedTransformer,
    dispatched: Callable[[str, Any], lk.HookedTransformer],
) -> None:  # fmt: skip
    model = dispatched("demo-gpt2", {"": "acc", "blocks.1": "cpu", "unembed": "cpu"})
    assert any(parameter.is_meta for parameter in model.parameters())
    edits = [lk.Scale("blocks.1.attn.hook_z", 0.5, heads=3), lk.Save("blocks.1.attn.hook_result", tokens=-1, name="x")]
    asked = [(EIFFEL, edits), ("Paris is", edits[1:]), ("Nyhavn lies in", ())]
    ids = [send(service, demo_gpt2, text, hooks, max_new_tokens=5, eos_token_id=[]) for text, hooks in asked]
    backward = [
        lk.Read(lk.Act("blocks.1.hook_resid_post"), name="x"),
        lk.Backward(lk.Act("blocks.3.hook_resid_post").sum()),
        lk.Save(lk.Grad("x"), name="g"),
    ]
    alone = send(service, demo_gpt2, EIFFEL, backward)
    worker = worker_of(config, model)
    assert worker.once()
    assert worker.once()
    for id, (text, hooks) in zip(ids, asked, strict=True):
        found = outcome(service, demo_gpt2, id)
        expected = demo_gpt2.generate(text, hooks=hooks, max_new_tokens=5, eos_token_id=[])
        assert found.texts == expected.texts
        for name in expected.saved:
            for one, other in zip(found.saved[name], expected.saved[name], strict=True):
                assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    gradient = outcome(service, demo_gpt2, alone).saved["g"]
    here = demo_gpt2.run_with_hooks(EIFFEL, backward).saved["g"]
    assert (gradient - here).abs().max() <= 1e-5 * here.abs().max()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu", "blocks.1": "disk"}])
def test_a_workers_device_map_is_that_of_from_pretrained(tmp_path: Path, device_map: Any) -> None:
    given = Config(models=[{"name": "demo-gpt2", "device_map": device_map}], folder=tmp_path).models[0]
    told = Model(**json.loads(given.model_dump_json()))  # as a worker process gets it
    assert not any(parameter.is_meta for parameter in load(told).parameters())
    with pytest.raises(LenskitError, match="no device for"):
        load(Model(name="demo-gpt2", device_map={"embed": "cpu"}))


# -- a full disk under the database


@contextlib.contextmanager
def full(jobs: Jobs) -> Iterator[None]:
    """SQLite refuses to grow the database: "database or disk is full"."""
    with jobs._engine.begin() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    limits = []

    def limit(connection: Any, *_: Any) -> None:
        limits.append(connection)
        connection.execute(f"PRAGMA max_page_count={pages}")

    with jobs._engine.begin() as connection:  # the pool has it, and hands it to whoever comes next
        limit(connection.connection.driver_connection)
    yield
    for raw in limits:
        raw.execute("PRAGMA max_page_count=1073741823")


def in_process(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://127.0.0.1"
    )


async def post(app: FastAPI, job: Any) -> httpx.Response:
    async with in_process(app) as http:
        return await http.post("/v1/jobs", json=job)


def test_a_full_disk_refuses_jobs_and_takes_them_again(service: Service, demo_gpt2: lk.HookedTransformer) -> None:
    job = {"model": "demo-gpt2", "verb": "forward", "tokens": [[1] * 200] * 200}  # a body of some size
    app = application(service, Metrics())
    statuses = []
    with full(service.jobs):
        for _ in range(5):
            answer = asyncio.run(post(app, job))
            statuses.append(answer.status_code)
            if answer.status_code != 202:
                assert answer.status_code == 507
                assert isinstance(wire.error_from_wire(answer.json()["error"]), OutOfRoomError)
                assert int(answer.headers["retry-after"]) > 0
    assert 507 in statuses
    accepted = statuses.count(202)
    assert len(service.jobs.listed(ADA.key, 100)) + len(service.jobs.listed("everybody", 100)) == accepted
    assert asyncio.run(post(app, job)).status_code == 202


def test_what_runs_while_the_disk_is_full_ends_when_it_is_not(
    config: Config, service: Service, demo_gpt2: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = send(service, demo_gpt2, max_new_tokens=3)
    worker = worker_of(config, demo_gpt2)
    finish, failures = worker.jobs.finish, []

    def fails_twice(*args: Any) -> Any:
        if len(failures) < 2:
            failures.append(1)
            with full(worker.jobs), worker.jobs._for_writing.begin() as connection:
                connection.exec_driver_sql("CREATE TABLE more AS SELECT randomblob(100000) AS x")
        return finish(*args)

    monkeypatch.setattr(worker.jobs, "finish", fails_twice)
    thread = threading.Thread(target=worker.once)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert len(failures) == 2
    assert outcome(service, demo_gpt2, id).texts == demo_gpt2.generate(EIFFEL, max_new_tokens=3).texts


def test_a_worker_outlives_a_database_that_is_away(
    config: Config, service: Service, demo_gpt2: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(config, demo_gpt2)

    def away(*_: Any, **__: Any) -> Any:
        raise OperationalError("SELECT 1", {}, Exception("the server closed the connection"))

    id = send(service, demo_gpt2, max_new_tokens=2)
    monkeypatch.setattr(worker.jobs, "claim", away)
    assert worker.once() is False
    monkeypatch.undo()
    assert worker.once()
    assert not isinstance(outcome(service, demo_gpt2, id), LenskitError)
