"""The server: real processes, real sockets on loopback; what a client with any HTTP library sees."""

import asyncio
import json
import os
import random
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
import torch
from server_process import ServerProcess

import lenskit as lk
from lenskit.errors import (
    GenerationError,
    JobCancelledError,
    KeyRefusedError,
    LimitError,
    NoSuchJobError,
    PlanFormatError,
    QuotaError,
    ResultGoneError,
    SelectorError,
)
from lenskit.remote import wire

CLOSE = 1e-5
EIFFEL = "The Eiffel Tower is in the city of"
FINAL = ("done", "failed", "cancelled")


@pytest.fixture
def http(server: ServerProcess, key: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client


def job_of(
    model: lk.HookedTransformer, prompt: Any = EIFFEL, verb: str = "forward", hooks: Any = (), **options: Any
) -> dict:
    """A job as data."""
    batch = model.batch(prompt)
    mask = {} if batch.mask is None else {"mask": batch.mask.int().tolist()}
    given = {"options": options} if options else {}
    plan = {"plan": lk.Plan(hooks).to_json()} if hooks else {}
    return {"model": "demo-gpt2", "verb": verb, "tokens": batch.tokens.tolist(), **mask, **plan, **given}


def send(http: httpx.Client, job: Any, tensors: Any = None) -> dict[str, Any]:
    if tensors:
        body, kind = wire.pack(job, tensors), wire.SAFETENSORS
    else:
        body, kind = json.dumps(job).encode(), wire.JSON
    answer = http.post("/v1/jobs", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 202, answer.text
    return answer.json()


def result(http: httpx.Client, id: str, model: lk.HookedTransformer) -> Any:
    answer = http.get(f"/v1/jobs/{id}/result", params={"wait": 60})
    assert answer.status_code == 200, answer.text
    return wire.result_from_wire(*wire.unpack(answer.content), model.to_string)


def refused(answer: httpx.Response, status: int) -> Exception:
    """The error of an answer."""
    assert answer.status_code == status, answer.text
    return wire.error_from_wire(answer.json()["error"])


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.shape == other.shape
    assert torch.equal(one.isfinite(), other.isfinite())  # scores that are hidden are -inf
    one, other = one[one.isfinite()], other[other.isfinite()]
    assert (one - other).abs().max() <= CLOSE * max(1.0, float(other.detach().abs().max()))


# -- jobs


def test_a_forward_pass_is_what_it_is_locally(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    hooks = [lk.Set("blocks.1.hook_mlp_out", torch.ones(128), tokens=-1), lk.Save("blocks.*.hook_resid_post")]
    job = job_of(demo_gpt2, [EIFFEL, "Paris"], hooks=hooks)
    found = result(http, send(http, job, lk.Plan(hooks).tensors())["id"], demo_gpt2)
    expected = demo_gpt2.run_with_hooks([EIFFEL, "Paris"], hooks)
    same(found.logits[found.mask], expected.logits[expected.mask])
    assert list(found.saved) == list(expected.saved)
    for name in found.saved:
        same(found.saved[name], expected.saved[name])


def test_a_generation_is_what_it_is_locally(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    hooks = [lk.Scale("blocks.0.attn.hook_z", 0.5, heads=1), lk.Save("blocks.-1.hook_resid_post", tokens=-1)]
    job = {**job_of(demo_gpt2, verb="generate", hooks=hooks, max_new_tokens=6), "logits": True}
    found = result(http, send(http, job)["id"], demo_gpt2)
    expected = demo_gpt2.generate(EIFFEL, hooks=hooks, max_new_tokens=6, return_logits=True)
    assert found.texts == expected.texts
    assert found.finished == expected.finished
    for one, other in zip(
        found.saved["blocks.-1.hook_resid_post"], expected.saved["blocks.-1.hook_resid_post"], strict=True
    ):
        same(one, other)
    same(found.logits[0], expected.logits[0])


def test_what_takes_several_passes_or_gradients_runs_alone(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    act = lk.Act("blocks.2.hook_resid_post", prompts=0, tokens=-1)
    later = [
        lk.Set("blocks.0.hook_resid_post", act, prompts=1, tokens=-1),
        lk.Save("blocks.-1.hook_resid_post", tokens=-1, name="last"),
    ]
    gradient = [
        lk.Read(lk.Act("blocks.0.hook_resid_post"), name="x"),
        lk.Backward(lk.Act("hook_logits", tokens=-1).sum(), name="loss"),
        lk.Save(lk.Grad("x"), name="g"),
    ]
    for hooks, prompts, name in ((later, [EIFFEL, "Paris"], "last"), (gradient, EIFFEL, "g")):
        job = job_of(demo_gpt2, prompts, hooks=hooks)
        found = result(http, send(http, job)["id"], demo_gpt2)
        same(found.saved[name], demo_gpt2.run_with_hooks(prompts, hooks).saved[name])


def test_many_jobs_share_batches_and_are_what_they_are_alone(
    http: httpx.Client, demo_gpt2: lk.HookedTransformer
) -> None:
    prompts = [EIFFEL, "Paris is", "The Colosseum is in the city of", "A", "Madison Square Garden is located in"]
    hooks = [[lk.Save(f"blocks.{n % 4}.hook_resid_post", tokens=-1, name="x")] for n in range(20)]
    jobs = [
        job_of(demo_gpt2, prompts[n % 5], "generate", hooks[n], max_new_tokens=3 + n % 4, eos_token_id=[])
        for n in range(20)
    ]
    with ThreadPoolExecutor(10) as pool:
        ids = list(pool.map(lambda job: send(http, job)["id"], jobs))
        found = list(pool.map(lambda id: result(http, id, demo_gpt2), ids))
    for n, output in enumerate(found):
        expected = demo_gpt2.generate(prompts[n % 5], hooks=hooks[n], max_new_tokens=3 + n % 4, eos_token_id=[])
        assert output.texts == expected.texts
        for one, other in zip(output.saved["x"], expected.saved["x"], strict=True):
            same(one, other)
    metrics = http.get("/metrics").text
    batches = float(next(line for line in metrics.splitlines() if line.startswith("lenskit_batches_total")).split()[-1])
    ended = sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("lenskit_jobs_ended_total"))
    assert batches < ended, "some ran together"


def test_what_is_drawn_is_the_same_when_the_job_is_run_again(
    http: httpx.Client, demo_gpt2: lk.HookedTransformer
) -> None:
    job = job_of(demo_gpt2, verb="generate", max_new_tokens=8, do_sample=True, seed=7)
    first, second = (result(http, send(http, job)["id"], demo_gpt2) for _ in range(2))
    assert first.texts == second.texts == demo_gpt2.generate(EIFFEL, max_new_tokens=8, do_sample=True, seed=7).texts


def test_the_same_request_again_is_the_same_job(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    same_key, job = {"Idempotency-Key": str(uuid.uuid4())}, job_of(demo_gpt2)
    ids = {http.post("/v1/jobs", json=job, headers=same_key).json()["id"] for _ in range(5)}
    assert len(ids) == 1
    with ThreadPoolExecutor(8) as pool:
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        answers = list(pool.map(lambda _: http.post("/v1/jobs", json=job, headers=headers), range(8)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_events_tell_the_whole_way(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    job = send(http, job_of(demo_gpt2, verb="generate", max_new_tokens=200, eos_token_id=[]))
    told: list[tuple[str, dict[str, Any]]] = []
    with http.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                told.append((name, json.loads(line.removeprefix("data: "))))
    names = [name for name, _ in told]
    assert names[-1] == "done"
    assert set(names) <= {"queued", "running", "saved", "done"}
    steps = [data["step"] for _, data in told if data["step"] is not None]
    assert steps == sorted(steps)
    assert told[-1][1]["result"]["bytes"] > 0


def test_a_result_is_read_in_parts(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    job = send(http, job_of(demo_gpt2, hooks=[lk.Save("blocks.*.hook_resid_post")]))
    whole = http.get(f"/v1/jobs/{job['id']}/result?wait=30")
    assert whole.headers["accept-ranges"] == "bytes"
    for first in (0, 1, 1000, len(whole.content) - 1):
        part = http.get(f"/v1/jobs/{job['id']}/result", headers={"Range": f"bytes={first}-"})
        assert part.status_code == (206 if first else 200)
        assert part.content == whole.content[first:]
    behind = http.get(f"/v1/jobs/{job['id']}/result", headers={"Range": f"bytes={len(whole.content)}-"})
    assert behind.status_code == 416


def test_a_job_is_cancelled_between_two_steps(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    long = [job_of(demo_gpt2, verb="generate", max_new_tokens=240, eos_token_id=[]) for _ in range(3)]
    ids = [send(http, job)["id"] for job in long]
    cancelled = http.delete(f"/v1/jobs/{ids[0]}").json()
    assert cancelled["status"] in FINAL
    if cancelled["status"] == "cancelled":
        assert isinstance(refused(http.get(f"/v1/jobs/{ids[0]}/result"), 409), JobCancelledError)
    for id in ids[1:]:
        assert len(result(http, id, demo_gpt2).new_tokens[0]) == 240


def test_a_finished_jobs_result_can_be_deleted(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    job = send(http, job_of(demo_gpt2))
    result(http, job["id"], demo_gpt2)
    used = http.get("/v1/limits").json()["used"]["result_bytes"]
    assert http.delete(f"/v1/jobs/{job['id']}").json()["result"] is None
    assert http.get("/v1/limits").json()["used"]["result_bytes"] < used
    assert isinstance(refused(http.get(f"/v1/jobs/{job['id']}/result"), 410), ResultGoneError)


# -- whose it is


def test_nothing_is_there_for_another_key(
    server: ServerProcess, http: httpx.Client, demo_gpt2: lk.HookedTransformer
) -> None:
    job = send(http, job_of(demo_gpt2))
    result(http, job["id"], demo_gpt2)
    other = {"Authorization": f"Bearer {server.key('somebody else')}"}
    for method, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/result"),
        ("DELETE", ""),
    ):
        answer = http.request(method, f"/v1/jobs/{job['id']}{path}", headers=other)
        assert isinstance(refused(answer, 404), NoSuchJobError)
    assert http.get("/v1/jobs", headers=other).json() == {"jobs": []}
    assert job["id"] not in http.get("/v1/overview", headers=other).text
    assert http.get(f"/v1/jobs/{job['id']}").json()["status"] == "done", "and the other's DELETE did nothing"


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer lk_wrong"}, {"Authorization": "Basic x"}, {"Authorization": ""}]
)
def test_nothing_is_there_without_a_key(server: ServerProcess, header: dict[str, str]) -> None:
    for method, path in (("GET", "jobs"), ("POST", "jobs"), ("GET", "jobs/x"), ("GET", "models"), ("GET", "overview")):
        answer = httpx.request(method, f"{server.url}/v1/{path}", headers=header)
        assert isinstance(refused(answer, 401), KeyRefusedError)
    assert httpx.get(f"{server.url}/v1/health").json()["status"] == "ok"


def test_a_key_is_kept_as_a_hash_and_can_be_removed(server: ServerProcess, demo_gpt2: lk.HookedTransformer) -> None:
    key = server.key("to be removed")
    database = b"".join(path.read_bytes() for path in server.folder.glob("server.db*"))
    assert key.encode() not in database
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    os.system(f"{os.sys.executable} -m lenskit keys remove 'to be removed' --folder {server.folder} > /dev/null")  # type: ignore[attr-defined]
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401


# -- limits


def test_limits_of_a_key_say_which_how_much_and_when(server: ServerProcess, demo_gpt2: lk.HookedTransformer) -> None:
    job = job_of(demo_gpt2, verb="generate", max_new_tokens=100, eos_token_id=[])
    for limit, figure in (("tokens_per_minute=150", "150"), ("result_bytes=2000", "2,000")):
        headers = {"Authorization": f"Bearer {server.key(limit, limit)}"}
        answers = [httpx.post(f"{server.url}/v1/jobs", json=job, headers=headers) for _ in range(3)]
        over = next(answer for answer in answers if answer.status_code != 202)
        error = refused(over, 429)
        assert isinstance(error, QuotaError)
        assert limit.partition("=")[0] in str(error)
        assert figure in str(error)
        assert int(over.headers["retry-after"]) > 0


def test_a_job_that_costs_too_much_is_refused_with_the_figures(
    http: httpx.Client, demo_gpt2: lk.HookedTransformer
) -> None:
    job = job_of(demo_gpt2)
    too_many = {**job, "tokens": [[1] * 200] * 600}
    assert isinstance(refused(http.post("/v1/jobs", json=too_many), 413), LimitError)
    long = {**job, "verb": "generate", "options": {"max_new_tokens": 10**9}}
    assert "token" in str(refused(http.post("/v1/jobs", json=long), 413))
    wide = lk.Act("hook_embed").sum(-1, keepdim=True).expand(1, 11, 10**9)
    hooks = [lk.Save(wide * 2, name="x")]
    error = refused(http.post("/v1/jobs", json=job_of(demo_gpt2, hooks=hooks)), 413)
    assert "bytes" in str(error)


# -- what is wrong is told


def test_errors_are_those_of_the_library(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    cases: list[tuple[dict[str, Any], int, type[Exception]]] = [
        (job_of(demo_gpt2, hooks=[lk.Save("hook_embed", tokens=99)]), 422, SelectorError),
        (job_of(demo_gpt2, verb="generate", max_new_tokens=3, temperature=-1.0, do_sample=True), 422, GenerationError),
        ({**job_of(demo_gpt2), "plan": {"format": "x"}}, 400, PlanFormatError),
        ({**job_of(demo_gpt2), "model": "gpt-5"}, 404, lk.errors.CheckpointNotFoundError),
        ({**job_of(demo_gpt2), "tokens": [[10**6]]}, 422, lk.errors.InputError),
        ({**job_of(demo_gpt2), "tokens": []}, 422, lk.errors.InputError),
        ({**job_of(demo_gpt2), "more": 1}, 422, lk.errors.InputError),
    ]
    for job, status, kind in cases:
        assert isinstance(refused(http.post("/v1/jobs", json=job), status), kind)


def test_a_job_that_fails_says_why_and_the_others_go_on(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    broken = job_of(
        demo_gpt2,
        verb="generate",
        hooks=[lk.Set("hook_logits", float("nan"), tokens=-1)],
        max_new_tokens=3,
        do_sample=True,
    )
    fine = job_of(demo_gpt2, verb="generate", max_new_tokens=3)
    ids = [send(http, job)["id"] for job in (fine, broken, fine)]
    result(http, ids[0], demo_gpt2)
    result(http, ids[2], demo_gpt2)
    answer = http.get(f"/v1/jobs/{ids[1]}/result?wait=30")
    assert isinstance(refused(answer, 409), GenerationError)
    assert http.get(f"/v1/jobs/{ids[1]}").json()["error"]["type"] == "GenerationError"


BODIES = [
    b"", b"{", b"[]", b"null", b"1e999", b'"x"', b"[" * 100_000, b'{"model": "demo-gpt2"}', b"\xff\xfe", b"{}" * 1000,
    b'{"model": "demo-gpt2", "verb": "forward", "tokens": [[1e400]]}',
    b'{"model": "demo-gpt2", "verb": "forward", "tokens": [[NaN]]}',
    b'{"model": {"a": 1}, "verb": [], "tokens": {}}',
]  # fmt: skip


@pytest.mark.parametrize("kind", [wire.JSON, wire.SAFETENSORS, "text/plain", ""])
def test_bodies_that_are_nothing_are_told_so(http: httpx.Client, kind: str) -> None:
    for body in BODIES:
        answer = http.post("/v1/jobs", content=body, headers={"Content-Type": kind})
        assert 400 <= answer.status_code < 500, (body[:50], answer.text)
        assert answer.json()["error"]["fix"]


def mutated(random: random.Random, data: Any) -> Any:
    """The same data with something changed somewhere."""
    odd: list[Any] = [
        None, True, -1, 0, 2**31, 2**63, 1e308, "", "x" * 1000, [], {}, [[]], {"slice": [0, 0, 0]}, "blocks.*", "*",
        {"node": 0}, {"node": -1}, {"tensor": "sha256:x"}, {"float": "nan"}, [1, 2, 3], "\x00", "\ud800",
    ]  # fmt: skip
    if isinstance(data, dict) and data and random.random() < 0.85:
        key = random.choice(list(data))
        action = random.random()
        if action < 0.1:
            return {name: value for name, value in data.items() if name != key}
        if action < 0.2:
            return {**data, random.choice(["x", "op", "at", "value", "name", "selectors", "plan"]): random.choice(odd)}
        return {**data, key: mutated(random, data[key])}
    if isinstance(data, list) and data and random.random() < 0.85:
        index = random.randrange(len(data))
        if random.random() < 0.1:
            return data[:index] + data[index + 1 :]
        if random.random() < 0.1:
            return data + data
        return [*data[:index], mutated(random, data[index]), *data[index + 1 :]]
    return random.choice(odd)


def test_mutated_jobs_break_nothing(http: httpx.Client, demo_gpt2: lk.HookedTransformer) -> None:
    act = lk.Act("blocks.0.hook_resid_post", tokens=-1)
    hooks = [
        lk.Set("blocks.1.hook_mlp_out", torch.ones(128), tokens=-1),
        lk.Add("blocks.2.hook_resid_pre", act.softmax(-1) * 2 + act[..., :1], tokens=-1),
        lk.Save("blocks.*.attn.hook_pattern", heads=[0, 1]),
        lk.Save((act @ act.mT).sum(), name="norm"),
    ]
    forward, tensors = job_of(demo_gpt2, hooks=hooks), lk.Plan(hooks).tensors()
    generate = {
        **forward,
        "verb": "generate",
        "options": {"max_new_tokens": 2, "do_sample": True, "top_k": 3, "seed": 1},
    }
    seed = random.Random(0)
    statuses: dict[int, int] = {}
    for n in range(2000):
        job = forward if n % 2 else generate
        for _ in range(seed.choice([1, 1, 2, 4])):
            job = mutated(seed, job)
        try:
            body = wire.pack(job, tensors)
        except (ValueError, UnicodeEncodeError):
            continue
        if n % 10 == 0:  # and bytes of the file itself
            at = seed.randrange(len(body))
            body = body[:at] + bytes([seed.randrange(256)]) + body[at + 1 :]
        answer = http.post("/v1/jobs", content=body, headers={"Content-Type": wire.SAFETENSORS})
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (job, answer.text)
    assert statuses[202] > 50
    assert sum(n for status, n in statuses.items() if status >= 400) > 500
    end = time.monotonic() + 120
    while any(job["status"] not in FINAL for job in http.get("/v1/jobs?limit=1000").json()["jobs"]):
        assert time.monotonic() < end, "a job hangs"
        time.sleep(0.5)
    failed = [job for job in http.get("/v1/jobs?limit=1000").json()["jobs"] if job["status"] == "failed"]
    assert not [job["error"] for job in failed if "died" in job["error"]["what"]]


# -- nothing is lost


def test_jobs_survive_their_worker(tmp_path_factory: pytest.TempPathFactory, demo_gpt2: lk.HookedTransformer) -> None:
    server = ServerProcess(tmp_path_factory.mktemp("worker"), keys=False).start()
    try:
        with httpx.Client(base_url=server.url, timeout=90) as http:
            job = job_of(demo_gpt2, verb="generate", max_new_tokens=240, eos_token_id=[])
            ids = [send(http, job)["id"] for _ in range(6)]
            time.sleep(0.05)
            for pid in server.workers():
                os.kill(pid, signal.SIGKILL)
            expected = demo_gpt2.generate(EIFFEL, max_new_tokens=240, eos_token_id=[]).texts
            for id in ids:
                assert result(http, id, demo_gpt2).texts == expected
    finally:
        server.stop()


def test_jobs_survive_the_server(tmp_path_factory: pytest.TempPathFactory, demo_gpt2: lk.HookedTransformer) -> None:
    server = ServerProcess(tmp_path_factory.mktemp("server"), keys=False).start()
    try:
        ids: list[str] = []
        with httpx.Client(base_url=server.url, timeout=90) as http:
            for n in range(12):
                job = job_of(demo_gpt2, verb="generate", max_new_tokens=60 + n, eos_token_id=[])
                ids.append(send(http, job)["id"])
        server.kill()
        server.start()
        with httpx.Client(base_url=server.url, timeout=90) as http:
            for n, id in enumerate(ids):
                assert len(result(http, id, demo_gpt2).new_tokens[0]) == 60 + n
        assert not list((server.folder / "results").glob("*.partial"))
    finally:
        server.stop()


def test_a_client_that_hangs_while_it_sends_is_let_go(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = ServerProcess(tmp_path_factory.mktemp("hang"), keys=False, upload_seconds=0.5).start()

    async def hang() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        await writer.drain()
        try:
            return await asyncio.wait_for(reader.read(200), 10)
        finally:
            writer.close()
            await writer.wait_closed()

    try:
        assert b"408" in asyncio.run(hang()).splitlines()[0]
        assert httpx.get(f"{server.url}/v1/health").status_code == 200
    finally:
        server.stop()
