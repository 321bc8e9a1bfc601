"""Hooks: where they can be put, what they see and change, how long they stay, and what is refused."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from threading import Barrier, Event, Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity_table import WRITTEN_OUT, error, ids
from torch import Tensor, nn

import lenskit as lk
from lenskit.errors import AxisError, HookConflictError, HookError, ReplacementError, UnknownHookPointError
from lenskit.hooks import Attachment, attach
from lenskit.interventions import scope

CLOSE = 1e-5
LENGTH = 9
TOKENS = ids(2, LENGTH)

Edit = Callable[[Tensor], Tensor]

BY_HEAD = ["hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"]
IN_A_BLOCK = [
    "hook_resid_pre", *BY_HEAD, "ln1.hook_scale", "ln1.hook_normalized", "ln1.hook_out", "attn.hook_q",
    "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern",
    "attn.hook_z", "attn.hook_result", "hook_attn_out", "hook_resid_mid", "hook_mlp_in", "ln2.hook_scale",
    "ln2.hook_normalized", "ln2.hook_out", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post",
    "hook_mlp_out", "hook_resid_post",
]  # fmt: skip
OUTSIDE = [
    "hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "ln_final.hook_out",
    "hook_logits",
]  # fmt: skip
NAMES = [*OUTSIDE, *(f"blocks.1.{name}" for name in IN_A_BLOCK)]
ABSENT = {"gpt2": ("rot_q", "rot_k", "pre_linear"), "llama": ("pos_embed",)}
NAMES_OF = {model_type: [name for name in NAMES if not name.endswith(ABSENT[model_type])] for model_type in WRITTEN_OUT}
EVERY_POINT = pytest.mark.parametrize(
    ("model_type", "name"),
    [(model_type, name) for model_type in WRITTEN_OUT for name in NAMES_OF[model_type]],
    indirect=["model_type"],
)


def reference(model: lk.HookedTransformer, tokens: Tensor, edits: dict[str, Edit]) -> tuple[Tensor, dict[str, Tensor]]:
    """The forward pass written out once more, from the weights in the shapes of the papers.

    Every activation goes through the edit of its name. Returns the logits, and all activations after their edits.
    """
    cfg, llama = model.cfg, model.cfg.model_type == "llama"
    seen: dict[str, Tensor] = {}

    def at(name: str, x: Tensor) -> Tensor:
        seen[name] = edits.get(name, lambda same: same)(x)
        return seen[name]

    def norm(module: nn.Module, x: Tensor, name: str | None) -> Tensor:
        x = x if llama else x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + cfg.eps).sqrt()
        scale = at(f"{name}.hook_scale", scale) if name else scale
        normalized = at(f"{name}.hook_normalized", x / scale) if name else x / scale
        gained = normalized * module.weight + (0.0 if llama else module.bias)
        return at(f"{name}.hook_out", gained) if name else gained

    def turn(x: Tensor) -> Tensor:
        if not llama:
            return x
        pairs = torch.arange(cfg.d_head // 2)
        angles = torch.arange(x.shape[1])[:, None, None] * cfg.rope.theta ** (-2 * pairs / cfg.d_head)
        a, b = x.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    def attention(block: nn.Module, inputs: Sequence[Tensor], name: str) -> Tensor:
        attn = block.attn
        q, k, v = (
            at(f"{name}.hook_{short}", torch.einsum("bphm,hmd->bphd", x, weight) + bias)
            for short, x, weight, bias in zip(
                "qkv", inputs, (attn.W_Q, attn.W_K, attn.W_V), (attn.b_Q, attn.b_K, attn.b_V), strict=True
            )
        )
        q, k = at(f"{name}.hook_rot_q", turn(q)), at(f"{name}.hook_rot_k", turn(k))
        k, v = (x.repeat_interleave(cfg.n_heads // cfg.n_key_value_heads, 2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(cfg.d_head)
        ahead = torch.ones(scores.shape[-2:]).triu(1).bool()
        pattern = at(f"{name}.hook_attn_scores", scores.masked_fill(ahead, -torch.inf)).softmax(-1)
        z = at(f"{name}.hook_z", torch.einsum("bhqk,bkhd->bqhd", at(f"{name}.hook_pattern", pattern), v))
        return at(f"{name}.hook_result", torch.einsum("bphd,hdm->bphm", z, attn.W_O)).sum(2) + attn.b_O

    def mlp(block: nn.Module, x: Tensor, name: str) -> Tensor:
        pre = x @ (block.mlp.W_gate if llama else block.mlp.W_in) + (block.mlp.b_gate if llama else block.mlp.b_in)
        act = nn.functional.silu if llama else partial(nn.functional.gelu, approximate="tanh")
        post = act(at(f"{name}.hook_pre", pre))
        if llama:
            post = post * at(f"{name}.hook_pre_linear", x @ block.mlp.W_in + block.mlp.b_in)
        return at(f"{name}.hook_post", post) @ block.mlp.W_out + block.mlp.b_out

    resid = at("hook_embed", model.embed.W_E[tokens])
    if not llama:
        resid = resid + at("hook_pos_embed", model.pos_embed.W_pos[: tokens.shape[1]].expand_as(resid))
    for layer, block in enumerate(model.blocks):
        name = f"blocks.{layer}"
        resid = at(f"{name}.hook_resid_pre", resid)
        read = norm(block.ln1, resid, f"{name}.ln1").unsqueeze(2)
        inputs = [read.expand(-1, -1, n, -1) for n in (cfg.n_heads, cfg.n_key_value_heads, cfg.n_key_value_heads)]
        attn_in = at(f"{name}.hook_attn_in", resid.unsqueeze(2).expand_as(inputs[1]))
        by_query_head = attn_in.repeat_interleave(cfg.n_heads // cfg.n_key_value_heads, 2)
        own = [at(f"{name}.{n}", x) for n, x in zip(BY_HEAD[1:], (by_query_head, attn_in, attn_in), strict=True)]
        if any(f"{name}.{point}" in edits for point in BY_HEAD):
            inputs = [norm(block.ln1, x, None) for x in own]
        attn_out = at(f"{name}.hook_attn_out", attention(block, inputs, f"{name}.attn"))
        resid = at(f"{name}.hook_resid_mid", resid + attn_out)
        mlp_in = norm(block.ln2, at(f"{name}.hook_mlp_in", resid), f"{name}.ln2")
        resid = at(f"{name}.hook_resid_post", resid + at(f"{name}.hook_mlp_out", mlp(block, mlp_in, f"{name}.mlp")))
    return at("hook_logits", norm(model.ln_final, resid, "ln_final") @ model.unembed.W_U), seen


def noisy(name: str) -> Edit:
    """Makes another activation of one, the same one every time; a scale stays positive, -inf stays -inf."""

    def edit(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(7))
        return 0.5 * x + 0.3 * noise

    return edit


def hook(edit: Edit) -> Callable[[Tensor, lk.HookPoint], Tensor]:
    """An edit as a hook function."""
    return lambda act, hook: edit(act)


def not_by_head(name: str) -> bool:
    """All points that may be edited at once: those by head exclude the norm before them."""
    return not name.endswith(tuple(BY_HEAD))


def double(act: Tensor, hook: lk.HookPoint) -> Tensor:
    return 2 * act


def nothing_attached(model: lk.HookedTransformer) -> bool:
    return all(point.attachments is None for point in model.hook_points.values())


@pytest.fixture(autouse=True)
def leaves_nothing_attached(request: pytest.FixtureRequest) -> object:
    """Whatever a test does to the shared models, no hook outlives it."""
    yield
    if "shared" in request.fixturenames:
        assert nothing_attached(request.getfixturevalue("shared"))


# -- what a point is


def test_a_point_knows_its_axes() -> None:
    point = lk.HookPoint("batch pos head d_head", head=3, d_head=8)
    assert point.axes == ("batch", "pos", "head", "d_head")
    assert [point.axis(name) for name in point.axes] == [0, 1, 2, 3]
    assert point.shape(batch=2, pos=5) == (2, 5, 3, 8)
    assert repr(point) == "HookPoint(batch pos head d_head)"
    assert repr(lk.HookPoint("batch pos", on_demand=True)) == "HookPoint(batch pos, on demand)"


def test_an_axis_that_a_point_lacks(shared: lk.HookedTransformer) -> None:
    with pytest.raises(AxisError) as refused:
        shared.hook_points["blocks.0.hook_resid_pre"].axis("head")
    assert str(refused.value).splitlines()[:3] == [
        "hook point 'blocks.0.hook_resid_pre' has no axis 'head'",
        "  got:      'head'",
        "  expected: one of batch, pos, d_model",
    ]


def test_an_unused_point_gives_back_the_very_tensor() -> None:
    x = torch.ones(3)
    assert lk.HookPoint("pos")(x) is x


def test_a_function_is_told_the_point(shared: lk.HookedTransformer) -> None:
    told: dict[str, tuple[int | None, tuple[str, ...]]] = {}
    tell = lambda act, hook: told.update({hook.name: (hook.layer, hook.axes)})  # noqa: E731
    shared.run_with_hooks(TOKENS, [(not_by_head, tell)])
    shared.run_with_hooks(TOKENS, [(lambda name: not not_by_head(name), tell)])
    assert told["blocks.2.attn.hook_q"] == (2, ("batch", "pos", "head", "d_head"))
    assert told["hook_embed"] == (None, ("batch", "pos", "d_model"))
    assert told["ln_final.hook_scale"] == (None, ("batch", "pos", "1"))
    assert told.keys() == shared.hook_points.keys()


def test_points_are_those_of_the_design_in_the_order_of_the_forward_pass(shared: lk.HookedTransformer) -> None:
    absent = ABSENT[shared.cfg.model_type]
    blocks = [f"blocks.{layer}.{name}" for layer in range(3) for name in IN_A_BLOCK]
    assert {n for n in [*OUTSIDE, *blocks] if not n.endswith(absent)} == shared.hook_points.keys()
    ran: list[str] = []
    shared.run_with_hooks(TOKENS, [(not_by_head, lambda act, hook: ran.append(hook.name))])
    assert ran == [name for name in shared.hook_points if name in ran]
    assert len(ran) == len(shared.hook_points) - 4 * 3


@given(rows=st.integers(1, 3), length=st.integers(1, 12))
@torch.no_grad()
def test_shapes_are_those_of_the_activations(shared: lk.HookedTransformer, rows: int, length: int) -> None:
    tokens = ids(rows, length)
    _, cache = shared.run_with_cache(tokens, "*")
    assert shared.shapes(tokens) == {name: tuple(activation.shape) for name, activation in cache.items()}


def test_shapes_compute_nothing(shared: lk.HookedTransformer) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model ran")

    with shared.hooks([("*", refuse)]):
        assert shared.shapes([[1, 2, 3], [4]])["blocks.0.attn.hook_pattern"][-2:] == (3, 3)


# -- what an edit does, at every point there is


@EVERY_POINT
@torch.no_grad()
def test_an_edit_has_the_effect_that_the_model_written_out_says(
    shared: lk.HookedTransformer, model_type: str, name: str
) -> None:
    edit = noisy(name)
    plain, _ = reference(shared, TOKENS, {})
    wanted, everything = reference(shared, TOKENS, {name: edit})
    assert error(shared(TOKENS), plain) < CLOSE
    assert error(wanted, plain) > 1e-3, "the edit is too small to tell"

    assert error(shared.run_with_hooks(TOKENS, [(name, hook(edit))]).logits, wanted) < CLOSE
    with shared.hooks([(name, hook(edit))]):
        logits, cache = shared.run_with_cache(TOKENS, None if ".ln1." in name else "*")
    assert error(logits, wanted) < CLOSE
    for point, activation in cache.items():
        assert error(activation.nan_to_num(neginf=0.0), everything[point].nan_to_num(neginf=0.0)) < CLOSE, point


@EVERY_POINT
@torch.no_grad()
def test_an_edit_in_place_does_what_a_replacement_does(
    shared: lk.HookedTransformer, model_type: str, name: str
) -> None:
    def in_place(act: Tensor, hook: lk.HookPoint) -> None:
        act.copy_(noisy(name)(act))

    replaced = shared.run_with_hooks(TOKENS, [(name, hook(noisy(name)))]).logits
    assert torch.equal(shared.run_with_hooks(TOKENS, [(name, in_place)]).logits, replaced)


@EVERY_POINT
@torch.no_grad()
def test_returning_none_or_the_same_changes_nothing(shared: lk.HookedTransformer, model_type: str, name: str) -> None:
    for function in (lambda act, hook: None, lambda act, hook: act):
        assert error(shared.run_with_hooks(TOKENS, [(name, function)]).logits, shared(TOKENS)) < CLOSE


PROJECTIONS = {"hook_q": ("W_Q", "b_Q"), "hook_k": ("W_K", "b_K"), "hook_v": ("W_V", "b_V"), "hook_z": ("W_O",)}


@pytest.mark.parametrize("name", PROJECTIONS)
@torch.no_grad()
def test_scaling_a_head_is_scaling_its_weights(
    tiny: Callable[..., lk.HookedTransformer], model_type: str, name: str
) -> None:
    """Also where keys and values have fewer heads than queries."""
    fresh = tiny(model_type, **({"attention_bias": True} if model_type == "llama" else {}))
    head = 1

    def scale(act: Tensor, hook: lk.HookPoint) -> None:
        act[:, :, head] *= 3

    hooked = fresh.run_with_hooks(TOKENS, [(f"blocks.1.attn.{name}", scale)]).logits
    unhooked = fresh(TOKENS)
    for weight in PROJECTIONS[name]:
        getattr(fresh.blocks[1].attn, weight)[head] *= 3
    assert error(fresh(TOKENS), hooked) < CLOSE
    assert error(unhooked, hooked) > 1e-3


@torch.no_grad()
def test_a_key_value_head_serves_its_group_of_queries(tiny: Callable[..., lk.HookedTransformer]) -> None:
    model = tiny("llama")
    assert (model.cfg.n_heads, model.cfg.n_key_value_heads) == (4, 2)

    def silence(act: Tensor, hook: lk.HookPoint) -> None:
        act[:, :, 1] = 0

    with model.hooks([("blocks.0.attn.hook_v", silence)]):
        _, cache = model.run_with_cache(TOKENS, "*.hook_z")
    assert [bool(cache["z", 0][:, :, head].any()) for head in range(4)] == [True, True, False, False]


@torch.no_grad()
def test_an_edit_of_what_the_mlp_reads_leaves_the_stream_alone(shared: lk.HookedTransformer) -> None:
    _, before = shared.run_with_cache(TOKENS)
    with shared.hooks([("blocks.1.hook_mlp_in", lambda act, hook: act.zero_())]):
        _, after = shared.run_with_cache(TOKENS)
    assert torch.equal(after["resid_mid", 1], before["resid_mid", 1])
    assert torch.equal(after["resid_post", 1], before["resid_mid", 1] + after["mlp_out", 1])
    assert not torch.equal(after["mlp_out", 1], before["mlp_out", 1])


@torch.no_grad()
def test_each_head_reads_an_input_of_its_own(shared: lk.HookedTransformer) -> None:
    def silence(act: Tensor, hook: lk.HookPoint) -> None:
        act[:, :, 1] = 0

    _, before = shared.run_with_cache(TOKENS)
    with shared.hooks([("blocks.1.hook_q_input", silence)]):
        _, after = shared.run_with_cache(TOKENS)
    for head in range(shared.cfg.n_heads):
        changed = error(after["q", 1][:, :, head], before["q", 1][:, :, head]) > CLOSE
        assert changed == (head == 1)
    for other in ("k", "v"):
        assert error(after[other, 1], before[other, 1]) < CLOSE
    assert torch.equal(after["resid_pre", 1], before["resid_pre", 1])


@torch.no_grad()
def test_functions_run_in_list_order_whatever_names_them(shared: lk.HookedTransformer) -> None:
    name = "blocks.1.hook_mlp_out"
    add = (name, lambda act, hook: act + 1)
    times = ("blocks.*.hook_mlp_out", lambda act, hook: act * 3 if hook.layer == 1 else None)
    seen = []
    look = (name, lambda act, hook: seen.append(act.clone()))
    shared.run_with_hooks(TOKENS, [look, add, look, times, look])
    shared.run_with_hooks(TOKENS, [times, add, look])
    before, added, multiplied, other_order = seen
    assert torch.equal(added, before + 1)
    assert torch.equal(multiplied, (before + 1) * 3)
    assert torch.equal(other_order, before * 3 + 1)


def test_the_result_tells_the_batch(shared: lk.HookedTransformer) -> None:
    result = shared.run_with_hooks([[1, 2, 3], [4]])
    assert torch.equal(result.tokens[0], torch.tensor([1, 2, 3]))
    assert int(result.tokens[1, -1]) == 4
    assert torch.equal(result.mask, torch.tensor([[True, True, True], [False, False, True]]))
    assert torch.equal(result.logits[result.mask], shared([[1, 2, 3], [4]])[result.mask])
    assert shared.run_with_hooks(TOKENS).mask is None


# -- what a cache or an earlier function holds stays what it was

IN_PLACE = {
    "zero": lambda act: act.zero_(),
    "negate": lambda act: act.neg_(),
    "first row": lambda act: act[:1].mul_(7),
    "view": lambda act: act.transpose(0, 1).fill_(3),
    "through data": lambda act: act.data.fill_(2),
}


@given(data=st.data())
@torch.no_grad()
def test_later_edits_do_not_reach_what_was_kept(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    names = list(shared.hook_points)
    edited = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    edited = [name for name in edited if ".ln1." not in name] or ["hook_embed"]  # edits by head exclude these
    change = data.draw(st.sampled_from(sorted(IN_PLACE)))
    _, before = shared.run_with_cache(TOKENS, "*")
    held: dict[str, Tensor] = {}
    snapshots: dict[str, Tensor] = {}

    def keep(act: Tensor, hook: lk.HookPoint) -> None:
        held[hook.name], snapshots[hook.name] = act, act.clone()

    def spoil(act: Tensor, hook: lk.HookPoint) -> None:
        IN_PLACE[change](act)

    upstream = names[: min(names.index(name) for name in edited)]
    with shared.hooks([(lambda name: ".ln1." not in name, keep), (edited, spoil)]):
        _, after = shared.run_with_cache(TOKENS, "*")
    for name in upstream:
        assert torch.equal(after[name], before[name]), name
    assert len(held) == len(names) - 3 * shared.cfg.n_layers
    for name, snapshot in snapshots.items():
        assert torch.equal(held[name].nan_to_num(), snapshot.nan_to_num()), name


@torch.no_grad()
def test_a_cache_taken_before_an_edit_on_the_same_point_keeps_the_original(shared: lk.HookedTransformer) -> None:
    """Whatever attached it: reading attachments do not copy, editing ones have to."""
    point = shared.hook_points["blocks.1.hook_resid_pre"]
    _, before = shared.run_with_cache(TOKENS)
    inside = ExitStack()

    def attach_edits(act: Tensor, hook: lk.HookPoint) -> None:
        inside.enter_context(shared.hooks([(point.name, lambda act, hook: act.zero_())]))

    with inside, shared.hooks([("hook_embed", attach_edits)]):
        logits, cache = shared.run_with_cache(TOKENS)
    assert torch.equal(cache["resid_pre", 1], before["resid_pre", 1])
    assert torch.equal(cache["resid_post", 0], before["resid_post", 0])
    assert not torch.equal(logits, shared(TOKENS))


def test_a_replacement_that_is_kept_and_changed_later_changes_no_cache(shared: lk.HookedTransformer) -> None:
    replacement = torch.zeros(2, LENGTH, shared.cfg.d_model)
    with (
        torch.no_grad(),
        shared.hooks(
            [
                ("blocks.0.hook_mlp_out", lambda act, hook: replacement),
                ("blocks.1.hook_mlp_out", lambda act, hook: act.fill_(5)),
            ]
        ),
    ):
        _, cache = shared.run_with_cache(TOKENS)
    assert not cache["mlp_out", 0].any()
    assert not replacement.any()


# -- names


def test_names(shared: lk.HookedTransformer) -> None:
    def named(site: object) -> list[str]:
        return shared.hook_names(site)

    assert named("blocks.1.attn.hook_q") == ["blocks.1.attn.hook_q"]
    assert named("blocks.-1.attn.hook_q") == ["blocks.2.attn.hook_q"]
    assert named("blocks.-3.attn.hook_q") == ["blocks.0.attn.hook_q"]
    assert named("blocks.*.attn.hook_q") == [f"blocks.{layer}.attn.hook_q" for layer in range(3)]
    assert named("blocks.-1.ln?.hook_scale") == ["blocks.2.ln1.hook_scale", "blocks.2.ln2.hook_scale"]
    assert named("blocks.[02].hook_mlp_out") == ["blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"]
    assert named(lambda name: name.endswith("hook_z")) == [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    assert named(
        ["hook_logits", "blocks.-1.hook_resid_mid", "*.hook_resid_mid", lambda name: name == "hook_embed"]
    ) == [
        "hook_embed",
        *(f"blocks.{layer}.hook_resid_mid" for layer in range(3)),
        "hook_logits",
    ]
    assert named(["hook_embed", ["hook_logits"]]) == ["hook_embed", "hook_logits"]
    assert named("*") == shared.hook_names() == list(shared.hook_points)
    assert all(point.name == name for name, point in shared.hook_points.items())


def test_a_list_runs_a_function_once_at_each_point(shared: lk.HookedTransformer) -> None:
    ran = []
    site = ["blocks.0.hook_mlp_out", "blocks.*.hook_mlp_out", "blocks.-3.hook_mlp_out"]
    shared.run_with_hooks(TOKENS, [(site, lambda act, hook: ran.append(hook.name))])
    assert ran == [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]


@pytest.mark.parametrize(
    ("site", "got", "near"),
    [
        ("blocks.0.attn.hook_qq", "'blocks.0.attn.hook_qq'", "blocks.0.attn.hook_q"),
        ("blocks.3.hook_resid_post", "'blocks.3.hook_resid_post'", "blocks.2.hook_resid_post"),
        ("blocks.-4.hook_resid_post", "'blocks.-4.hook_resid_post'", "blocks.2.hook_resid_post"),
        ("blocks.*.attn.hook_queries", "'blocks.*.attn.hook_queries'", "attn.hook_"),
        ("hook_resid_pre", "'hook_resid_pre'", "hook_"),
        ("zzz", "'zzz'", "hook_logits"),
        ("", "''", "hook_logits"),
        ([], "an empty list", "hook_logits"),
        (["hook_embed", "hook_embd"], "'hook_embd'", "hook_embed"),
        (["hook_embed", []], "an empty list", "hook_logits"),
        (lambda name: False, "predicate <lambda>", "hook_logits"),
        (3, "3 (a int)", "hook_logits"),
    ],
)
def test_a_site_that_matches_nothing(shared: lk.HookedTransformer, site: object, got: str, near: str) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model ran")

    for use in (
        lambda: shared.hook_names(site),
        lambda: shared.run_with_cache(TOKENS, site),
        lambda: shared.run_with_hooks(TOKENS, [("*", refuse), (site, refuse)]),
        lambda: shared.run_with_hooks(TOKENS, [("*", refuse)], bwd_hooks=[(site, refuse)]),
        lambda: shared.hooks([(site, refuse)]),
    ):
        with pytest.raises(UnknownHookPointError) as refused:
            use()
        lines = str(refused.value).splitlines()
        assert lines[0].endswith(f"no hook point matches {got}")
        assert lines[1] == f"  got:      {got}"
        assert near in lines[2]
        assert "model.hook_names()" in lines[3]


def test_a_point_that_this_architecture_lacks(tiny: Callable[..., lk.HookedTransformer]) -> None:
    with pytest.raises(UnknownHookPointError, match=r"blocks\.0\.attn\.hook_rot_q"):
        tiny("gpt2").run_with_hooks(TOKENS, [("blocks.0.attn.hook_rot_q", double)])
    with pytest.raises(KeyError, match="hook_pos_embed"):
        tiny("llama").run_with_cache(TOKENS, "hook_pos_embed")


@pytest.mark.parametrize(
    "wrong", [("hook_embed",), "hook_embed", ("hook_embed", 3), ("hook_embed", double, "more"), double, None]
)
def test_what_is_no_hook(shared: lk.HookedTransformer, wrong: object) -> None:
    for use in (shared.hooks, partial(shared.run_with_hooks, TOKENS)):
        with pytest.raises(HookError) as refused:
            use([("hook_embed", double), wrong])
        assert str(refused.value).startswith(f"hooks[1] is not a hook\n  got:      {wrong!r}\n")
        assert "pairs (name, glob or predicate; function of (activation, hook))" in str(refused.value)


# -- what cannot replace an activation


@pytest.mark.parametrize(
    ("replace", "got"),
    [
        (lambda act: act[:, :-1], "float32 (2, 8, {d_model}) on cpu"),
        (lambda act: act[0], "float32 (9, {d_model}) on cpu"),
        (lambda act: act.new_zeros(()), "float32 () on cpu"),
        (lambda act: act.half(), "float16 (2, 9, {d_model}) on cpu"),
        (lambda act: act.double(), "float64 (2, 9, {d_model}) on cpu"),
        (lambda act: act.to("meta"), "float32 (2, 9, {d_model}) on meta"),
        (lambda act: 0.0, "float"),
        (lambda act: (act,), "tuple"),
        (lambda act: act.numpy(), "ndarray"),
    ],
)
@torch.no_grad()
def test_what_cannot_stand_where_the_activation_stood(shared: lk.HookedTransformer, replace: Edit, got: str) -> None:
    name, d_model = "blocks.1.hook_resid_mid", shared.cfg.d_model
    with pytest.raises(ReplacementError) as refused:
        shared.run_with_hooks(TOKENS, [(name, hook(replace))])
    assert str(refused.value).splitlines() == [
        f"a hook on {name!r} returned something that cannot replace the activation",
        f"  got:      {got.format(d_model=d_model)}",
        f"  expected: float32 (2, 9, {d_model}) on cpu [batch pos d_model], or None to leave it",
        "  to do:    return a tensor of the activation's own shape, dtype and device",
    ]
    assert nothing_attached(shared)


@torch.no_grad()
def test_the_layout_of_a_replacement_is_the_points_own(shared: lk.HookedTransformer) -> None:
    """[batch pos head d_head], though the heads come first in the tensor that flows."""
    shape = (2, LENGTH, shared.cfg.n_heads, shared.cfg.d_head)
    with pytest.raises(ReplacementError, match=r"\[batch pos head d_head\]") as refused:
        shared.run_with_hooks(TOKENS, [("blocks.0.attn.hook_q", lambda act, hook: act.transpose(1, 2))])
    assert f"float32 {shape} on cpu" in refused.value.expected
    any_layout = torch.rand(shape).transpose(1, 2).contiguous().transpose(1, 2)
    for new in (any_layout, any_layout.contiguous()):
        with shared.hooks([("blocks.0.attn.hook_q", lambda act, hook, new=new: new)]):
            _, cache = shared.run_with_cache(TOKENS)
        assert torch.equal(cache["q", 0], any_layout)


@torch.no_grad()
def test_no_dtype_is_cast_silently(fresh: lk.HookedTransformer) -> None:
    with pytest.raises(ReplacementError, match="float32") as refused:
        fresh.to(torch.bfloat16).run_with_hooks(TOKENS, [("hook_embed", lambda act, hook: act.float())])
    assert refused.value.expected.startswith("bfloat16")


# -- how long they stay


@torch.no_grad()
def test_scopes_nest_and_inner_ones_leave_outer_ones(shared: lk.HookedTransformer) -> None:
    outer, inner = ("blocks.0.hook_mlp_out", double), ("blocks.*.hook_mlp_out", lambda act, hook: act + 1)
    plain = shared(TOKENS)
    with_outer = shared.run_with_hooks(TOKENS, [outer]).logits
    with_both = shared.run_with_hooks(TOKENS, [outer, inner]).logits
    assert len({float(logits.sum()) for logits in (plain, with_outer, with_both)}) == 3
    with shared.hooks([outer]):
        assert torch.equal(shared(TOKENS), with_outer)
        with shared.hooks([inner]):
            assert torch.equal(shared(TOKENS), with_both)
            assert torch.equal(shared.run_with_cache(TOKENS, "hook_logits")[0], with_both)
        assert torch.equal(shared(TOKENS), with_outer)
        assert torch.equal(shared.run_with_hooks(TOKENS, [inner]).logits, with_both)
        assert torch.equal(shared(TOKENS), with_outer)
    assert torch.equal(shared(TOKENS), plain)


@torch.no_grad()
def test_scopes_may_end_in_any_order(shared: lk.HookedTransformer) -> None:
    first, second = ("blocks.0.hook_mlp_out", double), ("blocks.0.hook_mlp_out", lambda act, hook: act + 1)
    with_second = shared.run_with_hooks(TOKENS, [second]).logits
    one, other = shared.hooks([first]), shared.hooks([second])
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(shared(TOKENS), with_second)
    other.__exit__(None, None, None)
    assert nothing_attached(shared)


@torch.no_grad()
def test_the_same_function_attached_twice_runs_twice_and_leaves_once(shared: lk.HookedTransformer) -> None:
    twice = shared.run_with_hooks(TOKENS, [("hook_embed", lambda act, hook: 4 * act)]).logits
    once = shared.run_with_hooks(TOKENS, [("hook_embed", double)]).logits
    with shared.hooks([("hook_embed", double)]):
        with shared.hooks([("hook_embed", double)]):
            assert torch.equal(shared(TOKENS), twice)
        assert torch.equal(shared(TOKENS), once)


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.attn.hook_pattern", "blocks.2.hook_q_input", "hook_logits"])
def test_an_error_or_an_interrupt_leaves_nothing_attached(
    shared: lk.HookedTransformer, failure: type[BaseException], name: str
) -> None:
    def fail(act: Tensor, hook: lk.HookPoint) -> None:
        raise failure(hook.name)

    plain = shared(TOKENS)
    with pytest.raises(failure, match=name):
        shared.run_with_hooks(
            TOKENS, [("*.hook_z", lambda act, hook: None), (name, fail)], bwd_hooks=[("*.hook_z", double)]
        )
    assert nothing_attached(shared)
    with pytest.raises(failure, match=name), shared.hooks([(name, fail)]):
        shared.run_with_cache(TOKENS, "*")
    assert nothing_attached(shared)
    assert torch.equal(shared(TOKENS), plain)


def test_an_interrupt_while_attaching_leaves_nothing_attached(
    shared: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(attachments: list[tuple[lk.HookPoint, Attachment]]) -> None:
        attach(attachments[:20])
        assert not nothing_attached(shared)
        raise KeyboardInterrupt

    monkeypatch.setattr(scope, "attach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shared.run_with_cache(TOKENS)
    assert nothing_attached(shared)


def test_input_that_is_refused_attaches_nothing(shared: lk.HookedTransformer) -> None:
    with pytest.raises(lk.errors.InputError):
        shared.run_with_hooks([], [("*", double)])
    with pytest.raises(UnknownHookPointError):
        shared.hooks([("*", double), ("nowhere", double)])
    assert nothing_attached(shared)


# -- threads


@torch.no_grad()
def test_threads_do_not_see_each_others_hooks(shared: lk.HookedTransformer) -> None:
    hooks = [("blocks.*.hook_mlp_out", double)], [("blocks.*.attn.hook_z", lambda act, hook: act.neg_())]
    wanted = [shared.run_with_hooks(TOKENS, hook).logits for hook in hooks]
    plain = shared(TOKENS)
    together, wrong = Barrier(2, timeout=60), []

    def run(index: int) -> None:
        with torch.no_grad(), shared.hooks(hooks[index]):
            for _ in range(20):
                together.wait()
                logits, cache = shared.run_with_cache(TOKENS, ["*.hook_mlp_out", "*.hook_z"])
                if error(logits, wanted[index]) > CLOSE or len(cache) != 6:
                    wrong.append(index)

    threads = [Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert error(shared(TOKENS), plain) < CLOSE
    for thread in threads:
        thread.join()
    assert not wrong
    assert together.broken is False
    assert nothing_attached(shared)


@pytest.mark.parametrize("elsewhere", ["*.hook_q_input", "*.hook_attn_in", "*.hook_pattern", "*.hook_normalized"])
@pytest.mark.parametrize("here", ["*.ln1.hook_normalized", "*.ln1.hook_scale", "*.hook_attn_scores", "*.hook_q_input"])
@torch.no_grad()
def test_what_another_thread_asks_for_is_no_conflict(shared: lk.HookedTransformer, here: str, elsewhere: str) -> None:
    wanted = shared.run_with_hooks(TOKENS, [(here, double)]).logits
    attached, done = Event(), Event()

    def hold() -> None:
        with shared.hooks([(elsewhere, double)]):
            attached.set()
            done.wait(60)

    thread = Thread(target=hold)
    thread.start()
    try:
        assert attached.wait(60)
        assert error(shared.run_with_hooks(TOKENS, [(here, double)]).logits, wanted) < CLOSE
    finally:
        done.set()
        thread.join()


# -- gradients


def gradients(model: lk.HookedTransformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1).square().mean()


@EVERY_POINT
def test_backward_hooks_see_the_gradient_at_their_point(
    shared: lk.HookedTransformer, model_type: str, name: str
) -> None:
    """Only what passes through the point counts: hook_mlp_in has its own path's share, not the whole stream's."""
    probes: list[Tensor] = []

    def probe(x: Tensor) -> Tensor:
        probes.append(torch.zeros_like(x, requires_grad=True))
        return x + probes[0]

    loss(reference(shared, TOKENS, {name: probe})[0]).backward()
    seen = []
    result = shared.run_with_hooks(TOKENS, bwd_hooks=[(name, lambda grad, hook: seen.append((hook.name, grad)))])
    assert nothing_attached(shared)
    assert not seen
    loss(result.logits).backward()
    [(told, gradient)] = seen
    assert told == name
    assert error(gradient, probes[0].grad) < 1e-4


@EVERY_POINT
def test_backward_hooks_replace_the_gradient_at_their_point(
    fresh: lk.HookedTransformer, model_type: str, name: str
) -> None:
    def in_place(grad: Tensor, hook: lk.HookPoint) -> None:
        grad.mul_(3)

    loss(reference(fresh, TOKENS, {name: lambda x: 3 * x - (2 * x).detach().nan_to_num(neginf=0.0)})[0]).backward()
    wanted = gradients(fresh)
    fresh.zero_grad()
    loss(fresh(TOKENS)).backward()
    assert any(error(gradient, wanted[parameter]) > 1e-3 for parameter, gradient in gradients(fresh).items())
    for function in (lambda grad, hook: 3 * grad, in_place):
        fresh.zero_grad()
        loss(fresh.run_with_hooks(TOKENS, bwd_hooks=[(name, function)]).logits).backward()
        for parameter, gradient in gradients(fresh).items():
            assert error(gradient, wanted[parameter]) < 1e-4, parameter


def test_backward_hooks_run_in_the_scope_that_made_the_graph(shared: lk.HookedTransformer) -> None:
    seen = []
    with shared.hooks(bwd_hooks=[("blocks.*.hook_resid_post", lambda grad, hook: seen.append(hook.layer))]):
        inside = shared(TOKENS)
    outside = shared(TOKENS)
    loss(outside).backward()
    assert seen == []
    loss(inside).backward()
    assert seen == [2, 1, 0]
    shared.zero_grad()


def test_a_gradient_that_does_not_fit_is_refused(shared: lk.HookedTransformer) -> None:
    result = shared.run_with_hooks(TOKENS, bwd_hooks=[("hook_embed", lambda grad, hook: grad[0])])
    with pytest.raises(ReplacementError, match="hook_embed"):
        loss(result.logits).backward()
    shared.zero_grad()


def test_a_gradient_that_would_never_come_is_an_error(fresh: lk.HookedTransformer) -> None:
    expected = "gradient hook on 'blocks.0.hook_resid_pre' would never run"
    with torch.no_grad(), pytest.raises(HookError, match=expected) as refused:
        fresh.run_with_hooks(TOKENS, bwd_hooks=[("blocks.0.hook_resid_pre", double)])
    assert "torch.no_grad()" in str(refused.value)
    fresh.requires_grad_(False)
    with pytest.raises(HookError, match=expected) as refused:
        fresh.run_with_hooks(TOKENS, bwd_hooks=[("blocks.0.hook_resid_pre", double)])
    assert "model.requires_grad_(True)" in str(refused.value)
    assert nothing_attached(fresh)


def test_gradients_flow_through_edits_and_into_replacements(shared: lk.HookedTransformer) -> None:
    steering = torch.zeros(shared.cfg.d_model, requires_grad=True)
    result = shared.run_with_hooks(TOKENS, [("blocks.1.hook_resid_mid", lambda act, hook: act + steering)])
    loss(result.logits).backward()
    by_hand = torch.zeros(shared.cfg.d_model, requires_grad=True)
    loss(reference(shared, TOKENS, {"blocks.1.hook_resid_mid": lambda x: x + by_hand})[0]).backward()
    assert error(steering.grad, by_hand.grad) < 1e-4
    shared.zero_grad()


@EVERY_POINT
def test_gradients_of_an_edited_model_are_those_of_the_model_written_out(
    fresh: lk.HookedTransformer, model_type: str, name: str
) -> None:
    """Also where the edit cuts most of the graph, as when a norm's scale or a pattern is frozen."""
    for edit in (noisy(name), lambda x: 0.9 * x.detach() + 0.1 * x):
        fresh.zero_grad()
        loss(reference(fresh, TOKENS, {name: edit})[0]).backward()
        wanted = gradients(fresh)
        fresh.zero_grad()
        loss(fresh.run_with_hooks(TOKENS, [(name, hook(edit))]).logits).backward()
        for parameter, gradient in gradients(fresh).items():
            assert error(gradient, wanted[parameter]) < 1e-4, parameter


def test_forward_and_backward_hooks_together(shared: lk.HookedTransformer) -> None:
    name, seen = "blocks.1.hook_mlp_out", []
    keep = (name, lambda grad, hook: seen.append(grad))
    result = shared.run_with_hooks(TOKENS, [(name, double)], bwd_hooks=[keep])
    loss(result.logits).backward()
    probe = torch.zeros(2, LENGTH, shared.cfg.d_model, requires_grad=True)
    loss(reference(shared, TOKENS, {name: lambda x: 2 * x + probe})[0]).backward()
    assert error(seen[0], probe.grad) < 1e-4
    shared.zero_grad()


# -- two hooks of which one would have no effect


@pytest.mark.parametrize("head_input", BY_HEAD)
@pytest.mark.parametrize("norm", ["ln1.hook_normalized", "ln1.hook_scale", "ln1.hook_out"])
@torch.no_grad()
def test_an_edit_of_the_norm_that_no_head_reads_is_an_error(
    shared: lk.HookedTransformer, head_input: str, norm: str
) -> None:
    look = (f"blocks.1.{head_input}", lambda act, hook: None)
    with pytest.raises(HookConflictError) as refused:
        shared.run_with_hooks(TOKENS, [look, (f"blocks.1.{norm}", double)])
    assert f"a hook on 'blocks.1.{norm}' would be without effect" in str(refused.value)
    assert "edit hook_q_input, hook_k_input or hook_v_input instead" in str(refused.value)
    with shared.hooks([(f"blocks.1.{norm}", double)]), pytest.raises(HookConflictError):
        shared.run_with_cache(TOKENS, f"blocks.1.{head_input}")

    # Elsewhere, or only read, there is no conflict.
    shared.run_with_hooks(TOKENS, [look, (f"blocks.0.{norm}", double), ("blocks.1.ln2.hook_scale", double)])
    _, cache = shared.run_with_cache(TOKENS, [f"blocks.1.{head_input}", f"blocks.1.{norm}"])
    assert len(cache) == 2


@pytest.mark.parametrize("head_input", BY_HEAD)
@pytest.mark.parametrize("norm", ["ln1.hook_normalized", "ln1.hook_scale", "ln1.hook_out"])
def test_a_gradient_of_the_norm_that_no_head_reads_is_an_error(
    shared: lk.HookedTransformer, head_input: str, norm: str
) -> None:
    """It would never come."""
    look = (f"blocks.1.{head_input}", lambda act, hook: None)
    with pytest.raises(HookConflictError, match=f"blocks.1.{norm}"):
        shared.run_with_hooks(TOKENS, [look], bwd_hooks=[(f"blocks.1.{norm}", double)])
