"""Every variant in the table against Hugging Face's own implementation, and the identities its activations obey."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from parity_table import LENGTH, MODEL_TYPES, ROWS, TINY, Row, error, from_hf, hf_folder, hf_model, ids, on_disk, read
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

import lenskit as lk
from lenskit.checkpoints.load import complete
from lenskit.models.registry import MODULES, family
from lenskit.modules.attention import ExtendedAttention
from lenskit.modules.linear import TransformedUnembed
from lenskit.modules.mlp import ACTIVATIONS
from lenskit.modules.module import Identity
from lenskit.modules.norms import Norm, RMSNormOverHeads
from lenskit.modules.position_bias import LinearBias

CLOSE = 1e-5  # relative to the largest value


@dataclass(frozen=True)
class Pair:
    """The same weights twice."""

    row: Row
    folder: Path
    hf: PreTrainedModel  # with eager attention
    model: lk.HookedTransformer


@pytest.fixture(scope="module", params=ROWS, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = hf_folder(request.param, tmp_path_factory.mktemp("hf"))
    return Pair(request.param, folder, hf_model(folder), lk.HookedTransformer.from_pretrained(folder))


def run_hf(hf: PreTrainedModel, tokens: Tensor, **inputs: object) -> object:
    """Hugging Face's output for these tokens alone.

    Its rotary embedding remembers the longest sequence that it has seen, until it sees one that is short.
    """
    hf(tokens[:, :1])
    return hf(tokens, use_cache=False, **inputs)


def embedded(model: lk.HookedTransformer, cache: lk.ActivationCache) -> Tensor:
    """The sum of the embeddings."""
    return cache["embed"] + cache.get("pos_embed", 0.0) + cache.get("token_type_embed", 0.0)


def gained(norm: Norm, cache: lk.ActivationCache, name: str) -> Tensor:
    """`hook_normalized * gains (+ bias)`."""
    return cache[f"{name}.hook_normalized"] * norm.gains + dict(norm.named_parameters()).get("bias", 0.0)


def read_by(pair: Pair, cache: lk.ActivationCache, layer: int, norm: str) -> Tensor:
    """What a block's attention ("ln1") or MLP ("ln2") reads: the norm of the stream, or the stream."""
    block, name = pair.model.blocks[layer], f"blocks.{layer}."
    stream = cache["resid_pre", layer] if norm == "ln1" else before_mlp(cache, layer)
    if norm == "ln2" and not isinstance(block.ln2, Norm) and f"{name}hook_resid_mid" not in cache:
        norm = "ln1"  # side by side, and one norm for both
    part = block.get_submodule(norm)
    return gained(part, cache, name + norm) if isinstance(part, Norm) else stream


def read_by_unembedding(pair: Pair, cache: lk.ActivationCache) -> Tensor:
    """The final norm of the stream, or the stream."""
    norm = pair.model.ln_final
    return gained(norm, cache, "ln_final") if isinstance(norm, Norm) else cache["resid_post", -1]


def before_mlp(cache: lk.ActivationCache, layer: int) -> Tensor:
    """The stream that the MLP's norm is of."""
    return cache.get(f"blocks.{layer}.hook_resid_mid", cache[f"blocks.{layer}.hook_resid_pre"])


def summed(block: nn.Module, norm: str, stream: Tensor) -> Tensor:
    """The stream after something was added to it: its norm, in families that have one there."""
    parts = dict(block.named_children())
    return parts[norm](stream) if norm in parts else stream


def inexact(block: nn.Module) -> float:
    """How far the identity of sums may be off: not at all, but for a norm, which rounds."""
    return CLOSE if "ln1_sum" in dict(block.named_children()) else 0.0


def multiplier(pair: Pair) -> float:
    """What the sublayers' outputs are multiplied by before they are added."""
    return pair.model.cfg.to_json().get("residual_multiplier", 1.0)


# -- the same numbers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_equal_hugging_faces(pair: Pair, attention: str) -> None:
    hf = pair.hf if attention == "eager" else hf_model(pair.folder, attention="sdpa")
    for length in pair.row.lengths:
        tokens = ids(3, length)
        assert error(pair.model(tokens), run_hf(hf, tokens).logits) < CLOSE, f"{length} tokens"


@torch.no_grad()
def test_one_token_is_a_sequence(pair: Pair) -> None:
    assert error(pair.model(ids(2, 1)), pair.hf(ids(2, 1)).logits) < CLOSE


@torch.no_grad()
def test_length_leaves_nothing_behind(pair: Pair) -> None:
    long, short = ids(1, LENGTH), ids(1, LENGTH // 3, seed=1)
    alone = pair.model(short)
    pair.model(long)
    assert torch.equal(pair.model(short), alone)


@torch.no_grad()
def test_the_stream_equals_hugging_faces_hidden_states(pair: Pair) -> None:
    tokens, last = ids(2, LENGTH), []
    blocks = next(module for module in pair.hf.modules() if isinstance(module, nn.ModuleList))
    handle = blocks[-1].register_forward_hook(
        lambda module, inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    hidden = run_hf(pair.hf, tokens, output_hidden_states=True).hidden_states
    handle.remove()
    _, cache = pair.model.run_with_cache(tokens)
    for layer in range(pair.model.cfg.n_layers):
        assert error(cache["resid_pre", layer], hidden[layer]) < CLOSE
    for layer in range(pair.model.cfg.n_layers - 1):
        assert error(cache["resid_post", layer], hidden[layer + 1]) < CLOSE
    assert error(cache["resid_post", -1], last[-1]) < CLOSE
    read, unembed = read_by_unembedding(pair, cache), pair.model.unembed
    assert error(unembed.first(read) if isinstance(unembed, TransformedUnembed) else read, hidden[-1]) < CLOSE


@torch.no_grad()
def test_the_pattern_equals_hugging_faces_attentions(pair: Pair) -> None:
    if pair.row.sdpa_only:
        pytest.skip("Hugging Face's other implementation, which gives patterns, computes something else")
    tokens = ids(2, LENGTH)
    attentions = run_hf(pair.hf, tokens, output_attentions=True).attentions
    _, cache = pair.model.run_with_cache(tokens, "*.hook_pattern")
    for layer, pattern in enumerate(attentions):
        assert error(cache["pattern", layer], pattern) < CLOSE


def test_gradients_equal_hugging_faces(pair: Pair) -> None:
    tokens = ids(2, LENGTH)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    pair.hf.zero_grad()
    loss(run_hf(pair.hf, tokens).logits).backward()
    gradients = {name: p.grad for name, p in pair.hf.named_parameters() if p.grad is not None}
    theirs = read(pair.row.model_type, pair.model.cfg, on_disk(pair.hf, gradients))

    pair.model.zero_grad()
    loss(pair.model(tokens)).backward()
    gradients = {name: p.grad for name, p in pair.model.named_parameters(remove_duplicate=False)}
    table = family(pair.row.model_type, where="the row").weights(pair.model.cfg)
    ours = {name: gradient for name, gradient in table.to_disk(gradients) if gradient is not None}

    assert ours.keys() <= theirs.keys()
    for name, gradient in theirs.items():
        if float(gradient.abs().max()) > 1e-7:
            assert error(ours[name], gradient) < 2e-5, name
        else:  # of a router that picks one expert, whose weight is one; of an expert that nobody picked
            assert name not in ours or float(ours[name].abs().max()) < 1e-7, name


@torch.no_grad()
def test_left_padded_batches_equal_hugging_faces(pair: Pair) -> None:
    """It has to be told the positions."""
    if pair.row.length_matters:
        pytest.skip("Hugging Face scales every row by the longest one's length")
    tokens, mask = ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :5], mask[1, :17] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = run_hf(pair.hf, tokens, attention_mask=mask, position_ids=positions).logits
    assert error(pair.model(tokens, mask)[mask.bool()], theirs[mask.bool()]) < CLOSE


# -- identities


@torch.no_grad()
def test_the_stream_is_the_sum_of_what_was_written_to_it(pair: Pair) -> None:
    _, cache = pair.model.run_with_cache(ids(2, LENGTH))
    start = pair.model.ln_embed(embedded(pair.model, cache))
    assert error(cache["resid_pre", 0], start) <= (CLOSE if isinstance(pair.model.ln_embed, Norm) else 0.0)
    for layer, block in enumerate(pair.model.blocks):
        after_attention = summed(block, "ln1_sum", cache["resid_pre", layer] + cache["attn_out", layer])
        if f"blocks.{layer}.hook_resid_mid" in cache:
            assert error(after_attention, cache["resid_mid", layer]) <= inexact(block)
        after_mlp = summed(block, "ln2_sum", after_attention + cache["mlp_out", layer])
        assert error(after_mlp, cache["resid_post", layer]) <= inexact(block)
        if layer:
            assert torch.equal(cache["resid_pre", layer], cache["resid_post", layer - 1])


@torch.no_grad()
def test_sublayers_read_the_normalised_stream_with_its_gain(pair: Pair) -> None:
    _, cache = pair.model.run_with_cache(ids(2, LENGTH))
    for layer, block in enumerate(pair.model.blocks):
        extended = block.attn if isinstance(block.attn, ExtendedAttention) else None
        clip, clip_v = (Identity(), Identity()) if extended is None else (extended.clip, extended.clip_v)
        q, k, v = block.attn.qkv(read_by(pair, cache, layer, "ln1"))
        for short, by_head in (("q", clip(q)), ("k", clip(k)), ("v", clip_v(v))):
            assert error(cache[short, layer], by_head.transpose(1, 2)) < CLOSE
        mlp_out = block.ln2_post(block.mlp(read_by(pair, cache, layer, "ln2"))) * multiplier(pair)
        assert error(cache["mlp_out", layer], mlp_out) < CLOSE
    assert error(cache["logits"], pair.model.unembed(read_by_unembedding(pair, cache))) < CLOSE


@torch.no_grad()
def test_the_scale_is_what_was_divided_by(pair: Pair) -> None:
    _, cache = pair.model.run_with_cache(ids(2, LENGTH))
    for name, norm in pair.model.named_modules():
        part = name.split(".")[-1]
        if not isinstance(norm, Norm) or part in ("ln1_post", "ln2_post", "then"):
            continue  # those of what has no point before them
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        before = {"ln1": "resid_pre", "ln_final": "resid_post", "q_norm": "q", "k_norm": "k"}
        if part == "ln_embed":
            x = embedded(pair.model, cache)
        elif part == "ln":
            x = cache[name.replace("ln", "hook_post")]
        elif part == "ln1_sum":
            x = cache["resid_pre", layer] + cache["attn_out", layer]
        elif part == "ln2_sum":
            x = cache["resid_mid", layer] + cache["mlp_out", layer]
        elif part == "norm":
            x = cache[name.removesuffix("norm") + "hook_latent"]
        else:
            x = before_mlp(cache, layer) if part == "ln2" else cache[before[part], layer]
        x = norm.centre(x.flatten(2) if isinstance(norm, RMSNormOverHeads) else x)
        scale = cache[f"{name}.hook_scale"]
        assert scale.shape == (*x.shape[:-1], 1)
        assert error(cache[f"{name}.hook_normalized"] * scale, x) < CLOSE
        assert error(scale.pow(2), x.pow(2).mean(-1, keepdim=True) + norm.eps) < CLOSE


@torch.no_grad()
def test_the_pattern_is_the_softmax_of_the_scores_and_weighs_the_values(pair: Pair) -> None:
    _, cache = pair.model.run_with_cache(ids(2, LENGTH))
    columns = torch.arange(LENGTH)
    ago = columns[:, None] - columns
    for layer, block in enumerate(pair.model.blocks):
        attn, pattern, scores = block.attn, cache["pattern", layer], cache["attn_scores", layer]
        rotated = f"blocks.{layer}.attn.hook_rot_q" in cache
        q, k = (cache[f"rot_{short}" if rotated else short, layer] for short in "qk")
        k, v = (x.repeat_interleave(attn.group, 2) for x in (k, cache["v", layer]))
        by_hand = torch.einsum("bqhd,bkhd->bhqk", q, k) * attn.scale
        if isinstance(attn, ExtendedAttention):
            assert error(pattern, attn.softmax(scores, scores.dtype)) < CLOSE
            by_hand = attn.cap(by_hand)
            if isinstance(attn.position_bias, LinearBias):
                seen = -ago if attn.position_bias.rounded is None else columns.expand(LENGTH, -1)
                slopes = torch.tensor(attn.position_bias.slopes) * attn.position_bias.multiplier
                by_hand = by_hand + slopes[:, None, None] * seen
        else:
            assert error(pattern, scores.softmax(-1)) < CLOSE
        allowed = (ago >= 0) & (ago < (attn.window or LENGTH)) if pair.row.causal else ago == ago
        exact = not (isinstance(attn, ExtendedAttention) and getattr(attn.position_bias, "rounded", None))
        assert error(scores[..., allowed], by_hand[..., allowed]) < (CLOSE if exact else 0.01)
        assert bool((scores[..., ~allowed] == -torch.inf).all())
        assert error(cache["z", layer], torch.einsum("bhqk,bkhd->bqhd", pattern, v)) < CLOSE


@torch.no_grad()
def test_results_of_heads_sum_to_what_attention_adds(pair: Pair) -> None:
    _, cache = pair.model.run_with_cache(ids(2, LENGTH), ["*.hook_result", "*.hook_attn_out", "*.hook_z"])
    for layer, block in enumerate(pair.model.blocks):
        by_head = cache["result", layer]
        attn_out = block.ln1_post(by_head.sum(2) + block.attn.b_O) * multiplier(pair)
        assert error(attn_out, cache["attn_out", layer]) < CLOSE
        by_hand = torch.stack([z @ W_O for z, W_O in zip(cache["z", layer].unbind(2), block.attn.W_O, strict=True)], 2)
        assert error(by_head, by_hand) < CLOSE


@torch.no_grad()
def test_inputs_by_head_are_copies_of_the_stream(pair: Pair) -> None:
    names = ["attn_in", "q_input", "k_input", "v_input"]
    _, cache = pair.model.run_with_cache(ids(2, LENGTH), [f"*.hook_{name}" for name in names] + ["*resid*"])
    cfg = pair.model.cfg
    for layer in range(cfg.n_layers):
        for name in names:
            heads = cfg.n_heads if name == "q_input" else cfg.n_key_value_heads
            stream = cache["resid_pre", layer].unsqueeze(2).expand(-1, -1, heads, -1)
            assert torch.equal(cache[name, layer], stream)


@torch.no_grad()
def test_the_mlps_input_is_the_stream_before_its_norm(pair: Pair) -> None:
    _, cache = pair.model.run_with_cache(ids(2, LENGTH), ["*.hook_mlp_in", "*.hook_resid_*"])
    for layer in range(pair.model.cfg.n_layers):
        assert torch.equal(cache["mlp_in", layer], before_mlp(cache, layer))


@torch.no_grad()
def test_asking_changes_no_logits(pair: Pair) -> None:
    tokens = ids(3, LENGTH)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    unasked = pair.model(tokens, mask)
    everything, cache = pair.model.run_with_cache(tokens, "*", mask=mask)
    assert set(cache) == set(pair.model.hook_points)
    assert error(everything[mask.bool()], unasked[mask.bool()]) < CLOSE
    if pair.row.name != "default":
        return
    for name in pair.model.hook_points:  # each alone takes another path through the model
        logits, _ = pair.model.run_with_cache(tokens, name, mask=mask)
        assert error(logits[mask.bool()], unasked[mask.bool()]) < CLOSE, name


# -- padding


def assert_rows_equal_themselves_alone(model: lk.HookedTransformer, tokens: Tensor, mask: Tensor) -> None:
    together = model(tokens, mask)
    scored, cache = model.run_with_cache(tokens, ["*.hook_pattern", "*.hook_resid_post"], mask=mask)
    for row, kept in enumerate(mask.bool()):
        alone, own = model.run_with_cache(tokens[row, kept], ["*.hook_pattern", "*.hook_resid_post"])
        assert error(together[row, kept], alone[0]) < CLOSE, f"row {row}: fused attention"
        assert error(scored[row, kept], alone[0]) < CLOSE, f"row {row}: explicit attention"
        for layer in range(model.cfg.n_layers):
            assert error(cache["resid_post", layer][row, kept], own["resid_post", layer][0]) < CLOSE
            pattern = cache["pattern", layer][row][:, kept]
            assert error(pattern[:, :, kept], own["pattern", layer][0]) < CLOSE
            assert float(pattern[:, :, ~kept].sum()) == 0.0, "a token attends to padding"


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_themselves_alone(pair: Pair, side: str) -> None:
    lengths = torch.tensor([LENGTH, 1, 5, 17])
    columns = torch.arange(LENGTH).expand(4, -1)
    mask = columns >= LENGTH - lengths[:, None] if side == "left" else columns < lengths[:, None]
    assert_rows_equal_themselves_alone(pair.model, ids(4, LENGTH), mask)


@torch.no_grad()
def test_padding_that_all_rows_share_changes_nothing(pair: Pair) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, :15], mask[1, :20] = False, False
    assert_rows_equal_themselves_alone(pair.model, ids(2, LENGTH), mask)


@torch.no_grad()
def test_padding_ids_do_not_matter(pair: Pair) -> None:
    tokens, mask = ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, :9] = False
    others = torch.where(mask, tokens, ids(2, LENGTH, seed=5))
    assert error(pair.model(tokens, mask)[mask], pair.model(others, mask)[mask]) < CLOSE / 10


masks = st.integers(1, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.booleans(), min_size=length, max_size=length).filter(any), min_size=1, max_size=4
    )
)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def every_family(request: pytest.FixtureRequest, tiny: Callable[..., lk.HookedTransformer]) -> lk.HookedTransformer:
    return tiny(request.param)


@given(mask=masks)
@torch.no_grad()
def test_whatever_a_mask_leaves_out_is_not_there(every_family: lk.HookedTransformer, mask: list[list[bool]]) -> None:
    kept = torch.tensor(mask)
    if any(block.attn.window for block in every_family.blocks):  # it counts what is between a row's tokens
        kept = kept.sort(1).values
    assert_rows_equal_themselves_alone(every_family, ids(*kept.shape), kept)


# -- there and back


def test_config_round_trip(pair: Pair) -> None:
    cfg = pair.model.cfg
    raw = {"model_type": pair.row.model_type, **cfg.to_hf()}
    assert type(cfg).from_hf(complete(raw, where="the round trip")) == cfg
    assert type(cfg).from_json(json.loads(json.dumps(cfg.to_json()))) == cfg
    assert from_hf(pair.row) == cfg


def test_weights_are_bit_exact_after_saving_and_exporting(pair: Pair, tmp_path: Path) -> None:
    saved = pair.model.save_pretrained(tmp_path / "saved")
    again = lk.HookedTransformer.from_pretrained(saved)
    assert again.cfg == pair.model.cfg
    for (name, ours), (other, theirs) in zip(
        pair.model.named_parameters(remove_duplicate=False), again.named_parameters(remove_duplicate=False), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)

    original = read(pair.row.model_type, pair.model.cfg, load_file(pair.folder / "model.safetensors"))
    exported = load_file(lk.export(saved, tmp_path / "exported") / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name
    with torch.no_grad():
        assert error(hf_model(tmp_path / "exported")(ids(2, 7)).logits, pair.hf(ids(2, 7)).logits) == 0.0


def test_a_model_built_from_the_config_exports_to_hugging_face(pair: Pair, tmp_path: Path) -> None:
    new = lk.HookedTransformer(pair.model.cfg, seed=3)
    new.save_pretrained(tmp_path / "new")
    hf = hf_model(lk.export(tmp_path / "new", tmp_path / "exported"))
    with torch.no_grad():
        assert error(new(ids(2, LENGTH)), run_hf(hf, ids(2, LENGTH)).logits) < CLOSE


# -- the table itself


def test_every_family_is_in_the_table() -> None:
    assert TINY.keys() == MODULES.keys()
    assert {row.model_type for row in ROWS} == MODULES.keys()
    assert len({str(row) for row in ROWS}) == len(ROWS)


THE_SAME = {"gpt2-full context", "llama-past the context", "gpt2-upcast scores"}


@torch.no_grad()
def test_variants_compute_something_else(pair: Pair, tmp_path: Path) -> None:
    """A variant that computes what the default does tests nothing."""
    default = hf_model(hf_folder(Row("default", pair.row.model_type), tmp_path))
    if pair.row.name == "default" or str(pair.row) in THE_SAME:
        return
    ours, theirs = ({n: p.shape for n, p in hf.named_parameters()} for hf in (pair.hf, default))
    if ours == theirs:  # with other weights, it is something else
        default.load_state_dict(pair.hf.state_dict())
        assert error(pair.model(ids(3, LENGTH)), run_hf(default, ids(3, LENGTH)).logits) > 10 * CLOSE


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_functions_are_hugging_faces(name: str) -> None:
    x = torch.linspace(-9, 9, 2001)
    assert error(ACTIVATIONS[name](x), ACT2FN[name](x)) < 1e-6
