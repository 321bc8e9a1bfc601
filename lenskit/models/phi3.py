"""Phi 3 and 4 (Abdin et al. 2024, arXiv 2404.14219 and 2412.08905), 4-mini (Abouelenin et al. 2025, arXiv 2503.01743).

What is unusual next to LLaMA: queries, keys and values are one matrix, and on disk so are the MLP's gate and what it
multiplies; a query may see only the keys of a window before it; longer contexts have a divisor for every frequency
(LongRoPE), one set within the original context and one beyond it; a part of each head may stay unrotated (4-mini).

Keys in the cache stay as they were turned. Hugging Face's `generate`, and it alone, computes all of them again when a
sequence grows past the original context.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import LAYER, PRE_NORMS, heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import RMSNorm
from lenskit.modules.qkv import FusedQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, split

LINEAR = {
    "self_attn.qkv_proj": "attn.qkv.joined",
    "self_attn.o_proj": "attn.o",
    "mlp.down_proj": "mlp.w_out",
}


@dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
    """rope: the rotary embedding and its scaling; window: keys that a query sees, itself included, or None for all."""

    model_type: ClassVar[str] = "phi3"
    hf_names: ClassVar[Mapping[str, str]] = common_names(window="sliding_window")

    act_fn: str = "silu"
    eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    window: int | None = None

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
            read.refuse_unless(bias, False, "there are no biases")
        read.refuse_unless("full_attn_mod", 1, "all layers are alike")
        read.refuse_unless("interpolate_factor", 1, "positions are stretched by rope_parameters alone")
        read.ignore("original_max_position_embeddings", "partial_rotary_factor")  # rope_parameters has them
        return {}

    def unusual_to_hf(self) -> dict[str, Any]:
        original = self.rope.original_max_position_embeddings  # goes before what rope_parameters says
        return {} if original is None else {"original_max_position_embeddings": original}


class Phi3Block(Block):
    """Pre-norm: attention, then the gated MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: Phi3Config, rotary: Rotary) -> None:
        qkv = FusedQKV(cfg.d_model, **heads(cfg), bias=False)
        super().__init__(
            cfg,
            ln1=RMSNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=False, rotary=rotary, window=cfg.window),
            ln2=RMSNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: Phi3Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(Phi3Block(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: Phi3Config) -> WeightTable:
    """The gate's rows lie above those of what it multiplies."""
    gated = [f"blocks.{{l}}.mlp.{part}.weight" for part in ("w_gate", "w_in")]
    gate_up = split(LAYER + "mlp.gate_up_proj.weight", gated, [cfg.d_mlp] * 2)
    return table(cfg, [*in_layers({**LINEAR, **PRE_NORMS}), gate_up])


FAMILY = Family(Phi3Config, parts, weights, hf_class="Phi3ForCausalLM")
