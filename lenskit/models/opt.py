"""OPT (Zhang et al. 2022, arXiv 2205.01068); Galactica is one too (Taylor et al. 2022, arXiv 2211.09085).

What is unusual next to GPT-2: the table of learned positions begins with two rows that no token reads; the MLP has a
relu. The model of 350M parameters is in an older style: the stream itself is normalised after each addition (`ln1_sum`,
`ln2_sum`), so `ln1_sum` reads resid_pre + attn_out and gives `hook_resid_mid`, and there is no final norm; its tokens
have narrower vectors, which are projected to the stream (`hook_embed` is after that) and back for the unembedding,
whose `W_U` is both. Some models have neither biases nor learned gains.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import heads, in_layers
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Linear, OffsetPositions, TransformedEmbed, TransformedUnembed, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.weights import WeightTable, head, rules_of

LAYER = "model.decoder.layers.{l}."
LINEAR = {
    "self_attn.q_proj": "attn.qkv.q",
    "self_attn.k_proj": "attn.qkv.k",
    "self_attn.v_proj": "attn.qkv.v",
    "self_attn.out_proj": "attn.o",
    "fc1": "mlp.w_in",
    "fc2": "mlp.w_out",
}


@dataclass(frozen=True, kw_only=True)
class OPTConfig(DecoderConfig):
    """d_embed: width of a token's vector. bias: of every linear map. gains: whether norms have gains and biases.

    pre_norm: sublayers read a norm of the stream; otherwise the stream is normalised after each.
    no_final_norm: leaves out what a pre-norm model has at its end (fine-tuned before that was repaired).
    """

    model_type: ClassVar[str] = "opt"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        without=("n_key_value_heads", "d_head", "eps", "rope"),
        d_mlp="ffn_dim",
        act_fn="activation_function",
        init_range="init_std",
        d_embed="word_embed_proj_dim",
        bias="enable_bias",
        gains="layer_norm_elementwise_affine",
        pre_norm="do_layer_norm_before",
        no_final_norm="_remove_final_layer_norm",
    )

    act_fn: str = "relu"
    eps: float = 1e-5
    tie_embeddings: bool = True
    d_embed: int
    bias: bool = True
    gains: bool = True
    pre_norm: bool = True
    no_final_norm: bool = False

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("scale_embeddings", False, "embeddings are added as they are")
        read.ignore("dropout", "activation_dropout", "layerdrop", "output_projection", "learned_embeddings")
        return {}

    @property
    def final_norm(self) -> bool:
        return self.pre_norm and not self.no_final_norm

    def norm(self, present: bool) -> LayerNorm | None:
        return LayerNorm(self.d_model, self.eps, weight=self.gains, bias=self.gains) if present else None


class OPTBlock(Block):
    """Pre-norm: attention, then the MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: OPTConfig) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.bias)
        super().__init__(
            cfg,
            ln1=cfg.norm(cfg.pre_norm),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=cfg.bias),
            ln1_sum=cfg.norm(not cfg.pre_norm),
            ln2=cfg.norm(cfg.pre_norm),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=cfg.bias),
            ln2_sum=cfg.norm(not cfg.pre_norm),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


class PostNormBlock(OPTBlock):
    """Each sublayer reads the stream, and the stream with its output is normalised."""

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(self.ln1_sum(resid + self.hook_attn_out(self.attn(self.read(resid), run))))
        mlp_out = self.hook_mlp_out(self.mlp(self.hook_mlp_in(resid)))
        return self.hook_resid_post(self.ln2_sum(resid + mlp_out))


def parts(cfg: OPTConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass."""
    embed, unembed = Embed(cfg.d_vocab, cfg.d_model), Unembed(cfg.d_model, cfg.d_vocab, bias=False)
    if cfg.d_embed != cfg.d_model:
        embed = TransformedEmbed(cfg.d_vocab, cfg.d_embed, then=Linear(cfg.d_embed, cfg.d_model, bias=False))
        back = Linear(cfg.d_model, cfg.d_embed, bias=False)
        unembed = TransformedUnembed(cfg.d_embed, cfg.d_vocab, bias=False, first=back)
    return Parts(
        embed=embed,
        pos_embed=OffsetPositions(cfg.n_ctx, cfg.d_model, offset=2),
        blocks=((OPTBlock if cfg.pre_norm else PostNormBlock)(cfg) for _ in range(cfg.n_layers)),
        ln_final=cfg.norm(cfg.final_norm) or Identity(),
        unembed=unembed,
    )


def weights(cfg: OPTConfig) -> WeightTable:
    """A block's two norms have the same names wherever they stand: "final_layer_norm" is the MLP's."""
    around = {"embed_tokens": "embed", "embed_positions": "pos_embed"}
    around |= {} if cfg.d_embed == cfg.d_model else {"project_in": "embed.then", "project_out": "unembed.first"}
    rules = [
        *rules_of({f"model.decoder.{theirs}": ours for theirs, ours in around.items()}),
        *in_layers(LINEAR, bias=cfg.bias, layer=LAYER),
        head(cfg.tie_embeddings),
    ]
    if cfg.gains:
        ln1, ln2 = ("ln1", "ln2") if cfg.pre_norm else ("ln1_sum", "ln2_sum")
        rules += in_layers({"self_attn_layer_norm": ln1, "final_layer_norm": ln2}, bias=True, layer=LAYER)
    if cfg.gains and cfg.final_norm:
        rules += rules_of({"model.decoder.final_layer_norm": "ln_final"}, bias=True)
    return WeightTable(tuple(rules), cfg.n_layers, prefix="model.")


FAMILY = Family(OPTConfig, parts, weights, hf_class="OPTForCausalLM")
