"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060).

What is unusual next to OLMo: instead of an MLP, each layer has many narrow experts, of which a router picks a few for
each token; queries and keys are normalised over all heads at once before they are rotated (`attn.q_norm`,
`attn.k_norm`), and may be clamped after that. Points: `mlp.hook_router_logits`, `mlp.hook_expert_weights`,
`mlp.hook_expert_indices`, `mlp.experts.{e}.hook_pre` and so on. `hook_q` and `hook_k` are before the norms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, PRE_NORMS, apart_or_stacked, heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import common_names
from lenskit.modules.attention import Clip, ExtendedAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Linear, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.moe import MixtureOfExperts, SoftmaxTopK
from lenskit.modules.norms import RMSNorm, RMSNormOverHeads
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class OlmoeConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling; attention_bias: on all of attention's projections.

    clip: what queries, keys (after their norms) and values are clamped to, or None. n_experts: experts in a layer;
    top_k: experts a token; normalised: whether their weights sum to one. d_mlp is the width of an expert.
    """

    model_type: ClassVar[str] = "olmoe"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        d_head=None, attention_bias="attention_bias", clip="clip_qkv", n_experts="num_experts",
        top_k="num_experts_per_tok", normalised="norm_topk_prob",
    )  # fmt: skip

    act_fn: str = "silu"
    eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    clip: float | None = None
    n_experts: int = 64
    top_k: int = 8
    normalised: bool = False


class ClippedNorm(RMSNormOverHeads):
    """The norm of queries or keys, and what it gives clamped, where the config says so."""

    def __init__(self, cfg: OlmoeConfig, n_heads: int) -> None:
        super().__init__(cfg.d_head, cfg.eps, n_heads=n_heads)
        self.clip = Identity() if cfg.clip is None else Clip(cfg.clip)

    def forward(self, x: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch head pos d_head"]:
        return self.clip(super().forward(x))


class OlmoeBlock(Block):
    """Pre-norm: attention, then the experts, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: OlmoeConfig, rotary: Rotary) -> None:
        attn = ExtendedAttention(
            SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias),
            scale=cfg.d_head**-0.5,
            bias=cfg.attention_bias,
            rotary=rotary,
            q_norm=ClippedNorm(cfg, cfg.n_heads),
            k_norm=ClippedNorm(cfg, cfg.n_key_value_heads),
            clip_values=cfg.clip,
        )
        experts = (GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False) for _ in range(cfg.n_experts))
        super().__init__(
            cfg,
            ln1=RMSNorm(cfg.d_model, cfg.eps),
            attn=attn,
            ln2=RMSNorm(cfg.d_model, cfg.eps),
            mlp=MixtureOfExperts(
                cfg.d_model,
                router=Linear(cfg.d_model, cfg.n_experts, bias=False),
                choose=SoftmaxTopK(cfg.top_k, normalised=cfg.normalised),
                experts=experts,
            ),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: OlmoeConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(OlmoeBlock(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: OlmoeConfig) -> WeightTable:
    """Experts lie apart on disk; transformers can also write a layer's stacked."""
    norms = {**PRE_NORMS, "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
    common = [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers({**norms, "mlp.gate": "mlp.router"})]
    apart, stacked = apart_or_stacked(cfg.n_experts)
    return table(cfg, [*common, *apart], others=[[*common, *stacked]])


FAMILY = Family(OlmoeConfig, parts, weights, hf_class="OlmoeForCausalLM")
