"""BLOOM (BigScience 2022, arXiv 2211.05100).

What is unusual next to GPT-2: positions enter as ALiBi, a bias of the scores that grows with the distance, with a slope
for each head; the embedding is normalised before anything reads it (`embed.then`; `hook_embed` is after that); the rows
of the one matrix of queries, keys and values go head by head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import FUSED_LINEAR, PRE_NORMS, heads, in_layers
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import ExtendedAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import TransformedEmbed, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.position_bias import LinearBias, alibi_slopes
from lenskit.modules.qkv import GroupedQKV
from lenskit.weights import WeightTable, head, rules_of


@dataclass(frozen=True, kw_only=True)
class BloomConfig(DecoderConfig):
    """Nothing but sizes."""

    model_type: ClassVar[str] = "bloom"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        without=("n_key_value_heads", "d_head", "d_mlp", "n_ctx", "act_fn", "rope"),
        n_layers="n_layer",
        n_heads="n_head",
        eps="layer_norm_epsilon",
    )

    act_fn: str = "gelu_pytorch_tanh"
    eps: float = 1e-5
    tie_embeddings: bool = True

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("apply_residual_connection_post_layernorm", False, "what is added to is the stream itself")
        d_mlp = 4 * read("hidden_size")
        read.refuse_unless("n_inner", d_mlp, "the MLP is four times as wide as the stream")
        # Of the training code: how it rounds, and what it fuses.
        read.ignore("slow_but_exact", "attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion")
        read.ignore("skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "unk_token_id")
        return {"d_mlp": d_mlp, "n_ctx": read.optional("seq_length") or 2048}

    def unusual_to_hf(self) -> dict[str, Any]:
        return {"seq_length": self.n_ctx}


class BloomBlock(Block):
    """Pre-norm: attention, then the MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: BloomConfig, alibi: LinearBias) -> None:
        qkv = GroupedQKV(cfg.d_model, **heads(cfg), bias=True)
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps),
            attn=ExtendedAttention(qkv, scale=cfg.d_head**-0.5, bias=True, position_bias=alibi),
            ln2=LayerNorm(cfg.d_model, cfg.eps),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=True),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: BloomConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one bias."""
    alibi = LinearBias(alibi_slopes(cfg.n_heads))
    return Parts(
        embed=TransformedEmbed(cfg.d_vocab, cfg.d_model, then=LayerNorm(cfg.d_model, cfg.eps)),
        pos_embed=Identity(),
        blocks=(BloomBlock(cfg, alibi) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: BloomConfig) -> WeightTable:
    """On disk, every name has or has not the prefix "transformer."."""
    rules = (
        *rules_of({"transformer.word_embeddings": "embed"}),
        *rules_of({"transformer.word_embeddings_layernorm": "embed.then"}, bias=True),
        *in_layers({**FUSED_LINEAR, **PRE_NORMS}, bias=True, layer="transformer.h.{l}."),
        *rules_of({"transformer.ln_f": "ln_final"}, bias=True),
        head(cfg.tie_embeddings),
    )
    return WeightTable(rules, cfg.n_layers, prefix="transformer.")


FAMILY = Family(BloomConfig, parts, weights, hf_class="BloomForCausalLM")
