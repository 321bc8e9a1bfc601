"""Names on disk that many families share: those that began with LLaMA's."""

from collections.abc import Container, Mapping

from lenskit.models.base import DecoderConfig
from lenskit.weights import Rule, WeightTable, drop, head, rules_of

LAYER = "model.layers.{l}."

ATTENTION = {
    "self_attn.q_proj": "attn.qkv.q",
    "self_attn.k_proj": "attn.qkv.k",
    "self_attn.v_proj": "attn.qkv.v",
    "self_attn.o_proj": "attn.o",
}
GATED_MLP = {"mlp.gate_proj": "mlp.w_gate", "mlp.up_proj": "mlp.w_in", "mlp.down_proj": "mlp.w_out"}
PRE_NORMS = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}


def in_layers(
    names: Mapping[str, str], *, bias: bool | Container[str] = False, layer: str = LAYER, transpose: bool = False
) -> list[Rule]:
    """Rules for modules of a block, on disk -> ours, at every layer.

    Args:
        bias: whether all have a bias, or the names (as in `names`) of those that have one.
        layer: what comes before the names on disk; `{l}` is the layer's number.
        transpose: whether the disk has the weights as [d_in, d_out].
    """
    biased = [name for name in names if bias is True or (bias is not False and name in bias)]
    placed = {layer + theirs: "blocks.{l}." + ours for theirs, ours in names.items()}
    return rules_of(placed, bias=[layer + name for name in biased], transpose=transpose)


def table(cfg: DecoderConfig, rules: list[Rule], *, bias: bool = False, norm: str = "model.norm") -> WeightTable:
    """The table of a model whose blocks have these rules, with the usual names around the blocks.

    Args:
        bias: whether the final norm has one.
        norm: its name.
    """
    around = [*rules_of({"model.embed_tokens": "embed"}), *rules_of({norm: "ln_final"}, bias=bias)]
    inv_freq = drop(LAYER + "self_attn.rotary_emb.inv_freq")  # recomputed from the config
    return WeightTable((*around, *rules, head(cfg.tie_embeddings), inv_freq), cfg.n_layers, prefix="model.")
