"""Models without a checkpoint: built from a config, initialised, trained with plain torch, saved and loaded."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity_table import MODEL_TYPES, Row, from_hf, ids
from torch import Tensor

import lenskit as lk
from lenskit.models.config import DecoderConfig
from lenskit.models.gpt2 import GPT2Config
from lenskit.models.llama import LlamaConfig

WIDE = {
    "gpt2": Row("wide", "gpt2", {"n_embd": 96, "n_head": 4, "vocab_size": 400, "n_layer": 4}),
    "llama": Row("wide", "llama", {"hidden_size": 96, "intermediate_size": 256, "vocab_size": 400, "mlp_bias": True}),
}


@pytest.fixture
def cfg(model_type: str) -> DecoderConfig:
    return from_hf(WIDE[model_type])


def test_a_config_is_all_it_takes() -> None:
    sizes = {
        "d_model": 16, "n_layers": 2, "n_heads": 4, "n_key_value_heads": 4, "d_head": 4, "d_mlp": 32, "d_vocab": 59,
        "n_ctx": 32,
    }  # fmt: skip
    for config in (GPT2Config, LlamaConfig):
        model = lk.HookedTransformer(config(**sizes))
        assert model.cfg.d_model == 16
        assert model(ids(2, 5)).shape == (2, 5, 59)
        assert model.tokenizer is None


def test_configs_are_frozen_and_keyword_only(cfg: DecoderConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.d_model = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        type(cfg)(16, 2, 4, 4, 4, 32, 59, 32)
    assert dataclasses.replace(cfg, n_layers=1).n_layers == 1
    assert hash(cfg) == hash(dataclasses.replace(cfg))


# -- initialisation


def test_the_seed_decides(cfg: DecoderConfig) -> None:
    one, same, other = (lk.HookedTransformer(cfg, seed=seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (a.dim() == 1), name
    default, zero = lk.HookedTransformer(cfg), lk.HookedTransformer(cfg, seed=0)
    assert torch.equal(default.embed.W_E, zero.embed.W_E)


def test_the_global_generator_is_left_alone(cfg: DecoderConfig) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = lk.HookedTransformer(cfg, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(lk.HookedTransformer(cfg, seed=1).embed.W_E, first.embed.W_E)


def test_weights_are_drawn_as_gpt2s(cfg: DecoderConfig) -> None:
    """Radford et al. 2019: normal with init_range; what writes to the stream divided by sqrt(2 n_layers)."""
    for init_range in (0.02, 0.1):
        model = lk.HookedTransformer(dataclasses.replace(cfg, init_range=init_range))
        into_stream = [w for block in model.blocks for w in (block.attn.o.weight, block.mlp.w_out.weight)]
        scaled = {id(weight) for weight in into_stream}
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                assert bool((parameter == (0.0 if name.endswith("bias") else 1.0)).all()), name
                continue
            std = init_range / (2 * cfg.n_layers) ** 0.5 if id(parameter) in scaled else init_range
            # Both within five standard errors.
            n = parameter.numel()
            assert float(parameter.detach().std()) == pytest.approx(std, rel=5 / (2 * n) ** 0.5), name
            assert abs(float(parameter.detach().mean())) < 5 * std / n**0.5, name
        assert len(scaled) == 2 * cfg.n_layers


def test_an_untrained_model_knows_nothing(cfg: DecoderConfig) -> None:
    model = lk.HookedTransformer(cfg)
    tokens = torch.randint(cfg.d_vocab, (4, 32), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(torch.tensor(cfg.d_vocab).log().item(), rel=0.05)


# -- training


def next_token_loss(model: lk.HookedTransformer, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("model_type", MODEL_TYPES, indirect=True)
def test_a_plain_loop_trains(model_type: str, tmp_path: Path) -> None:
    """Counting on, modulo 59: learned in a few steps, then saved, loaded and still known."""
    model = lk.HookedTransformer(from_hf(Row("tiny", model_type)), seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def batch() -> Tensor:
        return (torch.randint(59, (16, 1), generator=generator) + torch.arange(12)) % 59

    losses = []
    for _ in range(120):
        loss = next_token_loss(model, batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 3.5
    assert losses[-1] < 1.5  # a cap on the logits (gemma2) makes it slow

    again = lk.HookedTransformer.from_pretrained(model.save_pretrained(tmp_path / "trained"))
    with torch.no_grad():
        tokens = batch()
        assert torch.equal(again(tokens), model(tokens))
        assert float((again(tokens)[:, :-1].argmax(-1) == tokens[:, 1:]).float().mean()) > 0.9
    assert again.cfg == model.cfg


def test_every_weight_is_trained(model_type: str) -> None:
    model = lk.HookedTransformer(from_hf(Row("tiny", model_type)), seed=0)
    next_token_loss(model, ids(4, 12)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_training_through_hooks(model_type: str) -> None:
    """A steering vector learned through a frozen model, as in many a paper."""
    model = lk.HookedTransformer(from_hf(Row("tiny", model_type)), seed=0).requires_grad_(False)
    steering = torch.zeros(model.cfg.d_model, requires_grad=True)
    optimizer = torch.optim.Adam([steering], lr=0.1)
    losses = []
    for _ in range(30):
        with model.hooks([("blocks.1.hook_resid_post", lambda act, hook: act + steering)]):
            loss = -model(ids(2, 6)).log_softmax(-1)[..., 7].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("sizes", [{"n_key_value_heads": 3}, {"d_mlp": -1}, {"n_layers": 0}, {"d_model": 8.0}])
def test_sizes_that_describe_no_model(sizes: dict[str, Any], tiny: Callable[..., lk.HookedTransformer]) -> None:
    cfg = tiny("llama").cfg
    with pytest.raises(lk.errors.ConfigError, match="LlamaConfig describes no model") as refused:
        dataclasses.replace(cfg, **sizes)
    assert all(f"{name}={size!r}" in refused.value.got for name, size in sizes.items())
