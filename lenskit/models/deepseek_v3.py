"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437), and what is built like it.

What is unusual next to Mixtral: keys and values come from a narrow latent, queries mostly from another
(`attn.qkv.kv_latent.hook_latent`, `attn.qkv.q_latent.hook_latent` and their norms' points); a last part of each query
and key is rotated, and of the key all heads share it (`attn.qkv.hook_k_shared`, before the rotation). Values are
narrower than keys. The first layers have one MLP; the others have experts that a sigmoid weighs, chosen within groups
with a correction that balances their load, beside shared ones that every token goes through (`mlp.shared.hook_pre`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import GATED_MLP, LAYER, PRE_NORMS, apart_or_stacked, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.latent import LatentQKV, UnevenAttention
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity, Module
from lenskit.modules.moe import ExactRouter, SharedExperts, SigmoidTopK
from lenskit.modules.norms import RMSNorm
from lenskit.modules.rope_types import RopeConfig, advised_amplitude
from lenskit.modules.rotary import Rotary, RotaryTail
from lenskit.weights import WeightTable, at_layers, drop, weight

LATENT_EPS = 1e-6  # of the latents' norms, whatever that of the others
KEYS_VALUES = {"kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_latent.norm", "kv_b_proj": "kv"}
QUERIES = {"q_a_proj": "q_down", "q_a_layernorm": "q_latent.norm", "q_b_proj": "q"}
BIASED = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
AHEAD = dict.fromkeys(("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"), "")


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DecoderConfig):
    """rope, interleaved: the rotary embedding, and whether the two of a pair are neighbours.

    d_plain, d_rotary, d_value: widths of a key's part that is not rotated, of that which is, of a value.
    q_rank, kv_rank: widths of the latents; queries come from the stream where theirs is None.
    attention_bias: on the projections to the latents and back to the stream.
    dense_layers: layers with one MLP, of width d_mlp, before those with experts, of width d_expert.
    n_experts, n_shared, top_k: experts in a layer, shared ones beside them, chosen ones a token.
    n_groups, top_groups: groups of experts, and those that a token may choose from.
    normalised, weights_times: whether a token's weights sum to one, before they are multiplied.
    unread_layers: layers on disk past the last, which predict tokens further ahead.
    """

    model_type: ClassVar[str] = "deepseek_v3"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        without=("d_head",), interleaved="rope_interleave", d_plain="qk_nope_head_dim", d_rotary="qk_rope_head_dim",
        d_value="v_head_dim", q_rank="q_lora_rank", kv_rank="kv_lora_rank", attention_bias="attention_bias",
        dense_layers="first_k_dense_replace", d_expert="moe_intermediate_size", n_experts="n_routed_experts",
        n_shared="n_shared_experts", top_k="num_experts_per_tok", n_groups="n_group", top_groups="topk_group",
        normalised="norm_topk_prob", weights_times="routed_scaling_factor", unread_layers="num_nextn_predict_layers",
    )  # fmt: skip

    act_fn: str = "silu"
    eps: float = 1e-6
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    interleaved: bool = True
    d_plain: int = 128
    d_rotary: int = 64
    d_value: int = 128
    q_rank: int | None = 1536
    kv_rank: int = 512
    attention_bias: bool = False
    dense_layers: int = 3
    d_expert: int = 2048
    n_experts: int = 256
    n_shared: int = 1
    top_k: int = 8
    n_groups: int = 8
    top_groups: int = 4
    normalised: bool = True
    weights_times: float = 2.5
    unread_layers: int = 0

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("num_key_value_heads", read("num_attention_heads"), "every head has keys of its own")
        read.refuse_unless("scoring_func", "sigmoid", "experts are weighed by a sigmoid")
        read.refuse_unless("topk_method", "noaux_tc", "experts are chosen within groups, with a correction")
        read.refuse_unless("moe_layer_freq", 1, "every layer past the dense ones has experts")
        read.ignore("qk_head_dim", "head_dim")  # a sum of others, and one of them
        read.ignore("aux_loss_alpha", "seq_aux", "ep_size")
        return {"d_head": read("qk_nope_head_dim") + read("qk_rope_head_dim")}


class DeepseekV3Block(Block):
    """Pre-norm: attention, then the MLP or the experts, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: DeepseekV3Config, rotary: Rotary, mlp: Module) -> None:
        qkv = LatentQKV(
            cfg.d_model, n_heads=cfg.n_heads, d_plain=cfg.d_plain, d_rotary=cfg.d_rotary, d_value=cfg.d_value,
            d_q_latent=cfg.q_rank, d_kv_latent=cfg.kv_rank, eps=LATENT_EPS, bias=cfg.attention_bias,
        )  # fmt: skip
        scale = advised_amplitude(cfg.rope.factor or 1.0, cfg.rope.mscale_all_dim or 0.0) ** 2 * cfg.d_head**-0.5
        attn = UnevenAttention(qkv, scale=scale, bias=cfg.attention_bias, rotary=rotary)
        ln1, ln2 = RMSNorm(cfg.d_model, cfg.eps), RMSNorm(cfg.d_model, cfg.eps)
        super().__init__(cfg, ln1=ln1, attn=attn, ln2=ln2, mlp=mlp)

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def gated(cfg: DeepseekV3Config, d_mlp: int) -> GatedMLP:
    """An MLP, an expert, or the shared experts, which are one MLP as wide as all of them."""
    return GatedMLP(cfg.d_model, d_mlp, act_fn=cfg.act_fn, bias=False)


def experts(cfg: DeepseekV3Config) -> SharedExperts:
    """What layers past the dense ones have instead of an MLP."""
    choose = SigmoidTopK(
        cfg.top_k, n_experts=cfg.n_experts, n_groups=cfg.n_groups, top_groups=cfg.top_groups,
        normalised=cfg.normalised, multiplier=cfg.weights_times,
    )  # fmt: skip
    return SharedExperts(
        cfg.d_model,
        router=ExactRouter(cfg.d_model, cfg.n_experts),
        choose=choose,
        experts=(gated(cfg, cfg.d_expert) for _ in range(cfg.n_experts)),
        shared=gated(cfg, cfg.n_shared * cfg.d_expert),
        gate=False,
    )


def parts(cfg: DeepseekV3Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = RotaryTail(cfg.rope, d_head=cfg.d_rotary, n_ctx=cfg.n_ctx, interleaved=cfg.interleaved)
    mlps = (gated(cfg, cfg.d_mlp) if layer < cfg.dense_layers else experts(cfg) for layer in range(cfg.n_layers))
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(DeepseekV3Block(cfg, rotary, mlp) for mlp in mlps),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: DeepseekV3Config) -> WeightTable:
    """Experts lie apart on disk; transformers can also write a layer's stacked. Layers past the last are not read."""
    qkv = {**({"q_proj": "q"} if cfg.q_rank is None else QUERIES), **KEYS_VALUES}
    attention = {
        **{f"self_attn.{theirs}": f"attn.qkv.{ours}" for theirs, ours in qkv.items()},
        "self_attn.o_proj": "attn.o",
    }
    shared = {
        name.replace("mlp.", "mlp.shared_experts."): ours.replace("mlp.", "mlp.shared.")
        for name, ours in GATED_MLP.items()
    }
    common = in_layers({**attention, **PRE_NORMS}, bias=BIASED if cfg.attention_bias else False)
    dense = at_layers(in_layers(GATED_MLP), range(min(cfg.dense_layers, cfg.n_layers)))
    correction = weight(LAYER + "mlp.gate.e_score_correction_bias", "blocks.{l}.mlp.choose.correction")
    apart, stacked = (
        [*in_layers({"mlp.gate": "mlp.router", **shared}), correction, *experts]
        for experts in apart_or_stacked(cfg.n_experts)
    )
    ahead = at_layers([*common, *apart, *in_layers(AHEAD)], range(cfg.n_layers, cfg.n_layers + cfg.unread_layers))
    unread = [drop(name) for rule in ahead for name in rule.on_disk]
    one, other = (
        [*common, *dense, *at_layers(later, range(cfg.dense_layers, cfg.n_layers)), *unread]
        for later in (apart, stacked)
    )
    return table(cfg, one, others=[other])


FAMILY = Family(DeepseekV3Config, parts, weights, hf_class="DeepseekV3ForCausalLM")
