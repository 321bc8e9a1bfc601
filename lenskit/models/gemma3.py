"""Gemma 3, the text models (Gemma Team 2025, arXiv 2503.19786).

What is unusual next to Gemma 2: queries and keys are normalised head by head before they are rotated (`attn.q_norm`,
`attn.k_norm`, whose gains all heads share), where the scores had a cap; five of six layers have a sliding window, and
a rotary embedding of their own, whose base is small and which no scaling of the context touches. `hook_q` and `hook_k`
are before the norms, `hook_embed` is after the multiplier.
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
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln1_post",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ln2_post",
}


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(DecoderConfig):
    """rope, local_rope: the rotary embedding of layers with full attention, of those with a window.

    attention_bias: on all of attention's projections.
    window, layer_types: keys that a query sees, itself included, in layers whose type is "sliding_attention".
    score_divisor: scores are divided by its root. logit_cap: a soft cap; None for none.
    """

    model_type: ClassVar[str] = "gemma3_text"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        without=("rope",),
        act_fn="hidden_activation",
        attention_bias="attention_bias",
        window="sliding_window",
        layer_types="layer_types",
        score_divisor="query_pre_attn_scalar",
        logit_cap="final_logit_softcapping",
    )

    act_fn: str = "gelu_pytorch_tanh"
    eps: float = 1e-6
    tie_embeddings: bool = True
    rope: RopeConfig = RopeConfig(theta=1_000_000.0)
    local_rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    window: int | None = 4096
    layer_types: tuple[str, ...]
    score_divisor: float = 256
    logit_cap: float | None = None

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("use_bidirectional_attention", False, "attention is causal")
        read.refuse_unless("attn_logit_softcapping", None, "norms of queries and keys stand in its place")
        read.ignore("_sliding_window_pattern", "sliding_window_pattern")  # what layer_types is made from
        with HFConfig(read("rope_parameters")) as ropes:
            return {"rope": ropes("full_attention"), "local_rope": ropes("sliding_attention")}

    def unusual_to_hf(self) -> dict[str, Any]:
        ropes = {"full_attention": self.rope.to_hf(), "sliding_attention": self.local_rope.to_hf()}
        return {"rope_parameters": ropes}


class Gemma3Block(Block):
    """Attention, then the gated MLP: each reads a norm of the stream, and a norm of what it gives is added."""

    def __init__(self, cfg: Gemma3Config, rotary: Rotary, window: int | None) -> None:
        attn = ExtendedAttention(
            SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias),
            scale=cfg.score_divisor**-0.5,
            bias=cfg.attention_bias,
            rotary=rotary,
            window=window,
            q_norm=OffsetRMSNorm(cfg.d_head, cfg.eps, n_heads=cfg.n_heads),
            k_norm=OffsetRMSNorm(cfg.d_head, cfg.eps, n_heads=cfg.n_key_value_heads),
        )
        super().__init__(
            cfg,
            ln1=OffsetRMSNorm(cfg.d_model, cfg.eps),
            attn=attn,
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


def parts(cfg: Gemma3Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; layers of one type share one rotary embedding."""
    ropes = {"full_attention": cfg.rope, "sliding_attention": cfg.local_rope}
    rotary = {kind: Rotary(rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx) for kind, rope in ropes.items()}
    layers = zip(cfg.layer_types, windows(cfg.layer_types, cfg.window), strict=True)
    unembed = Unembed(cfg.d_model, cfg.d_vocab, bias=False)
    if cfg.logit_cap is not None:
        unembed = CappedUnembed(cfg.d_model, cfg.d_vocab, bias=False, cap=cfg.logit_cap)
    return Parts(
        embed=ScaledEmbed(cfg.d_vocab, cfg.d_model, multiplier=cfg.d_model**0.5),
        pos_embed=Identity(),
        blocks=(Gemma3Block(cfg, rotary[kind], window) for kind, window in layers),
        ln_final=OffsetRMSNorm(cfg.d_model, cfg.eps),
        unembed=unembed,
    )


def weights(cfg: Gemma3Config) -> WeightTable:
    """Gemma 2's names, and those of the norms of queries and keys."""
    return table(cfg, [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers({**GATED_MLP, **NORMS})])


FAMILY = Family(Gemma3Config, parts, weights, hf_class="Gemma3ForCausalLM")
