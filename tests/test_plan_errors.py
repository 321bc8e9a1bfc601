"""What is wrong with an op is said before anything runs: by its own class, naming the op by its place and its text."""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from parity_table import ids
from torch import Tensor

import lenskit as lk
from lenskit.errors import (
    AxisError,
    DependencyError,
    ExpressionError,
    HookError,
    InputError,
    LenskitError,
    PlanError,
    PlanFormatError,
    SelectorError,
    StepError,
    UnknownHookPointError,
    ValueFitError,
    WithoutEffectError,
)
from lenskit.models.base import Decoder

TOKENS = ids(2, 5)
UNEQUAL = [[5, 6, 7], [8, 9, 10, 11, 12]]
PATTERN, SCALE, MID = "blocks.0.attn.hook_pattern", "blocks.0.ln1.hook_scale", "blocks.1.hook_resid_mid"


def as_id(value: Any) -> str:
    """A test's name, the same in every process."""
    return re.sub(r" at 0x\w+", "", repr(value))


@pytest.fixture(scope="module", autouse=True)
def nothing_runs() -> Iterator[None]:
    """No test of this file lets the models compute: every error comes before."""
    forbidden = pytest.MonkeyPatch()

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("the model runs")

    forbidden.setattr(lk.HookedTransformer, "decode", run)
    yield
    forbidden.undo()


def ran(act: Tensor, hook: lk.HookPoint) -> None:
    raise AssertionError(f"{hook.name} runs")


def refused(
    model: lk.HookedTransformer, *ops: Any, prompts: Any = TOKENS, n: int | None = None, **options: Any
) -> LenskitError:
    """The error, which names the last op: by index, and by text."""
    hooks = [("hook_embed", ran), lk.Save("hook_embed", name="other"), *ops]
    run = model.run_with_hooks if n is None else partial(model.generate, max_new_tokens=n)
    with pytest.raises(LenskitError) as told:
        run(prompts, hooks=hooks, **options)
    assert all(point.attachments is None for point in model.hook_points.values())
    error = told.value
    assert error.what.startswith(f"hooks[{len(hooks) - 1}] {hooks[-1]!r}"), error.what
    assert error.got
    assert error.expected
    assert error.fix
    return error


# -- names


@pytest.mark.parametrize(
    ("at", "near"),
    [
        ("blocks.0.hook_resid_pots", "blocks.0.hook_resid_post"),
        ("blocks.0.attn.hook_patern", "blocks.0.attn.hook_pattern"),
        ("hook_logit", "hook_logits"),
        ("blocks.3.hook_resid_post", "hook_resid_post"),
        ("blocks.-4.hook_resid_post", "hook_resid_post"),
        ("blocks.*.hook_nothing", "hook_"),
        (["hook_embed", "hook_embedd"], "hook_embed"),
        (lambda name: name == "other", "hook_logits"),
        ([], "hook_logits"),
        (3, "hook_logits"),
        (None, "hook_logits"),
    ],
    ids=as_id,
)
def test_unknown_names(shared: lk.HookedTransformer, at: Any, near: str) -> None:
    for op in (lk.Save(at), lk.Set(at, 0.0), lk.Add(at, 0.0), lk.Scale(at, 0.0), lk.Stop(at)):
        error = refused(shared, op)
        assert type(error) is UnknownHookPointError
        assert near in error.expected


def test_a_name_is_unknown_in_an_expression(shared: lk.HookedTransformer) -> None:
    for op in (lk.Save(lk.Act("hook_embedd") * 2, name="x"), lk.Set("hook_logits", lk.Act("hook_embedd"))):
        error = refused(shared, op)
        assert type(error) is UnknownHookPointError
        assert "hook_embed" in error.expected


def test_points_of_layers_that_do_not_run(shared: lk.HookedTransformer) -> None:
    for at in ("blocks.2.hook_resid_post", "hook_logits"):
        error = refused(shared, lk.Save(at), stop_at_layer=2)
        assert type(error) is UnknownHookPointError
        assert "points that run" in error.expected


# -- axes


@pytest.mark.parametrize(
    ("at", "selector", "has", "near"),
    [
        ("blocks.1.hook_resid_mid", "heads", "batch, pos, d_model", "blocks.1.attn.hook_"),
        ("hook_embed", "heads", "batch, pos, d_model", "blocks.0."),
        ("hook_logits", "heads", "batch, pos, d_vocab", "blocks.2.attn.hook_"),
        ("blocks.2.ln1.hook_scale", "heads", "batch, pos, 1", "blocks.2."),
    ],
)
def test_axes_that_a_point_lacks(shared: lk.HookedTransformer, at: str, selector: str, has: str, near: str) -> None:
    """The message names the axes that it has, and the nearest point that has the other."""
    act = lk.Act(at, **{selector: 0})
    ops = [
        lk.Save(at, **{selector: 0}),
        lk.Set(at, 0.0, **{selector: [0]}),
        lk.Save(act, name="x"),
        lk.Set("hook_logits", act.sum()),
    ]
    for op in ops:
        error = refused(shared, op)
        assert type(error) is AxisError
        assert at in error.what
        assert has in error.got
        assert near in error.expected
        nearest = next(name for name in error.expected.split("'") if name in shared.hook_points)
        assert "head" in shared.hook_points[nearest].axes


# -- ranges


RANGES: list[tuple[dict[str, Any], str, str]] = [
    ({"prompts": 2}, "prompts=2", "from -2 to 1"),
    ({"prompts": [0, -3]}, "prompts=-3", "from -2 to 1"),
    ({"tokens": 5}, "tokens=5", "from -5 to 4"),
    ({"tokens": [0, -6]}, "tokens=-6", "from -5 to 4"),
    ({"heads": 99}, "heads=99", "heads"),
    ({"heads": [-99]}, "heads=-99", "heads"),
    ({"dims": 400}, "dims=400", "dimensions"),
    ({"dims": [0, 1, -401]}, "dims=-401", "dimensions"),
]


@pytest.mark.parametrize(("chosen", "said", "range_"), RANGES, ids=lambda value: str(value))
def test_what_is_not_there(shared: lk.HookedTransformer, chosen: dict[str, Any], said: str, range_: str) -> None:
    at = "blocks.0.attn.hook_z"
    act = lk.Act(at, **chosen)
    for op in (
        lk.Save(at, **chosen),
        lk.Set(at, 0.0, **chosen),
        lk.Set("hook_logits", act.sum()),
        lk.Save(act, name="x"),
    ):
        error = refused(shared, op)
        assert type(error) is SelectorError
        assert said in error.what
        assert range_ in error.expected + error.got


NOTHING = [
    {"prompts": slice(2, None)}, {"tokens": slice(5, None)}, {"tokens": slice(3, 2)}, {"heads": slice(9, 12)},
    {"dims": slice(0, 0)},
]  # fmt: skip


@pytest.mark.parametrize("chosen", NOTHING, ids=str)
def test_slices_of_nothing(shared: lk.HookedTransformer, chosen: dict[str, Any]) -> None:
    [name] = chosen
    for op in (lk.Save("blocks.0.attn.hook_z", **chosen), lk.Add("blocks.0.attn.hook_z", 1.0, **chosen)):
        error = refused(shared, op)
        assert type(error) is SelectorError
        assert f"{name} selects nothing" in error.what


def test_a_token_that_a_shorter_prompt_lacks(shared: lk.HookedTransformer) -> None:
    error = refused(shared, lk.Save("hook_embed", tokens=3), prompts=UNEQUAL)
    assert type(error) is SelectorError
    assert "prompt 0 has 3 tokens" in error.got
    error = refused(shared, lk.Set("hook_embed", 0.0, prompts=[1, 0], tokens=[0, -4]), prompts=UNEQUAL)
    assert "prompt 0 has 3 tokens" in error.got
    error = refused(shared, lk.Save(PATTERN, tokens=0, dims=4), prompts=UNEQUAL)
    assert "prompt 0 has 3 dimensions" in error.got


def test_a_token_of_the_prompt_at_every_step(shared: lk.HookedTransformer) -> None:
    """Later steps process one token, and the advice says so."""
    for op in (
        lk.Save("hook_embed", tokens=3), lk.Set("hook_embed", 0.0, tokens=[1]), lk.Save("hook_embed", tokens=-2),
        lk.Save("hook_embed", tokens=slice(1, None)), lk.Add("hook_embed", lk.Act("hook_embed", tokens=2), tokens=-1),
        lk.Save(lk.Act(PATTERN, tokens=1).sum(), name="x"), lk.Scale("hook_embed", 2.0, tokens=1, steps=slice(0, 3)),
    ):  # fmt: skip
        error = refused(shared, op, n=4)
        assert type(error) is SelectorError
        assert "steps=0" in error.fix
        assert "one token" in error.fix


@pytest.mark.parametrize("name", ["prompts", "tokens", "heads", "dims", "steps"])
@pytest.mark.parametrize(
    "value",
    ["0", 1.0, [], [0.5], [True], True, {0}, slice(0.5, None), slice(None, None, -1), slice(None, None, 0), [[0]],
     np.array([[1]]), np.array([1.5]), torch.tensor([True, False]), {"slice": [0, 1, 1]}],
    ids=as_id,
)  # fmt: skip
def test_what_selects_nothing_that_there_is(name: str, value: Any) -> None:
    """Of the wrong type, whoever has it: at the line that writes it."""
    for make in (
        lambda: lk.Save("hook_embed", **{name: value}),
        lambda: lk.Set("hook_embed", 0.0, **{name: value}),
        lambda: lk.Act("hook_embed", **{name: value}),
    ):
        with pytest.raises(PlanError) as told:
            make()
        assert type(told.value) is SelectorError or (name == "steps" and type(told.value) is ExpressionError)
        assert "hook_embed" in told.value.what
        assert name in told.value.got


# -- steps


def test_steps_that_there_are_not(shared: lk.HookedTransformer) -> None:
    for steps in (4, [0, 4], slice(4, None), slice(2, 2), 100):
        for op in (
            lk.Save("hook_embed", steps=steps),
            lk.Set("hook_embed", 0.0, steps=steps),
            lk.Stop("hook_embed", steps=steps),
        ):
            error = refused(shared, op, n=4)
            assert type(error) is StepError
            assert "from 0 to 3" in error.expected
            assert "max_new_tokens=4" in error.expected
    error = refused(shared, lk.Set("hook_embed", lk.Act("hook_embed", tokens=0, steps=4), steps=slice(0, 2)), n=4)
    assert type(error) is StepError


def test_a_forward_pass_has_one_step(shared: lk.HookedTransformer) -> None:
    for op in (
        lk.Save("hook_embed", steps=1),
        lk.Save("hook_embed", steps=slice(1, None)),
        lk.Set("hook_embed", 0.0, steps=[0, 2]),
    ):
        error = refused(shared, op)
        assert type(error) is StepError
        assert "use generate" in error.fix


@pytest.mark.parametrize("steps", [-1, [0, -1], slice(-2, None), slice(None, -1)], ids=str)
def test_steps_do_not_count_from_the_end(steps: Any) -> None:
    for make in (lk.Save, lk.Stop, lambda at, steps: lk.Set(at, 0.0, steps=steps)):
        with pytest.raises(SelectorError, match="steps cannot count from the end"):
            make("hook_embed", steps=steps)


# -- values


@pytest.mark.parametrize(
    ("shape", "chosen"),
    [
        ((7,), {}), ((6, 1), {}), ((3, 5, 1), {}), ((1, 2, 5, 1), {}), ((5,), {"dims": slice(0, 4)}),
        ((2,), {"tokens": 0, "dims": 0, "prompts": 0}), ((5, 1), {"tokens": slice(1, None)}), ((0,), {}),
    ],
    ids=str,
)  # fmt: skip
def test_shapes_that_do_not_broadcast(
    shared: lk.HookedTransformer, shape: tuple[int, ...], chosen: dict[str, Any]
) -> None:
    """Said with both shapes, and the axes."""
    for kind in (lk.Set, lk.Add, lk.Scale):
        error = refused(shared, kind("hook_embed", torch.zeros(shape), **chosen))
        assert type(error) is ValueFitError
        assert str(shape) in error.got
        assert "batch pos d_model" in error.expected
    error = refused(shared, lk.Set("hook_embed", lk.Act("hook_embed").sum() + torch.zeros(shape), **chosen))
    assert type(error) is ValueFitError


def test_a_value_that_fits_some_steps_only(shared: lk.HookedTransformer) -> None:
    error = refused(shared, lk.Add("hook_embed", torch.zeros(5, 1)), n=3)
    assert type(error) is ValueFitError
    assert "step 1" in error.expected
    error = refused(shared, lk.Add("hook_embed", torch.zeros(5, 1), steps=2), n=3)
    assert "step 2" in error.expected
    error = refused(shared, lk.Scale(PATTERN, torch.zeros(6), steps=slice(1, None)), n=3)
    assert type(error) is ValueFitError, "the keys are one more at every step"


def test_prompts_of_unequal_length(shared: lk.HookedTransformer) -> None:
    """What crosses prompts says how long each is."""
    for op in (
        lk.Set("hook_embed", lk.Act("hook_embed", prompts=0), prompts=1),
        lk.Add(MID, lk.Act("hook_embed", prompts=1) * 2, prompts=0),
        lk.Set(MID, lk.Act("blocks.2.hook_resid_pre", prompts=1), prompts=0),
    ):
        error = refused(shared, op, prompts=UNEQUAL)
        assert type(error) is ValueFitError
        assert "prompt 0 has 3 tokens" in error.got
        assert "prompt 1 has 5 tokens" in error.got


@pytest.mark.parametrize(
    ("prompts", "sources", "targets"),
    [
        ([[5, 6], [5, 6, 7], [8, 9, 10], [11, 12]], [0, 1], [2, 3]),
        ([[5, 6], [5, 6, 7]], [0, 1], [1, 0]),
        ([[5, 6], [5, 6, 7], [8, 9, 10]], [0, 1], slice(1, 3)),
        ([[5, 6, 7], [8]], [0], slice(None)),
    ],
    ids=["crosswise", "exchanged", "one of two", "long into both"],
)  # fmt: skip
def test_several_prompts_of_unequal_length(
    shared: lk.HookedTransformer, prompts: Any, sources: Any, targets: Any
) -> None:
    """Padding is no token: row by row, a prompt gets as many tokens as it has."""
    op = lk.Set("hook_embed", lk.Act("hook_embed", prompts=sources), prompts=targets)
    error = refused(shared, op, prompts=prompts)
    assert type(error) is ValueFitError
    assert "tokens" in error.got


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_dtypes_that_would_be_lost(shared: lk.HookedTransformer, dtype: torch.dtype) -> None:
    width = shared.cfg.d_model
    for chosen in ({}, {"tokens": 0}, {"tokens": [0, 2]}, {"tokens": slice(0, 2)}):
        for value in (
            torch.zeros(width, dtype=dtype),
            lk.Act("hook_embed", **chosen) * torch.zeros(width, dtype=dtype),
        ):
            error = refused(shared, lk.Add("hook_embed", value, **chosen))
            assert type(error) is ValueFitError
            assert str(dtype) in error.got
            assert "torch.float32" in error.expected
    half = deepcopy(shared).half()
    error = refused(half, lk.Set("hook_embed", torch.zeros(width)))
    assert type(error) is ValueFitError
    assert "torch.float16" in error.expected


@pytest.mark.parametrize("chosen", [{}, {"tokens": 0}, {"tokens": [0, 2]}, {"tokens": slice(0, 2)}], ids=str)
def test_numbers_that_the_dtype_does_not_have(shared: lk.HookedTransformer, chosen: dict[str, Any]) -> None:
    """Infinity is written as such; a number that would become it, or that torch would refuse, is an error."""
    half = deepcopy(shared).half()
    for model, number in ((half, 1e6), (half, -70000), (shared, 1e300), (shared, 10**39)):
        error = refused(model, lk.Set("hook_embed", number, **chosen))
        assert type(error) is ValueFitError
        assert str(model.embed.weight.dtype) in error.expected


@pytest.mark.parametrize("kind", [lk.Set, lk.Add, lk.Scale])
def test_a_whole_number_that_no_float_reaches(shared: lk.HookedTransformer, kind: Any) -> None:
    with pytest.raises(PlanError):
        shared.run_with_hooks(TOKENS, hooks=[kind("hook_embed", 10**400)])


@pytest.mark.parametrize(
    "value", [None, "0", [0.0], (1.0,), True, np.zeros(3), np.float32(1), 1j, lambda act: act], ids=as_id
)
@pytest.mark.parametrize("kind", [lk.Set, lk.Add, lk.Scale])
def test_what_is_no_value(kind: Any, value: Any) -> None:
    with pytest.raises(PlanError, match=rf"{kind.__name__}\('hook_embed'") as told:
        kind("hook_embed", value)
    assert type(value).__name__ in told.value.got
    assert "a number, a tensor, or an expression" in told.value.expected


# -- expressions


def test_an_act_of_several_points(shared: lk.HookedTransformer) -> None:
    for at in ("blocks.*.hook_resid_post", "blocks.?.hook_resid_post", ["hook_embed"], "", 3, None):
        with pytest.raises(ExpressionError, match="an Act is one activation"):
            lk.Act(at)


def test_shapes_within_an_expression(shared: lk.HookedTransformer) -> None:
    for expression in (
        lk.Act("hook_embed") + lk.Act("blocks.0.attn.hook_q"),
        lk.Act("hook_embed") @ torch.zeros(3, 3),
        lk.Act("hook_embed", tokens=slice(0, 2)) + lk.Act("hook_embed", tokens=slice(0, 3)),
        torch.cat([lk.Act("hook_embed"), lk.Act("hook_logits")], 1),
        lk.Act("hook_embed")[:, :, 100],
        lk.Act("hook_embed").softmax(5),
        lk.Act("hook_embed")[lk.Act("hook_embed") > 0],
        shared.ln_final(lk.Act("blocks.0.attn.hook_q")),
    ):
        for op in (lk.Save(expression, name="x"), lk.Set("hook_logits", expression)):
            error = refused(shared, op)
            assert type(error) is ExpressionError
            assert "arguments" in error.got


def test_modules_of_another_model(shared: lk.HookedTransformer, tiny: Callable[..., lk.HookedTransformer]) -> None:
    other = tiny("gpt2", seed=1)
    for op in (
        lk.Save(other.unembed(lk.Act("hook_embed")), name="x"),
        lk.Set("hook_logits", other.unembed(other.ln_final(lk.Act("hook_embed")))),
    ):
        error = refused(shared, op)
        assert type(error) is ExpressionError
        assert "another model" in error.what


def test_modules_that_a_model_does_not_have(
    shared: lk.HookedTransformer, tiny: Callable[..., lk.HookedTransformer]
) -> None:
    """In a plan from a file, where modules are names."""
    small = tiny(
        shared.cfg.model_type, **{"gpt2": {"n_layer": 1}, "llama": {"num_hidden_layers": 1}}[shared.cfg.model_type]
    )
    ops = [lk.Save("hook_embed"), lk.Save(shared.blocks[2].ln1(lk.Act("hook_embed")), name="x")]
    plan = lk.Plan.from_json(lk.Plan(ops).to_json(shared))
    with pytest.raises(ExpressionError, match=r"the model has no module 'blocks\.2\.ln1'") as told:
        small.run_with_hooks(TOKENS, hooks=plan)
    assert told.value.what.startswith("hooks[1] Save(model.blocks.2.ln1(Act('hook_embed'))")


def test_a_save_of_an_expression_has_a_name_and_no_selectors() -> None:
    with pytest.raises(PlanError, match="an expression and no name"):
        lk.Save(lk.Act("hook_embed") * 2)
    with pytest.raises(PlanError, match="only steps") as told:
        lk.Save(lk.Act("hook_embed") * 2, tokens=-1, name="x")
    assert "tokens=-1" in told.value.got
    for kind in (lk.Set, lk.Add, lk.Scale):
        with pytest.raises(PlanError, match="only Save takes an expression"):
            kind(lk.Act("hook_embed"), 0.0)


@pytest.mark.parametrize("name", ["", 3, ["x"], b"x", lambda: "x"], ids=as_id)
def test_names_that_are_none(name: Any) -> None:
    with pytest.raises(PlanError, match="a name that is a string"):
        lk.Save("hook_embed", name=name)


# -- what ops are to each other


def test_values_that_need_the_future(shared: lk.HookedTransformer) -> None:
    """Both points are named: where the value is computed, and where it would be used."""
    early, late = "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"
    for op in (
        lk.Set(early, lk.Act(late)),
        lk.Add(early, lk.Act(late, tokens=-1)[:, None]),
        lk.Set(early, lk.Act(late, prompts=0), prompts=0),
        lk.Scale(early, lk.Act(late, prompts=1).mean()),
        lk.Set("blocks.*.hook_resid_pre", lk.Act("blocks.1.hook_resid_pre")),
        lk.Set([early, late], lk.Act(late)),
    ):
        error = refused(shared, op)
        assert type(error) is DependencyError
        assert "its own future" in error.what
        source = "blocks.1.hook_resid_pre" if "*" in repr(op) else late
        assert f"'{source}'" in error.got
        assert "'blocks.0.hook_resid_pre'" in error.got


def test_steps_that_need_later_ones(shared: lk.HookedTransformer) -> None:
    act = lk.Act("hook_embed", tokens=-1, steps=2)
    error = refused(shared, lk.Set("hook_embed", act[:, None], steps=0), n=4)
    assert type(error) is DependencyError
    assert "at step 2" in error.got
    assert "at step 0" in error.got
    error = refused(shared, lk.Set("hook_embed", act[:, None]), n=4)
    assert type(error) is DependencyError
    error = refused(shared, lk.Save(act * lk.Act("hook_embed", tokens=-1), name="x"), n=4)
    assert type(error) is DependencyError
    assert "steps=slice(2, None)" in error.fix


def test_circles(shared: lk.HookedTransformer) -> None:
    """Each prompt first needs the other; the two places are named."""
    error = refused(
        shared,
        lk.Set("blocks.0.hook_resid_post", lk.Act("blocks.1.hook_resid_post", prompts=1), prompts=0),
        lk.Set("blocks.0.hook_mlp_out", lk.Act("blocks.2.hook_mlp_out", prompts=0), prompts=1),
    )
    assert type(error) is DependencyError
    assert "prompts 0, 1 need each other's future" in error.what
    for name in (
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
        "blocks.0.hook_mlp_out",
        "blocks.2.hook_mlp_out",
    ):
        assert f"'{name}'" in error.got


def test_keys_that_are_taken(shared: lk.HookedTransformer) -> None:
    for first, second in [
        (lk.Save("hook_logits"), lk.Save("hook_logits", tokens=-1)),
        (lk.Save("blocks.2.hook_resid_post"), lk.Save("blocks.-1.hook_resid_post")),
        (lk.Save("blocks.*.hook_resid_post"), lk.Save("blocks.1.hook_resid_post")),
        (lk.Save("hook_logits", name="x"), lk.Save("hook_embed", name="x")),
        (lk.Save("hook_logits", name="x"), lk.Save("blocks.*.hook_mlp_out", name="x")),
        (lk.Save("blocks.*.hook_mlp_out", name="x"), lk.Save(lk.Act("hook_embed") * 2, name="x")),
        (lk.Save("hook_logits", name="hook_embed"), lk.Save("hook_embed")),
        (lk.Save("blocks.*.hook_mlp_out", name="x"), lk.Save("blocks.*.hook_attn_out", name="x")),
    ]:
        error = refused(shared, first, second)
        assert type(error) is WithoutEffectError
        assert f"hooks[2] {first!r}" in error.got, "the other one is named too"
        assert "name" in error.fix


def test_ops_after_a_stop(shared: lk.HookedTransformer) -> None:
    stop = lk.Stop("blocks.1.hook_resid_mid")
    for op in (
        lk.Save("hook_logits"), lk.Set("blocks.1.hook_resid_mid", 0.0), lk.Save("blocks.*.hook_mlp_out"),
        ("blocks.2.hook_mlp_out", ran), lk.Save(lk.Act("blocks.1.hook_mlp_out") * 2, name="x"),
        lk.Stop("blocks.1.hook_resid_mid"), lk.Stop("hook_logits"),
    ):  # fmt: skip
        with pytest.raises(WithoutEffectError) as told:
            shared.run_with_hooks(TOKENS, hooks=[stop, op])
        assert told.value.what.startswith("hooks[1] ")
        assert "would never run" in told.value.what
        assert f"hooks[0] {stop!r}" in told.value.got
    with pytest.raises(WithoutEffectError):
        shared.run_with_hooks(TOKENS, hooks=[lk.Save("hook_logits"), stop])


def test_ops_after_a_stop_at_a_step(shared: lk.HookedTransformer) -> None:
    stop = lk.Stop("blocks.1.hook_resid_mid", steps=1)
    for op in (
        lk.Save("hook_embed", steps=2),
        lk.Save("hook_logits", steps=1),
        lk.Set("hook_embed", 0.0, steps=[0, 2]),
    ):
        error = refused(shared, stop, op, n=4)
        assert type(error) is WithoutEffectError
        assert "step 1" in error.got


def test_a_stop_is_at_one_point(shared: lk.HookedTransformer) -> None:
    error = refused(shared, lk.Stop("blocks.*.hook_resid_mid"))
    assert type(error) is WithoutEffectError
    assert "3 hook points" in error.got


def test_a_pass_that_has_to_end_by_itself(shared: lk.HookedTransformer) -> None:
    """A prefill and a cache are of a whole pass: a Stop, or hooks that take two, are refused before anything runs."""
    stop = [("hook_embed", ran), lk.Stop("blocks.0.hook_resid_post")]
    two = [("hook_embed", ran), lk.Set("blocks.0.hook_resid_pre", lk.Act("hook_logits", prompts=0).sum(), prompts=1)]
    for hooks in (stop, two):
        for run in (shared.prefill, shared.run_with_cache):
            with pytest.raises(LenskitError) as told:
                run(TOKENS, hooks=hooks)
            assert isinstance(told.value, InputError | PlanError)
            assert "run_with_hooks" in told.value.fix


def test_what_fails_while_it_runs_names_the_op(
    tiny: Callable[..., lk.HookedTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only values can tell: positions to gather that are not there."""
    monkeypatch.setattr(lk.HookedTransformer, "decode", Decoder.decode)
    act = lk.Act("hook_embed")
    wrong = act.gather(1, (act * 0).long() + 7)
    for op in (lk.Set("blocks.0.hook_resid_pre", wrong), lk.Save(wrong, name="x")):
        with pytest.raises(ExpressionError) as told:
            tiny("gpt2").run_with_hooks(TOKENS, hooks=[lk.Save("hook_embed"), op])
        said = "\n".join([str(told.value), *getattr(told.value, "__notes__", [])])
        assert f"hooks[1] {op!r}" in said


# -- lists of hooks


@pytest.mark.parametrize(
    "hooks",
    [
        None, 3, lk.Save("hook_embed"), "hook_embed", ["hook_embed"], [None], [("hook_embed",)], [("hook_embed", 3)],
        [lk.Act("hook_embed")], [lk.Save], [("hook_embed", ran, 0)], ("hook_embed", ran), [[lk.Save("hook_embed")]],
    ],
    ids=as_id,
)  # fmt: skip
def test_what_is_no_list_of_hooks(shared: lk.HookedTransformer, hooks: Any) -> None:
    for run in (lk.Plan, lambda hooks: shared.run_with_hooks(TOKENS, hooks=hooks)):
        with pytest.raises(HookError) as told:
            run(hooks)
        assert "lk.Save" in told.value.fix
        assert told.value.what.startswith("hooks")


def test_ops_belong_to_a_run(shared: lk.HookedTransformer) -> None:
    with (
        pytest.raises(HookError, match=r"hooks\[1\] is not a function") as told,
        shared.hooks([("hook_embed", ran), lk.Save("hook_embed")]),
    ):
        pass
    assert "run_with_hooks" in told.value.fix
    with pytest.raises(HookError, match=r"hooks\[0\] is not a function"):
        shared.run_with_hooks(TOKENS, bwd_hooks=[lk.Save("hook_embed")])


def test_an_op_is_immutable() -> None:
    op = lk.Set("hook_embed", 0.0)
    for name in ("at", "value", "selectors", "other"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(op, name, 1)


def test_plans_that_cannot_be_data() -> None:
    for op, said in [(("hook_embed", ran), "a Python function"), (lk.Save(lambda name: True), "a predicate on names")]:
        with pytest.raises(PlanFormatError, match=r"hooks\[1\]") as told:
            lk.Plan([lk.Save("hook_embed", name="x"), op]).to_json()
        assert said in told.value.got


def test_classes_say_what_kind_of_mistake_it_is() -> None:
    assert issubclass(SelectorError, PlanError)
    assert issubclass(SelectorError, ValueError)
    assert issubclass(ValueFitError, ValueError)
    assert issubclass(StepError, ValueError)
    assert issubclass(ExpressionError, TypeError)
    assert issubclass(UnknownHookPointError, KeyError)
    assert not issubclass(PlanError, HookError)


def test_a_save_beside_a_cache_is_not_lost_in_silence(shared: lk.HookedTransformer) -> None:
    with pytest.raises(lk.errors.InputError) as refused:
        shared.run_with_cache([1, 2, 3], "hook_embed", hooks=[lk.Save("hook_logits")])
    assert refused.value.what == "hooks[0] Save('hook_logits') would be lost"
    assert "names=" in refused.value.fix
