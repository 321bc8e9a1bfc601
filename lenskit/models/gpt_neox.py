"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745), which Pythia is (Biderman et al. 2023, arXiv 2304.01373).

What is unusual next to GPT-2: attention and the MLP read the same stream, through norms of their own, and both add to
it (there is no `hook_resid_mid`), unless use_parallel_residual is off; positions enter by rotating a part of each
query and key; the rows of the one matrix of queries, keys and values go head by head; the unembedding is its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import heads, in_layers
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import common_names
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import GroupedQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable, drop, head, rules_of

LAYER = "gpt_neox.layers.{l}."


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(DecoderConfig):
    """rope: the rotary embedding, of a quarter of each head mostly; attention_bias: on all of attention's projections.

    parallel: whether attention and the MLP read the same stream.
    """

    model_type: ClassVar[str] = "gpt_neox"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        n_key_value_heads=None,
        d_head=None,
        eps="layer_norm_eps",
        attention_bias="attention_bias",
        parallel="use_parallel_residual",
    )

    act_fn: str = "gelu"
    eps: float = 1e-5
    tie_embeddings: bool = False
    rope: RopeConfig = RopeConfig(partial_rotary_factor=0.25)
    attention_bias: bool = True
    parallel: bool = True

    def unusual_to_hf(self) -> dict[str, Any]:
        partial = {"partial_rotary_factor": self.rope.partial_rotary_factor}  # left out, it would be a quarter
        return {"rope_parameters": {**self.rope.to_hf(), **partial}}


class GPTNeoXBlock(Block):
    """Attention and the MLP side by side, each reading a norm of its own of the stream that enters the block."""

    def __init__(self, cfg: GPTNeoXConfig, rotary: Rotary) -> None:
        qkv = GroupedQKV(cfg.d_model, **heads(cfg), bias=cfg.attention_bias)
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=cfg.attention_bias, rotary=rotary),
            ln2=LayerNorm(cfg.d_model, cfg.eps),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=True),
            parallel=cfg.parallel,
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self.attn(self.read(resid), run))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + attn_out + mlp_out)


class SequentialBlock(GPTNeoXBlock):
    """The same parts one after the other."""

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: GPTNeoXConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    block = GPTNeoXBlock if cfg.parallel else SequentialBlock
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(block(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: GPTNeoXConfig) -> WeightTable:
    """The unembedding is "embed_out" on disk; transformers may write "lm_head"."""
    attention = {"attention.query_key_value": "attn.qkv.joined", "attention.dense": "attn.o"}
    others = {
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2",
        "mlp.dense_h_to_4h": "mlp.w_in",
        "mlp.dense_4h_to_h": "mlp.w_out",
    }
    rules = (
        *rules_of({"gpt_neox.embed_in": "embed"}),
        *in_layers(attention, bias=cfg.attention_bias, layer=LAYER),
        *in_layers(others, bias=True, layer=LAYER),
        *rules_of({"gpt_neox.final_layer_norm": "ln_final"}, bias=True),
        drop(LAYER + "attention.bias"),  # the causal mask and other constants, in old checkpoints
        drop(LAYER + "attention.masked_bias"),
        drop(LAYER + "attention.rotary_emb.inv_freq"),
    )
    renamed = (*rules, head(cfg.tie_embeddings))
    original = (*rules, head(cfg.tie_embeddings, "embed_out.weight"))
    return WeightTable(original, cfg.n_layers, prefix="gpt_neox.", others=(renamed,))


FAMILY = Family(GPTNeoXConfig, parts, weights, hf_class="GPTNeoXForCausalLM")
