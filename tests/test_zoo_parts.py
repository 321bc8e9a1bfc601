"""Parts that the zoo is composed of, each against the plainest way to compute the same."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity_table import Row, error, hf_folder, hf_model, ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lenskit as lk
from lenskit.modules.attention import Attention, ExtendedAttention, SinkSoftmax
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.kv_cache import KVCache
from lenskit.modules.linear import Linear
from lenskit.modules.mlp import ClampedGatedMLP, GatedMLP
from lenskit.modules.moe import Choose, MixtureOfExperts, SharedExperts, SigmoidTopK, SoftmaxTopK, TopKSoftmax
from lenskit.modules.norms import LayerNorm, LayerNormByHead, Norm, OffsetRMSNorm, RMSNorm, RMSNormOverHeads
from lenskit.modules.position_bias import LinearBias, alibi_slopes
from lenskit.modules.qkv import QKV, FusedQKV, GroupedQKV, HeadInputs, SeparateQKV
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
    inputs = HeadInputs(*(x[:, :, None].expand(-1, -1, n, -1) for n in (HEADS, groups, groups)))
    for projected, by_head, n in zip(qkv(x), qkv.by_head(inputs), (HEADS, groups, groups), strict=True):
        assert projected.shape == (2, n, 5, D_HEAD)
        assert error(projected, by_head) < 1e-6


def test_grouped_rows_are_a_groups_queries_then_its_key_then_its_value() -> None:
    qkv = drawn(GroupedQKV(D_MODEL, n_heads=4, n_key_value_heads=2, d_head=1, bias=False))
    W_Q, W_K, W_V = (weight[:, :, 0] for weight in qkv.weights())
    assert torch.equal(torch.cat((W_Q, W_K, W_V)), qkv.joined.weight[[0, 1, 4, 5, 2, 6, 3, 7]])


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


@torch.no_grad()
def test_experts_are_read_stacked_or_apart(tmp_path: Path) -> None:
    apart = hf_folder(Row("x", "mixtral"), tmp_path / "apart")
    hf_model(apart).save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = load_file(tmp_path / "stacked" / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    one, other = (lk.HookedTransformer.from_pretrained(folder) for folder in (apart, tmp_path / "stacked"))
    assert torch.equal(one(ids(2, 5)), other(ids(2, 5)))


@torch.no_grad()
def test_a_renamed_unembedding_is_read_as_well(tmp_path: Path) -> None:
    folder = hf_folder(Row("x", "gpt_neox"), tmp_path / "hf")
    model, tensors = lk.HookedTransformer.from_pretrained(folder), load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(lk.HookedTransformer.from_pretrained(folder)(ids(2, 5)), model(ids(2, 5)))
