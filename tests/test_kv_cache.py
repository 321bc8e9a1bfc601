"""The key-value cache: in whatever pieces a sequence is processed, the model computes what it does for the whole."""

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Barrier, Thread
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_table import CAUSAL, LENGTH, Row, error, hf_folder, hf_model, ids, rope
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

import lenskit as lk
from lenskit.errors import HookError, InputError
from lenskit.hooks import HookPoint, hooks_off
from lenskit.interventions.scope import attached, on_points
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.kv_cache import KVCache

CLOSE = 1e-5
TOKENS = ids(2, LENGTH)

Make = Callable[..., lk.HookedTransformer]


def in_pieces(
    model: lk.HookedTransformer,
    tokens: Tensor,
    sizes: Sequence[int] = (),
    mask: Tensor | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """Logits of all tokens: pieces of these sizes, and one by one what they leave over."""
    cache, length = KVCache() if cache is None else cache, tokens.shape[1]
    ends = [end for end in accumulate(sizes) if end < length]
    bounds = [0, *ends, *range(ends[-1] + 1 if ends else 1, length + 1)]
    pieces = [
        model.decode(tokens[:, start:end], None if mask is None else mask[:, start:end], cache=cache)
        for start, end in pairwise(bounds)
    ]
    return torch.cat(pieces, 1)


def left_padded(pads: Sequence[int], length: int = LENGTH) -> Tensor:
    return torch.arange(length) >= torch.tensor(pads)[:, None]


def windowed(model: lk.HookedTransformer, window: int | None) -> lk.HookedTransformer:
    for block in model.blocks:
        block.attn.window = window
    return model


def written_out(model: lk.HookedTransformer) -> object:
    """A `with` block in which attention is not fused."""
    return model.hooks([("*.hook_pattern", lambda act, hook: None)])


# -- the same numbers


@torch.no_grad()
def test_token_by_token_is_the_whole(shared: lk.HookedTransformer) -> None:
    whole = shared.decode(TOKENS)
    assert error(in_pieces(shared, TOKENS), whole) < CLOSE
    with written_out(shared):
        assert error(in_pieces(shared, TOKENS), whole) < CLOSE


@torch.no_grad()
def test_every_activation_of_a_step_is_the_last_of_the_whole(shared: lk.HookedTransformer) -> None:
    seen: dict[str, Tensor] = {}
    cache = KVCache()
    shared.decode(TOKENS[:, :-1], cache=cache)
    with attached(on_points(shared.hook_points.values(), lambda act, hook: seen.update({hook.name: act}), "read")):
        shared.decode(TOKENS[:, -1:], cache=cache)
    _, whole = shared.run_with_cache(TOKENS, "*")
    assert seen.keys() == whole.keys()
    for name, point in shared.hook_points.items():
        axis = point.axis("query_pos" if "query_pos" in point.axes else "pos")
        last = whole[name].narrow(axis, LENGTH - 1, 1)
        assert seen[name].shape == point.shape(batch=2, pos=1, query_pos=1, key_pos=LENGTH)
        assert error(seen[name], last) < CLOSE, name


@given(data=st.data())
@torch.no_grad()
def test_pieces_of_any_sizes_are_the_whole(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), max_size=8))
    pads = data.draw(st.lists(st.integers(0, LENGTH - 1), min_size=2, max_size=2))
    mask = left_padded(pads) if any(pads) else None
    cache = KVCache(data.draw(st.integers(0, 30)))
    whole, own = shared.decode(TOKENS, mask), slice(None) if mask is None else mask
    assert error(in_pieces(shared, TOKENS, sizes, mask, cache)[own], whole[own]) < CLOSE
    assert cache.length == LENGTH
    assert (cache.mask is None) if mask is None else torch.equal(cache.mask, mask)


@pytest.mark.parametrize("sizes", [[LENGTH - 6], [3, 4, 10], [], [20, 1, 2]], ids=str)
@pytest.mark.parametrize("explicit", [False, True])
@torch.no_grad()
def test_padded_rows_are_as_if_alone(shared: lk.HookedTransformer, sizes: list[int], explicit: bool) -> None:
    """Also where a row begins only after some pieces, and where nothing tells of padding once it is past."""
    tokens, pads = ids(4, LENGTH), [0, 2, 9, 15]
    mask = left_padded(pads)
    with shared.hooks([("*.hook_attn_scores", lambda act, hook: None)] if explicit else []):
        logits = in_pieces(shared, tokens, sizes, mask)
        cache = KVCache()
        prompt = shared.decode(tokens[:, :16], mask[:, :16], cache=cache)
        later = in_pieces(shared, tokens[:, 16:], [3], None, cache)
    for row, pad in enumerate(pads):
        alone = shared.decode(tokens[row : row + 1, pad:])[0]
        assert error(logits[row, pad:], alone) < CLOSE
        assert error(torch.cat((prompt, later), 1)[row, pad:], alone) < CLOSE


def test_padding_between_a_rows_tokens(shared: lk.HookedTransformer) -> None:
    """Another turn, of prompts that differ in length again."""
    mask = torch.cat((left_padded([2, 0], 10), left_padded([0, 5], LENGTH - 10)), 1)
    with torch.no_grad():
        logits = in_pieces(shared, TOKENS, [10, 8], mask)
        for row in range(2):
            alone = shared.decode(TOKENS[row : row + 1, mask[row]])[0]
            assert error(logits[row, mask[row]], alone) < CLOSE


SCALED = ["dynamic", "longrope"]


@pytest.mark.parametrize("rope_type", SCALED)
@torch.no_grad()
def test_rows_are_scaled_by_their_own_length(tiny: Make, rope_type: str) -> None:
    """What is in the cache stays as it was turned, so rows are compared with rows alone in the same pieces."""
    [row] = [row for row in CAUSAL if row.name == f"rope {rope_type}"]
    model = tiny("llama", **row.attributes)
    tokens, pads = ids(3, LENGTH), [0, 5, 13]
    logits = in_pieces(model, tokens, [15], left_padded(pads))
    for row, pad in enumerate(pads):
        alone = in_pieces(model, tokens[row : row + 1, pad:], [15 - pad])
        assert error(logits[row, pad:], alone[0]) < CLOSE


@pytest.mark.parametrize(
    ("row", "prompt"),
    [(row, prompt) for row in CAUSAL for prompt in ((3, 7, 15) if row.length_matters else (7,))],
    ids=str,
)
@torch.no_grad()
def test_it_is_hugging_faces_cache(row: Row, prompt: int, tmp_path: Path) -> None:
    folder = hf_folder(row, tmp_path)
    hf, model, tokens = hf_model(folder), lk.HookedTransformer.from_pretrained(folder), ids(1, LENGTH)
    theirs = hf(tokens[:, :prompt], use_cache=True)
    ours, cache = model.decode(tokens[:, :prompt], cache=(kept := KVCache())), theirs.past_key_values
    assert error(ours, theirs.logits) < CLOSE
    for at in range(prompt, LENGTH):
        token = tokens[:, at : at + 1]
        wanted = hf(token, past_key_values=cache, use_cache=True).logits
        assert error(model.decode(token, cache=kept), wanted) < CLOSE, at


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_dtypes(tiny: Make, model_type: str, dtype: torch.dtype) -> None:
    model = tiny(model_type).to(dtype)
    cache = KVCache()
    logits, mask = in_pieces(model, TOKENS, [9], left_padded([0, 4]), cache), left_padded([0, 4])
    assert logits.dtype == dtype
    assert error(logits[mask], model.decode(TOKENS, mask)[mask]) < {torch.bfloat16: 0.05, torch.float16: 0.01}.get(
        dtype, 1e-12
    )
    held = 2 * 3 * 2 * LENGTH * model.cfg.n_key_value_heads * model.cfg.d_head * logits.element_size()
    assert held <= cache.nbytes <= 2 * held + 200


@torch.no_grad()
def test_edits_of_keys_and_values_stay_for_those_who_come_later(shared: lk.HookedTransformer) -> None:
    """What is kept is the key after its rotation and the value, as hooks have left them."""
    names = [name for name in shared.hook_points if name.endswith(("hook_rot_k", "hook_k", "hook_v"))]

    def edit(act: Tensor, hook: HookPoint) -> None:
        act[:, : max(0, 5 - hook.step)] *= 1.5

    with shared.hooks([(names, edit)]):
        whole = shared.decode(TOKENS)
        cache = KVCache()
        start = shared.decode(TOKENS[:, :8], cache=cache)
    later = in_pieces(shared, TOKENS[:, 8:], [3], None, cache)
    assert error(torch.cat((start, later), 1), whole) < CLOSE
    assert error(whole, shared.decode(TOKENS)) > 1e-3


# -- a window

Pair = tuple[PreTrainedModel, lk.HookedTransformer]
WINDOW = 5
SCORES = ["hook_attn_scores", "hook_pattern"]


@pytest.fixture(scope="module", params=[1, 2, WINDOW, 16])
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Hugging Face's model with a sliding window, and ours with the same weights and window."""
    folder = hf_folder(Row("windowed", "llama", {"num_hidden_layers": 2}), tmp_path_factory.mktemp("hf"))
    llama = LlamaForCausalLM.from_pretrained(folder)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "pad_token_id",
             "bos_token_id", "eos_token_id")  # fmt: skip
    config = MistralConfig(**{name: getattr(llama.config, name) for name in names}, sliding_window=request.param)
    config._attn_implementation = "eager"
    hf = MistralForCausalLM(config).eval()
    hf.load_state_dict(llama.state_dict())
    return hf, windowed(lk.HookedTransformer.from_pretrained(folder), request.param)


@pytest.mark.parametrize("length", [1, 3, 5, 6, 17, 36])
@torch.no_grad()
def test_a_window_is_hugging_faces_sliding_window(mistral: Pair, length: int) -> None:
    hf, model = mistral
    tokens = ids(2, length)
    wanted = hf(tokens, use_cache=False).logits
    assert error(model.decode(tokens), wanted) < CLOSE
    with written_out(model):
        assert error(model.decode(tokens), wanted) < CLOSE


@pytest.mark.parametrize("prompt", [1, 3, 5, 6, 11, 24])
@torch.no_grad()
def test_decoding_far_past_a_window(mistral: Pair, prompt: int) -> None:
    hf, model = mistral
    if hf.config.sliding_window == 1:
        pytest.skip("Hugging Face's cache keeps everything then")
    tokens = ids(2, 39)
    wanted = hf(tokens[:, :prompt], use_cache=True)
    caches = KVCache(), KVCache(50)
    for cache in caches:
        assert error(model.decode(tokens[:, :prompt], cache=cache), wanted.logits) < CLOSE
    for at in range(prompt, 39):
        token = tokens[:, at : at + 1]
        wanted = hf(token, past_key_values=wanted.past_key_values, use_cache=True)
        assert error(model.decode(token, cache=caches[0]), wanted.logits) < CLOSE
        with written_out(model):
            assert error(model.decode(token, cache=caches[1]), wanted.logits) < CLOSE


@settings(max_examples=12)
@given(data=st.data())
@torch.no_grad()
def test_a_window_in_pieces_of_any_sizes(mistral: Pair, data: st.DataObject) -> None:
    hf, model = mistral
    sizes = data.draw(st.lists(st.integers(1, 20), max_size=8))
    pads = data.draw(st.lists(st.integers(0, 38), min_size=2, max_size=2))
    tokens, mask = ids(2, 39), left_padded(pads, 39)
    capacity = data.draw(st.integers(0, 40))
    logits = in_pieces(model, tokens, sizes, mask, KVCache(capacity))
    for row, pad in enumerate(pads):
        alone = hf(tokens[row : row + 1, pad:], use_cache=False).logits[0]
        assert error(logits[row, pad:], alone) < CLOSE


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_scores_and_pattern_of_a_window_are_of_all_keys(tiny: Make, name: str) -> None:
    """As without a cache, although the cache has let go of those before the window."""
    model = windowed(tiny(name), WINDOW)
    seen: dict[str, list[Tensor]] = {}
    look = [
        (f"blocks.1.attn.{point}", lambda act, hook: seen.setdefault(hook.name, []).append(act)) for point in SCORES
    ]
    with model.hooks(look):
        in_pieces(model, TOKENS, [3, 2, 4, 13])
    _, whole = model.run_with_cache(TOKENS, [f"blocks.1.attn.{point}" for point in SCORES])
    assert len(seen) == len(SCORES)
    for point, parts in seen.items():
        n = 0
        for part in parts:
            n += part.shape[2]
            expected = whole[point][:, :, n - part.shape[2] : n, :n]
            assert part.shape == expected.shape
            assert torch.equal(part.isfinite(), expected.isfinite())
            assert error(part[part.isfinite()], expected[expected.isfinite()]) < CLOSE


@torch.no_grad()
def test_attention_to_keys_that_are_gone_is_refused(tiny: Make) -> None:
    model = windowed(tiny("llama"), WINDOW)
    pattern, options = "blocks.1.attn.hook_pattern", {"max_new_tokens": WINDOW + 3, "eos_token_id": []}
    for op in (lk.Set(pattern, 0.1, steps=slice(1, None)), lk.Set("blocks.1.attn.hook_attn_scores", 0.0)):
        with pytest.raises(HookError, match=rf"hook_pattern was made to attend(.|\n)*dims=slice\(-{WINDOW}, None\)"):
            model.generate([[1, 2, 3]], hooks=[op], **options)
    scaled = model.generate([[1, 2, 3]], hooks=[lk.Scale(pattern, 0.5)], **options)
    last = lk.Scale(pattern, 0.5, dims=slice(-WINDOW, None))
    assert torch.equal(scaled.tokens[0], model.generate([[1, 2, 3]], hooks=[last], **options).tokens[0])


@torch.no_grad()
def test_keys_of_a_window_are_counted_by_row(tiny: Make) -> None:
    model = windowed(tiny("llama"), WINDOW)
    prompts, options = [[1, 2, 3], [4, 5, 6, 7, 8, 9]], {"max_new_tokens": WINDOW + 3, "eos_token_id": []}

    def saved(given: list[list[int]], **rows: object) -> list[list[Tensor]]:
        selections: list[dict[str, object]] = [{}, {"dims": 0}, {"dims": slice(1, 3), **rows}]
        point = "blocks.1.attn.hook_pattern"
        saves = [lk.Save(point, tokens=-1, name=str(n), **some) for n, some in enumerate(selections)]
        found = model.generate(given, hooks=saves, **options).saved
        return [found[str(n)] for n in range(3)]

    together = saved(prompts, prompts=[1, 0])
    for row, prompt in enumerate(prompts):
        for step, (whole, first, some) in enumerate(zip(*saved([prompt]), strict=True)):
            n_keys = len(prompt) + step
            assert whole.shape == (1, model.cfg.n_heads, n_keys)
            assert torch.allclose(together[0][step][row, :, -n_keys:], whole[0], atol=CLOSE)
            assert torch.allclose(together[1][step][row], first[0], atol=CLOSE)
            assert torch.allclose(together[2][step][1 - row], some[0], atol=CLOSE)


@pytest.mark.parametrize("capacity", [0, 7, 1000])
@pytest.mark.parametrize("prompt", [1, 8, 300])
@torch.no_grad()
def test_a_window_bounds_memory(capacity: int, prompt: int) -> None:
    cache, one = KVCache(capacity), torch.ones(1, 2, 1, 3)
    cache.extend("a", *torch.ones(2, 1, 2, prompt, 3), WINDOW)
    cache.advance(prompt)
    for _ in range(100):
        cache.extend("a", one, one, WINDOW)
        cache.advance(1)
        assert cache.nbytes <= 2 * WINDOW * 2 * one.nbytes
    assert cache.length == prompt + 100


@torch.no_grad()
def test_keys_of_a_window_move_once_in_a_while() -> None:
    cache, window, moved = KVCache(), 50, 0
    spans: list[int] = []
    for step in range(500):
        k = torch.full((1, 1, 1, 1), float(step))
        keys, _ = cache.extend("a", k, k, window)
        cache.advance(1)
        assert keys.flatten().tolist() == list(range(max(0, step - window + 1), step + 1))
        spans.append(keys.data_ptr())
    moved = sum(later < earlier for earlier, later in pairwise(spans[2 * window :]))
    assert 0 < moved <= 400 / (window - 1)


def test_layers_may_differ_in_their_windows(tiny: Make) -> None:
    model = tiny("llama")
    model.blocks[1].attn.window = 4
    with torch.no_grad():
        whole = model.decode(TOKENS)
        assert error(whole, windowed(tiny("llama"), None).decode(TOKENS)) > 1e-3
        assert error(in_pieces(model, TOKENS, [6, 1, 9]), whole) < CLOSE


# -- what a step costs


class Ops(TorchDispatchMode):
    """Records the operations that torch runs, and the storages of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        made = op(*args, **(kwargs or {}))
        self.names.append(str(op).split(".")[1])
        self.made += [x for x in (made if isinstance(made, tuple | list) else [made]) if isinstance(x, Tensor)]
        return made


@torch.no_grad()
def test_a_step_concatenates_nothing_and_copies_neither_weights_nor_keys(shared: lk.HookedTransformer) -> None:
    cache = KVCache(60)
    shared.decode(TOKENS, cache=cache)
    weights = {p.untyped_storage().data_ptr() for p in shared.parameters()}
    shapes = {tuple(shape) for p in shared.parameters() if p.dim() > 1 for shape in (p.shape, p.T.shape)}
    buffers = {x.untyped_storage().data_ptr() for layer in cache._layers.values() for x in (layer.k, layer.v)}
    assert len(buffers) == 2 * shared.cfg.n_layers
    for step in range(3):
        with Ops() as ops:
            shared.decode(TOKENS[:, :1], cache=cache)
        assert "cat" not in ops.names
        assert "repeat_interleave" not in ops.names
        for tensor in ops.made:
            if tuple(tensor.shape) in shapes:
                assert tensor.untyped_storage().data_ptr() in weights
            if LENGTH + step + 1 in tensor.shape and tensor.dim() == 4:  # keys and values, not repeated for groups
                assert tensor.shape[1] == shared.cfg.n_key_value_heads
                assert tensor.untyped_storage().data_ptr() in buffers


@torch.no_grad()
def test_buffers_stay_where_they_are() -> None:
    cache, k, v = KVCache(100), torch.rand(3, 2, 10, 5), torch.rand(3, 2, 10, 5)
    cache.extend("a", k, v)
    cache.advance(10)
    seen = set()
    for _ in range(90):
        keys, values = cache.extend("a", k[:, :, :1], v[:, :, :1])
        cache.advance(1)
        seen.add((keys.data_ptr(), values.data_ptr()))
    assert len(seen) == 1
    assert torch.equal(keys, torch.cat((k, k[:, :, :1].expand(-1, -1, 90, -1)), 2))
    assert torch.equal(values[:, :, :10], v)
    assert cache.nbytes == 2 * 3 * 2 * 100 * 5 * 4


@torch.no_grad()
def test_beyond_their_capacity_buffers_double() -> None:
    cache, one, seen = KVCache(), torch.ones(1, 1, 1, 4), []
    for _ in range(1000):
        seen.append(cache.extend("a", one, one)[0].untyped_storage().data_ptr())
        cache.advance(1)
    assert sum(a != b for a, b in pairwise(seen)) <= 11
    assert cache.nbytes <= 2 * 1024 * 4 * 4


# -- branches


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("prompt", [3, 14])
@torch.no_grad()
def test_branches_are_independent(tiny: Make, model_type: str, window: int | None, prompt: int) -> None:
    model = windowed(tiny(model_type), window)
    tokens, mask = ids(3, prompt), left_padded([0, 2, 1], prompt)
    rows, more = [2, 0, 0, 1, 2], ids(5, 9, seed=1)
    cache = KVCache()
    model.decode(tokens, mask, cache=cache)
    branch, other = cache.branch(rows, 30), cache.branch([1], 0)
    source = in_pieces(model, more[:3], [4], None, cache)
    assert error(in_pieces(model, more[3:4], [], None, other)[0, -1], _alone(model, tokens, mask, more, 1, 3)) < CLOSE
    branched = in_pieces(model, more, [1, 5], None, branch)
    again = branch.branch([0, 4], 50)
    assert (cache.length, branch.length, again.n_rows) == (prompt + 9, prompt + 9, 2)
    for at, row in enumerate(rows):
        assert error(branched[at, -1], _alone(model, tokens, mask, more, row, at)) < CLOSE
    for row in range(3):
        assert error(source[row, -1], _alone(model, tokens, mask, more, row, row)) < CLOSE
    assert torch.equal(branch.mask[:, :prompt], mask[rows])


def _alone(model: lk.HookedTransformer, tokens: Tensor, mask: Tensor, more: Tensor, row: int, at: int) -> Tensor:
    """The last logits of a row of the prompts followed by a row of what came after."""
    return model.decode(torch.cat((tokens[row, mask[row]], more[at]))[None])[0, -1]


@torch.no_grad()
def test_one_row_becomes_many_in_one_copy(shared: lk.HookedTransformer) -> None:
    cache = KVCache()
    shared.decode(TOKENS[:1], cache=cache)
    with Ops() as ops:
        branch = cache.branch([0] * 16, 40)
    assert branch.nbytes == 16 * cache.nbytes * 40 / LENGTH
    big = {x.untyped_storage().data_ptr() for x in ops.made if x.untyped_storage().nbytes() > 16 * 8}
    buffers = {x.untyped_storage().data_ptr() for c in (cache, branch) for y in c._layers.values() for x in (y.k, y.v)}
    assert big <= buffers
    more = ids(16, 3)
    logits = in_pieces(shared, more, [], None, branch)
    assert error(logits, shared.decode(torch.cat((TOKENS[:1].expand(16, -1), more), 1))[:, -3:]) < CLOSE


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("prompts", [(3, 14), (14, 3), (5, 5)])
@torch.no_grad()
def test_rows_of_several_caches_go_on_under_each_other(
    tiny: Make, model_type: str, window: int | None, prompts: tuple[int, int]
) -> None:
    model = windowed(tiny(model_type), window)
    tokens = [ids(3, length, seed=length) for length in prompts]
    masks = [left_padded([0, 2, 1], length) for length in prompts]
    caches = [KVCache(), KVCache(40)]
    for some, mask, cache in zip(tokens, masks, caches, strict=True):
        model.decode(some, mask, cache=cache)
    rows = [[2, 0], [1]]
    joined = KVCache.joined(list(zip(caches, rows, strict=True)), 20)
    longest = max(int(mask[some].sum(1).max()) for mask, some in zip(masks, rows, strict=True))
    assert (joined.length, joined.n_rows) == (longest, 3)
    if window is None:
        for layer in joined._layers.values():
            for buffer in (layer.k, layer.v):
                buffer[:, :, joined.length :] = torch.nan  # what is not there yet
    more = ids(3, 9, seed=1)
    logits = in_pieces(model, more, [1, 5], None, joined)
    for at, (part, row) in enumerate([(0, 2), (0, 0), (1, 1)]):
        assert error(logits[at, -1], _alone(model, tokens[part], masks[part], more, row, at)) < CLOSE
    assert caches[0].length == prompts[0]


def test_a_branch_of_nothing_is_empty() -> None:
    assert KVCache().branch([0, 1], 10).length == 0


@pytest.mark.parametrize("rows", [[], [2], [0, -1]])
@torch.no_grad()
def test_rows_that_a_cache_does_not_have(shared: lk.HookedTransformer, rows: list[int]) -> None:
    cache = KVCache()
    shared.decode(TOKENS, cache=cache)
    with pytest.raises(InputError, match=r"numbers from 0 to 1") as refused:
        cache.branch(rows, 0)
    assert str(rows) in refused.value.got


# -- passes that fail


@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.attn.hook_z", "hook_logits"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_a_pass_that_fails_leaves_the_cache_as_it_was(
    tiny: Make, model_type: str, name: str, window: int | None, grad: bool
) -> None:
    model = windowed(tiny(model_type), window)

    def fail(act: Tensor, hook: HookPoint) -> None:
        raise KeyboardInterrupt

    def failing(tokens: Tensor, cache: KVCache) -> None:
        for _ in range(2):
            with torch.set_grad_enabled(grad), model.hooks([(name, fail)]), pytest.raises(KeyboardInterrupt):
                model.decode(tokens, cache=cache)

    with torch.no_grad():
        whole, cache, other = model.decode(TOKENS), KVCache(), ids(2, LENGTH, seed=5)
        failing(ids(5, 9), cache)
        assert (cache.length, cache.n_rows, cache.mask) == (0, None, None)
        pieces = []
        for start, end in pairwise([0, 3, 4, 5, 17, 18, 19, LENGTH]):
            for size in (1, 5, 13, end - start):
                failing(other[:, :size], cache)
                assert cache.length == start
            pieces.append(model.decode(TOKENS[:, start:end], cache=cache))
        assert error(torch.cat(pieces, 1), whole) < CLOSE


# -- gradients


def gradients(model: lk.HookedTransformer, logits: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    (logits if mask is None else logits[mask]).logsumexp(-1).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("sizes", [[10], [], [4, 7, 6]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_through_pieces_are_those_of_the_whole(
    tiny: Make, model_type: str, sizes: list[int], window: int | None, padded: bool
) -> None:
    model, mask = windowed(tiny(model_type), window), left_padded([0, 6]) if padded else None
    wanted = gradients(model, model.decode(TOKENS, mask), mask)
    found = gradients(model, in_pieces(model, TOKENS, sizes, mask), mask)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert error(found[name], gradient) < 1e-4, name


def test_gradients_through_branches(fresh: lk.HookedTransformer) -> None:
    rows, more = [1, 0, 1], ids(3, 4, seed=1)
    wanted = gradients(fresh, fresh.decode(torch.cat((TOKENS[rows], more), 1))[:, -4:])
    cache = KVCache()
    fresh.decode(TOKENS, cache=cache)
    found = gradients(fresh, in_pieces(fresh, more, [2], None, cache.branch(rows, 30)))
    for name, gradient in wanted.items():
        assert error(found[name], gradient) < 1e-4, name


def test_gradients_reach_back_to_where_they_were_recorded(fresh: lk.HookedTransformer) -> None:
    """As if the keys and values before that were constants."""
    caches = KVCache(60), KVCache()
    for cache in caches:
        with torch.no_grad():
            fresh.decode(TOKENS, cache=cache)
    more = ids(2, 6, seed=1)
    found = gradients(fresh, in_pieces(fresh, more, [3], None, caches[0]))
    wanted = gradients(fresh, fresh.decode(more, cache=caches[1]))
    for name, gradient in wanted.items():
        assert error(found[name], gradient) < 1e-4, name
    with torch.no_grad():  # and on without, in buffers again
        later = in_pieces(fresh, more, [], None, caches[0])
        assert error(later, fresh.decode(torch.cat((TOKENS, more, more), 1))[:, -6:]) < CLOSE


def test_a_graph_of_frozen_weights_is_not_written_over(fresh: lk.HookedTransformer) -> None:
    """Only queries require grad here, and what they attend to is saved for backward."""
    fresh.requires_grad_(False)
    steering = torch.ones(fresh.cfg.d_head, requires_grad=True)
    edit = ("*.hook_q", lambda act, hook: act + steering)
    with fresh.hooks([edit]):
        fresh.decode(TOKENS).logsumexp(-1).sum().backward()
        wanted, steering.grad = steering.grad, None
        in_pieces(fresh, TOKENS, [10], None, KVCache(40)).logsumexp(-1).sum().backward()
    assert error(steering.grad, wanted) < 1e-4


def test_a_cache_keeps_copies(fresh: lk.HookedTransformer) -> None:
    for grad in (False, True):
        fresh.requires_grad_(False)
        cache, held = KVCache(), []
        keep = on_points(
            [fresh.hook_points["blocks.1.attn.hook_v"]], lambda act, hook, held=held: held.append(act), "read"
        )
        with torch.set_grad_enabled(grad):
            with attached(keep):
                fresh.decode(TOKENS[:, :10], cache=cache)
            held[0].zero_()
            assert error(in_pieces(fresh, TOKENS[:, 10:], [], None, cache), fresh.decode(TOKENS)[:, 10:]) < CLOSE


@pytest.mark.parametrize("window", [None, 2])
def test_modes_may_change_between_passes(tiny: Make, model_type: str, window: int | None) -> None:
    model, mask, pieces = windowed(tiny(model_type), window), left_padded([0, 3]), []
    cache = KVCache()
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad]
    for mode, (start, end) in zip(modes * 3, pairwise([0, 1, 2, 3, 7, 12, 13, 14, 18, LENGTH]), strict=False):
        with mode():
            logits = model.decode(TOKENS[:, start:end], mask[:, start:end] if start < 7 else None, cache=cache)
        if mode is torch.enable_grad:
            logits.sum().backward()
            cache = cache.branch([0, 1], 0) if start == 2 else cache
            logits = logits.detach()
        with torch.no_grad():
            pieces.append(logits.clone())
            cache = cache if mode is torch.enable_grad else cache.branch([0, 1], 20)
    assert error(torch.cat(pieces, 1)[mask], model.decode(TOKENS, mask)[mask]) < CLOSE


# -- fewer logits


@pytest.mark.parametrize("n_logits", [1, 3, LENGTH, 100])
@torch.no_grad()
def test_logits_of_the_last_columns_only(shared: lk.HookedTransformer, n_logits: int) -> None:
    whole, shapes = shared.decode(TOKENS), {}
    assert error(shared.decode(TOKENS, n_logits=n_logits), whole[:, -n_logits:]) < CLOSE
    points = [shared.hook_points[name] for name in ("ln_final.hook_normalized", "hook_logits")]
    with attached(on_points(points, lambda act, hook: shapes.update({hook.name: act.shape[1]}), "read")):
        assert error(shared.decode(TOKENS, n_logits=n_logits), whole[:, -n_logits:]) < CLOSE
    assert shapes == {"ln_final.hook_normalized": LENGTH, "hook_logits": min(n_logits, LENGTH)}
    with Ops() as ops:
        shared.decode(TOKENS, n_logits=n_logits)
    vocabulary = [x.numel() / x.shape[-1] for x in ops.made if x.dim() > 1 and x.shape[-1] == shared.cfg.d_vocab]
    assert max(n for n in vocabulary if n != shared.cfg.d_model) == 2 * min(n_logits, LENGTH)


# -- what one pass shares


def test_a_pass_for_another_device_shares_the_cache() -> None:
    cache, one = KVCache(), torch.ones(2, 1, 3, 4)
    cache.extend("a", one, one)
    cache.advance(3, left_padded([0, 1], 3))
    run = ForwardPass(2, torch.device("cpu"), left_padded([0, 1], 2), cache=cache, step=4, prompts=[7, 8], n_logits=1)
    moved = run.to("meta")
    assert moved is run.to(torch.device("meta"))
    assert run.to("cpu") is run
    assert moved.cache is cache
    assert (moved.step, moved.prompts, moved.n_logits, moved.n_past, moved.n_keys) == (4, [7, 8], 1, 3, 5)
    assert moved.positions.device == moved.mask.device == moved.visible().device == torch.device("meta")
    assert torch.equal(run.positions, torch.tensor([[3, 4], [1, 2]]))


def test_what_queries_see() -> None:
    cache, one = KVCache(), torch.ones(2, 1, 3, 4)
    cpu = torch.device("cpu")
    cache.extend("a", one, one)
    cache.advance(3)
    run = ForwardPass(2, cpu, cache=cache)
    assert run.visible().tolist() == [[[[True] * 4 + [False], [True] * 5]]]
    assert run.visible(2).tolist() == [[[[True, True, False], [False, True, True]]]]
    assert run.positions.tolist() == [[3, 4]]
    step = ForwardPass(1, cpu, cache=cache)
    assert step.attention_bias(torch.float32) is step.attention_bias(torch.float32, 3) is None
    assert step.visible(3).tolist() == [[[[True] * 3]]]
    assert ForwardPass(4, cpu).attention_bias(torch.float32, 4) is None
    bias = ForwardPass(4, cpu).attention_bias(torch.float16, 3)
    assert bias.dtype == torch.float16
    assert bias[0, 0, 3].tolist() == [-torch.inf, 0, 0, 0]
    cache.advance(2, torch.tensor([[False, True], [True, True]]))
    assert cache.mask.tolist() == [[True, True, True, False, True], [True] * 5]
    padded = ForwardPass(1, cpu, cache=cache)
    assert padded.positions.tolist() == [[4], [5]]
    assert padded.visible(3)[:, 0, 0].tolist() == [[False, True, True], [True] * 3]


# -- what hook functions are told

Told = tuple[int, list[int], list[list[int]], list[list[bool]] | None]


def told(hook: HookPoint) -> Told:
    return hook.step, hook.prompts, hook.positions.tolist(), None if hook.mask is None else hook.mask.tolist()


@torch.no_grad()
def test_functions_are_told_the_pass(shared: lk.HookedTransformer) -> None:
    cache, seen = KVCache(), []
    mask = left_padded([1, 0], 3)
    with shared.hooks([("blocks.1.attn.hook_q", lambda act, hook: seen.append(told(hook)))]):
        shared.decode(TOKENS[:, :3], mask, cache=cache)
        shared.decode(TOKENS[:, 3:4], cache=cache, step=1, prompts=[4, 2])
        shared.decode(TOKENS[:, :2])
        shared(TOKENS[:, :2])
    assert seen == [
        (0, [0, 1], [[0, 0, 1], [0, 1, 2]], mask.tolist()),
        (1, [4, 2], [[2], [3]], None),
        (0, [0, 1], [[0, 1]], None),
        (0, [0, 1], [[0, 1]], None),
    ]


ATTRIBUTES = ["step", "prompts", "positions", "mask"]


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@torch.no_grad()
def test_outside_of_a_pass_there_is_nothing_to_tell(shared: lk.HookedTransformer, attribute: str) -> None:
    def fail(act: Tensor, hook: HookPoint) -> None:
        raise KeyboardInterrupt

    point = shared.hook_points["blocks.0.hook_mlp_out"]
    for verb in (shared, shared.run_with_cache):
        verb(TOKENS)
    with shared.hooks([(point.name, fail)]), pytest.raises(KeyboardInterrupt):
        shared(TOKENS)
    with pytest.raises(HookError, match=rf"hook\.{attribute} of 'blocks\.0\.hook_mlp_out' cannot be told"):
        getattr(point, attribute)


@torch.no_grad()
def test_a_function_may_run_the_model(shared: lk.HookedTransformer) -> None:
    seen: list[object] = []

    def outer(act: Tensor, hook: HookPoint) -> None:
        seen.append(told(hook))
        with shared.hooks([("hook_logits", lambda act, inner: seen.append(told(inner)))]):
            shared.decode(TOKENS[:1, :1], step=7)
        with pytest.raises(InputError):
            shared.decode(TOKENS, stop_at_layer=9)
        seen.append(told(hook))

    with shared.hooks([("blocks.1.hook_resid_pre", lambda act, hook: outer(act, hook) if hook.step == 3 else None)]):
        shared.decode(TOKENS[:, :2], step=3)
    assert seen == [(3, [0, 1], [[0, 1]], None), (7, [0], [[0]], None), (3, [0, 1], [[0, 1]], None)]


def test_functions_on_gradients_are_told_the_pass_that_made_the_graph(shared: lk.HookedTransformer) -> None:
    seen: list[Told] = []
    keep = ("blocks.1.hook_resid_pre", lambda grad, hook: seen.append(told(hook)))
    with shared.hooks(bwd_hooks=[keep]):
        first = shared.decode(TOKENS[:1, :2], step=1)
        second = shared.decode(TOKENS[:, :1], step=2)
    for logits in (second, first):
        logits.sum().backward()
    assert [(step, prompts) for step, prompts, *_ in seen] == [(2, [0, 1]), (1, [0])]
    shared.zero_grad()


@torch.no_grad()
def test_threads_are_told_of_their_own_passes(shared: lk.HookedTransformer) -> None:
    together, seen = Barrier(2, timeout=60), {}

    def run(step: int) -> None:
        def meet(act: Tensor, hook: HookPoint) -> None:
            together.wait()
            seen[step] = hook.step
            together.wait()

        with shared.hooks([("blocks.1.hook_mlp_out", meet)]):
            shared.decode(TOKENS, step=step)

    threads = [Thread(target=run, args=(step,)) for step in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1: 1, 2: 2}


@torch.no_grad()
def test_a_compiled_model_takes_a_cache_and_tells_functions_nothing(new_import: ModuleType, model_type: str) -> None:
    model = new_import.HookedTransformer.from_pretrained(f"demo-{model_type}")
    cache = sys.modules["lenskit.modules.kv_cache"].KVCache(20)
    compiled, tokens = torch.compile(model.decode, backend="eager"), ids(2, 10)
    logits = [compiled(piece, cache=cache) for piece in tokens.split([6, 1, 1, 2], 1)]
    assert error(torch.cat(logits, 1), model.decode(tokens)) < CLOSE
    with (
        model.hooks([("hook_embed", lambda act, hook: act * hook.step)]),
        pytest.raises(new_import.errors.HookError, match=r"hook\.step of 'hook_embed' cannot be told") as refused,
    ):
        compiled(tokens)
    assert "compile" in refused.value.got
    torch._dynamo.reset()


@torch.no_grad()
def test_hooks_can_be_off(shared: lk.HookedTransformer) -> None:
    ran, elsewhere = [], []
    site = ["blocks.1.attn.hook_pattern", "blocks.0.hook_q_input", "hook_embed", "ln_final.hook_scale"]
    hook = (site, lambda act, hook: ran.append(hook.name) or act * 2)

    def other_thread() -> None:
        with torch.no_grad(), shared.hooks([("hook_embed", lambda act, hook: elsewhere.append(hook.name))]):
            shared(TOKENS)

    with shared.hooks([hook]):
        with hooks_off():
            with hooks_off():
                logits = shared(TOKENS)
            assert not shared.hook_points["hook_embed"].used
            assert error(logits, shared(TOKENS)) == 0.0
            thread = Thread(target=other_thread)
            thread.start()
            thread.join()
        assert not ran
        with pytest.raises(KeyboardInterrupt), hooks_off():
            raise KeyboardInterrupt
        edited = shared(TOKENS)
    assert elsewhere == ["hook_embed"]
    assert sorted(ran) == sorted(site)
    assert error(logits, shared(TOKENS)) < CLOSE < error(edited, logits)


@torch.no_grad()
def test_a_plan_gets_the_activation_itself_and_says_what_goes_on(shared: lk.HookedTransformer) -> None:
    seen: list[Tensor] = []
    point = shared.hook_points["blocks.1.hook_mlp_out"]

    def halve(act: Tensor, hook: HookPoint) -> Tensor:
        assert hook is point
        seen.append(act)
        return act / 2

    with attached(on_points([point], halve, "plan")):
        assert not point.only_read
        logits = shared(TOKENS)
    assert error(logits, shared.run_with_hooks(TOKENS, [(point.name, lambda act, hook: act / 2)]).logits) < CLOSE
    assert error(seen[0], shared.run_with_cache(TOKENS, point.name)[1][point.name]) < CLOSE
    same = on_points([point], lambda act, hook: act, "plan")
    keep = on_points([point], lambda act, hook: seen.append(act), "read")
    with attached([*keep, *same, *keep]):
        shared(TOKENS)
    assert seen[1] is seen[2]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_whatever_ends_a_function_is_told_where_it_was(
    shared: lk.HookedTransformer, failure: type[BaseException]
) -> None:
    def fail(act: Tensor, hook: HookPoint) -> None:
        raise failure

    with pytest.raises(failure) as ended:
        shared.run_with_hooks(TOKENS, [("blocks.2.hook_mlp_out", fail)])
    assert ended.value.__notes__ == [
        f"in a hook on 'blocks.2.hook_mlp_out', whose activation is float32 (2, {LENGTH}, {shared.cfg.d_model}) on cpu"
    ]


def test_statistics_are_known_as_such(shared: lk.HookedTransformer) -> None:
    points = shared.hook_points.items()
    assert {name for name, point in points if point.statistic} == set(shared.hook_names("*.hook_scale"))


# -- what is refused


@pytest.mark.parametrize("part", [{"start_at_layer": 1}, {"stop_at_layer": 2}, {"stop_at_layer": 3}])
def test_a_cache_for_a_part_of_the_model(shared: lk.HookedTransformer, part: dict[str, int]) -> None:
    stream = torch.ones(2, 4, shared.cfg.d_model) if "start_at_layer" in part else TOKENS
    with pytest.raises(InputError, match="a key-value cache needs all layers"):
        shared.decode(stream, cache=KVCache(), **part)


@torch.no_grad()
def test_a_cache_of_another_batch(shared: lk.HookedTransformer) -> None:
    cache = KVCache()
    shared.decode(TOKENS, cache=cache)
    with pytest.raises(InputError, match=r"1 rows of tokens, for a cache of 2"):
        shared.decode(TOKENS[:1], cache=cache)
    assert cache.length == LENGTH


@torch.no_grad()
def test_a_cache_of_another_model_or_window(tiny: Make) -> None:
    cache, model = KVCache(), windowed(tiny("llama", num_hidden_layers=2), 3)
    model.decode(TOKENS, cache=cache)
    with pytest.raises(InputError, match=r"lacks keys that layer 'blocks.2.attn.hook_k' needs"):
        windowed(tiny("llama"), 3).decode(TOKENS[:, :1], cache=cache)
    with pytest.raises(InputError, match=r"blocks.0.attn.hook_k' needs(.|\n)*from column"):
        windowed(model, 9).decode(TOKENS[:, :1], cache=cache)


@torch.no_grad()
def test_the_context_of_learned_positions_ends(tiny: Make) -> None:
    model = tiny("gpt2")
    cache, pads = KVCache(), left_padded([0, 5], 38)
    model.decode(ids(2, 38), cache=cache)
    model.decode(ids(2, 2), cache=cache)
    with pytest.raises(InputError, match="41 tokens"):
        model.decode(ids(2, 1), cache=cache)
    assert cache.length == 40
    padded = KVCache()
    model.decode(ids(2, 38), pads, cache=padded)
    alone = padded.branch([1], 50)
    for _ in range(7):  # padding does not count
        model.decode(ids(1, 1), cache=alone)
    with pytest.raises(InputError, match="41 tokens"):
        model.decode(ids(1, 1), cache=alone)


@torch.no_grad()
def test_past_the_context_of_rotary_positions(tiny: Make) -> None:
    model = tiny("llama", max_position_embeddings=10, **rope("linear", factor=2.0))
    assert error(in_pieces(model, TOKENS, [5]), model.decode(TOKENS)) < CLOSE
