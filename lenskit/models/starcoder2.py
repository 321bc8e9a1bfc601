"""StarCoder 2 (Lozhkov et al. 2024, arXiv 2402.19173).

What is unusual next to Mistral: norms are centred and have biases, the MLP is not gated, and attention and MLP have
biases everywhere. Large models have a sliding window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from lenskit.models.base import Block, Family, Parts
from lenskit.models.common import ATTENTION, PRE_NORMS, heads, in_layers, table
from lenskit.models.config import DecoderConfig
from lenskit.models.hf_config import HFConfig, common_names
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, Unembed
from lenskit.modules.mlp import MLP
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.modules.rope_types import RopeConfig
from lenskit.modules.rotary import Rotary
from lenskit.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class Starcoder2Config(DecoderConfig):
    """rope: the rotary embedding and its scaling; window: keys that a query sees, itself included, or None for all.

    bias: on all projections.
    """

    model_type: ClassVar[str] = "starcoder2"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        eps="norm_epsilon", d_head=None, window="sliding_window", bias="use_bias"
    )

    act_fn: str = "gelu_pytorch_tanh"
    eps: float = 1e-5
    tie_embeddings: bool = True
    rope: RopeConfig = RopeConfig()
    window: int | None = None
    bias: bool = True

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.ignore("embedding_dropout", "residual_dropout")
        return {}


class Starcoder2Block(Block):
    """Pre-norm: attention, then the MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, cfg: Starcoder2Config, rotary: Rotary) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=cfg.bias)
        super().__init__(
            cfg,
            ln1=LayerNorm(cfg.d_model, cfg.eps),
            attn=Attention(qkv, scale=cfg.d_head**-0.5, bias=cfg.bias, rotary=rotary, window=cfg.window),
            ln2=LayerNorm(cfg.d_model, cfg.eps),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=cfg.bias),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.read(resid), run)))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(resid))))
        return self.hook_resid_post(resid + mlp_out)


def parts(cfg: Starcoder2Config) -> Parts:
    """The decoder's parts, in the order of the forward pass; all layers share one rotary embedding."""
    rotary = Rotary(cfg.rope, d_head=cfg.d_head, n_ctx=cfg.n_ctx)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=Identity(),
        blocks=(Starcoder2Block(cfg, rotary) for _ in range(cfg.n_layers)),
        ln_final=LayerNorm(cfg.d_model, cfg.eps),
        unembed=Unembed(cfg.d_model, cfg.d_vocab, bias=False),
    )


def weights(cfg: Starcoder2Config) -> WeightTable:
    """LLaMA's names around GPT-2's for the MLP; all norms have biases."""
    mlp = {"mlp.c_fc": "mlp.w_in", "mlp.c_proj": "mlp.w_out"}
    rules = [*in_layers({**ATTENTION, **mlp}, bias=cfg.bias), *in_layers(PRE_NORMS, bias=True)]
    return table(cfg, rules, bias=True)


FAMILY = Family(Starcoder2Config, parts, weights, hf_class="Starcoder2ForCausalLM")
