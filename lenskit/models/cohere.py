"""Command R (Cohere 2024, "Command R: retrieval-augmented generation at production scale").

What is unusual next to LLaMA: attention and the MLP both read one norm of the stream, a LayerNorm without bias, and
what they give is added to it at once; rotated dimensions are neighbours; the logits are multiplied by a constant, and
the embedding is tied. Command R+ normalises queries and keys head by head, with gains for each head (`attn.q_norm`,
`attn.k_norm`); `hook_q` and `hook_k` are before these norms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, GATED_MLP, heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import ExtendedAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, ScaledUnembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm, LayerNormByHead
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class CohereConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling; attention_bias: on all of attention's projections.

    qk_norm: whether queries and keys are normalised; logits_multiplier: of the logits.
    """

    model_type: ClassVar[str] = "cohere"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        d_head=None,
        eps="layer_norm_eps",
        attention_bias="attention_bias",
        qk_norm="use_qk_norm",
        logits_multiplier="logit_scale",
    )

    act_fn: str = "silu"
    eps: float = 1e-5
    tie_embeddings: bool = True
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    qk_norm: bool = False
    logits_multiplier: float = 0.0625

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.ignore("model_max_length")  # the tokenizer's affair
        return {}


class CohereBlock(Block):
    """Attention and the gated MLP side by side: both read one norm of the stream, and are added at once."""

    def __init__(self, cfg: CohereConfig, rotary: Rotary) -> None:
        attn = ExtendedAttention(
            SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias),
            scale=cfg.d_head**-0.5,
            bias=cfg.attention_bias,
            rotary=rotary,
            q_norm=LayerNormByHead(cfg.d_head, cfg.eps, n_heads=cfg.n_heads) if cfg.qk_norm else None,
            k_norm=LayerNormByHead(cfg.d_head, cfg.eps, n_heads=cfg.n_key_value_heads) if cfg.qk_norm else None,
        )
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps, bias=False),
            attn=attn,
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
            parallel=True,
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_in, mlp_in = self.read_both(resid)
        attn_out = self.hook_attn_out(self.attn(attn_in, run))
        return self.hook_resid_post(resid + attn_out + self.hook_mlp_out(self.mlp(mlp_in)))


def parts(cfg: CohereConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx, interleaved=True)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(CohereBlock(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps, bias=False),
        unembed=ScaledUnembed(cfg.d_model, cfg.d_vocab, bias=False, multiplier=cfg.logits_multiplier),
    )


def weights(cfg: CohereConfig) -> WeightTable:
    """LLaMA's names; one norm a block, and those of queries and keys."""
    norms = {"input_layernorm": "ln1"}
    if cfg.qk_norm:
        norms |= {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
    return table(cfg, [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers({**GATED_MLP, **norms})])


FAMILY = Family(CohereConfig, parts, weights, hf_class="CohereForCausalLM")
