"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

What is unusual: learned absolute positions are added to the embedding; queries, keys and values come from one
matrix; weights lie on disk as [d_in, d_out], the transpose of torch's habit; the unembedding is the embedding.
Some checkpoints divide the scores by the layer's number as well (Mistral's "stanford-gpt2" models).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import in_layers
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, LearnedPositions, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import FusedQKV
from lenskit.weights import WeightTable, drop, head, rules_of


@dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """scale_scores: divide q k^T by sqrt(d_head); scale_scores_by_layer: divide layer l's by l + 1 as well."""

    model_type: ClassVar[str] = "gpt2"
    hf_names: ClassVar[Mapping[str, str]] = {
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_vocab": "vocab_size",
        "n_ctx": "n_positions",
        "act_fn": "activation_function",
        "eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "init_range": "initializer_range",
        "scale_scores": "scale_attn_weights",
        "scale_scores_by_layer": "scale_attn_by_inverse_layer_idx",
    }

    act_fn: str = "gelu_new"
    eps: float = 1e-5
    tie_embeddings: bool = True
    scale_scores: bool = True
    scale_scores_by_layer: bool = False

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("add_cross_attention", False, "an encoder's output would be attended to")
        read.ignore("reorder_and_upcast_attn")  # rounding under float16 only
        return {"d_mlp": read.optional("n_inner") or 4 * read("n_embd")}

    def unusual_to_hf(self) -> dict[str, Any]:
        return {"n_inner": self.d_mlp}

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
    layer = "transformer.h.{l}."
    names = {
        "attn.c_attn": "attn.qkv.joined",
        "attn.c_proj": "attn.o",
        "mlp.c_fc": "mlp.w_in",
        "mlp.c_proj": "mlp.w_out",
    }
    around = {"transformer.wte": "embed", "transformer.wpe": "pos_embed", "transformer.ln_f": "ln_final"}
    rules = [
        *rules_of(around, bias=["transformer.ln_f"]),
        *in_layers({"ln_1": "ln1", "ln_2": "ln2"}, bias=True, layer=layer),
        *in_layers(names, bias=True, layer=layer, transpose=True),
        head(cfg.tie_embeddings),
        drop(layer + "attn.bias"),  # the causal mask, in old checkpoints
        drop(layer + "attn.masked_bias"),
    ]
    return WeightTable(tuple(rules), cfg.n_layers, prefix="transformer.")


FAMILY = Family(GPT2Config, parts, weights, hf_class="GPT2LMHeadModel")
