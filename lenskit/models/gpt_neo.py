"""GPT-Neo (Black et al. 2021, "GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow").

What is unusual next to GPT-2: scores are not scaled; every second layer is "local", where a query sees only the keys of
a window before it; queries, keys and values come from three matrices without biases; weights lie on disk as
[d_out, d_in].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import heads, in_layers, windows
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, LearnedPositions, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.weights import WeightTable, drop, head, rules_of

LAYER = "transformer.h.{l}."
PROJECTIONS = {
    "attn.attention.q_proj": "attn.qkv.q",
    "attn.attention.k_proj": "attn.qkv.k",
    "attn.attention.v_proj": "attn.qkv.v",
}
OTHERS = {
    "ln_1": "ln1",
    "attn.attention.out_proj": "attn.o",
    "ln_2": "ln2",
    "mlp.c_fc": "mlp.w_in",
    "mlp.c_proj": "mlp.w_out",
}
KINDS = {"local": "sliding_attention", "global": "full_attention"}


@dataclass(frozen=True, kw_only=True)
class GPTNeoConfig(DecoderConfig):
    """window: keys that a query sees, itself included, in layers whose type is "sliding_attention".

    layer_types: that or "full_attention" for each layer.
    """

    model_type: ClassVar[str] = "gpt_neo"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        without=("n_key_value_heads", "d_head", "d_mlp", "rope"),
        n_layers="num_layers",
        n_heads="num_heads",
        act_fn="activation_function",
        eps="layer_norm_epsilon",
        window="window_size",
    )

    act_fn: str = "gelu_new"
    eps: float = 1e-5
    tie_embeddings: bool = True
    window: int = 256
    layer_types: tuple[str, ...]

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.ignore("attention_types")  # the list of layers, abbreviated
        read.ignore("resid_dropout", "embed_dropout")
        return {
            "d_mlp": read.optional("intermediate_size") or 4 * read("hidden_size"),
            "layer_types": tuple(KINDS.get(kind, kind) for kind in read("attention_layers")),
        }

    def unusual_to_hf(self) -> dict[str, Any]:
        kinds = {ours: theirs for theirs, ours in KINDS.items()}
        layers = [kinds[kind] for kind in self.layer_types]
        return {"intermediate_size": self.d_mlp, "attention_types": [[layers, 1]]}


class GPTNeoBlock(Block):
    """Pre-norm: attention, then the MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: GPTNeoConfig, window: int | None) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=False)
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=1.0, bias=True, window=window),
            ln2=LayerNorm(cfg.d_model, cfg.eps),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=True),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: GPTNeoConfig) -> Parts:
    """The decoder's parts, in the order of the forward pass."""
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=LearnedPositions(cfg.n_ctx, cfg.d_model),
        blocks=(GPTNeoBlock(cfg, window) for window in windows(cfg.layer_types, cfg.window)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: GPTNeoConfig) -> WeightTable:
    """GPT-2's names around the projections."""
    rules = (
        *rules_of({"transformer.wte": "embed", "transformer.wpe": "pos_embed"}),
        *in_layers(PROJECTIONS, layer=LAYER),
        *in_layers(OTHERS, bias=True, layer=LAYER),
        *rules_of({"transformer.ln_f": "ln_final"}, bias=True),
        head(cfg.tie_embeddings),
        drop(LAYER + "attn.attention.bias"),  # the causal mask, in old checkpoints
        drop(LAYER + "attn.attention.masked_bias"),
    )
    return WeightTable(rules, cfg.n_layers, prefix="transformer.")


FAMILY = Family(GPTNeoConfig, parts, weights, hf_class="GPTNeoForCausalLM")
