"""The client: models that run on a server do what they do here, whatever happens to the connection."""

import asyncio
import contextlib
import copy
import gc
import json
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import FakeServer, serving
from safetensors.torch import load_file
from test_docs import blocks, run
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MinLengthLogitsProcessor, TextStreamer
from typer.testing import CliRunner

import lenskit as lk
from lenskit import cli, errors
from lenskit.analysis.ablation import ablate_heads
from lenskit.analysis.lens import logit_lens
from lenskit.modules.kv_cache import KVCache
from lenskit.remote import asking, settings, structure, transport, watching
from lenskit.remote.asking import Answer, Asking, Pause, Send
from lenskit.remote.status import Status
from lenskit.remote.talk import Order, Talk

TEXT = "The Eiffel Tower is in the city of"
TEXTS = [TEXT, "Nyhavn lies in", "Madison Square Garden is located in the city of New"]
RESID = "blocks.1.hook_resid_post"
LAST = "blocks.-1.hook_resid_post"


@pytest.fixture(scope="module")
def server(demo_gpt2: lk.HookedTransformer, demo_llama: lk.HookedTransformer) -> Iterator[FakeServer]:
    with serving(demo_gpt2, demo_llama) as server:
        yield server


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def alone(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's takes part, and pauses are short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.delenv("LENSKIT_URL", raising=False)
    monkeypatch.delenv("LENSKIT_API_KEY", raising=False)
    monkeypatch.setattr(asking, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def connection(server: FakeServer) -> Iterator[lk.remote.connection.Connection]:
    server.requests.clear()
    with lk.connect(server.url) as connection:
        yield connection
    server.go.set()
    server.faults.clear()


@pytest.fixture(params=["demo-gpt2", "demo-llama"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def local(name: str, request: pytest.FixtureRequest) -> lk.HookedTransformer:
    return request.getfixturevalue(name.replace("-", "_"))


@pytest.fixture
def remote(name: str, connection: Any) -> lk.HookedTransformer:
    return connection.model(name)


@pytest.fixture
def gpt2(connection: Any) -> lk.HookedTransformer:
    return connection.model("demo-gpt2")


def same(one: Any, other: Any) -> bool:
    """Whether two results, or parts of them, hold the same, within 1e-5 of the largest number."""
    if isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point():
            return torch.equal(one, other)
        largest = other[other.isfinite()].abs().max() if other.isfinite().any() else 0
        return bool(((one == other) | ((one - other).abs() <= 1e-5 * largest)).all())  # masked scores are infinite
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, lk.interventions.saved.Saved):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, lk.Result):
        return all(map(same, (one.tokens, one.saved, one.output), (other.tokens, other.saved, other.output)))
    if isinstance(one, lk.Generation):
        names = ("tokens", "new_tokens", "logits", "logprobs", "saved", "steps_run", "finished", "texts", "new_texts")
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    return one == other


def test_the_comparison_sees_differences() -> None:
    x = torch.ones(2, 3)
    assert same(x, x.clone())
    assert not same(x, x + 1e-4)
    assert not same([x, x], [x])
    assert not same(x, x.double())


# -- the same verbs


def test_a_model_has_all_but_its_weights(remote: lk.HookedTransformer, local: lk.HookedTransformer) -> None:
    assert remote.hook_names() == local.hook_names()
    assert remote.shapes(TEXT) == local.shapes(TEXT)
    assert remote.to_str_tokens(TEXT) == local.to_str_tokens(TEXT)
    assert remote.cfg == local.cfg
    assert remote.device == torch.device("cpu"), "where inputs go"
    assert all(parameter.is_meta for parameter in remote.parameters())


def test_a_forward_pass(remote: lk.HookedTransformer, local: lk.HookedTransformer) -> None:
    assert same(remote(TEXT), local(TEXT).detach())
    ids, mask, _ = local.to_tokens(TEXTS)
    assert same(remote(ids, mask)[mask], local(ids, mask)[mask].detach())


def ops(model: lk.HookedTransformer) -> list[Any]:
    """Of every kind, with tensors, expressions, modules, and other prompts' activations."""
    generator = torch.Generator().manual_seed(0)
    return [
        lk.Save("hook_embed", prompts=1, name="before"),
        lk.Read(lk.Act(RESID, prompts=0, tokens=-1), name="x"),
        lk.Set("blocks.0.hook_resid_post", torch.randn(model.cfg.d_model, generator=generator), tokens=0),
        lk.Scale("blocks.0.attn.hook_v", 0.5, heads=1),
        lk.Add(RESID, lk.Act("blocks.2.hook_resid_post", prompts=0, tokens=-1) * 0.1, prompts=[1, 2], tokens=-1),
        lk.Save(model.unembed(model.ln_final(lk.Act(RESID, tokens=-1))).softmax(-1), name="lens"),
        lk.Save(["blocks.*.attn.hook_pattern", "hook_logits"], tokens=-1, name="several"),
        lk.Save(lk.Ref("x") - lk.Act(RESID, prompts=0, tokens=-1), name="difference"),
    ]


def test_a_run_with_hooks(remote: lk.HookedTransformer, local: lk.HookedTransformer) -> None:
    found, expected = remote.run_with_hooks(TEXTS, ops(remote)), local.run_with_hooks(TEXTS, ops(local))
    assert same(found.saved, expected.saved)
    assert same(found.tokens, expected.tokens)
    assert torch.equal(found.mask, expected.mask)
    assert same(found.logits[found.mask], expected.logits[found.mask].detach())


def test_gradients_and_a_stop(remote: lk.HookedTransformer, local: lk.HookedTransformer) -> None:
    loss = lk.Act("hook_logits", tokens=-1).sum()
    hooks = [lk.Read(lk.Act(RESID), name="x"), lk.Backward(loss, name="loss"), lk.Save(lk.Grad("x"), name="gradient")]
    assert same(remote.run_with_hooks(TEXT, hooks).saved, local.run_with_hooks(TEXT, hooks).saved)
    stopped = remote.run_with_hooks(TEXT, [lk.Save(RESID), lk.Stop(RESID)])
    assert same(stopped.saved[RESID], local.run_with_cache(TEXT, RESID)[1][RESID])
    with pytest.raises(errors.NotSavedError, match="there are no logits"):
        _ = stopped.logits


@pytest.mark.parametrize("names", [None, "blocks.*.attn.hook_pattern", lambda name: name.endswith("hook_resid_mid")])
def test_a_cache(remote: lk.HookedTransformer, local: lk.HookedTransformer, names: Any) -> None:
    hooks = [lk.Scale("blocks.0.hook_mlp_out", 0.0)]
    logits, cache = remote.run_with_cache(TEXT, names, hooks=hooks)
    expected_logits, expected = local.run_with_cache(TEXT, names, hooks=hooks)
    assert same(logits, expected_logits)
    assert list(cache) == list(expected)
    assert all(same(cache[name], expected[name]) for name in expected)
    assert same(cache.stack("resid_mid" if callable(names) else "pattern"), expected.stack(
        "resid_mid" if callable(names) else "pattern"
    ))  # fmt: skip


def test_a_cache_of_prompts_of_unequal_lengths(remote: lk.HookedTransformer, local: lk.HookedTransformer) -> None:
    (_, cache), (_, expected) = (model.run_with_cache(TEXTS, RESID) for model in (remote, local))
    assert torch.equal(cache.mask, expected.mask)
    assert same(cache[RESID][cache.mask], expected[RESID][cache.mask])
    assert not cache[RESID][~cache.mask].any(), "padding reads as zeros"


def test_a_generation(remote: lk.HookedTransformer, local: lk.HookedTransformer) -> None:
    hooks = [
        lk.Set("hook_embed", lk.Act("hook_embed", prompts=0, tokens=0), prompts=1, tokens=0, steps=0),
        lk.Scale("blocks.1.hook_mlp_out", 0.5, steps=slice(1, None)),
        lk.Save(LAST, tokens=-1),
        lk.Save("hook_logits", tokens=-1, steps=9, name="late"),
        lk.Save("blocks.0.attn.hook_z", tokens=-1, steps=1, name="one"),
    ]
    found, expected = (
        model.generate(TEXTS, max_new_tokens=10, hooks=hooks, return_logits=True) for model in (remote, local)
    )
    assert found.saved.entry("late").step == expected.saved.entry("late").step == 9
    with pytest.raises(errors.NotSavedError, match="never ran"):
        found.saved["late"]
    assert same(found.saved[LAST], expected.saved[LAST])
    assert same(found.saved["one"], expected.saved["one"])
    for part in ("tokens", "new_tokens", "logits", "logprobs", "steps_run", "finished", "texts"):
        assert same(getattr(found, part), getattr(expected, part)), part


OPTIONS: list[dict[str, Any]] = [
    {"do_sample": True, "seed": 3, "temperature": 2.0, "top_k": 20, "top_p": 0.9, "num_return_sequences": 3},
    {"do_sample": True, "seed": torch.tensor(3).numpy()[()], "min_p": 0.01, "temperature": 5},
    {"repetition_penalty": 1.5, "eos_token_id": []},
    {"stop_strings": [" Cop", "Par"], "eos_token_id": [3, 5]},
    {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=True, top_k=7), "seed": 0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_mean_the_same(demo_gpt2: lk.HookedTransformer, gpt2: Any, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 6, **options}
    assert same(gpt2.generate(TEXTS, **options), demo_gpt2.generate(TEXTS, **options))


def test_without_a_seed_torchs_own_generator_decides(gpt2: lk.HookedTransformer) -> None:
    def drawn() -> list[str]:
        return gpt2.generate(TEXT, max_new_tokens=6, do_sample=True, temperature=9.0, eos_token_id=[]).texts

    torch.manual_seed(0)
    first, second = drawn(), drawn()
    torch.manual_seed(0)
    assert first == drawn() != second


def test_a_trace(remote: lk.HookedTransformer, local: lk.HookedTransformer) -> None:
    def traced(model: lk.HookedTransformer) -> list[Any]:
        with model.trace(TEXT) as run:
            stream = model.blocks[1].output
            before = stream.save()
            model.blocks[0].attn.hook_v.output[:, :, 1] = 0.0
            stream[:, 0] = stream[:, 1]
            lens = model.unembed(model.ln_final(stream)).t[-1].argmax(-1).save()
            with run.backward(model.output.t[-1].max()):
                gradient = stream.grad.save()
        return [before.value, lens.value, gradient.value, run.tokens, run.texts]

    assert same(traced(remote), traced(local))


def test_a_trace_of_a_generation(remote: lk.HookedTransformer, local: lk.HookedTransformer) -> None:
    def traced(model: lk.HookedTransformer) -> list[Any]:
        with model.trace(max_new_tokens=3, eos_token_id=[]) as run:
            with run.invoke(TEXTS[2]):
                embeddings = model.hook_embed.output
            with run.invoke("_ _ _ _ _ _ _ _ _ _"):
                model.hook_embed.output[:, :3] = embeddings[:, :3]
                with run.all():
                    best = model.output.t[-1].argmax(-1).save()
        return [best.value, run.texts]

    assert same(traced(remote), traced(local))


def test_a_plan_of_a_file(gpt2: lk.HookedTransformer, demo_gpt2: lk.HookedTransformer, tmp_path: Path) -> None:
    lk.Plan(ops(demo_gpt2)).save(tmp_path / "plan.json", demo_gpt2)
    plan = lk.Plan.load(tmp_path / "plan.json")
    assert same(gpt2.run_with_hooks(TEXTS, plan).saved, demo_gpt2.run_with_hooks(TEXTS, plan).saved)


def test_large_tensors_go_both_ways(gpt2: lk.HookedTransformer, demo_gpt2: lk.HookedTransformer) -> None:
    rows, width = 64, 256
    ids = torch.randint(5, 1000, (rows, width), generator=torch.Generator().manual_seed(0))
    value = torch.randn(rows, width, 128, generator=torch.Generator().manual_seed(1))  # 8 MiB
    hooks = [lk.Set(RESID, value), lk.Save("blocks.3.mlp.hook_post")]  # 32 MiB
    with torch.no_grad():
        found, expected = gpt2.run_with_hooks(ids, hooks), demo_gpt2.run_with_hooks(ids, hooks)
    assert found.saved["blocks.3.mlp.hook_post"].nbytes == 2**25
    assert same(found, expected)


def test_logits_may_stay_there(connection: Any, server: FakeServer, demo_gpt2: lk.HookedTransformer) -> None:
    model = connection.model("demo-gpt2", logits=False)
    found = model.run_with_hooks(TEXT, [lk.Save(RESID)])
    assert list(found.saved) == [RESID]
    with pytest.raises(errors.NotSavedError, match="logits=False"):
        _ = found.logits
    logits, cache = model.run_with_cache(TEXT, RESID)
    assert logits is None
    assert RESID in cache
    assert same(model(TEXT), demo_gpt2(TEXT).detach()), "who asks for nothing else gets them"


def test_from_pretrained_can_be_told_of_a_server(connection: Any, demo_gpt2: lk.HookedTransformer) -> None:
    model = lk.HookedTransformer.from_pretrained("demo-gpt2", device="meta", remote=connection)
    assert same(model(TEXT), demo_gpt2(TEXT).detach())
    assert "demo-gpt2" in model.source


def test_the_dtype_is_the_servers(tmp_path: Path) -> None:
    half = lk.HookedTransformer.from_pretrained("demo-gpt2", dtype=torch.bfloat16)
    with serving(half) as server, lk.connect(server.url) as connection:
        model = connection.model("demo-gpt2")
        value = torch.zeros(128, dtype=torch.bfloat16)
        assert same(model.run_with_hooks(TEXT, [lk.Add(RESID, value)]).logits, half(TEXT).detach())
        with pytest.raises(errors.ValueFitError, match="bfloat16"):
            model.run_with_hooks(TEXT, [lk.Set(RESID, torch.zeros(128, dtype=torch.float64))])


# -- what is checked here, and what cannot go


@pytest.mark.parametrize(
    ("hooks", "error"),
    [
        ([lk.Save("blocks.9.hook_resid_post")], errors.UnknownHookPointError),
        ([lk.Set(RESID, torch.zeros(7))], errors.ValueFitError),
        ([lk.Set(RESID, 0.0, tokens=99)], errors.SelectorError),
        ([lk.Set(RESID, 0.0, steps=4)], errors.StepError),
        ([lk.Save(RESID, heads=0)], errors.AxisError),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_sent(
    gpt2: Any, server: FakeServer, hooks: list[Any], error: type[Exception]
) -> None:
    sent = len(server.requests)
    with pytest.raises(error):
        gpt2.run_with_hooks(TEXT, hooks)
    with pytest.raises(errors.InputError):
        gpt2.run_with_hooks([[99999]], [lk.Save(RESID)])
    with pytest.raises(errors.GenerationError):
        gpt2.generate(TEXT, max_new_tokens=2, temperature=-1.0)
    assert len(server.requests) == sent


def function(activation: Tensor, hook: lk.HookPoint) -> Tensor:
    return activation * 0


def test_a_function_is_refused_and_the_op_named(gpt2: lk.HookedTransformer) -> None:
    hooks = [lk.Save(RESID), ("blocks.0.hook_mlp_out", function)]
    for call in (gpt2.run_with_hooks, partial(gpt2.generate, max_new_tokens=2)):
        with pytest.raises(errors.PlanFormatError) as caught:
            call(TEXT, hooks=hooks)
        assert caught.value.what.startswith("hooks[1] ('blocks.0.hook_mlp_out', function)")
        assert "lk.Act" in caught.value.fix
    with pytest.raises(errors.PlanFormatError, match=r"(?s)hooks\[0\] Save\(predicate .*a predicate on names"):
        gpt2.run_with_hooks(TEXT, [lk.Save(lambda name: "mlp_out" in name)])


def test_a_function_of_a_trace_is_refused_at_its_line(gpt2: lk.HookedTransformer) -> None:
    with (
        pytest.raises(errors.PlanFormatError, match=r"(?s)hooks\[0\].*a Python function") as caught,
        gpt2.trace(TEXT) as run,
    ):
        run.apply(len, gpt2.blocks[0].output)
    assert any("run.apply(len, gpt2.blocks[0].output)" in note for note in caught.value.__notes__)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "bwd_hooks": lambda model: model.run_with_hooks(TEXT, bwd_hooks=[(RESID, function)]),
    "grad": lambda model: model.run_with_cache(TEXT, grad=True),
    "start_at_layer": lambda model: model(torch.zeros(1, 2, 128), start_at_layer=1),
    "stop_at_layer": lambda model: model.run_with_hooks(TEXT, stop_at_layer=1),
    "past": lambda model: model.generate(
        TEXT, max_new_tokens=2, past=lk.Past(torch.ones(1, 2).long(), None, KVCache(2))
    ),
    "prefill": lambda model: model.prefill(TEXT),
    "generate_steps": lambda model: model.generate_steps(TEXT, max_new_tokens=2),
    "streamer": lambda model: model.generate(TEXT, max_new_tokens=2, streamer=TextStreamer(model.tokenizer)),
    "logits_processor": lambda model: model.generate(TEXT, max_new_tokens=2, logits_processor=[lambda ids, x: x]),
    "stopping_criteria": lambda model: model.trace(TEXT, max_new_tokens=2, stopping_criteria=[lambda ids, x: True]),
    "hooks": lambda model: model.hooks([(RESID, function)]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_go_is_refused_with_what_to_do(gpt2: Any, server: FakeServer, what: str) -> None:
    sent = len(server.requests)
    with pytest.raises(errors.RemoteError, match=f"^{what} cannot go to a server") as caught:
        REFUSED[what](gpt2)
    assert "or load the weights, and run it here" in caught.value.fix
    assert len(server.requests) == sent


def test_objects_in_a_generation_config_are_refused_too(gpt2: Any) -> None:
    config = {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 0, "cpu")])}
    with pytest.raises(errors.RemoteError, match=r"^logits_processor cannot go"):
        gpt2.generate(TEXT, max_new_tokens=2, generation_config=config)


WEIGHTS: list[Callable[[Any], Any]] = [
    lambda model: model.W_Q.tolist(),
    lambda model: model.blocks[0].attn.W_Q.numpy(),
    lambda model: model.blocks[0].attn.W_Q @ torch.zeros(16),
    lambda model: bool(model.W_O.any()),
    lambda model: float(model.W_in.sum()),
    lambda model: model.W_in.cpu(),
    lambda model: model.unembed(torch.zeros(1, 2, 128)),
    lambda model: model.embed(torch.tensor([[1, 2]])),
    lambda model: model.blocks[0].mlp(torch.zeros(1, 2, 128)),
    lambda model: model.state_dict()["embed.weight"].to("cpu"),
    lambda model: logit_lens(model, model.run_with_cache(TEXT, "blocks.*.hook_resid_post")[1]),
]


@pytest.mark.parametrize("look", WEIGHTS)
def test_weights_are_not_here_to_be_looked_at(gpt2: Any, look: Callable[[Any], Any]) -> None:
    with pytest.raises(errors.RemoteError, match="weights are on a server") as caught:
        look(gpt2)
    assert "model.trace" in caught.value.fix


def test_weights_have_shapes(remote: lk.HookedTransformer, local: lk.HookedTransformer) -> None:
    for name in ("W_Q", "W_K", "W_O", "W_in", "W_out"):
        assert getattr(remote, name).shape == getattr(local, name).shape
    assert (remote.embed.W_E @ remote.unembed.W_U).shape == (1280, 1280)
    assert "meta" in str(remote.W_Q)


def test_weights_are_not_saved(gpt2: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="weights are not here to be saved"):
        gpt2.save_pretrained(tmp_path / "checkpoint")
    assert not list(tmp_path.glob("checkpoint*"))


def test_an_analysis_that_needs_layers_alone_says_so(gpt2: Any) -> None:
    with pytest.raises(errors.RemoteError, match="start_at_layer cannot go"):
        ablate_heads(gpt2, TEXT)


def test_a_copy_is_at_the_same_server(gpt2: Any) -> None:
    copied = copy.deepcopy(gpt2)
    assert same(copied(TEXT), gpt2(TEXT))
    with pytest.raises(errors.RemoteError, match="weights are on a server"):
        copied.W_Q.tolist()


@pytest.mark.parametrize("how", [{}, {"device": "cpu"}, {"device": "meta", "dtype": torch.float16}])
def test_a_model_that_runs_there_has_no_weights_here(connection: Any, how: dict[str, Any]) -> None:
    with pytest.raises(errors.InputError, match="no weights here"):
        lk.HookedTransformer.from_pretrained("demo-gpt2", remote=connection, **how)


def test_another_model_of_that_name_is_noticed(demo_llama: lk.HookedTransformer, connection: Any) -> None:
    mine = lk.HookedTransformer.from_pretrained("demo-gpt2", device="meta")
    with pytest.raises(errors.RemoteError, match="is another model") as caught:
        connection.attach(mine, "demo-llama")
    assert "family 'llama' there" in caught.value.got
    with pytest.raises(errors.CheckpointNotFoundError, match="no such model"):
        connection.model("demo-gpt3")
    with pytest.raises(errors.CheckpointNotFoundError, match="no such model"):
        connection.model("owner/name")


def test_a_model_without_weights_says_where_it_could_run() -> None:
    model = lk.HookedTransformer.from_pretrained("demo-gpt2", device="meta")
    with pytest.raises(errors.TraceError, match=r"lk\.connect"), model.trace(TEXT):
        pass


def test_hugging_faces_and_others_words_lead_here(demo_gpt2: lk.HookedTransformer) -> None:
    with pytest.raises(errors.GenerationError, match=r"remote=lk\.connect\(url\)"):
        demo_gpt2.generate(TEXT, max_new_tokens=1, remote=True)


# -- jobs


@pytest.fixture
def held(server: FakeServer) -> Iterator[FakeServer]:
    """The server takes jobs, and runs none before `go` is set."""
    server.go.clear()
    yield server
    server.go.set()


def test_a_job_is_a_handle(connection: Any, held: FakeServer, demo_gpt2: lk.HookedTransformer) -> None:
    model = connection.model("demo-gpt2", blocking=False)
    job = model.generate(TEXTS, max_new_tokens=3, hooks=[lk.Save(LAST)])
    status = job.status()
    assert (status.state, status.place, status.steps, status.rows, status.over) == ("queued", 0, 3, 3, False)
    assert str(status) == "queued, 0 before it"
    assert job.wait(0.05).state == "queued"
    with pytest.raises(errors.JobUnfinishedError, match=r"queued, 0 before it, after 0\.05 seconds"):
        job.result(0.05)
    with pytest.raises(TimeoutError):
        job.result(timeout=0)
    held.go.set()
    status = job.wait()
    assert (status.state, status.over, status.place) == ("done", True, None)
    assert status.result_bytes == len(held.jobs[job.id].result or b"")
    fetched = held.count("GET", f"{job.id}/result")
    expected = demo_gpt2.generate(TEXTS, max_new_tokens=3, hooks=[lk.Save(LAST)])
    assert same(job.result(), expected)
    assert job.result() is job.result(), "it is fetched once"
    assert held.count("GET", f"{job.id}/result") == fetched + 1


def test_jobs_of_every_verb(connection: Any, demo_gpt2: lk.HookedTransformer) -> None:
    model = connection.model("demo-gpt2", blocking=False)
    logits, cached, result = (
        model(TEXT),
        model.run_with_cache(TEXT, RESID),
        model.run_with_hooks(TEXT, [lk.Save(RESID)]),
    )
    expected = demo_gpt2.run_with_cache(TEXT, RESID)
    assert same(logits.result(), expected[0])
    assert same(cached.result()[0], expected[0])
    assert same(cached.result()[1][RESID], expected[1][RESID])
    assert same(result.result().saved[RESID], expected[1][RESID])


def test_a_job_is_known_by_its_id_elsewhere(connection: Any, server: FakeServer, demo_gpt2: Any, cache: Path) -> None:
    job = connection.model("demo-gpt2", blocking=False).generate(TEXT, max_new_tokens=3)
    expected = demo_gpt2.generate(TEXT, max_new_tokens=3)
    with lk.connect(server.url) as another:
        assert same(another.job(job.id).result(), expected)
        assert (another.jobs()[0].id, another.jobs()[0].last.state) == (job.id, "done")
        assert isinstance(another.job(connection.model("demo-gpt2", blocking=False)(TEXT).id).result(), lk.Result)
    code = f"import lenskit as lk\nprint(lk.connect({server.url!r}).job({job.id!r}).result().texts[0])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(lk.__file__).parent.parent)
    assert done.stdout == expected.texts[0] + "\n"


def test_a_cancelled_job(connection: Any, held: FakeServer) -> None:
    job = connection.model("demo-gpt2", blocking=False).generate(TEXT, max_new_tokens=3)
    assert job.cancel().state == "cancelled"
    held.go.set()
    with pytest.raises(errors.JobCancelledError) as caught:
        job.result()
    assert job.id in caught.value.__notes__[0]
    assert job.wait().state == "cancelled"
    assert str(job.status().error).startswith("it was cancelled")


def test_cancelling_a_job_that_is_done_changes_nothing(connection: Any, server: FakeServer) -> None:
    job = connection.model("demo-gpt2", blocking=False).generate(TEXT, max_new_tokens=3)
    assert job.wait().state == "done"
    assert job.cancel().state == "done"
    assert server.count("DELETE", job.id) == 0
    job.delete()
    with pytest.raises(errors.ResultGoneError):
        job.result()


def test_a_job_nobody_knows(connection: Any) -> None:
    for ask in (connection.job("job_x").status, connection.job("../models").result, connection.job("job_x").cancel):
        with pytest.raises(errors.NoSuchJobError):
            ask()


def test_a_jobs_own_error(connection: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> bytes:
        raise errors.OutOfRoomError("no memory", got="much", expected="little", fix="less")

    monkeypatch.setattr(server, "_run", fails)
    blocking, job = connection.model("demo-gpt2"), connection.model("demo-gpt2", blocking=False)(TEXT)
    with pytest.raises(errors.OutOfRoomError, match="no memory") as caught:
        blocking(TEXT)
    assert caught.value.__notes__[0].startswith("job_")
    assert job.wait().state == "failed", "waiting raises nothing"
    with pytest.raises(errors.OutOfRoomError):
        job.result()


def test_a_trace_waits_when_a_value_is_read(connection: Any, held: FakeServer, demo_gpt2: lk.HookedTransformer) -> None:
    model = connection.model("demo-gpt2", blocking=False)
    with model.trace(TEXT) as run:
        value = model.blocks[1].output.save()
    assert run.job.status().state == "queued"
    assert value.shape == (1, 11, 128), "that is known"
    assert "hook_resid_post" in repr(value)
    held.go.set()
    assert same(value.value, demo_gpt2.run_with_cache(TEXT, RESID)[1][RESID])
    assert same(run.output, run.job.result())


def test_an_error_of_a_traces_job_names_the_line(
    connection: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> bytes:
        raise errors.PlanError("hooks[0] Save(...) cannot be", got="a", expected="b", fix="c")

    monkeypatch.setattr(server, "_run", fails)
    model = connection.model("demo-gpt2", blocking=False)
    with model.trace(TEXT) as run:
        model.blocks[1].output.save()
    with pytest.raises(errors.PlanError) as caught:
        _ = run.texts
    assert any("model.blocks[1].output.save()" in note for note in caught.value.__notes__)


def test_a_job_can_be_awaited(connection: Any, demo_gpt2: lk.HookedTransformer) -> None:
    model = connection.model("demo-gpt2", blocking=False)

    async def both() -> Sequence[Any]:
        async def result(job: Any) -> Any:
            return await job

        return await asyncio.gather(result(model(TEXT)), result(model.generate(TEXT, max_new_tokens=2)))

    logits, generation = asyncio.run(both())
    assert same(logits, demo_gpt2(TEXT).detach())
    assert same(generation, demo_gpt2.generate(TEXT, max_new_tokens=2))


def test_many_threads_share_a_connection(gpt2: lk.HookedTransformer, demo_gpt2: lk.HookedTransformer) -> None:
    with ThreadPoolExecutor(8) as pool, torch.no_grad():
        found = list(pool.map(gpt2.run_with_hooks, TEXTS * 8))
    with torch.no_grad():
        expected = [demo_gpt2.run_with_hooks(text) for text in TEXTS]
    assert all(same(one.output, expected[i % 3].output) for i, one in enumerate(found))


def test_what_the_server_has_and_what_the_key_may(connection: Any) -> None:
    assert [model["name"] for model in connection.models()] == ["demo-gpt2", "demo-llama"]
    assert "hook_embed" in [point["name"] for point in connection.describe("demo-gpt2")["hook_points"]]
    assert connection.limits() == {"jobs": 10}
    assert str(connection) == f"Connection({connection.url!r})"


def test_a_connection_that_nobody_closes_is_closed_with_its_models(server: FakeServer) -> None:
    model = lk.connect(server.url).model("demo-gpt2")
    gc.collect()
    assert model(TEXT).shape == (1, 11, 1280)
    client = model.remote._start.__self__._transport._client
    assert not client.is_closed
    del model
    gc.collect()
    assert client.is_closed


def test_a_closed_connection_says_so(server: FakeServer) -> None:
    with lk.connect(server.url) as connection:
        model = connection.model("demo-gpt2")
    with pytest.raises(errors.RemoteError, match="the connection is closed"):
        model(TEXT)


# -- asyncio


def test_the_async_client_runs_many_jobs_at_a_time(held: FakeServer, demo_gpt2: lk.HookedTransformer) -> None:
    async def main() -> list[Any]:
        async with lk.connect_async(held.url) as connection:
            assert "demo-gpt2" in [model["name"] for model in await connection.models()]
            model = await connection.model("demo-gpt2")
            before = len(held.jobs)
            jobs = asyncio.gather(*[model.generate(text, max_new_tokens=3) for text in TEXTS * 5], model(TEXT))
            while len(held.jobs) < before + 16:  # all are there before the first one runs
                await asyncio.sleep(0.01)
            held.go.set()
            return await jobs

    *generations, logits = asyncio.run(main())
    expected = [demo_gpt2.generate(text, max_new_tokens=3) for text in TEXTS]
    assert all(same(one, expected[i % 3]) for i, one in enumerate(generations))
    assert same(logits, demo_gpt2(TEXT).detach())


def test_an_async_job_is_a_handle_too(held: FakeServer, demo_gpt2: lk.HookedTransformer) -> None:
    async def main() -> None:
        async with lk.connect_async(held.url) as connection:
            model = await connection.model("demo-gpt2", logits=False)
            job = model.run_with_hooks(TEXT, [lk.Save(RESID)])
            with pytest.raises(errors.RemoteError, match="no id yet"):
                _ = job.id
            await job.submit()
            assert (await job.status()).state == "queued"
            assert (await job.wait(0.01)).state == "queued"
            with pytest.raises(errors.JobUnfinishedError):
                await job.result(0.01)
            held.go.set()
            assert (await job.wait()).state == "done"
            assert same((await job).saved[RESID], demo_gpt2.run_with_cache(TEXT, RESID)[1][RESID])
            assert await job is await job
            assert same((await connection.job(job.id)).saved, (await job).saved)
            [newest, *_] = await connection.jobs()
            assert (newest.id, newest.last.state) == (job.id, "done")
            held.go.clear()
            cancelled = await model(TEXT).submit()
            assert (await cancelled.cancel()).state == "cancelled"
            with pytest.raises(errors.JobCancelledError):
                await cancelled
            assert await connection.limits() == {"jobs": 10}

    asyncio.run(main())


def test_an_async_trace_has_its_values_once_its_job_was_awaited(
    server: FakeServer, demo_gpt2: lk.HookedTransformer
) -> None:
    async def main() -> Tensor:
        async with lk.connect_async(server.url) as connection:
            model = await connection.model("demo-gpt2")
            with model.trace(TEXT) as run:
                value = model.blocks[1].output.save()
            with pytest.raises(errors.TraceError, match=r"await run\.job"):
                _ = value.value
            await run.job
            return value.value

    assert same(asyncio.run(main()), demo_gpt2.run_with_cache(TEXT, RESID)[1][RESID])


def test_a_cancelled_task_cancels_its_job(held: FakeServer) -> None:
    async def main() -> str:
        async with lk.connect_async(held.url) as connection:
            model = await connection.model("demo-gpt2")
            before = len(held.jobs)
            task = asyncio.create_task(model.generate(TEXT, max_new_tokens=3).result())
            while len(held.jobs) == before or held.count("GET", list(held.jobs)[-1]) == 0:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            mine = await model.generate(TEXT, max_new_tokens=3).submit()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(mine.result(), 0.1)
            return mine.id

    kept = asyncio.run(main())
    *_, awaited, mine = held.jobs.values()
    assert awaited.told["status"] == "cancelled"
    assert (mine.told["id"], mine.told["status"]) == (kept, "queued"), "it was handed in on its own"


def test_loading_cannot_await() -> None:
    connection = lk.connect_async("http://localhost:1")
    with pytest.raises(errors.RemoteError, match=r"await connection\.model"):
        lk.HookedTransformer.from_pretrained("demo-gpt2", device="meta", remote=connection)
    asyncio.run(connection.close())


# -- when the connection fails


@pytest.mark.parametrize("kind", ["deaf", "lost", "half", 502, 503, 504])
def test_a_job_is_handed_in_once_whatever_happens(
    gpt2: lk.HookedTransformer, server: FakeServer, demo_gpt2: lk.HookedTransformer, kind: str | int
) -> None:
    before, asked = len(server.jobs), server.count("POST", "/v1/jobs")
    server.fail("POST", "/v1/jobs", kind, times=3)
    assert same(gpt2(TEXT), demo_gpt2(TEXT).detach())
    assert server.count("POST", "/v1/jobs") == asked + 4
    assert len(server.jobs) == before + 1
    keys = {headers["idempotency-key"] for method, _, headers in server.requests[-8:] if method == "POST"}
    assert len(keys) == 1
    gpt2(TEXT)
    assert len(server.jobs) == before + 2, "another call is another job"


@pytest.mark.parametrize("kind", ["deaf", "lost", 503])
def test_looking_is_repeated(connection: Any, server: FakeServer, kind: str | int) -> None:
    job = connection.model("demo-gpt2", blocking=False)(TEXT)
    for method, path in (("GET", f"{job.id}$"), ("GET", f"{job.id}/result"), ("GET", "/v1/models")):
        server.fail(method, path, kind)
    assert job.status().id == job.id
    assert job.wait().state == "done"
    assert connection.models()


def test_a_download_goes_on_where_it_broke_off(
    gpt2: lk.HookedTransformer, server: FakeServer, demo_gpt2: lk.HookedTransformer
) -> None:
    server.fail("GET", "/result", "half", times=3)
    assert same(gpt2(TEXT), demo_gpt2(TEXT).detach())
    asked = [headers.get("range") for _, path, headers in server.requests if "/result" in path]
    total = len(list(server.jobs.values())[-1].result or b"")
    starts = [0, *(int(range_.removeprefix("bytes=").removesuffix("-")) for range_ in asked[1:])]
    assert len(starts) == 4
    assert starts == sorted(set(starts)), "each time a part more"
    assert starts[-1] >= total * 0.85


def test_a_server_without_ranges_is_asked_for_all(
    gpt2: lk.HookedTransformer, server: FakeServer, demo_gpt2: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ranges", False)
    server.fail("GET", "/result", "half")
    assert same(gpt2(TEXT), demo_gpt2(TEXT).detach())


@pytest.mark.parametrize("kind", ["deaf", "half", 503])
def test_files_come_whole(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server.fail("GET", "/files/", kind, times=2)
    with lk.connect(server.url) as connection:
        assert connection.model("demo-gpt2")(TEXT).shape == (1, 11, 1280)


def test_too_much_is_said_at_once(gpt2: lk.HookedTransformer, server: FakeServer) -> None:
    asked = server.count("POST", "/v1/jobs")
    server.fail("POST", "/v1/jobs", 429, headers={"Retry-After": "7"})
    with pytest.raises(errors.RemoteError, match="come back in 7 seconds"):
        gpt2(TEXT)
    assert server.count("POST", "/v1/jobs") == asked + 1


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with lk.connect("http://127.0.0.1:9", patience=0.2) as connection:
        began = time.monotonic()
        with pytest.raises(errors.UnreachableError, match="no answer from") as caught:
            connection.models()
    assert 0.1 < time.monotonic() - began < 5
    assert "attempts" in caught.value.got
    assert isinstance(caught.value, ConnectionError)


def answers(flow: Any, *given: Answer | BaseException) -> list[Any]:
    """What a flow wants, one after another, given these answers; at last what it returned, or raised."""
    wishes: list[Any] = []
    left = iter(given)
    step: Callable[[], Any] = lambda: next(flow)  # noqa: E731
    while True:
        try:
            wishes.append(step())
        except StopIteration as end:
            return [*wishes, end.value]
        except BaseException as error:
            return [*wishes, error]
        answer = Answer() if isinstance(wishes[-1], Pause) else next(left)
        step = (lambda e: lambda: flow.throw(e))(answer) if isinstance(answer, BaseException) else (
            lambda a: lambda: flow.send(a)
        )(answer)  # fmt: skip


OK = Answer(200, {}, b"{}")
BUSY = Answer(503, {"retry-after": "4"}, b"{}")
DROPPED = Answer(broken=ConnectionError("gone"))
DEAD = Answer(500, {"content-type": "text/plain"}, b"Internal Server Error")


def test_what_stands_before_a_server_that_died_is_asked_again() -> None:
    send = Send("GET", "/")
    *_, found = answers(Asking("http://x").json(send), DEAD, DEAD, OK)
    assert found == {}
    *_, found = answers(Asking("http://x").download(send), DEAD, OK)
    assert found == OK
    told = {"type": "RemoteError", "what": "a defect", "got": "a", "expected": "b", "fix": "c"}
    own = Answer(500, {"content-type": "application/json"}, json.dumps({"error": told}).encode())
    *_, error = answers(Asking("http://x").json(send), own, OK)
    assert error.what == "a defect"


def test_a_server_that_says_when_is_taken_at_its_word() -> None:
    _, pause, _, found = answers(Asking("http://x").json(Send("GET", "/")), BUSY, OK)
    assert 4 <= pause.seconds <= 5
    assert found == {}
    _, error = answers(Asking("http://x", patience=3).json(Send("GET", "/")), BUSY)
    assert isinstance(error, errors.UnreachableError)
    assert "come back in 4 seconds" in error.got


def test_pauses_grow_and_are_no_ones_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "LONGEST_PAUSE", 15.0)
    runs = [
        [wish.seconds for wish in answers(Asking("http://x").json(Send("GET", "/")), *[DROPPED] * 5, OK)[1:-1:2]]
        for _ in range(2)
    ]
    assert runs[0] != runs[1]
    for pauses in runs:
        assert all(0.5 * 0.25 * 2**n <= pause <= 0.25 * 2**n for n, pause in enumerate(pauses))


def test_a_server_that_never_answered_is_given_up_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.time, "monotonic", iter(range(0, 10_000, 4)).__next__)
    asked = Asking("http://x")
    first = answers(asked.json(Send("GET", "/")), *[DROPPED] * 99)
    assert answers(asked.json(Send("GET", "/")), OK)[-1] == {}
    later = answers(asked.json(Send("GET", "/")), *[DROPPED] * 99)
    assert isinstance(first[-1], errors.UnreachableError)
    assert isinstance(later[-1], errors.UnreachableError)
    assert len(first) < len(later)


def part(start: int, body: bytes, tag: str, *, whole: bool) -> Answer:
    headers = {"content-range": f"bytes {start}-{start + 9}/10", "etag": tag}
    return Answer(206, headers, body, None if whole else ConnectionError("gone"))


def test_parts_of_different_results_are_never_joined() -> None:
    begun = Answer(200, {"etag": '"a"'}, b"0123", ConnectionError("gone"))
    whole = Answer(200, {"etag": '"b"'}, b"abcdefgh")
    flow = Asking("http://x").download(Send("GET", "/"))
    asked = answers(flow, begun, part(4, b"efgh", '"b"', whole=True), whole)
    assert asked[-1].body == b"abcdefgh"
    assert asked[2].headers == {"Range": "bytes=4-", "If-Range": '"a"'}
    assert asked[4].headers == {}, "from the start"


def test_parts_of_one_result_are_joined() -> None:
    begun = Answer(200, {"etag": '"a"'}, b"0123", ConnectionError("gone"))
    flow = Asking("http://x").download(Send("GET", "/"))
    asked = answers(
        flow, begun, DROPPED, part(4, b"45", '"a"', whole=False), BUSY, part(6, b"67", '"a"', whole=True)
    )  # fmt: skip
    assert (asked[-1].status, asked[-1].body) == (200, b"01234567")
    assert [wish.headers.get("Range") for wish in asked[:-1] if isinstance(wish, Send)] == [
        None, "bytes=4-", "bytes=4-", "bytes=6-", "bytes=6-",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(301, {"location": "https://y"}, b""), "status 301 to https://y"),
        (Answer(200, {}, b"<html>hello</html>"), "<html>hello</html>"),
        (Answer(404, {}, b"not here"), "not here"),
        (Answer(200, {}, b"[" * 100_000), r"\[\["),
    ],
)
def test_who_is_no_lenskit_server_is_told_so(answer: Answer, said: str) -> None:
    *_, error = answers(Talk("http://x").model("m"), answer)
    assert isinstance(error, errors.RemoteError)
    with pytest.raises(errors.RemoteError, match=said):
        raise error


@pytest.mark.parametrize("said", ["[]", '{"id": "job_1"}', '{"error": 3}', "null", '"text"'])
def test_an_answer_that_is_no_job_is_an_error(said: str) -> None:
    for flow in (Talk("http://x").look("job_1"), Talk("http://x").jobs(3)):
        assert isinstance(answers(flow, Answer(200, {}, said.encode()))[-1], errors.RemoteError)


def test_a_status_that_is_not_known_is_an_error(connection: Any, server: FakeServer) -> None:
    job = connection.model("demo-gpt2", blocking=False)(TEXT)
    told = server.jobs[job.id].told
    with pytest.raises(errors.RemoteError, match="status 'asleep'"):
        Status.of({**told, "status": "asleep"})


# -- interrupts


@contextlib.contextmanager
def interrupted(server: FakeServer, path: str = "/result") -> Iterator[None]:
    """Ctrl-C, shortly after a request for that path has come."""
    before, main, over = server.count("GET", path), threading.main_thread().ident, threading.Event()
    assert main is not None

    def interrupt() -> None:
        while server.count("GET", path) == before and not over.is_set():
            time.sleep(0.01)
        if not over.wait(0.1):
            signal.pthread_kill(main, signal.SIGINT)

    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, was)


def test_an_interrupt_cancels_the_job(gpt2: lk.HookedTransformer, held: FakeServer) -> None:
    with interrupted(held), pytest.raises(KeyboardInterrupt) as caught:
        gpt2.generate(TEXT, max_new_tokens=3)
    job = list(held.jobs.values())[-1]
    assert job.told["status"] == "cancelled"
    assert f"{job.told['id']} was cancelled" in caught.value.__notes__[0]
    held.go.set()
    assert gpt2(TEXT).shape == (1, 11, 1280), "the connection is of use"


def test_an_interrupt_leaves_a_job_that_goes_on_by_itself(connection: Any, held: FakeServer) -> None:
    job = connection.model("demo-gpt2", blocking=False).generate(TEXT, max_new_tokens=3)
    with interrupted(held), pytest.raises(KeyboardInterrupt) as caught:
        job.result()
    assert held.jobs[job.id].told["status"] == "queued"
    assert "job.cancel()" in caught.value.__notes__[0]
    held.go.set()
    assert job.result().steps_run == [3]


QUEUED = {"id": "job_1", "model": "m", "verb": "forward", "status": "queued", "steps": 1}
ACCEPTED = Answer(202, {}, json.dumps(QUEUED).encode())


def test_an_interrupt_takes_back_what_may_have_arrived() -> None:
    order = Order(b"{}", "application/json", "the key", bytes)
    flow = Talk("http://x").run(order, watching.UNWATCHED)
    asked = answers(flow, DROPPED, KeyboardInterrupt(), ACCEPTED, OK)
    sends = [(wish.method, wish.path) for wish in asked if isinstance(wish, Send)]
    assert sends == [("POST", "/v1/jobs")] * 3 + [("DELETE", "/v1/jobs/job_1")]
    assert {wish.headers["Idempotency-Key"] for wish in asked[:4] if isinstance(wish, Send)} == {"the key"}
    assert isinstance(asked[-1], KeyboardInterrupt)
    assert "was cancelled" in asked[-1].__notes__[0]


@pytest.mark.parametrize("second", [DROPPED, Answer(400, {}, b"")])
def test_an_interrupt_says_what_it_does_not_know(second: Answer) -> None:
    order = Order(b"{}", "application/json", "the key", bytes)
    *_, error = answers(Talk("http://x").run(order, watching.UNWATCHED), KeyboardInterrupt(), second)
    assert "may have been handed in" in error.__notes__[0]
    *_, error = answers(Talk("http://x").run(order, watching.UNWATCHED), ACCEPTED, KeyboardInterrupt(), second)
    assert "could not be cancelled" in error.__notes__[0]


# -- the line about progress


class Screen:
    """What `tqdm` was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def tqdm(self, **_: Any) -> "Screen":
        return self

    def set_description_str(self, text: str, refresh: bool) -> None:
        self.said.append(text)

    def refresh(self) -> None:
        self.said.append(f"{self.n} of {self.total}")

    def close(self) -> None:
        self.said.append("closed")


def test_a_line_says_how_far_it_is(
    gpt2: lk.HookedTransformer, held: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(watching, "load", lambda module: screen)
    monkeypatch.setattr(watching.Line, "interval", 0.05)
    held.fail("POST", "/v1/jobs", "deaf")

    def later() -> None:
        for state in ({}, {"status": "running", "place": None, "step": 2}):
            seen = held.count("GET", "/result")
            while held.count("GET", "/result") < seen + 3:
                time.sleep(0.01)
            list(held.jobs.values())[-1].told.update(state)
        while "2 of 5" not in screen.said:
            time.sleep(0.01)
        held.go.set()

    thread = threading.Thread(target=later, daemon=True)
    thread.start()
    gpt2.generate(TEXT, max_new_tokens=5, progress=True)
    thread.join()
    assert screen.said[0].startswith("no answer (")
    assert "queued, 0 before it" in screen.said
    assert screen.said[screen.said.index("2 of 5") - 1] == "running"
    assert any(said.startswith("result: ") and "MiB" in said for said in screen.said)
    assert screen.said[-1] == "closed"


def test_nobody_who_does_not_look_sees_a_line(
    gpt2: lk.HookedTransformer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2(TEXT)
    assert capfd.readouterr() == ("", "")
    assert watching.watch_for(None) is watching.UNWATCHED
    assert watching.watch_for(False) is watching.UNWATCHED
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(watching.watch_for(None), watching.Line)


def test_what_is_short_has_no_line(gpt2: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(watching, "load", lambda module: pytest.fail("a line was drawn"))
    gpt2(TEXT)


# -- structures in the cache


def test_a_structure_is_downloaded_once(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_gpt2: lk.HookedTransformer
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with lk.connect(server.url) as connection:
        server.requests.clear()
        connection.model("demo-gpt2")
        n_files = server.count("GET", "/files/")
        assert n_files >= 4
        connection.model("demo-gpt2")
        assert server.count("GET", "/files/") == n_files
        [folder] = (tmp_path / "lenskit" / "remote").iterdir()
        (folder / "tokenizer.json").write_text("damaged")
        assert connection.model("demo-gpt2").to_str_tokens(TEXT) == demo_gpt2.to_str_tokens(TEXT)
        assert server.count("GET", "/files/") == 2 * n_files
        assert [path.name for path in (tmp_path / "lenskit" / "remote").iterdir()] == [folder.name]


def test_a_file_that_is_not_the_described_one_is_refused(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    described = server.describe("demo-gpt2")
    described["files"]["config.json"] = "0" * 64
    monkeypatch.setattr(server, "describe", lambda name: described)
    with lk.connect(server.url) as connection, pytest.raises(errors.RemoteError, match="another digest"):
        connection.model("demo-gpt2")
    assert not list((tmp_path / "lenskit" / "remote").iterdir()), "nothing is half there"


@pytest.mark.parametrize(
    "path", ["../config.json", "/etc/passwd", "a/../../b", ".ssh/x", "a\\b", "", "x/y/z/w", "a//b"]
)
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    described = Answer(200, {}, json.dumps({"files": {path: "0" * 64}, "dtype": "float32"}).encode())
    *_, error = answers(structure.fetched(Talk("http://x"), "m"), described)
    assert isinstance(error, errors.RemoteError)
    assert "cannot be used" in str(error)


def test_a_process_that_was_faster_is_no_problem(tmp_path: Path) -> None:
    files = {"a": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("a")
    structure._put(tmp_path / "mine", tmp_path / "theirs", files)
    assert (tmp_path / "theirs" / "a").read_text() == "a"


@pytest.mark.parametrize("dtype", ["int8", None, 3])
def test_a_dtype_that_is_none_is_refused(dtype: Any) -> None:
    with pytest.raises(errors.RemoteError, match="cannot be used"):
        structure.dtype_of({"dtype": dtype})


# -- settings and keys

KEY = "lk_" + "s" * 40


def write(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    file = tmp_path / "settings" / "lenskit" / "config.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)
    return file


def test_what_is_given_goes_first_then_the_environment_then_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.InputError, match="LENSKIT_URL"):
        settings.settings()
    write(tmp_path, 'url = "http://file/"\napi_key = "of-the-file"\n')
    assert settings.settings() == settings.Settings("http://file", "of-the-file")
    monkeypatch.setenv("LENSKIT_URL", "http://environment")
    assert settings.settings() == settings.Settings("http://environment", None), "a key goes to its own server"
    monkeypatch.setenv("LENSKIT_API_KEY", "of-the-environment")
    assert settings.settings() == settings.Settings("http://environment", "of-the-environment")
    assert settings.settings("http://given", "given") == settings.Settings("http://given", "given")


def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    file = write(tmp_path, f'url = "http://file"\napi_key = "{KEY}"\n', 0o644)
    with pytest.warns(UserWarning, match="others can read it") as caught:
        lk.connect().close()
    assert KEY not in str(caught[0].message)
    file.chmod(stat.S_IRUSR)
    lk.connect().close()
    write(tmp_path, 'url = "http://file"\n', 0o644)
    lk.connect().close()


@pytest.mark.parametrize("text", ["url = 3", f'key = "{KEY}"', "url = ", f'api_key = ["{KEY}"]', "\udcff"])
def test_a_file_that_says_something_else_is_an_error(tmp_path: Path, text: str) -> None:
    write(tmp_path, "").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(errors.InputError, match=r"config\.toml cannot be used") as caught:
        lk.connect("http://x")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["example.org", "ftp://x", "http://", "http://x:y", "http://x?a", f"http://me:{KEY}@x", 3]
)
def test_an_address_that_is_none(url: Any) -> None:
    with pytest.raises(errors.InputError, match="no server's address") as caught:
        lk.connect(url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["", f"{KEY} ", f"{KEY}\n", "clé"])
def test_a_key_that_can_be_none(key: str) -> None:
    with pytest.raises(errors.KeyRefusedError) as caught:
        lk.connect("http://x", key)
    assert KEY not in str(caught.value)


def test_a_key_is_sent_and_never_shown(demo_gpt2: lk.HookedTransformer) -> None:
    with serving(demo_gpt2, key=KEY) as server:
        with lk.connect(server.url) as connection, pytest.raises(errors.KeyRefusedError, match="no such key"):
            connection.models()
        with lk.connect(server.url, KEY[:-1]) as connection, pytest.raises(errors.KeyRefusedError) as caught:
            connection.model("demo-gpt2")
        assert KEY[:-1] not in str(caught.value)
        with lk.connect(server.url, KEY) as connection:
            model = connection.model("demo-gpt2", blocking=False)
            job = model(TEXT)
            assert job.result().shape == (1, 11, 1280)
            shown = [
                connection,
                model,
                job,
                model.remote,
                job.status(),
                connection.__dict__,
                settings.settings("http://x", KEY),
            ]
            assert KEY not in "".join(map(repr, shown))
            server.fail("GET", "/v1/models", "deaf", times=1000)
            connection._talk._asking._patience = 0.1
            with pytest.raises(errors.UnreachableError) as silent:
                connection.models()
            assert KEY not in f"{silent.value}{silent.value.__cause__!r}"


def test_a_path_before_v1_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    http = transport.Transport(settings.Settings("http://127.0.0.1:9/prefix"))
    request = http._client.build_request("GET", "/v1/models/a%2Fb", params={})
    assert str(request.url) == "http://127.0.0.1:9/prefix/v1/models/a%2Fb"
    http.close()


# -- the command line


def lenskit(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="lenskit")


def test_generate_with_a_server(server: FakeServer, tmp_path: Path, demo_gpt2: lk.HookedTransformer) -> None:
    common = ["generate", "demo-gpt2", *TEXTS, "--max-new-tokens", 3, "--json", "--save", LAST]
    remote = lenskit(*common, "--out", tmp_path / "there.safetensors", "--remote", server.url)
    here = lenskit(*common, "--out", tmp_path / "here.safetensors")
    assert remote.exit_code == 0, remote.output
    assert remote.stdout == here.stdout
    one, other = load_file(tmp_path / "there.safetensors"), load_file(tmp_path / "here.safetensors")
    assert one.keys() == other.keys()
    assert all(same(one[key], other[key]) for key in one)


def test_extract_with_a_server(server: FakeServer, tmp_path: Path, connection: Any) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, ["Where is Nyhavn?", "Where is the Beehive?"])))
    common = ["extract", "demo-llama", "--prompts", prompts, "--system", "Answer.", "--max-new-tokens", 4]
    remote = lenskit(*common, "--out", tmp_path / "there", "--remote", server.url)
    assert remote.exit_code == 0, remote.output
    assert lenskit(*common, "--out", tmp_path / "here").exit_code == 0
    assert (tmp_path / "there" / "texts.jsonl").read_text() == (tmp_path / "here" / "texts.jsonl").read_text()
    for name in ("00000.safetensors", "00001.safetensors"):
        one, other = (load_file(tmp_path / where / "states" / name) for where in ("there", "here"))
        assert one.keys() == other.keys()
        assert all(same(one[key], other[key]) for key in one)
    again = lenskit(*common, "--out", tmp_path / "there", "--remote", server.url)
    assert "0 new, 2 from before" in again.stdout


def test_extract_goes_on_after_a_server_that_went_away(server: FakeServer, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    common = ["extract", "demo-gpt2", "--prompts", prompts, "--max-new-tokens", 2, "--remote", server.url]
    done = lambda: server.count("POST", "/v1/jobs")  # noqa: E731
    before = done()
    server.fail("GET", "/result", 409, times=1)  # one job fails for good
    failed = lenskit(*common, "--out", tmp_path / "out")
    assert failed.exit_code == 1
    assert "prompts.txt:1" in failed.stderr
    result = lenskit(*common, "--out", tmp_path / "out")
    assert "3 new, 0 from before" in result.stdout
    assert done() == before + 4


@pytest.mark.parametrize("option", [("--device", "cpu"), ("--dtype", "float32"), ("--revision", "main")])
def test_extract_refuses_what_is_about_weights_here(
    server: FakeServer, tmp_path: Path, option: tuple[str, str]
) -> None:
    (tmp_path / "prompts.txt").write_text(TEXT)
    command = ["extract", "demo-gpt2", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    result = lenskit(*command, "--remote", server.url, *option)
    assert result.exit_code == 1
    assert f"{option[0]} is about weights here" in result.stderr


def test_an_interrupt_at_the_command_line_says_what_became_of_the_job(
    held: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted(held):
        result = lenskit("generate", "demo-gpt2", TEXT, "--remote", held.url)
    assert result.exit_code == 130
    assert "was cancelled at" in result.stderr
    assert result.stderr.endswith("interrupted\n")


# -- the page about it


def test_the_page_does_what_it_says(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_llama: lk.HookedTransformer
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    compared = sum(run(block.replace("https://lens.example.org", server.url), names) for block in blocks("remote.md"))
    assert compared >= 11
    for k in range(2):
        assert torch.load(tmp_path / f"hidden_{k}.pt").shape[1] == demo_llama.cfg.d_model
