"""SmolLM 3 (Hugging Face 2025, "SmolLM3: smol, multilingual, long-context reasoner").

What is unusual next to LLaMA: every fourth layer has no positions at all (NoPE, Kazemnejad et al. 2023, arXiv
2305.19466; `no_rope_layers` has a 1 for each layer that rotates); those layers may have a sliding window.
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
class SmolLM3Config(DecoderConfig):
    """rope: the rotary embedding and its scaling; attention_bias, mlp_bias: on all their projections.

    rotated: 1 for each layer that rotates, 0 for those without positions.
    window, layer_types: keys that a query sees, itself included, in layers whose type is "sliding_attention".
    """

    model_type: ClassVar[str] = "smollm3"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        attention_bias="attention_bias",
        mlp_bias="mlp_bias",
        d_head=None,
        window="sliding_window",
        layer_types="layer_types",
        rotated="no_rope_layers",
    )

    act_fn: str = "silu"
    eps: float = 1e-6
    tie_embeddings: bool = True
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    mlp_bias: bool = False
    rotated: tuple[int, ...]
    window: int | None = None
    layer_types: tuple[str, ...]

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.ignore("no_rope_layer_interval")  # what no_rope_layers is made from
        return {} if read("use_sliding_window") else {"window": None}

    def unusual_to_hf(self) -> dict[str, Any]:
        return {"use_sliding_window": self.window is not None}


class SmolLM3Block(Block):
    """Pre-norm: attention, then the gated MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: SmolLM3Config, rotary: Rotary | None, window: int | None) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias)
        super().__init__(
            cfg,
            ln1=RMSNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=cfg.attention_bias, rotary=rotary, window=window),
            ln2=RMSNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=cfg.mlp_bias),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: SmolLM3Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; the layers that rotate share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(
            SmolLM3Block(cfg, rotary if turns else None, window)
            for turns, window in zip(cfg.rotated, windows(cfg.layer_types, cfg.window), strict=True)
        ),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: SmolLM3Config) -> WeightTable:
    """Biases of attention (attention_bias: all four) and MLP (mlp_bias: all three) come with their matrices."""
    rules = [
        *in_layers(ATTENTION, bias=cfg.attention_bias),
        *in_layers(GATED_MLP, bias=cfg.mlp_bias),
        *in_layers(PRE_NORMS),
    ]
    return table(cfg, rules)


FAMILY = Family(SmolLM3Config, parts, weights, hf_class="SmolLM3ForCausalLM")
