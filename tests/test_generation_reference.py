"""Interventions while decoding, against the plain way: Hugging Face's model, the whole sequence again at every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hf_reference
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from parity_table import DECODERS, WRITTEN_OUT, Row, hf_folder, hf_model, ids
from torch import Tensor
from transformers import PreTrainedModel

import lenskit as lk

CLOSE = 1e-5
N_STEPS = 4
EVERY = set(range(N_STEPS))


@dataclass(frozen=True, repr=False)
class Pair:
    """The same weights twice, and where the points of one are in the other."""

    ours: lk.HookedTransformer
    theirs: PreTrainedModel
    places: hf_reference.Places

    @property
    def points(self) -> list[str]:
        """As the reference meets them in the forward pass, which is what "earlier" means below."""
        return list(self.places)


def looked_for(ours: lk.HookedTransformer, theirs: PreTrainedModel) -> hf_reference.Places:
    tokens = ids(2, 11)
    _, cache = ours.run_with_cache(tokens, ["*.hook_attn_out", "*.hook_mlp_out"])
    return hf_reference.looked_for(theirs, tokens, cache)


def pair_of(model_type: str, folder: Path, *, by_name: bool) -> Pair:
    hf_folder(Row("reference", model_type), folder)
    ours, theirs = lk.HookedTransformer.from_pretrained(folder), hf_model(folder, attention="sdpa")
    return Pair(ours, theirs, hf_reference.written_out(theirs) if by_name else looked_for(ours, theirs))


@pytest.fixture(scope="module", params=WRITTEN_OUT)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(request.param, tmp_path_factory.mktemp("hf"), by_name=True)


@pytest.fixture(scope="module", params=[name for name in DECODERS if name not in WRITTEN_OUT])
def other_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Every other family; the points of the stream."""
    return pair_of(request.param, tmp_path_factory.mktemp("hf"), by_name=False)


STEPS = [(None, EVERY), (0, {0}), (2, {2}), (slice(1, None), EVERY - {0}), ([0, 3], {0, 3})]
PROMPTS = st.lists(st.lists(st.integers(0, 58), min_size=2, max_size=9), min_size=1, max_size=3)


@dataclass(frozen=True)
class Case:
    """One edit, in lenskit's words and as the reference does it.

    row: the prompt that it is about; None for all. source: the point whose activation it uses, if it does.
    """

    op: lk.Set | lk.Add | lk.Scale
    edit: hf_reference.Edit
    row: int | None
    source: str | None


def change(
    part: Tensor, read: dict[str, Tensor], *, kind: str, index: tuple, value: Tensor | float | str, factor: float
) -> Tensor:
    """What an op does, on one row's [pos ...] of one step."""
    new = part.clone()
    operand = read[value][index] * factor if isinstance(value, str) else value
    if kind == "Set":
        new[index] = operand
    elif kind == "Add":
        new[index] = part[index] + operand
    else:
        new[index] = part[index] * operand
    return new


@st.composite
def cases(draw: st.DrawFn, pair: Pair, prompts: list[list[int]]) -> Case:
    """A random op."""
    point = draw(st.sampled_from([name for name in pair.points if name != "hook_logits"]))
    hook = pair.ours.hook_points[point]
    row = draw(st.sampled_from([None, *range(len(prompts))]))
    shortest = min(len(prompts[row]) for row in (range(len(prompts)) if row is None else [row]))
    steps, chosen = draw(st.sampled_from(STEPS))
    selectors: dict[str, object] = {} if row is None else {"prompts": slice(row, row + 1)}
    index: list[object] = [slice(None)] * (len(hook.axes) - 1)
    tokens = [None, -1, slice(-1, None)]
    if chosen == {0}:
        tokens += [0, shortest - 1, [0, -1], slice(1, None), slice(0, shortest - 1), -shortest]
    token = draw(st.sampled_from(tokens))
    if token is not None:
        selectors["tokens"], index[0] = token, token
    if "head" in hook.axes and draw(st.booleans()):
        selectors["heads"] = index[1] = draw(st.sampled_from([0, -1, slice(1, None), slice(0, 1)]))
    if draw(st.booleans()) and not isinstance(token, list):
        selectors["dims"] = index[-1] = draw(st.sampled_from([0, slice(2, 5), -1]))
    if steps is not None:
        selectors["steps"] = steps
    kind = draw(st.sampled_from(["Set", "Add", "Scale"]))
    factor = draw(st.sampled_from([0.5, -0.7]))  # none that may leave nothing of the stream but rounding
    value: Tensor | float | str = draw(st.sampled_from([0.0, 0.3, -1.5]))
    written: object = value
    names = pair.points
    alike = [name for name in names[: names.index(point)] if pair.ours.hook_points[name].axes == hook.axes]
    alike = [name for name in alike if pair.ours.hook_points[name].sizes == hook.sizes]
    source = draw(st.sampled_from([None, *alike]))
    if source is not None:
        value = source
        chosen_part = {name: selector for name, selector in selectors.items() if name != "steps"}
        written = lk.Act(source, **chosen_part) * factor
    elif draw(st.booleans()) and "dims" not in selectors:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        value = written = torch.randn(hook.sizes[hook.axes[-1]], generator=generator)
    op = getattr(lk, kind)(point, written, **selectors)
    made = partial(change, kind=kind, index=tuple(index), value=value, factor=factor)
    return Case(op, hf_reference.Edit(point, chosen, made), row, source)


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of `theirs`, which an edit may have made zero."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3))


def check(pair: Pair, prompts: list[list[int]], found: lk.Generation, saved: Sequence[str], cases: list[Case]) -> None:
    """Every row's logits and saves are those of the reference, as long as no near tie makes the tokens part."""
    for row, prompt in enumerate(prompts):
        edits = [case.edit for case in cases if case.row in (None, row)]
        expected = hf_reference.generate(pair.theirs, pair.places, prompt, N_STEPS, edits)
        for step in range(N_STEPS):
            # A stream that an edit has made all alike is nothing to a norm without a bias: what is left is rounding.
            assume(expected.logits[step].abs().max() > 1e-2)
            assert off(found.logits[row][step], expected.logits[step]) < CLOSE
            for name in saved:
                theirs = expected.saved[step][name]
                ours = found.saved[name][step][row]
                assert off(ours[len(ours) - len(theirs) :], theirs) < 5 * CLOSE, (name, step)
                assert not ours[: len(ours) - len(theirs)].any()
            likeliest = expected.logits[step].topk(2).values
            if likeliest[0] - likeliest[1] < 1e-4:
                return
            assert found.new_tokens[row][step] == expected.tokens[len(prompt) + step]


def checked(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        phases=set(Phase) - {Phase.explain},
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@checked(max_examples=50)
@given(data=st.data())
def test_random_plans_equal_recomputing_everything(pair: Pair, data: st.DataObject) -> None:
    run_random_plan(pair, data)


@checked(max_examples=20)
@given(data=st.data())
def test_random_plans_on_the_stream_equal_recomputing_everything(other_pair: Pair, data: st.DataObject) -> None:
    run_random_plan(other_pair, data)


def test_places_that_are_looked_for_are_those_that_are_written_out(pair: Pair) -> None:
    found = looked_for(pair.ours, pair.theirs)
    assert len(found) == 4 * pair.ours.cfg.n_layers
    for name, place in found.items():
        assert place.module is pair.places[name].module
        assert place.side == pair.places[name].side
        assert place.factor == pytest.approx(1.0, abs=1e-6)


def run_random_plan(pair: Pair, data: st.DataObject) -> None:
    prompts = data.draw(PROMPTS)
    made = data.draw(st.lists(cases(pair, prompts), min_size=1, max_size=4))
    # An Act sees what the ops before it in the list have made of a point, the reference what all of them have.
    for index, case in enumerate(made):
        assume(case.source not in {later.edit.point for later in made[index:]})
    ops = [case.op for case in made]
    saved = data.draw(st.lists(st.sampled_from(pair.points), max_size=4, unique=True))
    plan = lk.Plan([*ops, *(lk.Save(name) for name in saved)])
    found = pair.ours.generate(prompts, max_new_tokens=N_STEPS, hooks=plan, return_logits=True, eos_token_id=[])
    check(pair, prompts, found, saved, made)
