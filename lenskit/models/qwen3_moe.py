"""Qwen 3, the mixtures of experts (Yang et al. 2025, arXiv 2505.09388).

What is unusual next to Qwen 3: instead of an MLP, layers have narrow experts, of which a router picks a few for each
token; some layers may keep an MLP. Points: `mlp.hook_router_logits`, `mlp.hook_expert_weights`,
`mlp.hook_expert_indices`, `mlp.experts.{e}.hook_pre` and so on. A window, if there is one, is every layer's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import (
    ATTENTION,
    GATED_MLP,
    PRE_NORMS,
    apart_or_stacked,
    heads,
    in_layers,
    table,
)
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import ExtendedAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Linear, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity, Module
from lenskit.modules.moe import MixtureOfExperts, SoftmaxTopK
from lenskit.modules.norms import RMSNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, at_layers


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling. attention_bias: on all of attention's projections.

    window: keys that a query sees, itself included; None for all before it. d_expert: width of an expert.
    n_experts: in a layer; top_k: experts a token; normalised: whether their weights sum to one.
    dense: layers that have an MLP, as wide as d_mlp; of the others, every `every`-th one has experts.
    """

    model_type: ClassVar[str] = "qwen3_moe"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        attention_bias="attention_bias", window="sliding_window", d_expert="moe_intermediate_size",
        n_experts="num_local_experts", top_k="num_experts_per_tok", normalised="norm_topk_prob",
        dense="mlp_only_layers", every="decoder_sparse_step",
    )  # fmt: skip

    act_fn: str = "silu"
    eps: float = 1e-6
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    window: int | None = None
    d_expert: int
    n_experts: int
    top_k: int
    normalised: bool = False
    dense: tuple[int, ...] = ()
    every: int = 1

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.ignore("max_window_layers")
        return {} if read("use_sliding_window") else {"window": None}

    def unusual_to_hf(self) -> dict[str, Any]:
        return {"use_sliding_window": self.window is not None}

    @property
    def mixed(self) -> list[int]:
        """Layers that have experts."""
        return [n for n in range(self.n_layers) if n not in self.dense and (n + 1) % self.every == 0]


class Qwen3MoeBlock(Block):
    """Pre-norm: attention, then the experts or the MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: Qwen3MoeConfig, rotary: Rotary, mlp: Module) -> None:
        attn = ExtendedAttention(
            SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias),
            scale=cfg.d_head**-0.5,
            bias=cfg.attention_bias,
            rotary=rotary,
            window=cfg.window,
            q_norm=RMSNorm(cfg.d_head, cfg.eps, n_heads=cfg.n_heads),
            k_norm=RMSNorm(cfg.d_head, cfg.eps, n_heads=cfg.n_key_value_heads),
        )
        ln1, ln2 = RMSNorm(cfg.d_model, cfg.eps), RMSNorm(cfg.d_model, cfg.eps)
        super().__init__(cfg, ln1=ln1, attn=attn, ln2=ln2, mlp=mlp)

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def gated(cfg: Qwen3MoeConfig, d_mlp: int) -> GatedMLP:
    """An MLP or an expert."""
    return GatedMLP(cfg.d_model, d_mlp, act_fn=cfg.act_fn, bias=False)


def experts(cfg: Qwen3MoeConfig) -> MixtureOfExperts:
    """What most layers have instead of an MLP."""
    return MixtureOfExperts(
        cfg.d_model,
        router=Linear(cfg.d_model, cfg.n_experts, bias=False),
        choose=SoftmaxTopK(cfg.top_k, normalised=cfg.normalised),
        experts=(gated(cfg, cfg.d_expert) for _ in range(cfg.n_experts)),
    )


def parts(cfg: Qwen3MoeConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    mlps = (experts(cfg) if layer in cfg.mixed else gated(cfg, cfg.d_mlp) for layer in range(cfg.n_layers))
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(Qwen3MoeBlock(cfg, rotary, mlp) for mlp in mlps),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: Qwen3MoeConfig) -> WeightTable:
    """Experts lie apart on disk; transformers can also write a layer's stacked."""
    norms = {**PRE_NORMS, "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
    dense = at_layers(in_layers(GATED_MLP), [n for n in range(cfg.n_layers) if n not in cfg.mixed])
    common = [*in_layers(ATTENTION, bias=cfg.attention_bias), *in_layers(norms), *dense]
    one, other = (
        [*common, *at_layers([*in_layers({"mlp.gate": "mlp.router"}), *rules], cfg.mixed)]
        for rules in apart_or_stacked(cfg.n_experts)
    )
    return table(cfg, one, others=[other])


FAMILY = Family(Qwen3MoeConfig, parts, weights, hf_class="Qwen3MoeForCausalLM")
