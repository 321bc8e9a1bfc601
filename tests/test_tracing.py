"""Tracing: what is written in a block is what a program over real tensors would do, and errors name the user's line."""

# ruff: noqa: PT012 (blocks of several lines are what is tested)

import contextlib
import json
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity_table import MODEL_TYPES, Row, from_hf, ids, perturb
from torch import Tensor, nn

import lenskit as lk
from lenskit.errors import (
    DependencyError,
    ExpressionError,
    GenerationError,
    InputError,
    NotSavedError,
    SelectorError,
    StepError,
    TraceError,
    ValueFitError,
    WithoutEffectError,
)
from lenskit.modules.linear import Linear
from lenskit.modules.module import Identity

CLOSE = 1e-5
LENGTH = 8
TOKENS = ids(1, LENGTH)
UNEVEN = [[1, 2, 3, 4, 5], [6, 7]]


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one - other).abs() <= CLOSE * (1 + other.abs().max())).all())


# -- a program over proxies does what it does over tensors

POINTS = ["hook_embed", "blocks.0.attn.hook_v", "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "hook_logits"]
INDICES: list[Any] = [
    0, slice(None), (slice(None), -1), (slice(None), 2), (slice(None), slice(1, 4)), (..., 0), (..., slice(0, 3)),
    (slice(None), [0, 2]), (0, slice(2, None)), (slice(None), None), (slice(None), slice(None, None, 2)), (0, 1),
]  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """For some points, in the order of the forward pass, statements on variables a, b, c, of which a is the point's."""
    made = []
    for point in POINTS:
        statements: list[tuple[Any, ...]] = []
        for _ in range(draw(st.integers(0, 4))):
            index = draw(st.sampled_from(INDICES))
            number = draw(st.sampled_from([0.0, 0.5, -2.0]))
            statements.append(draw(st.sampled_from([
                ("view", index), ("take", index), ("write", index, number), ("write view", number), ("add", number),
                ("add to part", index, number), ("scale", number), ("scale view", number), ("assign", number),
                ("write of itself", index, number), ("save a",), ("save b",), ("save c",), ("double",),
                ("mask", number), ("read again",), ("subtract", number), ("divide view", 2.0),
            ])))  # fmt: skip
        made.append((point, statements))
    return made


class Program:
    """The statements, on whatever behaves like a tensor."""

    def __init__(self, read: Callable[[], Any], assign: Callable[[Any], None], save: Callable[[Any], None]) -> None:
        self.read, self.assign, self.save = read, assign, save
        self.a = self.b = self.c = read()

    def do(self, what: str, *args: Any) -> None:
        match what, args:
            case "view", (index,):
                self.b = self.a[index]
            case "take", (index,):
                self.c = self.a[index] * 2
            case "write", (index, number):
                self.a[index] = number
            case "write view", (number,):
                self.b[...] = number
            case "add", (number,):
                self.a += number
            case "add to part", (index, number):
                self.a[index] += number
            case "scale", (number,):
                self.a *= number
            case "scale view", (number,):
                self.b *= number
            case "divide view", (number,):
                self.b /= number
            case "subtract", (number,):
                self.a -= self.a * number
            case "assign", (number,):
                self.assign(self.a * number + 1)
                self.a = self.b = self.read()
            case "write of itself", (index, number):
                self.a[index] = self.a[index] * number
            case "mask", (number,):
                self.a[self.a > 0] = number
            case "double", ():
                self.c = self.a + self.a
            case "read again", ():
                self.a = self.read()
            case "save a", ():
                self.save(self.a)
            case "save b", ():
                self.save(self.b)
            case "save c", ():
                self.save(self.c)


@given(made=programs())
@torch.no_grad()
def test_a_block_does_what_its_lines_would_do_to_tensors(
    shared: lk.HookedTransformer, made: list[tuple[str, list[tuple[Any, ...]]]]
) -> None:
    expected: list[Tensor] = []

    def function(statements: list[tuple[Any, ...]]) -> Callable[[Tensor, lk.HookPoint], Tensor]:
        def run(act: Tensor, _: lk.HookPoint) -> Tensor:
            held = [act]
            program = Program(
                lambda: held[0], lambda new: held.__setitem__(0, new), lambda x: expected.append(x.clone())
            )
            for statement in statements:
                program.do(*statement)
            return held[0]

        return run

    logits = shared.run_with_hooks(TOKENS, [(point, function(statements)) for point, statements in made]).logits
    saved: list[Any] = []
    with shared.trace(TOKENS) as run:
        for point, statements in made:
            place = shared.hook_points[point]
            program = Program(
                lambda place=place: place.output,
                lambda new, place=place: setattr(place, "output", new),
                lambda x: saved.append(x.save()),
            )
            for statement in statements:
                program.do(*statement)
    assert close(run.output.logits, logits)
    assert len(saved) == len(expected)
    for proxy, tensor in zip(saved, expected, strict=True):
        assert proxy.shape == tensor.shape
        assert proxy.dtype == tensor.dtype
        assert close(proxy.value, tensor)
    read = lk.Plan.from_json(json.loads(json.dumps(run.plan.to_json(shared))), run.plan.tensors())
    again = shared.run_with_hooks(TOKENS, read)
    assert torch.equal(again.logits, run.output.logits)
    for key in run.saved:
        assert torch.equal(again.saved[key], run.saved[key])


# -- what a module's ends are


def ends(model: lk.HookedTransformer) -> dict[str, nn.Module]:
    """The modules that have an input and an output, in one block and around the blocks."""
    names = ["blocks.1", *(f"blocks.1.{name}" for name in ("ln1", "attn", "ln2", "mlp")), "ln_final", "unembed"]
    found = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in found.items() if not isinstance(module, Identity)}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_ends_of_modules_are_what_they_are_given_and_give(model_type: str) -> None:
    model = lk.HookedTransformer(from_hf(Row("default", model_type)))
    perturb(model, 0)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in ends(model).items():
        handles.append(module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)})))
    model(TOKENS)
    for handle in handles:
        handle.remove()
    with model.trace(TOKENS) as run:
        saved = {name: (module.input.save(), module.output.save()) for name, module in ends(model).items()}
        ids_in = (model.input, model.embed.input)
        whole = (model.embed.output.save(), model.output.save())
    post = {
        f"blocks.1.{part}": getattr(model.blocks[1], norm) for part, norm in (("attn", "ln1_post"), ("mlp", "ln2_post"))
    }
    residual_multiplier = model.cfg.to_json().get("residual_multiplier", 1.0)
    for name, (taken, gave) in saved.items():
        assert close(taken.value, seen[name][0]), f"{name}.input"
        then = post.get(name, Identity())  # what is added to the stream is what a norm makes of the output
        times = residual_multiplier if name in post else 1.0
        assert close(gave.value, then(seen[name][1]) * times), f"{name}.output"
    assert all(torch.equal(each, TOKENS) for each in ids_in)
    assert torch.equal(whole[1].value, run.output.logits)
    assert torch.equal(whole[0].value, model.embed(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ln1", "ln2", "ln_final"])
def test_what_a_norm_gives_can_be_set(shared: lk.HookedTransformer, name: str) -> None:
    norm = shared.ln_final if name == "ln_final" else getattr(shared.blocks[1], name)
    with shared.trace(TOKENS) as run:
        norm.output = norm.output * 2
    weight = f"{'' if name == 'ln_final' else 'blocks.1.'}{name}.hook_out"
    by_hand = shared.run_with_hooks(TOKENS, [lk.Scale(weight, 2.0)])
    assert close(run.output.logits, by_hand.logits)
    assert not close(run.output.logits, shared(TOKENS))


def test_a_parameter_can_be_set_and_does_not_become_the_models(shared: lk.HookedTransformer) -> None:
    before = dict(shared.named_parameters())
    with shared.trace(TOKENS) as run:
        shared.blocks[0].output = nn.Parameter(torch.zeros(shared.cfg.d_model))
        out = shared.blocks[0].output.save()
    assert not out.value.any()
    assert dict(shared.named_parameters()).keys() == before.keys()
    assert run.output.logits.requires_grad


# -- prompts


@torch.no_grad()
def test_an_invoke_sees_its_own_tokens_only(shared: lk.HookedTransformer) -> None:
    alone = [shared.run_with_cache([row], "blocks.1.hook_resid_post")[1]["resid_post", 1] for row in UNEVEN]
    with shared.trace() as run:
        kept = []
        for row in UNEVEN:
            with run.invoke(row):
                out = shared.blocks[1].output
                kept.append(
                    (out.save(), out.t[0].save(), out.token[-1].save(), out[:, -2].save(), (out * 1).t[0].save())
                )
    for row, (whole, first, last, index, computed) in zip(alone, kept, strict=True):
        assert close(whole.value, row)
        assert close(first.value, row[:, 0])
        assert close(last.value, row[:, -1])
        assert close(index.value, row[:, -2])
        assert close(computed.value, row[:, 0])
    assert [list(tokens) for tokens in run.tokens] == UNEVEN


@torch.no_grad()
def test_tokens_count_each_rows_own_whatever_its_padding(shared: lk.HookedTransformer) -> None:
    alone = [shared.run_with_cache([row], "blocks.1.hook_resid_post")[1]["resid_post", 1][0] for row in UNEVEN]
    with shared.trace(UNEVEN):
        out = shared.blocks[1].output
        first, second = out.t[0].save(), (out + 0.0).t[1].save()
        last, end = (out + 0.0).t[-1].save(), (out + 0.0).t[-2:].save()
        out.t[0] = 0.0
        out.t[-1] += 1.0
        after = out.save()
    for row, states in enumerate(alone):
        assert close(first.value[row], states[0])
        assert close(second.value[row], states[1])
        assert close(last.value[row], states[-1])
        assert close(end.value[row], states[-2:])
        own = after.value[row, -len(states) :]
        assert not own[0].any() if len(states) > 1 else True
        assert close(own[-1], states[-1] + 1.0)
    assert not after.value[1, :3].any(), "padding reads as zeros, and is not written"


def test_tokens_that_cannot_be_counted(shared: lk.HookedTransformer) -> None:
    with pytest.raises(TraceError, match="tokens cannot be counted"), shared.trace(UNEVEN):
        _ = (shared.blocks[1].output + 0.0).t[0:2]
    with pytest.raises(TraceError, match="tokens cannot be counted"), shared.trace(UNEVEN):
        _ = shared.blocks[1].output.mean(1).t[0]
    with pytest.raises(TraceError, match="chosen already"), shared.trace(UNEVEN):
        _ = shared.blocks[1].output.t[1:].t[0]


@torch.no_grad()
def test_a_later_layer_of_one_prompt_into_an_earlier_one_of_another(shared: lk.HookedTransformer) -> None:
    one, other = ids(1, 4), ids(1, 4) + 1
    with shared.trace() as run:
        with run.invoke(one):
            late = shared.blocks[2].output
        with run.invoke(other):
            shared.blocks[0].output = late
            logits = shared.output.save()
    state = shared.run_with_cache(one)[1]["resid_post", 2]
    by_hand = shared.run_with_hooks(other, [lk.Set("blocks.0.hook_resid_post", state)]).logits
    assert close(logits.value, by_hand)


def test_a_batch_in_one_invoke_and_encodings(demo_gpt2: lk.HookedTransformer) -> None:
    encoding = demo_gpt2.tokenizer(["The Eiffel Tower", "Paris"], padding=True, return_tensors="pt")
    with demo_gpt2.trace() as run:
        with run.invoke(encoding):
            both = demo_gpt2.hook_embed.output.save()
        with run.invoke("Paris"):
            one = demo_gpt2.hook_embed.output.save()
    assert both.value.shape[0] == 2
    assert torch.equal(both.value[1, -one.value.shape[1] :], one.value[0])
    assert run.texts[2] == run.texts[1]


def test_a_plan_fits_other_prompts_and_other_models(shared: lk.HookedTransformer) -> None:
    with shared.trace() as run, run.invoke(TOKENS):
        shared.blocks[0].output[:, -1] = 0.0
        shared.blocks[2].output.save("late")
    assert "prompts" not in repr(run.plan)
    longer = ids(2, LENGTH + 3)
    again = shared.run_with_hooks(longer, run.plan).saved["late"]
    expected = shared.run_with_hooks(
        longer, [lk.Set("blocks.0.hook_resid_post", 0.0, tokens=-1), lk.Save("blocks.2.hook_resid_post")]
    )
    assert torch.equal(again, expected.saved["blocks.2.hook_resid_post"])


# -- steps


@torch.no_grad()
def test_steps(shared: lk.HookedTransformer) -> None:
    with shared.trace(TOKENS, max_new_tokens=5) as run:
        first = shared.blocks[1].output.save()
        run.next()
        second = shared.blocks[1].output.save()
        with run.all():
            every = shared.blocks[1].output.save()
            best = shared.output.t[-1].argmax(-1).save()
        with run.iter[2:4]:
            some = shared.blocks[1].output.save()
        with run.iter[[0, 4]]:
            listed = shared.blocks[1].output.save()
        with run.iter[3]:
            one = shared.blocks[1].output.save()
        with run.iter[1:100]:
            rest = shared.blocks[1].output.save()
        still_second = shared.blocks[1].output.save()
    assert [len(each.value) for each in (every, some, listed, rest)] == [5, 2, 2, 4]
    assert first.value.shape == (1, LENGTH, shared.cfg.d_model)
    assert second.value.shape == one.value.shape == (1, 1, shared.cfg.d_model)
    whole = shared.run_with_cache(run.tokens[0][None, :-1], "blocks.1.hook_resid_post")[1]["resid_post", 1]
    assert close(torch.cat(every.value, 1), whole)
    for got, wanted in [
        (first, 0), (second, 1), (one, 3), (still_second, 1),
    ]:  # fmt: skip
        assert torch.equal(got.value, every.value[wanted])
    assert torch.equal(torch.cat(some.value), torch.cat(every.value[2:4]))
    assert torch.equal(listed.value[1], every.value[4])
    assert torch.equal(torch.cat(best.value), run.output.new_tokens[0])


@torch.no_grad()
def test_edits_stay_in_their_steps(shared: lk.HookedTransformer) -> None:
    def edits(step: int) -> list[lk.HookPoint]:
        return [lk.Set("blocks.0.hook_resid_post", 0.5, steps=step)]

    for step in (0, 2):
        with shared.trace(TOKENS, max_new_tokens=4) as run:
            for _ in range(step):
                run.next()
            shared.blocks[0].output[:] = 0.5
        expected = shared.generate(TOKENS, max_new_tokens=4, hooks=edits(step))
        assert torch.equal(run.output.new_tokens[0], expected.new_tokens[0])
    with shared.trace(TOKENS, max_new_tokens=4) as run:
        start = shared.blocks[1].output.t[-1]
        with run.iter[1:]:
            shared.blocks[1].output.t[-1] = start  # what a single step computed, at each of the later ones
            kept = shared.blocks[1].output.save()
        start = start.save()
    assert all(torch.equal(state[:, -1], start.value) for state in kept.value)


def test_each_invoke_begins_at_step_0(shared: lk.HookedTransformer) -> None:
    with shared.trace(max_new_tokens=2) as run:
        with run.invoke(TOKENS):
            run.next()
            later = shared.hook_embed.output.save()
        with run.invoke(TOKENS):
            first = shared.hook_embed.output.save()
    assert later.value.shape[1] == 1
    assert first.value.shape[1] == LENGTH


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda run, model: past_the_end(run, model), StepError, "max_new_tokens=3 makes so many"),
        (lambda run, model: run.iter[5:9], StepError, "steps from 0 to 2"),
        (lambda run, model: run.iter[-1], SelectorError, "steps cannot count from the end"),
        (lambda run, model: run.iter["a"], SelectorError, "steps selects nothing"),
        (lambda run, model: nested(run), TraceError, "steps within steps"),
        (lambda run, model: next_in_all(run), TraceError, "block about several steps"),
        (lambda run, model: used_elsewhere(run, model), TraceError, "a value of several steps"),
        (lambda run, model: mixed(run, model), TraceError, "values of different steps"),
        (lambda run, model: shape_in_all(run, model), TraceError, r"\(1, 8, \d+\) or \(1, 1, \d+\)"),
        (lambda run, model: run.backward(model.output.sum()).__enter__(), TraceError, "a generation"),
    ],
)
def test_steps_that_cannot_be(shared: lk.HookedTransformer, wrong: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message), shared.trace(TOKENS, max_new_tokens=3) as run:
        wrong(run, shared)


def past_the_end(run: Any, model: lk.HookedTransformer) -> None:
    for _ in range(3):
        run.next()
    model.blocks[0].output.save()


def nested(run: Any) -> None:
    with run.all(), run.iter[1]:
        pass


def next_in_all(run: Any) -> None:
    with run.all():
        run.next()


def used_elsewhere(run: Any, model: lk.HookedTransformer) -> None:
    with run.all():
        out = model.blocks[0].output.t[-1]
    model.blocks[1].output.t[-1] = out


def mixed(run: Any, model: lk.HookedTransformer) -> None:
    with run.all():
        one = model.blocks[0].output.t[-1]
    with run.iter[1:]:
        _ = model.blocks[0].output.t[-1] + one


def shape_in_all(run: Any, model: lk.HookedTransformer) -> None:
    with run.all():
        _ = model.blocks[0].output.shape


def test_a_forward_pass_has_no_steps(shared: lk.HookedTransformer) -> None:
    for wrong in (lambda run: run.next(), lambda run: run.all(), lambda run: run.iter[0]):
        with pytest.raises(TraceError, match="one forward pass"), shared.trace(TOKENS) as run:
            wrong(run)


# -- gradients


def test_gradients_are_autograds(shared: lk.HookedTransformer) -> None:
    held: dict[str, Tensor] = {}

    def hold(act: Tensor, hook: lk.HookPoint) -> Tensor:
        held[hook.name] = act
        act.retain_grad()
        return act

    names = ["hook_embed", "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_q", "blocks.1.hook_resid_post"]
    logits = shared.run_with_hooks(TOKENS, [(names, hold)]).logits
    loss = logits[:, -1].logsumexp(-1).sum() + held["blocks.1.hook_resid_post"].pow(2).mean()
    loss.backward()
    before = {name: parameter.grad.clone() for name, parameter in shared.named_parameters()}
    with shared.trace(TOKENS) as run:
        loss = shared.output[:, -1].logsumexp(-1).sum() + shared.blocks[1].output.pow(2).mean()
        with run.backward(loss):
            found = {name: shared.hook_points[name].output.grad.save() for name in names}
            part = shared.blocks[1].output.t[-1].grad.save()
            heads = shared.blocks[1].attn.hook_q.output[:, :, 1].grad.save()
    for name in names:
        assert close(found[name].value, held[name].grad), name
        assert not found[name].value.requires_grad
    assert close(part.value, held[names[3]].grad[:, -1])
    assert close(heads.value, held[names[2]].grad[:, :, 1])
    for name, parameter in shared.named_parameters():
        assert torch.equal(parameter.grad, before[name]), "the weights get no gradient from a trace"
        parameter.grad = None


def test_a_gradient_that_is_set_goes_on(shared: lk.HookedTransformer) -> None:
    with shared.trace(TOKENS) as run:
        early, late = shared.blocks[0].output, shared.blocks[1].output
        loss = shared.output.t[-1].logsumexp(-1).sum()
        with run.backward(loss):
            plain = early.grad.save()
        with run.backward(loss):
            before = late.grad.save()
            late.grad *= 2
            twice, doubled = late.grad.save(), early.grad.save()
        with run.backward(loss * 1):
            late.grad = 0.0
            none = early.grad.save()
        with run.backward(loss):
            late.grad[:, :-1] = 0.0
            cut = late.grad.save()
    assert torch.equal(twice.value, before.value * 2)
    assert close(doubled.value, plain.value * 2)
    assert not none.value.any()
    assert not cut.value[:, :-1].any()
    assert torch.equal(cut.value[:, -1], before.value[:, -1])


def test_gradients_of_what_was_before_and_after_an_edit(shared: lk.HookedTransformer) -> None:
    with torch.no_grad(), shared.trace(TOKENS) as run:
        before = shared.blocks[0].output
        shared.blocks[0].output = before * 3
        after = shared.blocks[0].output
        loss = shared.output.pow(2).sum()
        with run.backward(loss):
            inner, outer = before.grad.save(), after.grad.save()
    assert close(inner.value, outer.value * 3)


def test_gradients_of_uneven_prompts(shared: lk.HookedTransformer) -> None:
    with shared.trace(UNEVEN) as run:
        loss = shared.output.t[-1].logsumexp(-1).sum()
        with run.backward(loss):
            grad, first = shared.hook_embed.output.grad.save(), shared.hook_embed.output.t[0].grad.save()
    for row, tokens in enumerate(UNEVEN):
        with shared.trace([tokens]) as run:
            loss = shared.output.t[-1].logsumexp(-1).sum()
            with run.backward(loss):
                alone = shared.hook_embed.output.grad.save()
        assert close(grad.value[row, -len(tokens) :], alone.value[0])
        assert close(first.value[row], alone.value[0, 0])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda run, model: model.hook_embed.output.grad, TraceError, "of no loss"),
        (lambda run, model: run.backward(model.output).__enter__(), ValueFitError, "a loss is one number"),
        (lambda run, model: run.backward(3.0).__enter__(), ValueFitError, "a float"),
        (lambda run, model: run.backward(model.output.argmax()).__enter__(), ValueFitError, "int64"),
        (lambda run, model: back(run, model, lambda: (model.output * 2).grad), TraceError, "no gradient of its own"),
        (lambda run, model: back(run, model, lambda: None), WithoutEffectError, "for nobody"),
        (
            lambda run, model: back(run, model, lambda: run.backward(model.output.sum()).__enter__()),
            TraceError,
            "within",
        ),
        (lambda run, model: back(run, model, lambda: set_wrongly(model)), ValueFitError, "new gradient does not fit"),
        (lambda run, model: back(run, model, lambda: set_from_earlier(model)), DependencyError, "computed after it"),
        (lambda run, model: back(run, model, lambda: stale(model)), TraceError, "set after it was read"),
        (lambda run, model: unrelated(run, model), WithoutEffectError, "does not depend on it"),
    ],
)
def test_gradients_that_cannot_be(shared: lk.HookedTransformer, wrong: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message), shared.trace(TOKENS) as run:
        wrong(run, shared)


def back(run: Any, model: lk.HookedTransformer, do: Callable[[], object]) -> None:
    with run.backward(model.output.sum()):
        do()


def set_wrongly(model: lk.HookedTransformer) -> None:
    model.hook_embed.output.grad = torch.zeros(3)


def set_from_earlier(model: lk.HookedTransformer) -> None:
    model.blocks[1].output.grad = model.hook_embed.output.grad


def stale(model: lk.HookedTransformer) -> None:
    x = model.hook_embed.output
    grad = x.grad * 2
    x.grad = 0.0
    grad.save()


def unrelated(run: Any, model: lk.HookedTransformer) -> None:
    with run.backward(model.blocks[0].output.sum()):
        model.blocks[2].output.grad.save()


# -- the rest of what can be written


@torch.no_grad()
def test_modules_out_of_order(shared: lk.HookedTransformer) -> None:
    with shared.trace(TOKENS):
        middle = shared.blocks[0].output
        lens = shared.unembed(shared.ln_final(middle)).save()
        kept = middle.save()
    assert close(lens.value, shared.unembed(shared.ln_final(kept.value)))


@torch.no_grad()
def test_python_functions(shared: lk.HookedTransformer) -> None:
    calls: list[tuple[int, ...]] = []

    def halve(x: Tensor, by: float) -> Tensor:
        calls.append(tuple(x.shape))
        return x / by

    with shared.trace(TOKENS) as run:
        new = run.apply(halve, shared.blocks[0].output, 2)
        shared.blocks[0].output = new
        told = run.apply(lambda x: float(x.sum()), shared.blocks[1].output)
        nothing = run.apply(lambda x: None, shared.blocks[1].output)
        with pytest.raises(TraceError, match="which a Python function returns"):
            _ = new.shape
        after = shared.blocks[0].output.save()
        total = shared.blocks[1].output.sum().save()
    assert calls == [(1, LENGTH, shared.cfg.d_model)], "called once, however often its value is used"
    assert torch.equal(after.value, new.value)
    assert told.value == pytest.approx(float(total.value), rel=1e-4)
    assert nothing.value is None
    with pytest.raises(lk.errors.PlanFormatError, match="Python function"):
        run.plan.to_json(shared)


def test_a_python_function_is_called_at_each_step(shared: lk.HookedTransformer) -> None:
    calls: list[int] = []
    with shared.trace(TOKENS, max_new_tokens=3) as run, run.all():
        seen = run.apply(lambda x: calls.append(x.shape[1]), shared.blocks[0].output)
    assert calls == [LENGTH, 1, 1]
    assert seen.value == [None] * 3


def test_a_failing_python_function_is_the_users_own_error(shared: lk.HookedTransformer) -> None:
    with pytest.raises(ZeroDivisionError), shared.trace(TOKENS) as run:
        run.apply(lambda x: 1 / 0, shared.blocks[0].output)
    assert all(point.attachments is None for point in shared.hook_points.values())


@torch.no_grad()
def test_stop(shared: lk.HookedTransformer) -> None:
    ran: list[str] = []
    with shared.hooks([("blocks.1.*_out", lambda act, hook: ran.append(hook.name))]), shared.trace(TOKENS) as run:
        out = shared.blocks[0].output.save()
        run.stop()
    assert out.value.shape[1] == LENGTH
    assert ran == []
    with pytest.raises(NotSavedError, match="no logits"):
        _ = run.output.logits
    with shared.trace(TOKENS, max_new_tokens=9) as run:
        run.next()
        shared.blocks[0].output.save()
        run.stop()
    assert run.output.steps_run == [2]
    with pytest.raises(TraceError, match="nothing that was saved"), shared.trace(TOKENS) as run:
        run.stop()


def test_shapes_and_the_like_are_known_at_once(shared: lk.HookedTransformer) -> None:
    cfg = shared.cfg
    with shared.trace(TOKENS):
        q = shared.blocks[0].attn.hook_q.output
        assert q.shape == (1, LENGTH, cfg.n_heads, cfg.d_head)
        assert (q.ndim, q.dim(), len(q), q.numel()) == (4, 4, 1, q.shape.numel())
        assert (q.size(1), q.dtype, q.device) == (LENGTH, torch.float32, torch.device("cpu"))
        assert q.mean(1).half().dtype == torch.float16
        assert [row.shape for row in q] == [q.shape[1:]]
        values, places = q.topk(2)
        assert (values.shape, places.dtype) == ((1, LENGTH, cfg.n_heads, 2), torch.int64)
        assert q.mean(1)[0].t().shape == (cfg.d_head, cfg.n_heads)
        assert torch.zeros(q.shape).shape == q.shape
        assert repr(q) == f"<Act('blocks.0.attn.hook_q'): float32 {list(q.shape)}>"
        assert repr(q * 2).startswith("<Act('blocks.0.attn.hook_q') * 2: float32")


def test_random_numbers_are_the_same_where_they_are_used_twice(shared: lk.HookedTransformer) -> None:
    torch.manual_seed(3)
    with shared.trace(TOKENS):
        noise = torch.randn_like(shared.blocks[0].output)
        before = shared.blocks[0].output.save()
        shared.blocks[0].output += noise
        after, kept = shared.blocks[0].output.save(), noise.save()
    assert torch.equal(after.value, before.value + kept.value)


# -- values


def test_values(shared: lk.HookedTransformer) -> None:
    with shared.trace(TOKENS) as run:
        x = shared.blocks[0].output
        y = x.save()
        x[:] = 0.0
        z = x.save("zeros")
        lost = x * 2
        with pytest.raises(NotSavedError, match="after the block"):
            _ = y.value
    assert y.value.any()
    assert not z.value.any()
    assert torch.equal(x.value, z.value), "what was saved of it last"
    assert run.saved["zeros"] is z.value
    assert "zeros" in repr(z)
    with pytest.raises(NotSavedError, match=r"write \.save\(\) in the block"):
        _ = lost.value
    for use in (lambda: y + 1, lambda: y[0], lambda: torch.exp(y), lambda: y.save(), lambda: shared.ln_final(y)):
        with pytest.raises(TraceError, match=r"use \.value"):
            use()
    with pytest.raises(TraceError, match="a proxy of another trace"), shared.trace(TOKENS):
        shared.blocks[0].output = y
    with shared.trace(TOKENS):
        shared.blocks[1].output = y.value
        same = shared.blocks[1].output.save()
    assert torch.equal(same.value, y.value)


def test_what_a_block_that_failed_leaves(shared: lk.HookedTransformer) -> None:
    with pytest.raises(KeyError), shared.trace(TOKENS) as run:
        x = shared.blocks[0].output.save()
        raise KeyError
    with pytest.raises(NotSavedError, match="has failed"):
        _ = x.value
    with pytest.raises(TraceError, match="no result"):
        _ = run.output
    with pytest.raises(TraceError, match="of no trace"):
        _ = shared.blocks[0].output
    assert all(point.attachments is None for point in shared.hook_points.values())


def test_what_was_replaced_cannot_be_written_to(shared: lk.HookedTransformer) -> None:
    with pytest.raises(TraceError, match="this activation was replaced"), shared.trace(TOKENS):
        old = shared.blocks[0].output
        shared.blocks[0].output = 0.0
        old[:] = 1.0


# -- errors


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda model: setattr(model.blocks[0], "output", torch.zeros(3)), ValueFitError, "does not fit"),
        (lambda model: setattr(model.blocks[0], "output", "a"), lk.errors.PlanError, "a value of type str"),
        (lambda model: setattr(model, "input", TOKENS), TraceError, "ids cannot be set"),
        (lambda model: setattr(model.blocks[0], "output", model.blocks[1].output), DependencyError, "own future"),
        (lambda model: model.blocks[0].output @ torch.zeros(3, 3), ExpressionError, "same reduction dim"),
        (lambda model: model.blocks[0].output[:, 99], SelectorError, "tokens=99"),
        (lambda model: model.blocks[0].output.t[99], SelectorError, "tokens=99"),
        (lambda model: model.blocks[0].output.svd(), ExpressionError, "run.apply"),
        (lambda model: model.blocks[0].output.sum().backward(), TraceError, "run.backward"),
        (lambda model: model.blocks[0].output.t(0), TraceError, r"write x\.t\[0\]"),
        (lambda model: torch.linalg.svd(model.blocks[0].output), ExpressionError, "svd"),
        (lambda model: bool(model.blocks[0].output.sum()), TraceError, "torch.where"),
        (lambda model: float(model.blocks[0].output.sum()), TraceError, "run.apply"),
        (lambda model: int(model.blocks[0].output.sum()), TraceError, "not a number"),
        (lambda model: model.blocks[0].output.sum().item(), TraceError, "not a number"),
        (lambda model: np.asarray(model.blocks[0].output), TraceError, "not an array"),
        (lambda model: 3 in model.blocks[0].output, TraceError, "not a search"),
        (lambda model: [0, 1][model.blocks[0].output.sum()], TraceError, "not a number"),
        (lambda model: model.blocks[0].output.topk(2).shape, TraceError, "two tensors"),
        (lambda model: model.blocks[0].output.save(""), lk.errors.PlanError, "an empty name"),
        (lambda model: [model.blocks[0].output.save("a") for _ in range(2)], TraceError, "two saves named 'a'"),
        (lambda model: model.blocks[0](model.blocks[0].output), ExpressionError, "one tensor"),
        (lambda model: lk.HookedTransformer(model.cfg).hook_embed.output, TraceError, "another model"),
        (lambda model: next(m for m in model.modules() if isinstance(m, Linear)).output, TraceError, "no hook point"),
        (lambda model: model.blocks[0].output.add_(1), ExpressionError, "add_"),
    ],
)
def test_errors_are_raised_on_the_line_that_made_them(
    shared: lk.HookedTransformer, wrong: Any, error: Any, message: str
) -> None:
    after = []
    with pytest.raises(error, match=message) as refused, shared.trace(TOKENS):
        wrong(shared)
        after.append("the line after")
    assert not after
    files = [frame.filename for frame in traceback.extract_tb(refused.value.__traceback__)]
    ours = [file for file in files if Path(file).parts[-2] in ("lenskit", "tracing", "modules", "interventions")]
    assert len(ours) <= 1, "the user's line, then one of ours"
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


def test_an_error_at_the_end_names_the_line(shared: lk.HookedTransformer) -> None:
    with pytest.raises(lk.errors.ReplacementError) as refused, shared.trace(TOKENS) as run:
        wrong = run.apply(lambda x: x[:, :1, :3], shared.blocks[0].output)
        shared.blocks[1].output = wrong  # this one
    [note] = [note for note in refused.value.__notes__ if note.startswith("written down")]
    assert note.endswith("shared.blocks[1].output = wrong  # this one")
    assert "test_tracing.py" in note


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda model: model.trace(), TraceError, "no prompt"),
        (lambda model: model.trace(""), InputError, "empty"),
        (lambda model: model.trace([[99999]]), InputError, "99999"),
        (lambda model: model.trace(TOKENS, max_new_tokens=0), GenerationError, "max_new_tokens=0"),
        (lambda model: model.trace(TOKENS, do_sample=True), GenerationError, "do_sample"),
        (lambda model: model.trace(TOKENS, max_new_tokens=2, temprature=1.0), GenerationError, "temprature"),
        (lambda model: model.trace(TOKENS, remote=True), GenerationError, "lk.connect"),
        (lambda model: model.trace(TOKENS, max_new_tokens=2, num_beams=2), GenerationError, "num_beams"),
    ],
)
def test_traces_that_cannot_be(demo_gpt2: lk.HookedTransformer, wrong: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message), wrong(demo_gpt2):
        pass


def test_invokes_that_cannot_be(shared: lk.HookedTransformer) -> None:
    with pytest.raises(TraceError, match="of no prompt"), shared.trace() as run:
        _ = shared.hook_embed.output
    with pytest.raises(TraceError, match="a prompt given to trace"), shared.trace(TOKENS) as run, run.invoke(TOKENS):
        pass
    with pytest.raises(TraceError, match="within another"), shared.trace() as run, run.invoke(TOKENS):
        run.invoke(TOKENS).__enter__()
    with pytest.raises(InputError, match="empty"), shared.trace() as run, run.invoke([]):
        pass
    with pytest.raises(TraceError, match="an invoke has no prompt"), shared.trace() as run, run.invoke():
        pass
    with shared.trace(TOKENS) as run:
        pass
    with pytest.raises(TraceError, match="one block"), run:
        pass


# -- wherever it is written


def test_threads_do_not_see_each_other(shared: lk.HookedTransformer) -> None:
    failed: list[BaseException] = []
    together = threading.Barrier(3)

    def work(number: int) -> None:
        try:
            for _ in range(10):
                with shared.trace(TOKENS) as run:
                    together.wait(10)
                    shared.blocks[1].output[:] = float(number)
                    together.wait(10)
                    kept = shared.blocks[1].output.save()
                assert len(run.plan) == 2
                assert (kept.value == number).all()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_trace_within_a_trace(shared: lk.HookedTransformer) -> None:
    with shared.trace(TOKENS) as outer:
        one = shared.hook_embed.output.save()
        with shared.trace(TOKENS.flip(1)):
            two = shared.hook_embed.output.save()
        shared.blocks[0].output = two.value
        three = shared.blocks[0].output.save()
    assert len(outer.plan) == 3
    assert torch.equal(three.value, two.value)
    assert not torch.equal(one.value, two.value)


def test_in_functions_generators_and_decorators(shared: lk.HookedTransformer) -> None:
    def traced(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with shared.trace(TOKENS):
                found = function()
            return found.value

        return run

    @traced
    def embedding() -> Any:
        return shared.hook_embed.output.save()

    assert embedding().shape[1] == LENGTH
    with shared.trace(TOKENS): [kept] = [shared.hook_embed.output.save() for _ in range(1)]  # fmt: skip # noqa: E701
    assert torch.equal(kept.value, embedding())
    with contextlib.ExitStack() as stack:
        stack.enter_context(shared.trace(TOKENS))
        late = shared.hook_embed.output.save()
    assert torch.equal(late.value, embedding())


SCRIPT = """
import lenskit as lk
model = lk.HookedTransformer.from_pretrained("demo-gpt2")
with model.trace("The Eiffel Tower"): x = model.blocks[0].output.save()
print(tuple(x.value.shape[::2]))
"""


@pytest.mark.parametrize("how", ["-c", "-"])
def test_on_the_command_line(how: str) -> None:
    given = {"input": SCRIPT} if how == "-" else {}
    command = [sys.executable, how, *([SCRIPT] if how == "-c" else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, **given)
    assert done.stdout.strip() == "(1, 128)"


def test_several_rows_a_prompt(shared: lk.HookedTransformer) -> None:
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 2, "seed": 0}
    with shared.trace(num_return_sequences=2, **options) as run:
        with run.invoke(TOKENS):
            plain = shared.blocks[0].output
            assert plain.shape[0] == 2
            plain = plain.save()
        with run.invoke(TOKENS):
            shared.blocks[0].output[:] = 0.0
            none = shared.blocks[0].output.save()
    assert len(run.tokens) == 4
    assert plain.value.shape == none.value.shape
    assert plain.value.any()
    assert not none.value.any()
    expected = shared.generate(TOKENS, num_return_sequences=2, **options)
    with shared.trace(TOKENS, num_return_sequences=2, **options) as run:
        pass
    assert [row.tolist() for row in run.tokens] == [row.tolist() for row in expected.tokens]


def test_a_model_without_weights(shared: lk.HookedTransformer) -> None:
    with torch.device("meta"):
        model = lk.HookedTransformer(shared.cfg, seed=None)
    with pytest.raises(TraceError, match="the model has no weights"), model.trace(TOKENS):
        pass


def test_past(shared: lk.HookedTransformer) -> None:
    past = shared.prefill(TOKENS[:, :5])
    with shared.trace(TOKENS[:, 5:], past=past):
        logits = shared.output.save()
    assert close(logits.value, shared(TOKENS)[:, 5:])
    with shared.trace(TOKENS[:, 5:], past=past, max_new_tokens=3) as run:
        pass
    assert torch.equal(run.tokens[0], shared.generate(TOKENS, max_new_tokens=3).tokens[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(shared: lk.HookedTransformer, dtype: torch.dtype) -> None:
    model = lk.HookedTransformer(shared.cfg).to(dtype)
    with model.trace(TOKENS):
        x = model.blocks[0].output
        assert x.dtype == dtype
        x += 0.5
        x.t[-1] = torch.ones(model.cfg.d_model, dtype=dtype)
        kept = x.save()
    assert kept.value.dtype == dtype
    with pytest.raises(ValueFitError, match="float32"), model.trace(TOKENS):
        model.blocks[0].output = torch.zeros(model.cfg.d_model)
