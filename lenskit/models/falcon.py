"""Falcon (Almazrouei et al. 2023, arXiv 2311.16867; the RefinedWeb models are of Penedo et al. 2023, arXiv 2306.01116).

What is unusual next to GPT-NeoX: all query heads, or groups of them, read one key-value head, with the rows of the one
matrix in that order; there are three orders of a block. The 7B model's: attention and the MLP read the same norm of the
same stream (no `ln2`, no `hook_resid_mid`). The 40B model's: each has a norm of its own. RW-1B's: one after the other,
with ALiBi instead of rotary embeddings: that bias is rounded as in training, then multiplied by the scores' scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import FUSED_LINEAR, PRE_NORMS, heads, in_layers
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import Attention, ExtendedAttention, SelfAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.position_bias import LinearBias, alibi_slopes
from lenskit.modules.qkv import GroupedQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, head, rules_of


@dataclass(frozen=True, kw_only=True)
class FalconConfig(DecoderConfig):
    """bias: of every linear map. alibi: ALiBi instead of the rotary embedding that rope describes.

    groups: the newer layout, in which key-value heads may be any number; in the older they are one, or as many as query
    heads. parallel: attention and the MLP read the same stream. two_norms: and each has a norm of its own.
    """

    model_type: ClassVar[str] = "falcon"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        without=("n_key_value_heads", "d_head"),
        d_mlp="ffn_hidden_size",
        act_fn="activation",
        eps="layer_norm_epsilon",
        bias="bias",
        alibi="alibi",
        groups="new_decoder_architecture",
        parallel="parallel_attn",
    )

    act_fn: str = "gelu"
    eps: float = 1e-5
    tie_embeddings: bool = True
    rope: RopeConfig = RopeConfig()
    bias: bool = False
    alibi: bool = False
    groups: bool = False
    parallel: bool = True
    two_norms: bool = False

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("apply_residual_connection_post_layernorm", False, "what is added to is the stream itself")
        read.ignore("ff_factor")  # ffn_hidden_size is what counts
        groups, n_groups = read("new_decoder_architecture"), read("num_kv_heads")
        old = 1 if read("multi_query") else read("num_attention_heads")
        name, value = ("parallel_attn", True) if groups else ("num_ln_in_parallel_attn", 1)
        read.refuse_unless(name, value, "blocks of the newer layout are parallel, and only they may have two norms")
        two_norms = groups and read.optional("num_ln_in_parallel_attn") != 1
        return {"n_key_value_heads": n_groups if groups else old, "two_norms": two_norms}

    def unusual_to_hf(self) -> dict[str, Any]:
        n, n_norms = self.n_key_value_heads, 2 if self.two_norms else 1
        return {"multi_query": n == 1, "num_kv_heads": n, "num_ln_in_parallel_attn": n_norms}


class FalconBlock(Block):
    """Attention and the MLP side by side: both read `ln1`'s output, and add to the stream that enters the block."""

    def __init__(self, cfg: FalconConfig, rotary: Rotary | None, alibi: LinearBias | None) -> None:
        qkv, scale = GroupedQKV(cfg.d_model, **heads(cfg), bias=cfg.bias), cfg.d_head**-0.5
        attn: SelfAttention = Attention(qkv, scale=scale, bias=cfg.bias, rotary=rotary)
        if alibi is not None:
            attn = ExtendedAttention(qkv, scale=scale, bias=cfg.bias, position_bias=alibi)
        ln1 = LayerNorm(cfg.d_model, cfg.eps)
        ln2 = None if cfg.parallel and not cfg.two_norms else LayerNorm(cfg.d_model, cfg.eps)
        mlp = MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=cfg.bias)
        super().__init__(cfg, ln1=ln1, attn=attn, ln2=ln2, mlp=mlp, parallel=cfg.parallel)

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_in, mlp_in = self.read_both(resid)
        attn_out = self.hook_attn_out(self.attn(attn_in, run))
        return self.hook_resid_post(resid + attn_out + self.hook_mlp_out(self.mlp(mlp_in)))


class TwoNormsBlock(FalconBlock):
    """Side by side, each with a norm of its own."""

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self.attn(self.read(resid), run))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + attn_out + mlp_out)


class SequentialBlock(FalconBlock):
    """Pre-norm: attention, then the MLP, each reading a norm of the stream and adding to it."""

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: FalconConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share what positions go through."""
    rotary = None if cfg.alibi else Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    alibi = LinearBias(alibi_slopes(cfg.n_heads), rounded=torch.bfloat16, multiplier=cfg.d_head**-0.5)
    block = (TwoNormsBlock if cfg.two_norms else FalconBlock) if cfg.parallel else SequentialBlock
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(block(cfg, rotary, alibi if cfg.alibi else None) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: FalconConfig) -> WeightTable:
    """BLOOM's names, without a norm of the embedding; two norms of one stream have names of their own."""
    norms = {"input_layernorm": "ln1"} if cfg.parallel else PRE_NORMS
    if cfg.two_norms:
        norms = {"ln_attn": "ln1", "ln_mlp": "ln2"}
    rules = (
        *rules_of({"transformer.word_embeddings": "embed"}),
        *in_layers(FUSED_LINEAR, bias=cfg.bias, layer="transformer.h.{l}."),
        *in_layers(norms, bias=True, layer="transformer.h.{l}."),
        *rules_of({"transformer.ln_f": "ln_final"}, bias=True),
        head(cfg.tie_embeddings),
    )
    return WeightTable(rules, cfg.n_layers, prefix="transformer.")


FAMILY = Family(FalconConfig, parts, weights, hf_class="FalconForCausalLM")
