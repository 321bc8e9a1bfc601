"""OLMo 2 (OLMo Team 2024, arXiv 2501.00656).

What is unusual next to LLaMA: attention and the MLP read the stream as it is, and a norm of what each gives is added
(`ln1_post`, `ln2_post`; there is no `ln1` or `ln2`); queries and keys are normalised over all heads at once, before
their rotation (`attn.q_norm`, `attn.k_norm`, behind `attn.hook_q` and `attn.hook_k`).
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
from lenskit.modules.norms import RMSNorm, RMSNormOverHeads
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable

NORMS = {
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "post_attention_layernorm": "ln1_post",
    "post_feedforward_layernorm": "ln2_post",
}


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(DecoderConfig):
    """rope: the rotary embedding and its scaling; attention_bias: on all of attention's projections."""

    model_type: ClassVar[str] = "olmo2"
    hf_names: ClassVar[Mapping[str, str]] = common_names(attention_bias="attention_bias")

    act_fn: str = "silu"
    eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False


class Olmo2Block(Block):
    """Post-norm: attention, then the gated MLP, each reading the stream; a norm of what it gives is added."""

    def __init__(self, cfg: Olmo2Config, rotary: Rotary) -> None:
        attn = ExtendedAttention(
            SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias),
            scale=cfg.d_head**-0.5,
            bias=cfg.attention_bias,
            rotary=rotary,
            q_norm=RMSNormOverHeads(cfg.d_head, cfg.eps, n_heads=cfg.n_heads),
            k_norm=RMSNormOverHeads(cfg.d_head, cfg.eps, n_heads=cfg.n_key_value_heads),
        )
        super().__init__(
            cfg,
            attn=attn,
            ln1_post=RMSNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
            ln2_post=RMSNorm(cfg.d_model, cfg.eps),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self.ln1_post(self.attn(self.read(resid), run)))
        resid = self.hook_resid_mid(resid + attn_out)
        mlp_out = self.hook_mlp_out(self.ln2_post(self.mlp(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: Olmo2Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(Olmo2Block(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: Olmo2Config) -> WeightTable:
    """LLaMA's names; the norms' say where they stand."""
    return table(cfg, [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers({**GATED_MLP, **NORMS})])


FAMILY = Family(Olmo2Config, parts, weights, hf_class="Olmo2ForCausalLM")
