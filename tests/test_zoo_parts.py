"""Parts that the zoo is composed of, each against the plainest way to compute the same."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from folders import same_weights, save, told
from hypothesis import given
from hypothesis import strategies as st
from parity_table import Row, error, hf_folder, hf_model, ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lenskit as lk
from lenskit.errors import HookConflictError, LenskitError, UnknownTensorError
from lenskit.modules.adapter import adapt
from lenskit.modules.attention import Attention, ExtendedAttention, SinkSoftmax
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.kv_cache import KVCache
from lenskit.modules.latent import LatentQKV, UnevenAttention
from lenskit.modules.linear import Linear
from lenskit.modules.mlp import MLP, ClampedGatedMLP, FeedForward, GatedMLP
from lenskit.modules.moe import Choose, MixtureOfExperts, SharedExperts, SigmoidTopK, SoftmaxTopK, TopKSoftmax
from lenskit.modules.norms import LayerNorm, LayerNormByHead, Norm, OffsetRMSNorm, RMSNorm, RMSNormOverHeads
from lenskit.modules.position_bias import LinearBias, alibi_slopes
from lenskit.modules.qkv import QKV, FusedQKV, GroupedQKV, HeadInputs, SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary, RotaryTail
from lenskit.weights import Rule, split, unstack

D_MODEL, D_HEAD, HEADS = 12, 4, 6


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- projections


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kind", [SeparateQKV, FusedQKV, GroupedQKV])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_projections_are_their_weights_by_head(kind: type[QKV], groups: int, bias: bool) -> None:
    qkv = drawn(kind(D_MODEL, n_heads=HEADS, n_key_value_heads=groups, d_head=D_HEAD, bias=bias))
    x = random(2, 5, D_MODEL)
    inputs = HeadInputs(*(x[:, :, None].expand(-1, -1, n, -1) for n in (HEADS, groups, groups)), x)
    for projected, by_head, n in zip(qkv(x), qkv.by_head(inputs), (HEADS, groups, groups), strict=True):
        assert projected.shape == (2, n, 5, D_HEAD)
        assert error(projected, by_head) < 1e-6


def test_grouped_rows_are_a_groups_queries_then_its_key_then_its_value() -> None:
    qkv = drawn(GroupedQKV(D_MODEL, n_heads=4, n_key_value_heads=2, d_head=1, bias=False))
    W_Q, W_K, W_V = (weight[:, :, 0] for weight in qkv.weights())
    assert torch.equal(torch.cat((W_Q, W_K, W_V)), qkv.joined.weight[[0, 1, 4, 5, 2, 6, 3, 7]])


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> lk.HookedTransformer:
    return lk.HookedTransformer.from_pretrained(hf_folder(Row("x", "deepseek_v3"), tmp_path_factory.mktemp("hf")))


def latent_qkv(**changes: object) -> LatentQKV:
    sizes = {"d_plain": 5, "d_rotary": 2, "d_value": 3, "d_q_latent": 8, "d_kv_latent": 9, **changes}
    return drawn(LatentQKV(D_MODEL, n_heads=HEADS, eps=0.1, bias=True, **sizes))


@pytest.mark.parametrize("d_q_latent", [None, 8])
@torch.no_grad()
def test_projections_through_latents_are_products_around_a_norm(d_q_latent: int | None) -> None:
    qkv, x = latent_qkv(d_q_latent=d_q_latent), random(2, 5, D_MODEL)
    c_kv, k_shared = x @ qkv.W_DKV + qkv.kv_down.bias[:9], x @ qkv.W_KR + qkv.kv_down.bias[9:]
    c_kv, c_q = qkv.kv_latent.norm(c_kv), x
    if d_q_latent:
        c_q = qkv.q_latent.norm(x @ qkv.W_DQ + qkv.q_down.bias)
    q, k, v = qkv(x)
    assert error(q, c_q[:, None] @ qkv.W_UQ) < 1e-6
    assert error(k[..., :5], c_kv[:, None] @ qkv.W_UK) < 1e-6
    assert error(k[..., 5:], k_shared[:, None].expand(-1, HEADS, -1, -1)) < 1e-6
    assert error(v, c_kv[:, None] @ qkv.W_UV) < 1e-6
    copies = HeadInputs(*(x[:, :, None].expand(-1, -1, HEADS, -1) for _ in range(3)), x)
    for projected, by_head in zip((q, k, v), qkv.by_head(copies), strict=True):
        assert error(projected, by_head) < 1e-6


def test_heads_read_inputs_of_their_own_through_latents(latent: lk.HookedTransformer) -> None:
    _, before = latent.run_with_cache(ids(2, 9), ["blocks.1.attn.hook_[qkv]"])
    ops = [lk.Set("blocks.1.hook_k_input", 0.3, heads=2), *(lk.Save(f"blocks.1.attn.hook_{part}") for part in "qkv")]
    after = latent.run_with_hooks(ids(2, 9), ops).saved
    for part in "qkv":
        name = f"blocks.1.attn.hook_{part}"
        changed = (after[name] - before[name]).abs().amax((0, 1, 3)) > 1e-6
        assert changed.tolist() == [False, False, part == "k", False]


def test_an_edit_of_a_latent_reaches_every_head(latent: lk.HookedTransformer) -> None:
    ops = [lk.Set("blocks.1.attn.qkv.kv_latent.hook_latent", 0.0), lk.Save("blocks.1.attn.hook_v")]
    assert not latent.run_with_hooks(ids(2, 9), ops).saved["blocks.1.attn.hook_v"].any()


@pytest.mark.parametrize("point", ["q_latent.hook_latent", "kv_latent.norm.hook_scale", "hook_k_shared"])
def test_a_latents_edit_and_inputs_by_head_exclude_each_other(latent: lk.HookedTransformer, point: str) -> None:
    point = f"blocks.1.attn.qkv.{point}"
    latent.run_with_cache(ids(2, 9), [point, "blocks.1.hook_v_input"])
    with pytest.raises(HookConflictError, match=f"{point}(.|\n)*per-head inputs(.|\n)*in a pass of its own"):
        latent.run_with_hooks(ids(2, 9), [lk.Scale(point, 2.0), lk.Save("blocks.1.hook_v_input")])


def test_products_that_there_are_not_say_what_there_is(latent: lk.HookedTransformer) -> None:
    with pytest.raises(LenskitError, match=r"no products of the stream(.|\n)*attn.qkv.W_UQ"):
        _ = latent.W_Q
    with pytest.raises(LenskitError, match=r"no W_DQ(.|\n)*use W_UQ"):
        _ = latent_qkv(d_q_latent=None).W_DQ


# -- attention


def attention(**parts: object) -> ExtendedAttention:
    qkv = SeparateQKV(D_MODEL, n_heads=HEADS, n_key_value_heads=2, d_head=D_HEAD, bias=True)
    return drawn(ExtendedAttention(qkv, scale=0.3, bias=True, **parts))


@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_without_parts_it_is_the_plain_attention(window: int | None) -> None:
    extended = attention(window=window)
    plain = Attention(copy.deepcopy(extended.qkv), scale=0.3, bias=True, window=window)
    plain.load_state_dict(extended.state_dict())
    x = random(2, 7, D_MODEL)
    run = ForwardPass(7, x.device)
    assert error(extended(x, run), plain(x, run)) < 1e-6


PARTS = {
    "bias": lambda: {"position_bias": LinearBias(alibi_slopes(HEADS))},
    "rounded bias": lambda: {"position_bias": LinearBias(alibi_slopes(HEADS), rounded=torch.bfloat16)},
    "cap": lambda: {"cap": 0.7},
    "sinks": lambda: {"softmax": SinkSoftmax(HEADS)},
    "all": lambda: {
        "cap": 0.7, "softmax": SinkSoftmax(HEADS), "clip": 0.9, "position_bias": LinearBias(alibi_slopes(HEADS)),
        "q_norm": LayerNormByHead(D_HEAD, 1e-5, n_heads=HEADS), "k_norm": RMSNormOverHeads(D_HEAD, 1e-5, n_heads=2),
    },
}  # fmt: skip


def explicit(attn: ExtendedAttention, x: Tensor, run: ForwardPass) -> Tensor:
    """The same without the fused kernel."""
    attn = copy.deepcopy(attn)
    attn.fusible = False
    return attn(x, run)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_padding_and_the_cache_change_nothing(name: str, window: int | None) -> None:
    attn, x = attention(window=window, **PARTS[name]()), random(3, 9, D_MODEL)
    mask = torch.arange(9) >= torch.tensor([0, 2, 6])[:, None]
    together = attn(x, ForwardPass(9, x.device, mask))
    assert error(explicit(attn, x, ForwardPass(9, x.device, mask))[mask], together[mask]) < 1e-5
    cache, pieces, start = KVCache(), [], 0
    for n in (6, 1, 2):
        part, own = x[:, start : start + n], mask[:, start : start + n]
        pieces.append(attn(part, ForwardPass(n, x.device, own, cache=cache)))
        cache.advance(n, own)
        start += n
    assert error(torch.cat(pieces, 1)[mask], together[mask]) < 1e-5
    for row, kept in enumerate(mask):
        alone = attn(x[row : row + 1, kept], ForwardPass(int(kept.sum()), x.device))
        assert error(together[row, kept], alone[0]) < (1e-5 if "rounded" not in name else 0.02)


@pytest.mark.parametrize("d_value", [3, 11])
@torch.no_grad()
def test_values_may_be_narrower_or_wider_than_keys(d_value: int) -> None:
    attn = drawn(UnevenAttention(latent_qkv(d_value=d_value), scale=0.3, bias=True))
    x, mask = random(2, 7, D_MODEL), torch.arange(7) >= torch.tensor([0, 2])[:, None]
    z = attn.fused(*attn.qkv(x), ForwardPass(7, x.device, mask))
    assert z.shape == (2, HEADS, 7, d_value)
    by_hand = attn.explicit(*attn.qkv(x), ForwardPass(7, x.device, mask))
    assert error(z.transpose(1, 2)[mask], by_hand.transpose(1, 2)[mask]) < 1e-6


@torch.no_grad()
def test_values_of_another_width_keep_the_kernel_that_builds_no_matrix() -> None:
    attn, x = drawn(UnevenAttention(latent_qkv(), scale=0.3, bias=True)), random(2, 7, D_MODEL)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # nothing else is allowed to run
        attn.fused(*attn.qkv(x), ForwardPass(7, x.device))


@pytest.mark.parametrize("interleaved", [False, True])
@torch.no_grad()
def test_a_rotary_tail_leaves_the_rest(interleaved: bool) -> None:
    rotary, tail = (kind(RopeConfig(), d_head=4, n_ctx=9, interleaved=interleaved) for kind in (Rotary, RotaryTail))
    x, tables = random(2, 3, 5, 10), rotary.tables(torch.arange(5)[None], 5, torch.float32)
    assert torch.equal(tail(x, *tables)[..., :6], x[..., :6])
    assert torch.equal(tail(x, *tables)[..., 6:], rotary(x[..., 6:], *tables))


@torch.no_grad()
def test_a_linear_bias_falls_with_the_distance() -> None:
    run = ForwardPass(4, torch.device("cpu"))
    bias = LinearBias((0.5, 2.0)).bias(run, torch.float32, None)
    assert bias[0, 0].tolist()[3] == [-1.5, -1.0, -0.5, 0.0]
    assert bias[0, 1].tolist()[1][:2] == [-2.0, 0.0]


def test_slopes_are_the_papers() -> None:
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(12) == (*alibi_slopes(8), *(2.0 ** (-i / 2) for i in (1, 3, 5, 7)))


@torch.no_grad()
def test_a_sink_takes_its_share_of_every_row() -> None:
    softmax, scores = drawn(SinkSoftmax(HEADS)), random(2, HEADS, 3, 5)
    by_hand = scores.exp() / (scores.exp().sum(-1, keepdim=True) + softmax.sinks.exp()[:, None, None])
    assert error(softmax(scores, torch.float32), by_hand) < 1e-6


@torch.no_grad()
def test_without_its_sink_a_pattern_sums_to_one(tmp_path: Path) -> None:
    model, tokens = lk.HookedTransformer.from_pretrained(hf_folder(Row("x", "gpt_oss"), tmp_path)), ids(2, 9)
    point, pattern = "blocks.0.attn.softmax.hook_sink_scores", "blocks.0.attn.hook_pattern"
    _, cache = model.run_with_cache(tokens, [point, pattern])
    assert error(cache[point], model.blocks[0].attn.softmax.sinks[:, None, None].expand(2, -1, 9, 1)) == 0.0
    assert float(cache[pattern].sum(-1)[:, 1].min()) < 0.9
    ops = [lk.Set(point, float("-inf"), heads=1), lk.Save(pattern)]
    sums = model.run_with_hooks(tokens, ops).saved[pattern].sum(-1)
    assert error(sums[:, 1], torch.ones(2, 9)) < 1e-6
    assert torch.equal(sums[:, 0], cache[pattern].sum(-1)[:, 0])


# -- norms

NORMS = {
    "layer": LayerNorm(D_HEAD, 0.1),
    "layer, gains only": LayerNorm(D_HEAD, 0.1, bias=False),
    "layer, nothing learned": LayerNorm(D_HEAD, 0.1, weight=False, bias=False),
    "layer of heads": LayerNorm(D_HEAD, 0.1, n_heads=HEADS),
    "layer by head": LayerNormByHead(D_HEAD, 0.1, n_heads=HEADS),
    "rms of heads": RMSNorm(D_HEAD, 0.1, n_heads=HEADS),
    "rms, one more": OffsetRMSNorm(D_HEAD, 0.1),
    "rms over heads": RMSNormOverHeads(D_HEAD, 0.1, n_heads=HEADS),
}


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_norms_are_what_they_say(name: str) -> None:
    norm: Norm = drawn(copy.deepcopy(NORMS[name]))
    x = random(2, HEADS, 5, D_HEAD) if "head" in name else random(2, 5, D_HEAD)
    flat = x.transpose(1, 2).flatten(2) if name == "rms over heads" else x
    centred = flat - flat.mean(-1, keepdim=True) if name.startswith("layer") else flat
    normalized = centred / (centred.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    gains = norm.gains[:, None] if name == "layer by head" else norm.gains
    by_hand = normalized * gains + dict(norm.named_parameters()).get("bias", 0.0)
    if name == "rms over heads":
        by_hand = by_hand.unflatten(2, (HEADS, D_HEAD)).transpose(1, 2)
    assert error(norm(x), by_hand) < 1e-6
    norm.hook_scale.__dict__["attachments"] = ()  # somebody's, of another thread
    assert error(norm(x), by_hand) < 1e-6, "written out"


# -- MLPs


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_clamped_mlp_is_its_weights_and_its_limit_holds(bias: bool) -> None:
    mlp, x = drawn(ClampedGatedMLP(D_MODEL, 5, bias=bias, alpha=1.7, limit=0.5)), random(2, 7, D_MODEL)
    gate, linear = x @ mlp.W_gate + mlp.b_gate, x @ mlp.W_in + mlp.b_in
    assert float(gate.max()) > 0.5 > -0.5 > float(linear.min())
    gate, linear = gate.clamp(max=0.5), linear.clamp(-0.5, 0.5)
    by_hand = (gate * (1.7 * gate).sigmoid() * (linear + 1)) @ mlp.W_out + mlp.b_out
    assert error(mlp(x), by_hand) < 1e-6


@torch.no_grad()
def test_its_views_write_every_second_row() -> None:
    mlp = drawn(ClampedGatedMLP(D_MODEL, 5, bias=True, alpha=1.7, limit=0.5))
    mlp.W_gate.zero_()
    mlp.b_in.fill_(1.0)
    assert not mlp.w_in.weight[::2].any()
    assert bool(mlp.w_in.weight[1::2].all())
    assert mlp.w_in.bias[1::2].tolist() == [1.0] * 5
    assert 1.0 not in mlp.w_in.bias[::2].tolist()


# -- mixtures of experts


def mixture(choose: Choose, *, shared: bool = False, gate: bool = False) -> MixtureOfExperts:
    def mlp() -> GatedMLP:
        return GatedMLP(D_MODEL, 5, act_fn="silu", bias=False)

    common = {"router": Linear(D_MODEL, 8, bias=False), "choose": choose, "experts": [mlp() for _ in range(8)]}
    if shared:
        return drawn(SharedExperts(D_MODEL, **common, shared=mlp(), gate=gate))
    return drawn(MixtureOfExperts(D_MODEL, **common))


GROUPED = {"n_experts": 8, "n_groups": 4, "top_groups": 2, "normalised": True, "multiplier": 2.5}
CHOICES = {
    "softmax": lambda: SoftmaxTopK(3, normalised=False),
    "softmax, normalised": lambda: SoftmaxTopK(3, normalised=True),
    "top first": lambda: TopKSoftmax(2),
    "sigmoid": lambda: SigmoidTopK(3, **GROUPED),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("shared", "gate"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_a_mixture_is_the_weighted_sum_of_each_tokens_experts(name: str, shared: bool, gate: bool) -> None:
    moe, x = mixture(CHOICES[name](), shared=shared, gate=gate), random(2, 7, D_MODEL)
    weights, experts = moe.choose(moe.router(x))
    for row in range(2):
        for pos in range(7):
            token = x[row, pos]
            own = zip(weights[row, pos].tolist(), experts[row, pos].tolist(), strict=True)
            by_hand = sum(weight * moe.experts[e](token) for weight, e in own)
            if shared:
                by_hand = by_hand + moe.shared(token) * ((moe.shared_gate.weight @ token).sigmoid() if gate else 1.0)
            assert error(moe(x)[row, pos], by_hand) < 1e-5


@torch.no_grad()
def test_experts_are_chosen_within_groups_however_low_their_scores() -> None:
    choose = SigmoidTopK(3, **GROUPED)
    choose.correction.copy_(torch.tensor([-9.0, -9.0, -2.0, -2.0, -9.0, -9.0, -2.0, -2.0]))
    _, experts = choose(random(2, 7, 8))
    assert set(experts.flatten().tolist()) == {2, 3, 6, 7}


@torch.no_grad()
def test_a_correction_and_router_logits_stay_float32(tmp_path: Path) -> None:
    """Half precision would round away what experts are told apart by; also in a checkpoint that lenskit wrote."""
    folder = hf_folder(Row("x", "deepseek_v3"), tmp_path / "hf")
    exact = lk.HookedTransformer.from_pretrained(folder).blocks[1].mlp.choose.correction
    half = lk.HookedTransformer.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "saved")
    for model in (half, lk.HookedTransformer.from_pretrained(tmp_path / "saved")):
        assert torch.equal(model.blocks[1].mlp.choose.correction, exact)
        assert model.embed.weight.dtype == torch.bfloat16
    name = "blocks.1.mlp.hook_router_logits"
    _, cache = half.run_with_cache(ids(2, 5), [name, "blocks.1.ln2.hook_out"])
    by_hand = cache["blocks.1.ln2.hook_out"].float() @ half.blocks[1].mlp.router.weight.float().T
    assert cache[name].dtype == torch.float32
    assert error(cache[name], by_hand) < 1e-6
    assert half.run_with_hooks(ids(2, 5), [lk.Add(name, torch.ones(8))]).logits.dtype == torch.bfloat16


def gated() -> FeedForward:
    return GatedMLP(D_MODEL, 5, act_fn="silu", bias=True)


EXPERTS = {
    "plain": lambda: MLP(D_MODEL, 5, act_fn="gelu", bias=False),
    "gated, biases": gated,
    "clamped": lambda: ClampedGatedMLP(D_MODEL, 5, bias=True, alpha=1.7, limit=0.5),
}


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("n_tokens", [1, 7])  # of one, most experts have nothing to do
@torch.no_grad()
def test_experts_together_are_what_each_gives_by_itself(
    kind: str, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = [EXPERTS[kind]() for _ in range(8)]
    router = Linear(D_MODEL, 8, bias=False)
    moe, x = (
        drawn(MixtureOfExperts(D_MODEL, router=router, choose=TopKSoftmax(2), experts=experts)),
        random(1, n_tokens, D_MODEL),
    )
    found = {}
    for plain in (True, False):
        monkeypatch.setattr("lenskit.modules.moe.calls_are_plain", lambda plain=plain: plain)
        found[plain] = moe(x)
    assert error(found[True], found[False]) < 1e-6


@pytest.mark.parametrize("how", ["a torch hook", "gradients", "an adapter"])
def test_experts_run_one_by_one_where_somebody_would_notice(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x, seen = mixture(TopKSoftmax(8)), random(1, 3, D_MODEL), []
    if how != "a torch hook":
        monkeypatch.setattr("lenskit.modules.moe.calls_are_plain", lambda: True)
    if how == "gradients":
        moe(x).sum().backward()
        assert all(parameter.grad is not None for parameter in moe.experts.parameters())
        return
    with torch.no_grad():
        before, merged = moe(x), copy.deepcopy(moe)
        if how == "an adapter":
            merged.experts[2].w_in.weight += 0.5 * 2  # scale x rank, of ones
            adapt(moe.experts[2].w_in, rank=2, scale=0.5)
            moe.experts[2].w_in.lora_A.fill_(1.0)
            moe.experts[2].w_in.lora_B.fill_(1.0)
            assert error(moe(x), merged(x)) < 1e-5
            return
        with moe.experts[2].w_in.register_forward_hook(lambda *_: seen.append(1)):
            assert error(moe(x), before) < 1e-6
        assert seen == [1]


def test_normalised_after_is_normalised_before() -> None:
    logits = random(2, 3, 8)
    for one, other in zip(SoftmaxTopK(2, normalised=True)(logits), TopKSoftmax(2)(logits), strict=True):
        assert error(one, other) < 1e-6


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> lk.HookedTransformer:
    return lk.HookedTransformer.from_pretrained(hf_folder(Row("x", "mixtral"), tmp_path_factory.mktemp("hf")))


@torch.no_grad()
def test_an_experts_points_have_all_tokens_and_edits_count_where_it_was_chosen(routed: lk.HookedTransformer) -> None:
    tokens = ids(2, 9)
    point = "blocks.1.mlp.experts.2.hook_post"
    logits, cache = routed.run_with_cache(tokens, [point, "*.hook_expert_indices", "*.mlp.hook_expert_weights"])
    assert error(logits, routed(tokens)) < 1e-6
    chosen = cache["blocks.1.mlp.hook_expert_indices"]
    assert (chosen.dtype, chosen.shape, cache[point].shape) == (torch.int64, (2, 9, 2), (2, 9, 20))
    before = routed.run_with_cache(tokens, "blocks.1.hook_mlp_out")[1]["mlp_out", 1]
    result = routed.run_with_hooks(tokens, [lk.Set(point, 0.0), lk.Save("blocks.1.hook_mlp_out")])
    changed = (result.saved["blocks.1.hook_mlp_out"] - before).abs().amax(-1) > 1e-6
    assert torch.equal(changed, (chosen == 2).any(-1))


@torch.no_grad()
def test_a_token_can_be_sent_to_another_expert(routed: lk.HookedTransformer) -> None:
    indices, weights = "blocks.1.mlp.hook_expert_indices", "blocks.1.mlp.hook_expert_weights"
    out = lk.Save("blocks.1.hook_mlp_out")
    ops = [lk.Set(indices, torch.tensor([3, 0])), lk.Set(weights, torch.tensor([1.0, 0.0])), out]
    result = routed.run_with_hooks(ids(2, 9), [*ops, lk.Save("blocks.1.ln2.hook_out")])
    by_hand = routed.blocks[1].mlp.experts[3](result.saved["blocks.1.ln2.hook_out"])
    assert error(result.saved["blocks.1.hook_mlp_out"], by_hand) < 1e-5


# -- weights


@given(n=st.integers(1, 4), parts=st.integers(1, 3), transpose=st.booleans())
def test_stacked_tensors_are_split_and_stacked_again(n: int, parts: int, transpose: bool) -> None:
    ours = [f"{e}.{part}" for e in range(n) for part in range(parts)]
    rule: Rule = unstack("all", ours, parts=parts, transpose=transpose)
    stacked = random(n, 5, 2 * parts) if transpose else random(n, 2 * parts, 5)
    parameters = rule.load([stacked])
    assert [tuple(p.shape) for p in parameters] == [(2, 5)] * len(ours)
    assert parameters[0].data_ptr() == stacked.data_ptr()
    assert torch.equal(rule.store(parameters)[0], stacked)


def test_joined_rows_are_split_and_joined_again() -> None:
    joined = random(6, 3)
    rule = split("qkv", ["q", "k", "v"], [4, 1, 1])
    assert [len(part) for part in rule.load([joined])] == [4, 1, 1]
    assert torch.equal(rule.store(rule.load([joined]))[0], joined)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_experts_are_read_stacked_or_apart(model_type: str, tmp_path: Path) -> None:
    apart = hf_folder(Row("x", model_type), tmp_path / "apart")
    hf_model(apart).save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = load_file(tmp_path / "stacked" / "model.safetensors")
    assert "model.layers.2.mlp.experts.gate_up_proj" in names
    assert same_weights(*(lk.HookedTransformer.from_pretrained(folder) for folder in (apart, tmp_path / "stacked")))


@torch.no_grad()
def test_layers_past_the_last_are_left_out(tmp_path: Path) -> None:
    folder, more = hf_folder(Row("x", "deepseek_v3"), tmp_path / "hf"), tmp_path / "more"
    tensors = load_file(folder / "model.safetensors")
    later = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.2." in n}
    later |= {f"model.layers.3.{name}.weight": torch.ones(32) for name in ("enorm", "hnorm", "shared_head.norm")}
    later |= {f"model.layers.3.{name}.weight": torch.ones(59, 32) for name in ("shared_head.head", "embed_tokens")}
    later["model.layers.3.eh_proj.weight"] = torch.ones(32, 64)
    shutil.copytree(folder, more)
    save(more, {**tensors, **later})
    assert same_weights(*(lk.HookedTransformer.from_pretrained(one) for one in (folder, more)))
    lk.export(more, tmp_path / "exported")
    assert load_file(tmp_path / "exported" / "model.safetensors").keys() == tensors.keys()
    save(more, {**tensors, "model.layers.3.x": torch.ones(1)})
    told(UnknownTensorError, more, "model.layers.3.x")


@torch.no_grad()
def test_a_renamed_unembedding_is_read_as_well(tmp_path: Path) -> None:
    folder = hf_folder(Row("x", "gpt_neox"), tmp_path / "hf")
    model, tensors = lk.HookedTransformer.from_pretrained(folder), load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(lk.HookedTransformer.from_pretrained(folder)(ids(2, 5)), model(ids(2, 5)))
