"""OLMo 1 (Groeneveld et al. 2024, arXiv 2402.00838).

What is unusual next to LLaMA: norms are centred and have neither gains nor biases; queries, keys and values may be
clipped. `hook_q`, `hook_k` and `hook_v` are after that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, GATED_MLP, heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import common_names
from lenskit.modules.attention import ExtendedAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class OlmoConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling; attention_bias: on all of attention's projections.

    clip: the largest that an entry of a query, key or value may be; None for no limit.
    """

    model_type: ClassVar[str] = "olmo"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        eps=None, d_head=None, attention_bias="attention_bias", clip="clip_qkv"
    )

    act_fn: str = "silu"
    eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    clip: float | None = None


class OlmoBlock(Block):
    """Pre-norm: attention, then the gated MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: OlmoConfig, rotary: Rotary) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias)
        scale = cfg.d_head**-0.5
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps, weight=False, bias=False),
            attn=ExtendedAttention(qkv, scale=scale, bias=cfg.attention_bias, rotary=rotary, clip=cfg.clip),
            ln2=LayerNorm(cfg.d_model, cfg.eps, weight=False, bias=False),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: OlmoConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(OlmoBlock(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps, weight=False, bias=False),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: OlmoConfig) -> WeightTable:
    """LLaMA's names, without norms."""
    return table(cfg, [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers(GATED_MLP)], norm=None)


FAMILY = Family(OlmoConfig, parts, weights, hf_class="OlmoForCausalLM")
