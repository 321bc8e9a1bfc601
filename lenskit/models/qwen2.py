"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv 2407.10671 and 2412.15115).

What is unusual next to LLaMA: queries, keys and values have biases, the output projection has none; some of the layers
may have a sliding window; small models tie the embeddings.
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
from lenskit.modules.attention import Attention
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
class Qwen2Config(DecoderConfig):
    """rope: the rotary embedding and its scaling.

    window: keys that a query sees, itself included, in layers whose type is "sliding_attention".
    layer_types: that or "full_attention" for each layer.
    """

    model_type: ClassVar[str] = "qwen2"
    hf_names: ClassVar[Mapping[str, str]] = common_names(window="sliding_window", layer_types="layer_types")

    act_fn: str = "silu"
    eps: float = 1e-6
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    window: int | None = None
    layer_types: tuple[str, ...]

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.ignore("use_sliding_window", "max_window_layers")  # what layer_types and sliding_window are made from
        return {}

    def unusual_to_hf(self) -> dict[str, Any]:
        return {"use_sliding_window": self.window is not None}


class Qwen2Block(Block):
    """Pre-norm: attention, then the gated MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: Qwen2Config, rotary: Rotary, window: int | None) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=True)
        super().__init__(
            cfg,
            ln1=RMSNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=False, rotary=rotary, window=window),
            ln2=RMSNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: Qwen2Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(Qwen2Block(cfg, rotary, window) for window in windows(cfg.layer_types, cfg.window)),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: Qwen2Config) -> WeightTable:
    """LLaMA's names; three of attention's four projections have a bias."""
    biased = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    return table(cfg, [*in_layers(ATTENTION, bias=biased), *in_layers({**GATED_MLP, **PRE_NORMS})])


FAMILY = Family(Qwen2Config, parts, weights, hf_class="Qwen2ForCausalLM")
