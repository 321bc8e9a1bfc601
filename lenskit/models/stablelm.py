"""StableLM (Tow et al. 2023, "StableLM 3B 4E1T"; Bellagente et al. 2024, arXiv 2402.17834).

What is unusual next to LLaMA: layer norms, and a rotation of a quarter of each head. StableLM 2 12B normalises queries
and keys head by head, with gains for each head (`attn.q_norm`, `attn.k_norm`), has no second norm, and adds what
attention and the MLP give at once; `hook_q` and `hook_k` are before these norms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, GATED_MLP, LAYER, PRE_NORMS, heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import common_names
from lenskit.modules.attention import ExtendedAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm, LayerNormByHead
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, stack

ATTN = "blocks.{l}.attn."


@dataclass(frozen=True, kw_only=True)
class StableLmConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling; qkv_bias: on the projections to queries, keys and values.

    qk_norm: whether queries and keys are normalised; parallel: whether both sublayers read the same norm.
    """

    model_type: ClassVar[str] = "stablelm"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        d_head=None,
        eps="layer_norm_eps",
        qkv_bias="use_qkv_bias",
        qk_norm="qk_layernorm",
        parallel="use_parallel_residual",
    )

    act_fn: str = "silu"
    eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig(partial_rotary_factor=0.25)
    qkv_bias: bool = False
    qk_norm: bool = False
    parallel: bool = False

    def unusual_to_hf(self) -> dict[str, Any]:
        partial = {"partial_rotary_factor": self.rope.partial_rotary_factor}  # left out, it would be a quarter
        return {"rope_parameters": {**self.rope.to_hf(), **partial}}


class StableLmBlock(Block):
    """Pre-norm: attention, then the gated MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: StableLmConfig, rotary: Rotary) -> None:
        attn = ExtendedAttention(
            SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.qkv_bias),
            scale=cfg.d_head**-0.5,
            bias=False,
            rotary=rotary,
            q_norm=LayerNormByHead(cfg.d_head, cfg.eps, n_heads=cfg.n_heads) if cfg.qk_norm else None,
            k_norm=LayerNormByHead(cfg.d_head, cfg.eps, n_heads=cfg.n_key_value_heads) if cfg.qk_norm else None,
        )
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps),
            attn=attn,
            ln2=None if cfg.parallel else LayerNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=False),
            parallel=cfg.parallel,
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


class ParallelBlock(StableLmBlock):
    """Attention and the gated MLP side by side: both read one norm of the stream, and are added at once."""

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_in, mlp_in = self.read_both(resid)
        attn_out = self.hook_attn_out(self.attn(attn_in, run))
        return self.hook_resid_post(resid + attn_out + self.hook_mlp_out(self.mlp(mlp_in)))


def parts(cfg: StableLmConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    block = ParallelBlock if cfg.parallel else StableLmBlock
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(block(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: StableLmConfig) -> WeightTable:
    """LLaMA's names; the gains of queries' and keys' norms are a tensor for each head on disk."""
    biased = [name for name in ATTENTION if cfg.qkv_bias and name != "self_attn.o_proj"]
    norms = {name: ours for name, ours in PRE_NORMS.items() if ours == "ln1" or not cfg.parallel}
    by_head = [
        stack(
            [f"{LAYER}self_attn.{x}_layernorm.norms.{h}.weight" for h in range(n)], f"blocks.{{l}}.attn.{x}_norm.weight"
        )
        for x, n in (("q", cfg.n_heads), ("k", cfg.n_key_value_heads))
    ]
    rules = [*in_layers({**ATTENTION, **GATED_MLP}, bias=biased), *in_layers(norms, bias=True)]
    return table(cfg, [*rules, *(by_head if cfg.qk_norm else [])], bias=True)


FAMILY = Family(StableLmConfig, parts, weights, hf_class="StableLmForCausalLM")
