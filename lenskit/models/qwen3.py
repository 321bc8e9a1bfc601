"""Qwen 3, the dense models (Yang et al. 2025, arXiv 2505.09388).

What is unusual next to Qwen 2: queries and keys are normalised head by head before they are rotated (`attn.q_norm`,
`attn.k_norm`, whose gains all heads share), and there are no biases unless the config says so; heads may be wider than
d_model / n_heads. `hook_q` and `hook_k` are before the norms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, GATED_MLP, PRE_NORMS, heads, in_layers, table, windows
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import ExtendedAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import RMSNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """rope: the rotary embedding and its scaling. attention_bias: on all of attention's projections.

    window: keys that a query sees, itself included, in layers whose type is "sliding_attention".
    layer_types: that or "full_attention" for each layer.
    """

    model_type: ClassVar[str] = "qwen3"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        attention_bias="attention_bias", window="sliding_window", layer_types="layer_types"
    )

    act_fn: str = "silu"
    eps: float = 1e-6
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    window: int | None = None
    layer_types: tuple[str, ...]

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.ignore("use_sliding_window", "max_window_layers")  # what layer_types and sliding_window are made from
        return {}

    def unusual_to_hf(self) -> dict[str, Any]:
        return {"use_sliding_window": self.window is not None}


class Qwen3Block(Block):
    """Pre-norm: attention, then the gated MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: Qwen3Config, rotary: Rotary, window: int | None) -> None:
        attn = ExtendedAttention(
            SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias),
            scale=cfg.d_head**-0.5,
            bias=cfg.attention_bias,
            rotary=rotary,
            window=window,
            q_norm=RMSNorm(cfg.d_head, cfg.eps, n_heads=cfg.n_heads),
            k_norm=RMSNorm(cfg.d_head, cfg.eps, n_heads=cfg.n_key_value_heads),
        )
        super().__init__(
            cfg,
            ln1=RMSNorm(cfg.d_model, cfg.eps),
            attn=attn,
            ln2=RMSNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: Qwen3Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(Qwen3Block(cfg, rotary, window) for window in windows(cfg.layer_types, cfg.window)),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: Qwen3Config) -> WeightTable:
    """LLaMA's names, and those of the norms of queries and keys."""
    norms = {**PRE_NORMS, "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
    return table(cfg, [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers({**GATED_MLP, **norms})])


FAMILY = Family(Qwen3Config, parts, weights, hf_class="Qwen3ForCausalLM")
