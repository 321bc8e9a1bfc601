"""Command R7B and Command A (Cohere 2025, arXiv 2504.00698).

What is unusual next to Command R: most layers see a window of keys and rotate queries and keys, and the others see all
of them and have no positions at all (Yang et al. 2025, arXiv 2501.18795).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, GATED_MLP, heads, in_layers, table, windows
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, ScaledUnembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class Cohere2Config(DecoderConfig):
    """rope: the rotary embedding and its scaling; attention_bias: on all of attention's projections.

    window: keys that a query sees, itself included, in layers whose type is "sliding_attention", which rotate.
    layer_types: that or "full_attention" for each layer. logits_multiplier: of the logits.
    """

    model_type: ClassVar[str] = "cohere2"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        d_head=None,
        eps="layer_norm_eps",
        attention_bias="attention_bias",
        window="sliding_window",
        layer_types="layer_types",
        logits_multiplier="logit_scale",
    )

    act_fn: str = "silu"
    eps: float = 1e-5
    tie_embeddings: bool = True
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    window: int | None = 4096
    layer_types: tuple[str, ...]
    logits_multiplier: float = 0.0625

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.ignore("head_dim", "sliding_window_pattern")  # Hugging Face computes the one, and layer_types of the other
        read.ignore("layer_switch", "order_of_interleaved_layers", "use_embedding_sharing", "use_parallel_embedding")
        read.refuse_unless("use_parallel_block", True, "attention and the MLP read the same norm")
        read.refuse_unless("use_gated_activation", True, "the MLP is gated")
        read.refuse_unless("position_embedding_type", "rope_gptj", "rotated dimensions are neighbours")
        read.refuse_unless("rotary_pct", 1.0, "whole heads are rotated")
        return {}


class Cohere2Block(Block):
    """Attention and the gated MLP side by side: both read one norm of the stream, and are added at once."""

    def __init__(self, cfg: Cohere2Config, rotary: Rotary | None, window: int | None) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias)
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps, bias=False),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=cfg.attention_bias, rotary=rotary, window=window),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
            parallel=True,
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_in, mlp_in = self.read_both(resid)
        attn_out = self.hook_attn_out(self.attn(attn_in, run))
        return self.hook_resid_post(resid + attn_out + self.hook_mlp_out(self.mlp(mlp_in)))


def parts(cfg: Cohere2Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; the layers that rotate share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx, interleaved=True)
    turned = [rotary if kind == "sliding_attention" else None for kind in cfg.layer_types]
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(
            Cohere2Block(cfg, turn, window)
            for turn, window in zip(turned, windows(cfg.layer_types, cfg.window), strict=True)
        ),
        ln_final=LayerNorm(cfg.d_model, cfg.eps, bias=False),
        unembed=ScaledUnembed(cfg.d_model, cfg.d_vocab, bias=False, multiplier=cfg.logits_multiplier),
    )


def weights(cfg: Cohere2Config) -> WeightTable:
    """LLaMA's names, and one norm a block."""
    return table(
        cfg, [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers({**GATED_MLP, "input_layernorm": "ln1"})]
    )


FAMILY = Family(Cohere2Config, parts, weights, hf_class="Cohere2ForCausalLM")
