"""Granite 3 (Granite Team 2024, "Granite 3.0 Language Models").

What is unusual next to LLaMA: four numbers of the config multiply the embedding, the scores (in the place of
1 / sqrt(d_head)), what each sublayer adds to the stream, and, as a divisor, the logits. `hook_embed`, `hook_attn_out`,
`hook_mlp_out` and `hook_logits` are after them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, GATED_MLP, PRE_NORMS, heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import common_names
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import ScaledEmbed, ScaledUnembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import RMSNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling; attention_bias, mlp_bias: on all their projections.

    embedding_multiplier, score_multiplier, residual_multiplier: of the embedding, of q k^T, of what sublayers add.
    logit_divisor: what logits are divided by.
    """

    model_type: ClassVar[str] = "granite"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        attention_bias="attention_bias",
        mlp_bias="mlp_bias",
        d_head=None,
        embedding_multiplier="embedding_multiplier",
        score_multiplier="attention_multiplier",
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
    )

    act_fn: str = "silu"
    eps: float = 1e-6
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_multiplier: float = 1.0
    score_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0


class GraniteBlock(Block):
    """Pre-norm: attention, then the gated MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: GraniteConfig, rotary: Rotary) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias)
        super().__init__(
            cfg,
            ln1=RMSNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.score_multiplier, bias=cfg.attention_bias, rotary=rotary),
            ln2=RMSNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=cfg.mlp_bias),
        )
        self.multiplier = cfg.residual_multiplier

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run) * self.multiplier))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))) * self.multiplier)
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: GraniteConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=ScaledEmbed(cfg.d_vocab, cfg.d_model, multiplier=cfg.embedding_multiplier, rounded=False),
        pos_embed=Identity(),
        blocks=(GraniteBlock(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=ScaledUnembed(cfg.d_model, cfg.d_vocab, bias=False, multiplier=1 / cfg.logit_divisor),
    )


def weights(cfg: GraniteConfig) -> WeightTable:
    """Biases of attention (attention_bias: all four) and MLP (mlp_bias: all three) come with their matrices."""
    rules = [
        *in_layers(ATTENTION, bias=cfg.attention_bias),
        *in_layers(GATED_MLP, bias=cfg.mlp_bias),
        *in_layers(PRE_NORMS),
    ]
    return table(cfg, rules)


FAMILY = Family(GraniteConfig, parts, weights, hf_class="GraniteForCausalLM")
