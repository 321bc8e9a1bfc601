"""Activations as they were (`Read`, `Ref`) and gradients (`Backward`, `Grad`, `SetGrad`) as ops of a plan."""

import json
from typing import Any

import pytest
import torch
from parity_table import error, ids
from torch import Tensor

import lenskit as lk
from lenskit.errors import (
    DependencyError,
    ExpressionError,
    InputError,
    PlanError,
    PlanFormatError,
    StepError,
    ValueFitError,
    WithoutEffectError,
)
from lenskit.interventions.expressions import Applied

CLOSE = 1e-5
TOKENS = ids(2, 6)
EARLY, LATE = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"
LOSS = lk.Act("hook_logits", tokens=-1).logsumexp(-1).sum()
READ = lk.Read(lk.Act(EARLY), name="x")


def through_a_file(ops: list[Any], model: lk.HookedTransformer) -> lk.Plan:
    plan = lk.Plan(ops)
    data = json.loads(json.dumps(plan.to_json(model), allow_nan=False))
    read = lk.Plan.from_json(data, plan.tensors())
    assert repr(read) == repr(plan)
    assert read.digest(model) == plan.digest(model)
    return read


# -- Read and Ref


@torch.no_grad()
def test_a_ref_is_what_the_read_found(shared: lk.HookedTransformer) -> None:
    ops = [
        lk.Scale(EARLY, 2.0),
        lk.Read(lk.Act(EARLY), name="x"),
        lk.Scale(EARLY, 3.0),
        lk.Save(lk.Ref("x") + lk.Act(EARLY), name="sum"),
        lk.Set(LATE, lk.Ref("x")),
        lk.Save(LATE),
    ]
    saved = shared.run_with_hooks(TOKENS, through_a_file(ops, shared)).saved
    plain = shared.run_with_cache(TOKENS, EARLY)[1][EARLY]
    assert error(saved["sum"], plain * 8) < CLOSE
    assert error(saved[LATE], plain * 2) < CLOSE


@torch.no_grad()
def test_refs_across_prompts_order_them(shared: lk.HookedTransformer) -> None:
    ops = [
        lk.Read(lk.Act(LATE, prompts=1, tokens=-1), name="late"),
        lk.Set(LATE, 0.0, prompts=1),
        lk.Set(EARLY, lk.Ref("late"), prompts=0, tokens=-1),
        lk.Save(EARLY),
    ]
    result = shared.run_with_hooks(TOKENS, ops)
    late = shared.run_with_cache(TOKENS[1:], LATE)[1][LATE][0, -1]
    assert error(result.saved[EARLY][0, -1], late) < CLOSE
    assert not error(result.logits[1], shared(TOKENS)[1]) < CLOSE


@torch.no_grad()
def test_refs_at_steps(shared: lk.HookedTransformer) -> None:
    ops = [
        lk.Read(lk.Act(EARLY, tokens=-1, steps=0), name="first"),
        lk.Read(lk.Act(EARLY, tokens=-1), name="own", steps=slice(1, None)),
        lk.Scale(EARLY, 0.5),
        lk.Set(LATE, lk.Ref("first"), tokens=-1, steps=[1, 2]),
        lk.Save(LATE, tokens=-1, steps=[1, 2]),
        lk.Save(lk.Ref("own") - 2 * lk.Act(EARLY, tokens=-1), name="nothing", steps=slice(1, None)),
        lk.Save(lk.Ref("first") * 1, name="first"),
    ]
    saved = shared.generate(TOKENS, max_new_tokens=4, eos_token_id=[], hooks=through_a_file(ops, shared)).saved
    assert [torch.equal(state, saved["first"]) for state in saved[LATE]] == [True, True]
    assert [float(rest.abs().max()) < CLOSE for rest in saved["nothing"]] == [True] * 3


@pytest.mark.parametrize(
    ("ops", "kind", "message"),
    [
        ([lk.Save(lk.Ref("x") * 1, name="a")], ExpressionError, r"hooks\[0\] .* is of nothing that was read"),
        (
            [lk.Set(LATE, lk.Ref("x")), lk.Read(lk.Act(EARLY), name="x")],
            ExpressionError,
            "an earlier Read: there is none",
        ),
        ([lk.Read(lk.Act(EARLY), name="x"), lk.Read(lk.Act(LATE), name="x")], ExpressionError, "its name is taken"),
        ([lk.Read(lk.Act("nowhere"), name="x")], lk.errors.UnknownHookPointError, "nowhere"),
        ([lk.Read(lk.Act(EARLY, tokens=9), name="x")], lk.errors.SelectorError, "tokens=9"),
        ([lk.Read(lk.Act(LATE), name="x"), lk.Set(EARLY, lk.Ref("x"))], DependencyError, "needs its own future"),
        ([lk.Read(lk.Act(EARLY), name="x"), lk.Set(LATE, lk.Ref("x")[:, :2])], ValueFitError, "does not fit"),
        ([lk.Stop(EARLY), lk.Read(lk.Act(LATE), name="x")], WithoutEffectError, "would never run"),
    ],
)
def test_reads_that_cannot_be(shared: lk.HookedTransformer, ops: list[Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        shared.run_with_hooks(TOKENS, ops)


def test_a_ref_at_a_step_at_which_nothing_is_read(shared: lk.HookedTransformer) -> None:
    ops = [lk.Read(lk.Act(EARLY), name="x", steps=[1, 2]), lk.Set(LATE, lk.Ref("x"))]
    with pytest.raises(StepError, match="is not read at every step at which it is used"):
        shared.generate(TOKENS, max_new_tokens=3, hooks=ops)


# -- gradients


def of_autograd(model: lk.HookedTransformer, names: list[str]) -> list[Tensor]:
    held: dict[str, Tensor] = {}

    def hold(act: Tensor, hook: lk.HookPoint) -> Tensor:
        act.retain_grad()
        return held.setdefault(hook.name, act)

    with torch.enable_grad():
        logits = model.run_with_hooks(TOKENS, [(names, hold)]).logits
        loss = logits[:, -1].logsumexp(-1).sum()
        loss.backward(inputs=[held[name] for name in names])
    return [held[name].grad for name in names]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_gradients_are_autograds(shared: lk.HookedTransformer, frozen: bool, mode: Any) -> None:
    expected = of_autograd(shared, [EARLY, LATE])
    ops = [
        lk.Read(lk.Act(EARLY), name="early"),
        lk.Read(lk.Act(LATE, prompts=1, tokens=[0, -1]), name="late"),
        lk.Backward(LOSS),
        lk.Save(lk.Grad("early"), name="a"),
        lk.Save(lk.Grad("late") * 2, name="b"),
    ]
    shared.requires_grad_(not frozen)
    try:
        with mode():
            saved = shared.run_with_hooks(TOKENS, through_a_file(ops, shared)).saved
    finally:
        shared.requires_grad_(True)
    assert error(saved["a"], expected[0]) < CLOSE
    assert error(saved["b"], 2 * expected[1][1, [0, -1]]) < CLOSE
    assert all(parameter.grad is None for parameter in shared.parameters())
    assert all(point.attachments is None for point in shared.hook_points.values())


def test_what_is_set_goes_back_from_there(shared: lk.HookedTransformer) -> None:
    reads = [lk.Read(lk.Act(EARLY), name="early"), lk.Read(lk.Act(LATE), name="late")]
    changed = [
        lk.Backward(LOSS, name="changed"),
        lk.SetGrad(lk.Grad("late", of="changed"), lk.Grad("late", of="changed") * torch.tensor(3.0)),
        lk.Save(lk.Grad("early", of="changed"), name="thrice"),
    ]
    plain = [lk.Backward(LOSS), lk.Save(lk.Grad("early"), name="once")]
    saved = shared.run_with_hooks(TOKENS, through_a_file([*reads, *changed, *plain], shared)).saved
    assert error(saved["thrice"], 3 * saved["once"]) < CLOSE


def test_ops_on_one_gradient_run_in_list_order(shared: lk.HookedTransformer) -> None:
    ops = [
        lk.Read(lk.Act(EARLY), name="x"),
        lk.Backward(LOSS),
        lk.Save(lk.Grad("x"), name="before"),
        lk.SetGrad(lk.Grad("x"), 1.0),
        lk.Save(lk.Grad("x"), name="after"),
    ]
    saved = shared.run_with_hooks(TOKENS, ops).saved
    assert (saved["after"] == 1).all()
    assert not (saved["before"] == 1).any()


WIDE = [READ, lk.Read(lk.Act(LATE), name="y"), lk.Backward(LOSS)]


@pytest.mark.parametrize(
    ("ops", "kind", "message"),
    [
        ([lk.Backward(lk.Act("hook_logits"))], ValueFitError, "a loss is one number"),
        ([lk.Backward(lk.Act("hook_logits").argmax())], ValueFitError, "int64"),
        ([READ, lk.Backward(LOSS)], WithoutEffectError, "for nobody"),
        ([READ, lk.Save(lk.Grad("x"), name="a")], ExpressionError, "there is none"),
        ([READ, lk.Save(lk.Grad("x"), name="a"), lk.Backward(LOSS)], ExpressionError, "behind a Backward"),
        ([lk.Backward(LOSS), lk.Save(lk.Grad("x"), name="a")], ExpressionError, "nothing that was read"),
        ([*WIDE, lk.Set(LATE, lk.Grad("x"))], ExpressionError, "when the pass is over"),
        ([*WIDE, lk.Backward(LOSS), lk.Save(lk.Grad("x"), name="a")], ExpressionError, "a second loss"),
        ([*WIDE, lk.SetGrad(lk.Grad("y"), lk.Grad("x"))], DependencyError, "computed after it"),
        ([*WIDE, lk.SetGrad(lk.Grad("y"), torch.zeros(3))], ValueFitError, "does not fit"),
        (
            [*WIDE, lk.Backward(LOSS, name="b"), lk.Save(lk.Grad("x") + lk.Grad("y", of="b"), name="a")],
            ExpressionError, "gradients of 2 losses",
        ),
        (
            [READ, lk.Backward(lk.Act("hook_embed").sum()), lk.Save(lk.Grad("x"), name="a")],
            WithoutEffectError, "does not depend on it",
        ),
    ],
)  # fmt: skip
def test_gradients_that_cannot_be(shared: lk.HookedTransformer, ops: list[Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        shared.run_with_hooks(TOKENS, ops)
    assert all(point.attachments is None for point in shared.hook_points.values())


def test_gradients_need_one_whole_forward_pass(shared: lk.HookedTransformer) -> None:
    ops = [*WIDE, lk.Save(lk.Grad("x"), name="a")]
    with pytest.raises(StepError, match="a generation"):
        shared.generate(TOKENS, max_new_tokens=2, hooks=ops)
    with pytest.raises(StepError, match="2 passes"):
        shared.run_with_hooks(TOKENS, [lk.Set(EARLY, lk.Act(LATE, prompts=1), prompts=0), *ops])
    for call in (shared.prefill, shared.run_with_cache):
        with pytest.raises(InputError, match="Backward"):
            call(TOKENS, hooks=ops)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: lk.Read("blocks.0.hook_resid_post", name="x"),
        lambda: lk.Read(lk.Act(EARLY), name=""),
        lambda: lk.Backward(3.0),
        lambda: lk.Backward(LOSS, name=3),
        lambda: lk.SetGrad(lk.Act(EARLY), 0.0),
        lambda: lk.SetGrad(lk.Grad("x"), "a"),
        lambda: lk.Grad(3),
        lambda: lk.Ref(""),
    ],
)
def test_ops_that_are_none(wrong: Any) -> None:
    with pytest.raises(PlanError, match="expected"):
        wrong()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["ops"][0].pop("name"),
        lambda data: data["ops"][0].update(name=""),
        lambda data: data["ops"][0].update(at="blocks.0"),
        lambda data: data["ops"][0].update(value=3),
        lambda data: data["ops"][0].update(value={"node": 99}),
        lambda data: data["ops"][1].update(selectors={}),
        lambda data: data["ops"][1].update(value=1.0),
        lambda data: data["ops"][2].pop("grad"),
        lambda data: data["ops"][2].update(grad={"node": 0}),
        lambda data: data["nodes"].append({"ref": 3}),
        lambda data: data["nodes"].append({"grad": "x"}),
        lambda data: data["nodes"].append({"grad": "x", "of": None}),
    ],
)
def test_data_that_is_no_plan(shared: lk.HookedTransformer, change: Any) -> None:
    data = lk.Plan([READ, lk.Backward(LOSS), lk.SetGrad(lk.Grad("x"), 0.0)]).to_json(shared)
    lk.Plan.from_json(data)
    change(data)
    with pytest.raises(PlanFormatError):
        lk.Plan.from_json(data)


def test_a_python_function_in_an_expression_is_no_data(shared: lk.HookedTransformer) -> None:
    plan = lk.Plan([lk.Save(Applied(len, (lk.Act(EARLY),)), name="a")])
    assert shared.run_with_hooks(TOKENS, plan).saved["a"] == 2
    with pytest.raises(PlanFormatError, match="a Python function"):
        plan.to_json(shared)
