"""BERT (Devlin et al. 2018, arXiv 1810.04805): an encoder, with the head that fills in masked tokens.

What is unusual next to GPT-2: a token sees all of its row, those after it as well. What enters the first block is a
norm (`ln_embed`) of three embeddings' sum: the token's, its position's, and that of its type (`hook_token_type_embed`),
which says of a pair of texts which one it is in. The stream itself is normalised after each addition (`ln1_sum`,
`ln2_sum`), so `ln1_sum` reads resid_pre + attn_out and gives `hook_resid_mid`; there is no final norm. The head is a
layer of its own (`unembed.hook_pre`, `unembed.hook_post`, a norm, `unembed.ln`) and the embedding's transpose with a
bias. The classifier of pairs that the first models were trained with too is left out.
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
from lenskit.modules.attention import BidirectionalAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, LearnedPositions, Linear, NonlinearUnembed, TokenTypes
from lenskit.modules.mlp import MLP, activation
from lenskit.modules.module import Identity
from lenskit.modules.norms import LayerNorm
from lenskit.modules.qkv import SeparateQKV
from lenskit.weights import Rule, WeightTable, drop, rules_of, weight

EMBEDDINGS = {
    "bert.embeddings.word_embeddings": "embed",
    "bert.embeddings.position_embeddings": "pos_embed",
    "bert.embeddings.token_type_embeddings": "token_type_embed",
}
LAYER = "bert.encoder.layer.{l}."
LINEAR = {
    "attention.self.query": "attn.qkv.q",
    "attention.self.key": "attn.qkv.k",
    "attention.self.value": "attn.qkv.v",
    "attention.output.dense": "attn.o",
    "intermediate.dense": "mlp.w_in",
    "output.dense": "mlp.w_out",
}
NORMS = {
    "bert.embeddings.LayerNorm": "ln_embed",
    LAYER + "attention.output.LayerNorm": "blocks.{l}.ln1_sum",
    LAYER + "output.LayerNorm": "blocks.{l}.ln2_sum",
    "cls.predictions.transform.LayerNorm": "unembed.ln",
}
UNREAD = ("bert.pooler.dense", "cls.seq_relationship")  # the classifier of pairs
POOLER = "pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"


@dataclass(frozen=True, kw_only=True)
class BertConfig(DecoderConfig):
    """n_token_types: how many there are. act_fn: the head's too."""

    model_type: ClassVar[str] = "bert"
    hf_names: ClassVar[Mapping[str, str]] = common_names(
        without=("n_key_value_heads", "d_head", "rope"), eps="layer_norm_eps", n_token_types="type_vocab_size"
    )

    act_fn: str = "gelu"
    eps: float = 1e-12
    tie_embeddings: bool = True
    n_token_types: int = 2

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        read.refuse_unless("is_decoder", False, "a token sees its whole row")
        read.refuse_unless("add_cross_attention", False, "another model's output would be attended to")
        read.refuse_unless("position_embedding_type", "absolute", "one learned vector a position is added")
        read.refuse_unless("directionality", "bidi", "a token sees its whole row")
        read.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", *POOLER.split())
        return {}

    def norm(self) -> LayerNorm:
        return LayerNorm(self.d_model, self.eps)


class BertBlock(Block):
    """Each sublayer reads the stream, and the stream with its output is normalised."""

    def __init__(self, cfg: BertConfig) -> None:
        qkv = SeparateQKV(cfg.d_model, **heads(cfg), bias=True)
        super().__init__(
            cfg,
            attn=BidirectionalAttention(qkv, scale=cfg.d_head**-0.5, bias=True),
            ln1_sum=cfg.norm(),
            mlp=MLP(cfg.d_model, cfg.d_mlp, act_fn=cfg.act_fn, bias=True),
            ln2_sum=cfg.norm(),
        )

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = self.hook_resid_mid(self.ln1_sum(resid + self.hook_attn_out(self.attn(self.read(resid), run))))
        mlp_out = self.hook_mlp_out(self.mlp(self.hook_mlp_in(resid)))
        return self.hook_resid_post(self.ln2_sum(resid + mlp_out))


def parts(cfg: BertConfig) -> Parts:
    """The encoder's parts, in the order of the forward pass."""
    dense = Linear(cfg.d_model, cfg.d_model, bias=True)
    return Parts(
        embed=Embed(cfg.d_vocab, cfg.d_model),
        pos_embed=LearnedPositions(cfg.n_ctx, cfg.d_model),
        token_types=TokenTypes(cfg.n_token_types, cfg.d_model),
        ln_embed=cfg.norm(),
        blocks=(BertBlock(cfg) for _ in range(cfg.n_layers)),
        ln_final=Identity(),
        unembed=NonlinearUnembed(
            cfg.d_model, cfg.d_vocab, bias=True, dense=dense, act=activation(cfg.act_fn), ln=cfg.norm()
        ),
    )


def weights(cfg: BertConfig) -> WeightTable:
    """The oldest checkpoints call a norm's gains "gamma" and its bias "beta", after TensorFlow."""
    head, unread = "cls.predictions.decoder.", [drop("bert.embeddings.position_ids")]
    unread += [drop(f"{module}.{part}") for module in UNREAD for part in ("weight", "bias")]
    if cfg.tie_embeddings:  # copies of the embedding, and of the bias
        output: list[Rule] = [
            weight("cls.predictions.bias", "unembed.bias"),
            drop(head + "weight"),
            drop(head + "bias"),
        ]
    else:
        output = [*rules_of({head[:-1]: "unembed"}, bias=True), drop("cls.predictions.bias")]
    rules = [
        *rules_of(EMBEDDINGS),
        *in_layers(LINEAR, bias=True, layer=LAYER),
        *rules_of({"cls.predictions.transform.dense": "unembed.dense"}, bias=True),
        *output,
        *unread,
    ]
    old = [
        weight(f"{theirs}.{name}", f"{ours}.{part}")
        for theirs, ours in NORMS.items()
        for name, part in (("gamma", "weight"), ("beta", "bias"))
    ]
    now = rules_of(NORMS, bias=True)
    return WeightTable((*rules, *now), cfg.n_layers, prefix="bert.", others=((*rules, *old),))


FAMILY = Family(BertConfig, parts, weights, hf_class="BertForMaskedLM")
