"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

What is unusual: learned absolute positions are added to the embedding; queries, keys and values come from one
matrix; weights lie on disk as [d_in, d_out], the transpose of torch's habit; the unembedding is the embedding.
Some checkpoints divide the scores by the layer's number as well (Mistral's "stanford-gpt2" models).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, DecoderConfig, Family, Parts
from lenskit.models.hf_config import HFConfig
from lenskit.modules.attention import Attention, FusedQKV
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, LearnedPositions, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.norms import LayerNorm
from lenskit.weights import WeightTable, drop, weight


@dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """scale_scores: divide q k^T by sqrt(d_head); scale_scores_by_layer: divide layer l's by l + 1 as well."""

    model_type: ClassVar[str] = "gpt2"

    act_fn: str = "gelu_new"
    eps: float = 1e-5
    tie_embeddings: bool = True
    scale_scores: bool = True
    scale_scores_by_layer: bool = False

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        with HFConfig(hf) as read:
            read.refuse_unless("add_cross_attention", False, "an encoder's output would be attended to")
            read.ignore("reorder_and_upcast_attn", "n_inner")  # rounding under float16 only; read below
            d_model, n_heads = read("n_embd"), read("n_head")
            return cls(
                d_model=d_model,
                n_layers=read("n_layer"),
                n_heads=n_heads,
                n_key_value_heads=n_heads,
                d_head=d_model // n_heads,
                d_mlp=hf.get("n_inner") or 4 * d_model,
                d_vocab=read("vocab_size"),
                n_ctx=read("n_positions"),
                act_fn=read("activation_function"),
                eps=read("layer_norm_epsilon"),
                tie_embeddings=read("tie_word_embeddings"),
                init_range=read("initializer_range"),
                scale_scores=read("scale_attn_weights"),
                scale_scores_by_layer=read("scale_attn_by_inverse_layer_idx"),
            )

    def to_hf(self) -> dict[str, Any]:
        return {
            "n_embd": self.d_model,
            "n_layer": self.n_layers,
            "n_head": self.n_heads,
            "n_inner": self.d_mlp,
            "vocab_size": self.d_vocab,
            "n_positions": self.n_ctx,
            "activation_function": self.act_fn,
            "layer_norm_epsilon": self.eps,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_range,
            "scale_attn_weights": self.scale_scores,
            "scale_attn_by_inverse_layer_idx": self.scale_scores_by_layer,
        }

    def score_scale(self, layer: int) -> float:
        """What layer `layer`'s q k^T is multiplied by."""
        scale = self.d_head**-0.5 if self.scale_scores else 1.0
        return scale / (layer + 1) if self.scale_scores_by_layer else scale


class GPT2Block(Block):
    """Pre-norm: attention, then the MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: GPT2Config, layer: int) -> None:
        qkv = FusedQKV(cfg.d_model, n_heads=cfg.n_heads, d_head=cfg.d_head, bias=True)
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.score_scale(layer), bias=True),
            ln2=LayerNorm(cfg.d_model, cfg.eps),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=True),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: GPT2Config) -> Parts:
    """The decoder's parts, in the order of the forward pass."""
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=LearnedPositions(cfg.n_ctx, cfg.d_model),
        blocks=(GPT2Block(cfg, layer) for layer in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: GPT2Config) -> WeightTable:
    """On disk, every name has or has not the prefix "transformer."."""
    layer, ours = "transformer.h.{l}.", "blocks.{l}."
    rules = [
        weight("transformer.wte.weight", "embed.weight"),
        weight("transformer.wpe.weight", "pos_embed.weight"),
        weight(layer + "ln_1.weight", ours + "ln1.weight"),
        weight(layer + "ln_1.bias", ours + "ln1.bias"),
        weight(layer + "attn.c_attn.weight", ours + "attn.qkv.joined.weight", transpose=True),
        weight(layer + "attn.c_attn.bias", ours + "attn.qkv.joined.bias"),
        weight(layer + "attn.c_proj.weight", ours + "attn.o.weight", transpose=True),
        weight(layer + "attn.c_proj.bias", ours + "attn.o.bias"),
        weight(layer + "ln_2.weight", ours + "ln2.weight"),
        weight(layer + "ln_2.bias", ours + "ln2.bias"),
        weight(layer + "mlp.c_fc.weight", ours + "mlp.w_in.weight", transpose=True),
        weight(layer + "mlp.c_fc.bias", ours + "mlp.w_in.bias"),
        weight(layer + "mlp.c_proj.weight", ours + "mlp.w_out.weight", transpose=True),
        weight(layer + "mlp.c_proj.bias", ours + "mlp.w_out.bias"),
        weight("transformer.ln_f.weight", "ln_final.weight"),
        weight("transformer.ln_f.bias", "ln_final.bias"),
        drop("lm_head.weight") if cfg.tie_embeddings else weight("lm_head.weight", "unembed.weight"),
        drop(layer + "attn.bias"),  # the causal mask, in old checkpoints
        drop(layer + "attn.masked_bias"),
    ]
    return WeightTable(tuple(rules), cfg.n_layers, prefix="transformer.")


FAMILY = Family(GPT2Config, parts, weights, hf_class="GPT2LMHeadModel")
