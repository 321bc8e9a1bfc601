"""GPT-J (Wang and Komatsuzaki 2021, "GPT-J-6B: A 6 Billion Parameter Autoregressive Language Model").

What is unusual next to GPT-2: attention and the MLP read the same norm of the same stream, and both add to it (there is
no `ln2` and no `hook_resid_mid`); positions enter by rotating the first dimensions of each query and key, in pairs of
neighbours; attention has no biases; the unembedding is its own and has a bias.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import heads, in_layers
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, drop, head, rules_of, weight

LAYER = "transformer.h.{l}."
ATTENTION = {
    "attn.q_proj": "attn.qkv.q",
    "attn.k_proj": "attn.qkv.k",
    "attn.v_proj": "attn.qkv.v",
    "attn.out_proj": "attn.o",
}


@dataclass(frozen=True, kw_only=True)
class GPTJConfig(DecoderConfig):
    """d_rotary: how many dimensions of each query and key are rotated."""

    model_type: ClassVar[str] = "gptj"
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
        "d_rotary": "rotary_dim",
    }

    act_fn: str = "gelu_new"
    eps: float = 1e-5
    tie_embeddings: bool = False
    d_rotary: int = 64

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("rotary", True, "positions enter by rotation")  # of the first release
        read.refuse_unless("scale_attn_weights", True, "scores are divided by sqrt(d_head)")
        return {"d_mlp": read.optional("n_inner") or 4 * read("n_embd")}

    def unusual_to_hf(self) -> dict[str, Any]:
        return {"n_inner": self.d_mlp}


class GPTJBlock(Block):
    """Attention and the MLP side by side: both read `ln1`'s output, and add to the stream that enters the block."""

    def __init__(self, cfg: GPTJConfig, rotary: Rotary) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=False)
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=False, rotary=rotary),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=True),
            parallel=True,
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_in, mlp_in = self.read_both(resid)
        attn_out = self.hook_attn_out(self.attn(attn_in, run))
        return self.hook_resid_post(resid + attn_out + self.hook_mlp_out(self.mlp(mlp_in)))


def parts(cfg: GPTJConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    share = math.nextafter(cfg.d_rotary / cfg.d_head, 2)  # so that no rounding leaves out a dimension
    rope = RopeConfig(partial_rotary_factor=share)
    rotary = Rotary(rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx, interleaved=True)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(GPTJBlock(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=True),
    )


def weights(cfg: GPTJConfig) -> WeightTable:
    """GPT-2's names around the projections, which are apart here and lie as [d_out, d_in]."""
    rules = (
        *rules_of({"transformer.wte": "embed"}),
        *in_layers(ATTENTION, layer=LAYER),
        *in_layers({"ln_1": "ln1", "mlp.fc_in": "mlp.w_in", "mlp.fc_out": "mlp.w_out"}, bias=True, layer=LAYER),
        *rules_of({"transformer.ln_f": "ln_final"}, bias=True),
        head(cfg.tie_embeddings),
        weight("lm_head.bias", "unembed.bias"),
        drop(LAYER + "attn.bias"),  # the causal mask and other constants, in old checkpoints
        drop(LAYER + "attn.masked_bias"),
        drop(LAYER + "attn.embed_positions"),
    )
    return WeightTable(rules, cfg.n_layers, prefix="transformer.")


FAMILY = Family(GPTJConfig, parts, weights, hf_class="GPTJForCausalLM")
