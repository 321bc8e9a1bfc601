"""MPT (MosaicML 2023, "Introducing MPT-7B: A New Standard for Open-Source, Commercially Usable LLMs").

What is unusual next to GPT-2: there is no bias anywhere, not even in the layer norms; positions enter as ALiBi, a bias
of the scores that grows with the distance, with a slope for each head; queries, keys and values may be clipped, and
`hook_q`, `hook_k`, `hook_v` are after that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import heads, in_layers
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig
from lenskit.modules.attention import ExtendedAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.position_bias import LinearBias, alibi_slopes
from lenskit.modules.qkv import FusedQKV
from lenskit.weights import WeightTable, head, rules_of

NAMES = {
    "norm_1": "ln1",
    "attn.Wqkv": "attn.qkv.joined",
    "attn.out_proj": "attn.o",
    "norm_2": "ln2",
    "ffn.up_proj": "mlp.w_in",
    "ffn.down_proj": "mlp.w_out",
}


@dataclass(frozen=True, kw_only=True)
class MPTConfig(DecoderConfig):
    """clip: the largest number in queries, keys and values; score_scale: what q k^T is multiplied by.

    None for no limit, and for 1 / sqrt(d_head).
    """

    model_type: ClassVar[str] = "mpt"
    hf_names: ClassVar[Mapping[str, str]] = {
        "d_model": "d_model",
        "n_layers": "n_layers",
        "n_heads": "n_heads",
        "d_vocab": "vocab_size",
        "n_ctx": "max_seq_len",
        "eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "init_range": "initializer_range",
    }

    act_fn: str = "gelu"
    eps: float = 1e-5
    tie_embeddings: bool = True
    clip: float | None = None
    score_scale: float | None = None

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("expansion_ratio", 4, "the MLP is four times as wide as the stream")
        read.refuse_unless("no_bias", True, "there are no biases")
        read.refuse_unless("logit_scale", None, "logits are not scaled")
        if read("norm_type") != "layernorm":  # the same, but for how the training code rounds
            read.refuse_unless("norm_type", "low_precision_layernorm", "norms are layer norms")
        read.ignore("learned_pos_emb")  # is true where there are none: ALiBi takes their place
        read.ignore("emb_pdrop", "embedding_fraction", "init_device", "init_config", "tokenizer_name", "verbose")
        with HFConfig(read("attn_config")) as attn:
            attn.refuse_unless("attn_type", "multihead_attention", "every head has keys and values of its own")
            attn.refuse_unless("alibi", True, "positions enter as ALiBi")
            attn.refuse_unless("alibi_bias_max", 8, "slopes end at 2^-8")
            for name in ("qk_ln", "prefix_lm", "attn_uses_sequence_id"):
                attn.refuse_unless(name, False, "attention is causal, of queries and keys as they are")
            attn.ignore("attn_impl")
            return {
                "d_mlp": 4 * read("d_model"),
                "clip": attn("clip_qkv") or None,
                "score_scale": attn("softmax_scale"),
            }

    def unusual_to_hf(self) -> dict[str, Any]:
        return {"attn_config": {"clip_qkv": self.clip, "softmax_scale": self.score_scale}}


class MPTBlock(Block):
    """Pre-norm: attention, then the MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: MPTConfig, alibi: LinearBias) -> None:
        qkv = FusedQKV(cfg.d_model, **heads(cfg), bias=False)
        scale = cfg.d_head**-0.5 if cfg.score_scale is None else cfg.score_scale
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps, bias=False),
            attn=ExtendedAttention(qkv, scale=scale, bias=False, clip=cfg.clip, position_bias=alibi),
            ln2=LayerNorm(cfg.d_model, cfg.eps, bias=False),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: MPTConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one bias."""
    alibi = LinearBias(alibi_slopes(cfg.n_heads))
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(MPTBlock(cfg, alibi) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps, bias=False),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: MPTConfig) -> WeightTable:
    """No tensor but these."""
    rules = (
        *rules_of({"transformer.wte": "embed", "transformer.norm_f": "ln_final"}),
        *in_layers(NAMES, layer="transformer.blocks.{l}."),
        head(cfg.tie_embeddings),
    )
    return WeightTable(rules, cfg.n_layers, prefix="transformer.")


FAMILY = Family(MPTConfig, parts, weights, hf_class="MptForCausalLM")
