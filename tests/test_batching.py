"""Runs that share a batch: each is what it is alone, whatever the others do."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity_table import ROWS, hf_folder
from torch import Tensor

import lenskit as lk
from lenskit import batching
from lenskit.batching import Forward, Member, SharedRun, Work, can_share
from lenskit.errors import HookConflictError, LenskitError, NotSavedError
from lenskit.generation import left_padded
from lenskit.interventions.forward import geometry_of
from lenskit.interventions.saved import Saved

CLOSE = 1e-5
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a smaller example is not worth the minutes
EIFFEL = "The Eiffel Tower is in the city of"
# Families that differ in what a batch could mix up: absolute positions, rotary ones, ALiBi, windows, experts.
MIXED = ["gpt2", "llama", "bloom", "mistral", "gemma2", "mixtral"]


@pytest.fixture(scope="module", params=MIXED)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> lk.HookedTransformer:
    row = next(row for row in ROWS if row.model_type == request.param)
    return lk.HookedTransformer.from_pretrained(hf_folder(row, tmp_path_factory.mktemp("hf")))


def work_of(model: lk.HookedTransformer, verb: str, prompts: Any, hooks: Any, **options: Any) -> Work:
    """A run that is ready; all that is wrong with it raises here."""
    if verb == "generate":
        return model.generator(prompts, hooks=hooks, **options)
    batch = left_padded(model.batch(prompts))
    return Forward(batch, lk.Plan(hooks).compile(model, model.hook_points, geometry_of(batch, None), n_steps=None))


def together(model: lk.HookedTransformer, works: list[Work]) -> SharedRun:
    run = SharedRun(model, works)
    before = [point.attachments for point in model.hook_points.values()]
    while not run.over:
        run.step()
    assert [point.attachments for point in model.hook_points.values()] == before, "nothing stays attached"
    return run


def alone(model: lk.HookedTransformer, verb: str, prompts: Any, hooks: Any, **options: Any) -> Any:
    if verb == "generate":
        return model.generate(prompts, hooks=hooks, **options)
    return model.run_with_hooks(prompts, hooks)


def same(one: Any, other: Any) -> None:
    """Equal in shape, and in numbers within the bar."""
    assert type(one) is type(other)
    if isinstance(one, Saved):
        assert list(one) == list(other)
        for key in one:
            same(one.entry(key), other.entry(key))
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    elif isinstance(one, Tensor):
        other = other.detach()
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if not one.dtype.is_floating_point:
            assert torch.equal(one, other)
        else:
            there = other.isfinite()
            assert torch.equal(one.isfinite(), there)
            largest = float(other[there].abs().max()) if there.any() else 0.0  # a mean of a normalised one is 0
            assert (one[there] - other[there]).abs().le(CLOSE * max(1.0, largest)).all()
    elif isinstance(one, lk.Generation):
        for name in ("tokens", "new_tokens", "saved", "steps_run", "finished", "logits", "logprobs"):
            same(getattr(one, name), getattr(other, name))
    elif isinstance(one, lk.Result):
        for name in ("tokens", "mask", "saved"):
            same(getattr(one, name), getattr(other, name))
        if one.output is not None and one.mask is not None:  # padding holds nothing
            same(one.output[one.mask], other.output[one.mask])
        else:
            same(one.output, other.output)


# -- any plans


@st.composite
def hooks(
    draw: st.DrawFn, model: lk.HookedTransformer, n_prompts: int, generating: bool, on_demand: bool = True
) -> list[Any]:
    """Ops of all kinds; some cannot be carried out."""
    found: list[Any] = []
    points = [p for p in model.hook_points.values() if not (p.whole_numbers or p.statistic)]
    points = points if on_demand else [p for p in points if not p.on_demand]
    for _ in range(draw(st.integers(0, 4))):
        point = draw(st.sampled_from(points))
        selectors: dict[str, Any] = {"tokens": draw(st.sampled_from([None, -1, slice(-2, None), slice(1, None), 0]))}
        selectors["prompts"] = draw(st.sampled_from([None, 0, [n_prompts - 1, 0], slice(0, 1)]))
        selectors["steps"] = draw(st.sampled_from([None, 0, 1, slice(1, 3), [0, 2]])) if generating else None
        if "head" in point.axes:
            selectors["heads"] = draw(st.sampled_from([None, 1, [0, 1]]))
        kind = draw(st.sampled_from(["save", "save", "set", "add", "scale", "patch", "mean"]))
        if kind == "save":
            found.append(lk.Save(point.name, name=f"kept {len(found)}", **selectors))
        elif kind == "mean":
            act = lk.Act(point.name, **{**selectors, "steps": None})
            found.append(lk.Save(act.mean(-1), name=f"kept {len(found)}", steps=selectors["steps"]))
        elif kind == "patch":
            found.append(lk.Add(point.name, lk.Act(point.name, **{**selectors, "steps": None}) * 0.5, **selectors))
        else:
            op = {"set": lk.Set, "add": lk.Add, "scale": lk.Scale}[kind]
            found.append(op(point.name, draw(st.sampled_from([0.0, 0.5])), **selectors))
    return found


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(data=st.data())
@pytest.mark.parametrize("verb", ["forward", "generate"])
def test_runs_together_are_each_as_alone(model: lk.HookedTransformer, verb: str, data: st.DataObject) -> None:
    jobs = []
    for _ in range(data.draw(st.integers(2, 4))):
        prompts = data.draw(st.lists(st.lists(st.integers(0, 58), min_size=1, max_size=9), min_size=1, max_size=3))
        options: dict[str, Any] = {}
        if verb == "generate":
            options["max_new_tokens"] = data.draw(st.integers(1, 6))
            options["eos_token_id"] = data.draw(st.sampled_from([[], list(range(20)), list(range(0, 59, 2))]))
            options["return_logits"] = data.draw(st.booleans())
        ops = data.draw(hooks(model, len(prompts), verb == "generate"))
        try:
            work = work_of(model, verb, prompts, ops, **options)
        except LenskitError:
            continue
        if can_share(work):
            jobs.append((work, prompts, ops, options))
    if not jobs:
        return
    try:
        run = together(model, [work for work, *_ in jobs])
    except HookConflictError:  # one asks for each head's input, another for ln1's points: they cannot share
        return
    for member, (_, prompts, ops, options) in zip(run.members, jobs, strict=True):
        try:
            expected = alone(model, verb, prompts, ops, **options)
        except LenskitError as raised:
            expected = raised
        if isinstance(expected, LenskitError):
            assert type(member.error) is type(expected)
        else:
            assert member.error is None
            same(member.output, expected)


@st.composite
def generations(draw: st.DrawFn, model: lk.HookedTransformer) -> tuple[Work, Any] | None:
    """One that may share a batch at any time, and what it gives alone; None for what cannot be carried out."""
    prompts = draw(st.lists(st.lists(st.integers(0, 58), min_size=1, max_size=9), min_size=1, max_size=3))
    ops = draw(hooks(model, len(prompts), True, on_demand=False))
    options: dict[str, Any] = {
        "max_new_tokens": draw(st.integers(1, 12)),
        "eos_token_id": draw(st.sampled_from([[], [], list(range(20))])),
        "return_logits": True,
    }
    try:
        expected = alone(model, "generate", prompts, ops, **options)
    except LenskitError:
        return None
    work = work_of(model, "generate", prompts, ops, **options)
    return (work, expected) if can_share(work) else None


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(data=st.data())
def test_runs_that_come_later_are_each_as_alone(model: lk.HookedTransformer, data: st.DataObject) -> None:
    """Whatever the lengths, and however far the others are."""
    batch: SharedRun | None = None
    members: list[tuple[Member, Any]] = []  # and what each is alone
    for _ in range(data.draw(st.integers(2, 4))):
        found = [one for _ in range(data.draw(st.integers(1, 2))) if (one := data.draw(generations(model))) is not None]
        if not found:
            continue
        run = SharedRun(model, [work for work, _ in found])
        members += zip(run.members, [expected for _, expected in found], strict=True)
        run.step()
        if batch is None or batch.over:
            batch = run
        elif not run.over:
            assert batch.open
            assert run.open
            batch.join(run)
        for _ in range(data.draw(st.integers(0, 5))):
            if not batch.over:
                batch.step()
    while batch is not None and not batch.over:
        batch.step()
    for member, expected in members:
        assert member.error is None
        same(member.output, expected)


# -- each for itself


def test_each_draws_its_own_numbers_and_has_its_own_end(demo_gpt2: lk.HookedTransformer) -> None:
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 12, "do_sample": True, "seed": 1},
        {"max_new_tokens": 3},
        {"max_new_tokens": 20, "do_sample": True, "seed": 2, "top_k": 5, "repetition_penalty": 1.2},
        {"max_new_tokens": 20, "stop_strings": "in"},
    ]
    works = [work_of(demo_gpt2, "generate", EIFFEL, (), **some) for some in options]
    run = SharedRun(demo_gpt2, works)
    over_at: dict[int, int] = {}
    while not run.over:
        run.step()
        for number, member in enumerate(run.members):
            if member.over:
                over_at.setdefault(number, run.index)
    for member, some in zip(run.members, options, strict=True):
        same(member.output, demo_gpt2.generate(EIFFEL, **some))
    assert over_at[1] == 3 < max(over_at.values()), "a run's result waits for no other's"


def test_a_run_that_fails_fails_alone(demo_gpt2: lk.HookedTransformer) -> None:
    fine = [lk.Save("blocks.1.hook_resid_post", tokens=-1)]
    # nan for all logits: no token can be drawn
    broken = [lk.Set("hook_logits", float("nan"), tokens=-1, steps=1)]
    options = {"max_new_tokens": 4, "do_sample": True, "seed": 0, "eos_token_id": []}
    works = [work_of(demo_gpt2, "generate", EIFFEL, hooks, **options) for hooks in (fine, broken, fine)]
    run = together(demo_gpt2, works)
    expected = demo_gpt2.generate(EIFFEL, hooks=fine, **options)
    same(run.members[0].output, expected)
    same(run.members[2].output, expected)
    assert isinstance(run.members[1].error, lk.errors.GenerationError)
    assert run.members[1].output is None


def test_a_stop_ends_one_run(demo_gpt2: lk.HookedTransformer) -> None:
    stopped = [lk.Save("blocks.0.hook_resid_post"), lk.Stop("blocks.0.hook_resid_post")]
    fine = [lk.Save("blocks.-1.hook_resid_post")]
    run = together(demo_gpt2, [work_of(demo_gpt2, "forward", EIFFEL, hooks) for hooks in (stopped, fine)])
    same(run.members[0].output, demo_gpt2.run_with_hooks(EIFFEL, stopped))
    same(run.members[1].output, demo_gpt2.run_with_hooks(EIFFEL, fine))
    output = run.members[0].output
    assert isinstance(output, lk.Result)
    with pytest.raises(NotSavedError):
        _ = output.logits


def test_nothing_is_computed_after_the_last_stop(demo_gpt2: lk.HookedTransformer) -> None:
    stops = [[lk.Stop("blocks.0.hook_resid_post")], [lk.Stop("blocks.1.hook_resid_pre")]]
    seen: list[str] = []
    with demo_gpt2.hooks([("blocks.*.hook_resid_post", lambda _, hook: seen.append(hook.name))]):
        together(demo_gpt2, [work_of(demo_gpt2, "forward", EIFFEL, hooks) for hooks in stops])
    assert seen == ["blocks.0.hook_resid_post"]


def test_a_run_can_be_dropped_between_steps(demo_gpt2: lk.HookedTransformer) -> None:
    works = [work_of(demo_gpt2, "generate", EIFFEL, (), max_new_tokens=6, eos_token_id=[]) for _ in range(3)]
    run = SharedRun(demo_gpt2, works)
    run.step()
    run.members[0].drop()
    run.members[1].drop()
    while not run.over:
        run.step()
    assert run.members[0].output is None
    assert run.members[0].error is None
    same(run.members[2].output, demo_gpt2.generate(EIFFEL, max_new_tokens=6, eos_token_id=[]))


def test_rows_of_those_that_are_over_are_let_go(demo_gpt2: lk.HookedTransformer) -> None:
    works = [work_of(demo_gpt2, "generate", EIFFEL, (), max_new_tokens=n, eos_token_id=[]) for n in (2, 2, 2, 6)]
    rows: list[int] = []
    with demo_gpt2.hooks([("hook_embed", lambda act, _: rows.append(len(act)))]):
        together(demo_gpt2, works)
    assert rows == [4, 4, 1, 1, 1, 1]


def test_what_a_run_sees_of_others_is_nothing(demo_gpt2: lk.HookedTransformer) -> None:
    huge = [lk.Set("hook_embed", float("inf")), lk.Set("blocks.0.attn.hook_pattern", float("nan"))]
    fine = [lk.Save("blocks.*.attn.hook_pattern"), lk.Save("blocks.*.hook_resid_post")]
    works = [work_of(demo_gpt2, "forward", ["a much longer prompt than the other one", "two"], huge)]
    works.append(work_of(demo_gpt2, "forward", EIFFEL, fine))
    run = together(demo_gpt2, works)
    same(run.members[1].output, demo_gpt2.run_with_hooks(EIFFEL, fine))


# -- what cannot share


def test_what_cannot_share_is_known(demo_gpt2: lk.HookedTransformer) -> None:
    act = lk.Act("blocks.1.hook_resid_post", prompts=0, tokens=-1)
    later = lk.Set("blocks.0.hook_resid_post", act, prompts=1, tokens=-1)
    assert not can_share(work_of(demo_gpt2, "forward", ["one two", "three four"], [later]))
    assert not can_share(work_of(demo_gpt2, "forward", EIFFEL, [("hook_embed", lambda act, hook: act)]))
    read = lk.Read(lk.Act("blocks.0.hook_resid_post"), name="read")
    gradient = [read, lk.Backward(lk.Act("hook_logits").sum(), name="loss"), lk.Save(lk.Grad("read"), name="g")]
    assert not can_share(work_of(demo_gpt2, "forward", EIFFEL, gradient))
    past = demo_gpt2.prefill(EIFFEL)
    assert not can_share(work_of(demo_gpt2, "generate", "Paris", (), max_new_tokens=2, past=past))
    assert can_share(work_of(demo_gpt2, "generate", [EIFFEL, "Paris"], [lk.Save("hook_embed")], max_new_tokens=2))


@pytest.mark.parametrize(("window", "shared"), [(4, False), (None, True)])
def test_what_may_attend_to_keys_that_are_gone_runs_alone(window: int | None, shared: bool) -> None:
    """Its error would be everybody's."""
    model = lk.HookedTransformer.from_pretrained("demo-llama")
    for block in model.blocks:
        block.attn.window = window
    edit = [lk.Set("blocks.1.attn.hook_pattern", 0.1)]
    assert can_share(work_of(model, "generate", EIFFEL, edit, max_new_tokens=3)) is shared
    assert can_share(work_of(model, "generate", EIFFEL, [lk.Save("blocks.*.attn.hook_pattern")], max_new_tokens=3))
    assert can_share(work_of(model, "forward", EIFFEL, edit)), "without a cache nothing is gone"


def test_an_error_of_the_pass_itself_is_nobodys(
    demo_gpt2: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [work_of(demo_gpt2, "forward", EIFFEL, [lk.Save("hook_embed")]) for _ in range(2)]
    run = SharedRun(demo_gpt2, works)

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(batching.SharedRun, "_inputs", lambda _: works[0].batch)
    monkeypatch.setattr(type(demo_gpt2), "decode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run.step()
    assert all(point.attachments is None for point in demo_gpt2.hook_points.values())
    assert [member.error for member in run.members] == [None, None]
