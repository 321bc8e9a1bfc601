"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118).

What is unusual next to LLaMA: each sublayer's output is normalised as well, before it is added (`ln1_post`,
`ln2_post`); norms multiply by 1 + weight; scores and logits have soft caps; scores are divided by the root of a number
of its own instead of d_head's; every second layer has a sliding window; the embedding is multiplied by sqrt(d_model),
and is the unembedding as it is stored, without that. `hook_embed` is after the multiplier, `hook_logits` after the cap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, GATED_MLP, heads, in_layers, table, windows
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import ExtendedAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import CappedUnembed, ScaledEmbed, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import OffsetRMSNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable

NORMS = {
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln1_post",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ln2_post",
}


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(DecoderConfig):
    """rope: the rotary embedding. attention_bias: on all of attention's projections.

    window, layer_types: keys that a query sees, itself included, in layers whose type is "sliding_attention".
    score_divisor: scores are divided by its root.
    score_cap, logit_cap: soft caps, in the units of what they cap; None for none.
    """

    model_type: ClassVar[str] = "gemma2"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        act_fn="hidden_activation",
        attention_bias="attention_bias",
        window="sliding_window",
        layer_types="layer_types",
        score_divisor="query_pre_attn_scalar",
        score_cap="attn_logit_softcapping",
        logit_cap="final_logit_softcapping",
    )

    act_fn: str = "gelu_pytorch_tanh"
    eps: float = 1e-6
    tie_embeddings: bool = True
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    window: int | None = 4096
    layer_types: tuple[str, ...]
    score_divisor: float = 256
    score_cap: float | None = 50.0
    logit_cap: float | None = 30.0

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("use_bidirectional_attention", False, "attention is causal")
        read.ignore("hidden_act")  # of the first release: hidden_activation is what counts
        return {}


class Gemma2Block(Block):
    """Attention, then the gated MLP: each reads a norm of the stream, and a norm of what it gives is added."""

    def __init__(self, cfg: Gemma2Config, rotary: Rotary, window: int | None) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias)
        scale, bias = cfg.score_divisor**-0.5, cfg.attention_bias
        super().__init__(
            cfg,
            ln1=OffsetRMSNorm(cfg.d_model, cfg.eps),
            attn=ExtendedAttention(qkv, scale=scale, bias=bias, rotary=rotary, window=window, cap=cfg.score_cap),
            ln1_post=OffsetRMSNorm(cfg.d_model, cfg.eps),
            ln2=OffsetRMSNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
            ln2_post=OffsetRMSNorm(cfg.d_model, cfg.eps),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self.ln1_post(self.attn(self.read(resid), run)))
        resid = self.hook_resid_mid(resid + attn_out)
        mlp_out = self.hook_mlp_out(self.ln2_post(self.mlp(self.ln2(self.hook_mlp_in(resid)))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: Gemma2Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    unembed = Unembed(cfg.d_model, cfg.d_vocab, bias=False)
    if cfg.logit_cap is not None:
        unembed = CappedUnembed(cfg.d_model, cfg.d_vocab, bias=False, cap=cfg.logit_cap)
    return Parts(
        embed=ScaledEmbed(cfg.d_vocab, cfg.d_model, multiplier=cfg.d_model**0.5),
        pos_embed=Identity(),
        blocks=(Gemma2Block(cfg, rotary, window) for window in windows(cfg.layer_types, cfg.window)),
        ln_final=OffsetRMSNorm(cfg.d_model, cfg.eps),
        unembed=unembed,
    )


def weights(cfg: Gemma2Config) -> WeightTable:
    """LLaMA's names, with two more norms: "post_attention_layernorm" is of attention's output here."""
    return table(cfg, [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers({**GATED_MLP, **NORMS})])


FAMILY = Family(Gemma2Config, parts, weights, hf_class="Gemma2ForCausalLM")
