"""LLaMA 1, 2 and 3 (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Grattafiori et al. 2024, arXiv 2407.21783).

What is unusual next to GPT-2: positions enter by rotating queries and keys; norms have no centring and no bias;
the MLP is gated; keys and values may have fewer heads than queries; the unembedding is mostly its own matrix.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, DecoderConfig, Family, Parts
from lenskit.models.hf_config import HFConfig
from lenskit.modules.attention import Attention, SeparateQKV
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import GatedMLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import RMSNorm
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, drop, weight


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """rope: the rotary embedding and its scaling; attention_bias, mlp_bias: on all their projections."""

    model_type: ClassVar[str] = "llama"

    act_fn: str = "silu"
    eps: float = 1e-6
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        with HFConfig(hf) as read:
            n_ctx = read("max_position_embeddings")
            return cls(
                d_model=read("hidden_size"),
                n_layers=read("num_hidden_layers"),
                n_heads=read("num_attention_heads"),
                n_key_value_heads=read("num_key_value_heads"),
                d_head=read("head_dim"),
                d_mlp=read("intermediate_size"),
                d_vocab=read("vocab_size"),
                n_ctx=n_ctx,
                act_fn=read("hidden_act"),
                eps=read("rms_norm_eps"),
                tie_embeddings=read("tie_word_embeddings"),
                init_range=read("initializer_range"),
                rope=RopeConfig.from_hf(read("rope_parameters"), n_ctx=n_ctx),
                attention_bias=read("attention_bias"),
                mlp_bias=read("mlp_bias"),
            )

    def to_hf(self) -> dict[str, Any]:
        return {
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_key_value_heads,
            "head_dim": self.d_head,
            "intermediate_size": self.d_mlp,
            "vocab_size": self.d_vocab,
            "max_position_embeddings": self.n_ctx,
            "hidden_act": self.act_fn,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_range,
            "rope_parameters": self.rope.to_hf(),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**{**data, "rope": RopeConfig.from_hf(data["rope"], n_ctx=data["n_ctx"])})

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "rope": self.rope.to_hf()}


class LlamaBlock(Block):
    """Pre-norm: attention, then the gated MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: LlamaConfig, rotary: Rotary) -> None:
        qkv = SeparateQKV(
            cfg.d_model,
            n_heads=cfg.n_heads,
            n_key_value_heads=cfg.n_key_value_heads,
            d_head=cfg.d_head,
            bias=cfg.attention_bias,
        )
        super().__init__(
            cfg,
            ln1=RMSNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=cfg.attention_bias, rotary=rotary),
            ln2=RMSNorm(cfg.d_model, cfg.eps),
            mlp=GatedMLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=cfg.mlp_bias),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: LlamaConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(LlamaBlock(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=RMSNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: LlamaConfig) -> WeightTable:
    """Biases of attention (attention_bias: all four) and MLP (mlp_bias: all three) come with their matrices."""
    names = {
        "self_attn.q_proj": "attn.qkv.q",
        "self_attn.k_proj": "attn.qkv.k",
        "self_attn.v_proj": "attn.qkv.v",
        "self_attn.o_proj": "attn.o",
        "mlp.gate_proj": "mlp.w_gate",
        "mlp.up_proj": "mlp.w_in",
        "mlp.down_proj": "mlp.w_out",
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2",
    }
    biased = ["self_attn."] * cfg.attention_bias + ["mlp."] * cfg.mlp_bias
    rules = [weight("model.embed_tokens.weight", "embed.weight"), weight("model.norm.weight", "ln_final.weight")]
    for theirs, ours in names.items():
        kinds = ["weight", "bias"] if theirs.startswith(tuple(biased)) else ["weight"]
        rules += [weight(f"model.layers.{{l}}.{theirs}.{kind}", f"blocks.{{l}}.{ours}.{kind}") for kind in kinds]
    head = drop("lm_head.weight") if cfg.tie_embeddings else weight("lm_head.weight", "unembed.weight")
    inv_freq = drop("model.layers.{l}.self_attn.rotary_emb.inv_freq")  # recomputed from the config
    return WeightTable((*rules, head, inv_freq), cfg.n_layers, prefix="model.")


FAMILY = Family(LlamaConfig, parts, weights, hf_class="LlamaForCausalLM")
