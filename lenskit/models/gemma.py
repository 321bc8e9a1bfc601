"""Gemma (Gemma Team 2024, arXiv 2403.08295).

What is unusual next to LLaMA: norms multiply by 1 + weight; the gate is a GELU; heads are wider than d_model / n_heads;
the embedding is multiplied by sqrt(d_model), and is the unembedding as it is stored, without that. `hook_embed` is
after the multiplier.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, GATED_MLP, PRE_NORMS, heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import ScaledEmbed, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import OffsetRMSNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling; attention_bias: on all of attention's projections."""

    model_type: ClassVar[str] = "gemma"
    hf_names: ClassVar[Mapping[str, str]] = common_names(attention_bias="attention_bias")

    act_fn: str = "gelu_pytorch_tanh"
    eps: float = 1e-6
    tie_embeddings: bool = True
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("use_bidirectional_attention", False, "attention is causal")
        read.ignore("hidden_activation")  # of later releases' configs, beside hidden_act
        return {}


class GemmaBlock(Block):
    """Pre-norm: attention, then the gated MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: GemmaConfig, rotary: Rotary) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias)
        super().__init__(
            cfg,
            ln1=OffsetRMSNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=cfg.attention_bias, rotary=rotary),
            ln2=OffsetRMSNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: GemmaConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=ScaledEmbed(cfg.d_vocab, cfg.d_model, multiplier=cfg.d_model**0.5),
        pos_embed=Identity(),
        blocks=(GemmaBlock(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=OffsetRMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: GemmaConfig) -> WeightTable:
    """LLaMA's names."""
    return table(cfg, [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers({**GATED_MLP, **PRE_NORMS})])


FAMILY = Family(GemmaConfig, parts, weights, hf_class="GemmaForCausalLM")
