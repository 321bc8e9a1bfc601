"""Weights in the shapes that papers write down: views of what is stored, right by the arithmetic of the papers."""

import inspect
import math
import pydoc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity_table import WRITTEN_OUT, error, ids
from torch import Tensor

import lenskit as lk

CLOSE = 1e-5
TOKENS = ids(2, 9)

# Of one block, but for the first and the last; in sizes of the config.
SHAPES = {
    "attn.W_Q": "n_heads d_model d_head",
    "attn.W_K": "n_key_value_heads d_model d_head",
    "attn.W_V": "n_key_value_heads d_model d_head",
    "attn.W_O": "n_heads d_head d_model",
    "attn.b_Q": "n_heads d_head",
    "attn.b_K": "n_key_value_heads d_head",
    "attn.b_V": "n_key_value_heads d_head",
    "attn.b_O": "d_model",
    "mlp.W_in": "d_model d_mlp",
    "mlp.W_gate": "d_model d_mlp",
    "mlp.W_out": "d_mlp d_model",
    "mlp.b_in": "d_mlp",
    "mlp.b_gate": "d_mlp",
    "mlp.b_out": "d_model",
    "embed.W_E": "d_vocab d_model",
    "pos_embed.W_pos": "n_ctx d_model",
    "unembed.W_U": "d_model d_vocab",
    "unembed.b_U": "d_vocab",
}
ABSENT = {"gpt2": ["mlp.W_gate", "mlp.b_gate"], "llama": ["pos_embed.W_pos"]}
# With these, every bias that the architecture can have is there.
BIASED = {"gpt2": {"n_inner": 50}, "llama": {"attention_bias": True, "mlp_bias": True}}
WEIGHTS = [(model_type, weight) for model_type in WRITTEN_OUT for weight in SHAPES if weight not in ABSENT[model_type]]
# Neither family has a bias there: it is no stored weight.
STORED = [(model_type, weight) for model_type, weight in WEIGHTS if weight != "unembed.b_U"]
STACKED = [(model_type, weight) for model_type, weight in WEIGHTS if weight.startswith(("attn", "mlp"))]
EVERY_WEIGHT = pytest.mark.parametrize(("model_type", "weight"), WEIGHTS, indirect=["model_type"])
EVERY_STORED_WEIGHT = pytest.mark.parametrize(("model_type", "weight"), STORED, indirect=["model_type"])
EVERY_STACKED_WEIGHT = pytest.mark.parametrize(("model_type", "weight"), STACKED, indirect=["model_type"])


@pytest.fixture
def biased(tiny: Callable[..., lk.HookedTransformer], model_type: str) -> lk.HookedTransformer:
    return tiny(model_type, **BIASED[model_type])


def read(model: lk.HookedTransformer, weight: str) -> Tensor:
    owner: Any = model.blocks[1] if weight.startswith(("attn", "mlp")) else model
    part, name = weight.split(".")
    return getattr(getattr(owner, part), name)


def shape(model: lk.HookedTransformer, weight: str) -> tuple[int, ...]:
    sizes = vars(model.cfg)
    return tuple(sizes[axis] for axis in SHAPES[weight].split())


@EVERY_WEIGHT
def test_shapes(biased: lk.HookedTransformer, model_type: str, weight: str) -> None:
    assert read(biased, weight).shape == shape(biased, weight)


@EVERY_STORED_WEIGHT
def test_weights_are_views_of_what_is_stored(biased: lk.HookedTransformer, model_type: str, weight: str) -> None:
    view = read(biased, weight)
    storages = {p.untyped_storage().data_ptr(): p for p in biased.parameters()}
    assert view.untyped_storage().data_ptr() in storages
    stored = storages[view.untyped_storage().data_ptr()]
    start, end = stored.data_ptr(), stored.data_ptr() + stored.nbytes
    assert start <= view.data_ptr() < end
    assert view.numel() <= stored.numel()
    for _ in range(2):
        assert read(biased, weight).data_ptr() == view.data_ptr()


@EVERY_STORED_WEIGHT
@torch.no_grad()
def test_writing_in_place_changes_what_the_model_computes(
    biased: lk.HookedTransformer, model_type: str, weight: str
) -> None:
    before = biased(TOKENS)
    read(biased, weight).mul_(-2.0)
    assert not torch.equal(biased(TOKENS), before)
    read(biased, weight).div_(-2.0)
    assert error(biased(TOKENS), before) < CLOSE


@EVERY_STORED_WEIGHT
def test_gradients_reach_the_stored_weights_through_views(
    biased: lk.HookedTransformer, model_type: str, weight: str
) -> None:
    view = read(biased, weight)
    view.square().sum().backward()
    total = sum(float(p.grad.square().sum()) for p in biased.parameters() if p.grad is not None)
    assert total == pytest.approx(float((2 * view.detach()).square().sum()), rel=1e-4)


# -- by hand


@torch.no_grad()
def test_heads_by_hand(biased: lk.HookedTransformer) -> None:
    """One head at a time, as a paper would write it."""
    # Without inputs by head: for those, the model itself computes from these views.
    _, cache = biased.run_with_cache(TOKENS, lambda name: not name.endswith(("_input", "attn_in")))
    cfg, rotated = biased.cfg, biased.cfg.model_type == "llama"
    for layer, block in enumerate(biased.blocks):
        attn, total = block.attn, torch.zeros_like(cache["attn_out", layer])
        x = cache["normalized", layer, "ln1"] * block.ln1.weight
        x = x if rotated else x + block.ln1.bias
        for head in range(cfg.n_heads):
            group = head // (cfg.n_heads // cfg.n_key_value_heads)
            q = x @ attn.W_Q[head] + attn.b_Q[head]
            k = x @ attn.W_K[group] + attn.b_K[group]
            v = x @ attn.W_V[group] + attn.b_V[group]
            assert error(cache["q", layer][:, :, head], q) < CLOSE
            assert error(cache["k", layer][:, :, group], k) < CLOSE
            assert error(cache["v", layer][:, :, group], v) < CLOSE
            if rotated:  # by angles that the parity tests vouch for
                q, k = cache["rot_q", layer][:, :, head], cache["rot_k", layer][:, :, group]
            scores = (q @ k.mT / math.sqrt(cfg.d_head)).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
            z = scores.softmax(-1) @ v
            assert error(cache["pattern", layer][:, head], scores.softmax(-1)) < CLOSE
            assert error(cache["z", layer][:, :, head], z) < CLOSE
            assert error(cache["result", layer][:, :, head], z @ attn.W_O[head]) < CLOSE
            total += z @ attn.W_O[head]
        assert error(cache["attn_out", layer], total + attn.b_O) < CLOSE


@torch.no_grad()
def test_mlp_by_hand(biased: lk.HookedTransformer) -> None:
    _, cache = biased.run_with_cache(TOKENS)
    for layer, block in enumerate(biased.blocks):
        mlp, gated = block.mlp, biased.cfg.model_type == "llama"
        x = cache["normalized", layer, "ln2"] * block.ln2.weight
        x = x if gated else x + block.ln2.bias
        linear = x @ mlp.W_in + mlp.b_in
        if gated:
            assert error(cache["pre", layer], x @ mlp.W_gate + mlp.b_gate) < CLOSE
            assert error(cache["pre_linear", layer], linear) < CLOSE
        else:
            assert error(cache["pre", layer], linear) < CLOSE
        assert error(cache["mlp_out", layer], cache["post", layer] @ mlp.W_out + mlp.b_out) < CLOSE


@torch.no_grad()
def test_embedding_and_unembedding_by_hand(biased: lk.HookedTransformer) -> None:
    _, cache = biased.run_with_cache(TOKENS)
    stream = biased.embed.W_E[TOKENS]
    assert torch.equal(cache["embed"], stream)
    if biased.cfg.model_type == "gpt2":
        assert torch.equal(cache["pos_embed"], biased.pos_embed.W_pos[:9].expand(2, -1, -1))
        stream = stream + biased.pos_embed.W_pos[:9]
    assert torch.equal(cache["resid_pre", 0], stream)
    final = biased.ln_final(cache["resid_post", -1])
    assert error(cache["logits"], final @ biased.unembed.W_U + biased.unembed.b_U) < CLOSE


# -- biases that are not there

NO_BIAS = ["attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O", "mlp.b_in", "mlp.b_gate", "mlp.b_out", "unembed.b_U"]


@pytest.mark.parametrize("bias", NO_BIAS)
def test_absent_biases_read_zero(tiny: Callable[..., lk.HookedTransformer], bias: str) -> None:
    model = tiny("llama")
    zeros = read(model, bias)
    assert zeros.shape == shape(model, bias)
    assert not zeros.any()
    assert zeros.dtype == model.embed.W_E.dtype
    assert read(model.to(torch.bfloat16), bias).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", NO_BIAS)
@pytest.mark.parametrize(
    "write",
    [
        lambda zeros: zeros.add_(1.0),
        lambda zeros: zeros.fill_(1.0),
        lambda zeros: zeros[:1].mul_(2.0),
        lambda zeros: zeros.view(-1)[0].fill_(1.0),
        lambda zeros: zeros.__setitem__((0,) * zeros.dim(), 1.0),
    ],
    ids=["add", "fill", "slice", "element", "setitem"],
)
@torch.no_grad()
def test_absent_biases_refuse_to_be_written(
    tiny: Callable[..., lk.HookedTransformer], bias: str, write: Callable[[Tensor], object]
) -> None:
    """Else the write would be lost without a word."""
    model = tiny("llama")
    with pytest.raises((RuntimeError, lk.LenskitError)):
        write(read(model, bias))
    assert not read(model, bias).any()


# -- stacked over the layers


@EVERY_STACKED_WEIGHT
def test_stacked_over_layers(biased: lk.HookedTransformer, model_type: str, weight: str) -> None:
    part, name = weight.split(".")
    stacked = getattr(biased, name)
    assert stacked.shape == (3, *shape(biased, weight))
    for layer, block in enumerate(biased.blocks):
        assert torch.equal(stacked[layer], getattr(block.get_submodule(part), name))


def test_stacks_follow_the_weights(biased: lk.HookedTransformer) -> None:
    before = biased.W_Q
    with torch.no_grad():
        biased.blocks[0].attn.W_Q[0] = 0
    assert not biased.W_Q[0, 0].any()
    assert bool(before[0, 0].any())
    biased.W_V.sum().backward()
    assert all(block.attn.qkv.weights()[2] is not None for block in biased.blocks)
    assert sum(p.grad is not None for p in biased.parameters()) == 3


def test_stacks_of_biases_that_are_not_there(tiny: Callable[..., lk.HookedTransformer]) -> None:
    model = tiny("llama")
    assert model.b_Q.shape == (3, 4, 8)
    assert not model.b_Q.any()


@pytest.mark.parametrize("name", ["W_gate", "b_gate"])
def test_a_weight_that_the_model_does_not_have(tiny: Callable[..., lk.HookedTransformer], name: str) -> None:
    with pytest.raises(lk.LenskitError) as refused:
        getattr(tiny("gpt2"), name)
    what, got, expected, fix = str(refused.value).splitlines()
    assert what == f"this model has no {name}"
    assert got.startswith("  got:      GPT2Block: ")
    assert name in got
    assert expected == f"  expected: blocks whose mlp has {name}"
    assert "print(model.blocks[0])" in fix


def test_help_on_the_class_works() -> None:
    assert "run_with_hooks" in pydoc.plain(pydoc.render_doc(lk.HookedTransformer))
    assert "run_with_hooks" in dict(inspect.getmembers(lk.HookedTransformer))


def test_tied_embeddings_are_one_tensor(tiny: Callable[..., lk.HookedTransformer]) -> None:
    tied, untied = tiny("gpt2"), tiny("gpt2", tie_word_embeddings=False)
    assert tied.unembed.W_U.data_ptr() == tied.embed.W_E.data_ptr()
    assert torch.equal(tied.unembed.W_U, tied.embed.W_E.T)
    assert untied.unembed.W_U.data_ptr() != untied.embed.W_E.data_ptr()
    with torch.no_grad():
        tied.embed.W_E[3] = 0
    assert not tied.unembed.W_U[:, 3].any()
