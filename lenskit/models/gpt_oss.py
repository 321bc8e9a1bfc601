"""gpt-oss (OpenAI 2025, arXiv 2508.10925).

What is unusual next to Mixtral: each head has a sink, a learned score beside those of the keys that takes a share of
every softmax and has no value (`attn.softmax.hook_sink_scores`), so a row of `attn.hook_pattern` sums to less than one;
every second layer has a sliding window; attention, router and experts have biases; an expert multiplies
x * sigmoid(1.702 x) of its gate, which is cut off above, by one plus its linear part, which is cut off on both sides
(`mlp.experts.{e}.hook_pre` and `hook_pre_linear` are before that). The chosen experts' weights are a softmax of their
logits alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, LAYER, PRE_NORMS, heads, in_layers, table, windows
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import ExtendedAttention, SinkSoftmax
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Linear, Unembed
from lenskit.modules.mlp import ClampedGatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.moe import MixtureOfExperts, TopKSoftmax
from lenskit.modules.norms import RMSNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, unstack, weight


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling. attention_bias: on all of attention's projections.

    window, layer_types: keys that a query sees, itself included, in layers whose type is "sliding_attention".
    n_experts: experts in a layer; top_k: experts a token. d_mlp is the width of an expert.
    gate_slope: what a gate is multiplied by in its sigmoid; limit: where gates and linear parts are cut off.
    """

    model_type: ClassVar[str] = "gpt_oss"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        without=("act_fn",),
        attention_bias="attention_bias",
        window="sliding_window",
        layer_types="layer_types",
        n_experts="num_local_experts",
        top_k="num_experts_per_tok",
        gate_slope="swiglu_alpha",
        limit="swiglu_limit",
    )

    act_fn: str = "silu"
    eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig(theta=150_000.0)
    attention_bias: bool = True
    window: int | None = 128
    layer_types: tuple[str, ...]
    n_experts: int = 128
    top_k: int = 4
    gate_slope: float = 1.702
    limit: float = 7.0

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("hidden_act", "silu", "gates are multiplied by their sigmoid")
        read.ignore("experts_per_token", "initial_context_length")  # the first release's names for what is there twice
        return {}


class GptOssBlock(Block):
    """Pre-norm: attention, then the experts, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: GptOssConfig, rotary: Rotary, window: int | None) -> None:
        attn = ExtendedAttention(
            SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias),
            scale=cfg.d_head**-0.5,
            bias=cfg.attention_bias,
            rotary=rotary,
            window=window,
            softmax=SinkSoftmax(cfg.n_heads),
        )
        mlp = MixtureOfExperts(
            cfg.d_model,
            router=Linear(cfg.d_model, cfg.n_experts, bias=True),
            choose=TopKSoftmax(cfg.top_k),
            experts=(
                ClampedGatedMLP(cfg.d_model, cfg.d_mlp, bias=True, alpha=cfg.gate_slope, limit=cfg.limit)
                for _ in range(cfg.n_experts)
            ),
        )
        ln1, ln2 = RMSNorm(cfg.d_model, cfg.eps), RMSNorm(cfg.d_model, cfg.eps)
        super().__init__(cfg, ln1=ln1, attn=attn, ln2=ln2, mlp=mlp)

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: GptOssConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(GptOssBlock(cfg, rotary, window) for window in windows(cfg.layer_types, cfg.window)),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: GptOssConfig) -> WeightTable:
    """A layer's experts lie stacked on disk, [expert, d_in, d_out], with gate and linear part in turns."""
    moe, each = LAYER + "mlp.experts.", [f"blocks.{{l}}.mlp.experts.{e}." for e in range(cfg.n_experts)]
    stacked = {"gate_up_proj": "w_in", "down_proj": "w_out"}
    return table(
        cfg,
        [
            *in_layers(ATTENTION, bias=cfg.attention_bias),
            weight(LAYER + "self_attn.sinks", "blocks.{l}.attn.softmax.sinks"),
            *in_layers(PRE_NORMS),
            *in_layers({"mlp.router": "mlp.router"}, bias=True),
            *(unstack(moe + name, [f"{e}{w}.weight" for e in each], transpose=True) for name, w in stacked.items()),
            *(unstack(f"{moe}{name}_bias", [f"{e}{w}.bias" for e in each]) for name, w in stacked.items()),
        ],
    )


FAMILY = Family(GptOssConfig, parts, weights, hf_class="GptOssForCausalLM")
