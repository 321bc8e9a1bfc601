"""Mixtral (Jiang et al. 2024, arXiv 2401.04088).

What is unusual next to Mistral: instead of an MLP, each layer has several, the experts, of which a router picks two for
each token; their weights are a softmax over all experts, made to sum to one over those two. Points:
`mlp.hook_router_logits`, `mlp.hook_expert_weights`, `mlp.hook_expert_indices`, `mlp.experts.{e}.hook_pre` and so on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, LAYER, PRE_NORMS, heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import common_names
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Linear, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.moe import MixtureOfExperts, SoftmaxTopK
from lenskit.modules.norms import RMSNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, unstack


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling; window: keys that a query sees, itself included, or None for all.

    n_experts: experts in a layer; top_k: experts a token. d_mlp is the width of an expert.
    """

    model_type: ClassVar[str] = "mixtral"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        window="sliding_window", n_experts="num_local_experts", top_k="num_experts_per_tok"
    )

    act_fn: str = "silu"
    eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    window: int | None = None
    n_experts: int = 8
    top_k: int = 2


class MixtralBlock(Block):
    """Pre-norm: attention, then the experts, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: MixtralConfig, rotary: Rotary) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=False)
        experts = (GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False) for _ in range(cfg.n_experts))
        super().__init__(
            cfg,
            ln1=RMSNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=False, rotary=rotary, window=cfg.window),
            ln2=RMSNorm(cfg.d_model, cfg.eps),
            mlp=MixtureOfExperts(
                cfg.d_model,
                router=Linear(cfg.d_model, cfg.n_experts, bias=False),
                choose=SoftmaxTopK(cfg.top_k, normalised=True),
                experts=experts,
            ),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: MixtralConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(MixtralBlock(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: MixtralConfig) -> WeightTable:
    """Experts lie apart on disk; transformers can also write a layer's stacked, gate above up."""
    moe, each = LAYER + "mlp.experts.", [f"blocks.{{l}}.mlp.experts.{e}." for e in range(cfg.n_experts)]
    apart = {
        f"block_sparse_moe.experts.{e}.{theirs}": f"mlp.experts.{e}.{ours}"
        for e in range(cfg.n_experts)
        for theirs, ours in (("w1", "w_gate"), ("w3", "w_in"), ("w2", "w_out"))
    }
    stacked = [
        *in_layers({**ATTENTION, **PRE_NORMS, "mlp.gate": "mlp.router"}),
        unstack(moe + "gate_up_proj", [f"{e}{w}.weight" for e in each for w in ("w_gate", "w_in")], parts=2),
        unstack(moe + "down_proj", [f"{e}w_out.weight" for e in each]),
    ]
    rules = in_layers({**ATTENTION, **PRE_NORMS, "block_sparse_moe.gate": "mlp.router", **apart})
    return table(cfg, rules, others=[stacked])


FAMILY = Family(MixtralConfig, parts, weights, hf_class="MixtralForCausalLM")
