"""Phi 1, 1.5 and 2 (Gunasekar et al. 2023, arXiv 2306.11644; Li et al. 2023, arXiv 2309.05463).

What is unusual next to LLaMA: attention and the MLP read the same layer norm of the same stream, and both add to it
(there is no `ln2` and no `hook_resid_mid`); a part of each query and key is rotated; the MLP has no gate; everything
has a bias, the unembedding too. Queries and keys of each head may have a layer norm (`attn.q_norm`, `attn.k_norm`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import common_names
from lenskit.modules.attention import Attention, ExtendedAttention, SelfAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, weight

LINEAR = {
    "self_attn.q_proj": "attn.qkv.q",
    "self_attn.k_proj": "attn.qkv.k",
    "self_attn.v_proj": "attn.qkv.v",
    "self_attn.dense": "attn.o",
    "mlp.fc1": "mlp.w_in",
    "mlp.fc2": "mlp.w_out",
}
HEAD_NORMS = {"self_attn.q_layernorm": "attn.q_norm", "self_attn.k_layernorm": "attn.k_norm"}


@dataclass(frozen=True, kw_only=True)
class PhiConfig(DecoderConfig):
    """rope: the rotary embedding, of a part of each head; head_norms: whether queries and keys are normalised."""

    model_type: ClassVar[str] = "phi"
    hf_names: ClassVar[Mapping[str, str]] = common_names(d_head=None, eps="layer_norm_eps", head_norms="qk_layernorm")

    act_fn: str = "gelu_new"
    eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig(partial_rotary_factor=0.5)
    head_norms: bool = False

    def unusual_to_hf(self) -> dict[str, Any]:
        partial = {"partial_rotary_factor": self.rope.partial_rotary_factor}  # left out, it would be a half
        return {"rope_parameters": {**self.rope.to_hf(), **partial}}


def attention(cfg: PhiConfig, rotary: Rotary) -> SelfAttention:
    """With or without norms of heads."""
    qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=True)
    scale = cfg.d_head**-0.5
    if not cfg.head_norms:
        return Attention(qkv, scale=scale, bias=True, rotary=rotary)
    q_norm = LayerNorm(cfg.d_head, cfg.eps, n_heads=cfg.n_heads)
    k_norm = LayerNorm(cfg.d_head, cfg.eps, n_heads=cfg.n_key_value_heads)
    return ExtendedAttention(qkv, scale=scale, bias=True, rotary=rotary, q_norm=q_norm, k_norm=k_norm)


class PhiBlock(Block):
    """Attention and the MLP side by side: both read `ln1`'s output, and add to the stream that enters the block."""

    def __init__(self, cfg: PhiConfig, rotary: Rotary) -> None:
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps),
            attn=attention(cfg, rotary),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=True),
            parallel=True,
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_in, mlp_in = self.read_both(resid)
        attn_out = self.hook_attn_out(self.attn(attn_in, run))
        return self.hook_resid_post(resid + attn_out + self.hook_mlp_out(self.mlp(mlp_in)))


def parts(cfg: PhiConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(PhiBlock(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=True),
    )


def weights(cfg: PhiConfig) -> WeightTable:
    """LLaMA's names for the most part, all of them with biases."""
    names = {**LINEAR, "input_layernorm": "ln1", **(HEAD_NORMS if cfg.head_norms else {})}
    bias = weight("lm_head.bias", "unembed.bias")
    return table(cfg, [*in_layers(names, bias=True), bias], bias=True, norm="model.final_layernorm")


FAMILY = Family(PhiConfig, parts, weights, hf_class="PhiForCausalLM")
