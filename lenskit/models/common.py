"""What many families' files would repeat: names on disk that began with LLaMA's, sizes of heads, windows by layer."""

from collections.abc import Container, Mapping, Sequence
from typing import TypedDict

from lenskit.errors import UnsupportedConfigError
from lenskit.models.config import DecoderConfig
from lenskit.weights import Rule, WeightTable, drop, head, rules_of, unstack

LAYER = "model.layers.{l}."

ATTENTION = {
    "self_attn.q_proj": "attn.qkv.q",
    "self_attn.k_proj": "attn.qkv.k",
    "self_attn.v_proj": "attn.qkv.v",
    "self_attn.o_proj": "attn.o",
}
GATED_MLP = {"mlp.gate_proj": "mlp.w_gate", "mlp.up_proj": "mlp.w_in", "mlp.down_proj": "mlp.w_out"}
FUSED_LINEAR = {  # Megatron-LM's
    "self_attention.query_key_value": "attn.qkv.joined",
    "self_attention.dense": "attn.o",
    "mlp.dense_h_to_4h": "mlp.w_in",
    "mlp.dense_4h_to_h": "mlp.w_out",
}
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


def apart_or_stacked(n_experts: int) -> tuple[list[Rule], list[Rule]]:
    """Rules for gated experts: each with tensors of its own on disk, or a layer's in two, its gates above its linear
    parts.
    """
    every, layer = range(n_experts), LAYER + "mlp.experts."
    names = {theirs.removeprefix("mlp."): ours.removeprefix("mlp.") for theirs, ours in GATED_MLP.items()}
    apart = {f"mlp.experts.{e}.{theirs}": f"mlp.experts.{e}.{ours}" for e in every for theirs, ours in names.items()}
    gates, outs = (
        [f"blocks.{{l}}.mlp.experts.{e}.{part}.weight" for e in every for part in parts]
        for parts in (("w_gate", "w_in"), ("w_out",))
    )
    return in_layers(apart), [unstack(layer + "gate_up_proj", gates, parts=2), unstack(layer + "down_proj", outs)]


def table(
    cfg: DecoderConfig,
    rules: Sequence[Rule],
    *,
    bias: bool = False,
    norm: str | None = "model.norm",
    others: Sequence[Sequence[Rule]] = (),
) -> WeightTable:
    """The table of a model whose blocks have these rules, with the usual names around the blocks.

    Args:
        bias: whether the final norm has one.
        norm: its name; None where it has no weights.
        others: rules of the blocks in other layouts, which are read as well.
    """
    around = (
        *rules_of({"model.embed_tokens": "embed"}),
        *([] if norm is None else rules_of({norm: "ln_final"}, bias=bias)),
        head(cfg.tie_embeddings),
        drop(LAYER + "self_attn.rotary_emb.inv_freq"),  # recomputed from the config
    )
    other = tuple((*around, *rules) for rules in others)
    return WeightTable((*around, *rules), cfg.n_layers, prefix="model.", others=other)


class Heads(TypedDict):
    """What every projection to queries, keys and values has to know."""

    n_heads: int
    n_key_value_heads: int
    d_head: int


def heads(cfg: DecoderConfig) -> Heads:
    """For `SeparateQKV(cfg.d_model, **heads(cfg), bias=...)` and its kin."""
    return Heads(n_heads=cfg.n_heads, n_key_value_heads=cfg.n_key_value_heads, d_head=cfg.d_head)


def windows(layer_types: Sequence[str], window: int | None) -> list[int | None]:
    """Each layer's window: `window` where its type is "sliding_attention", None where it is "full_attention".

    Raises:
        UnsupportedConfigError: another type.
    """
    known = {"sliding_attention": window, "full_attention": None}
    unknown = sorted(set(layer_types) - set(known))
    if unknown:
        raise UnsupportedConfigError(
            f"layer types {', '.join(unknown)} are not supported",
            got=f"layer_types={list(layer_types)}",
            expected=f"{' or '.join(known)} for every layer",
            fix="use a checkpoint without them, or teach the family file to compute them",
        )
    return [known[kind] for kind in layer_types]
