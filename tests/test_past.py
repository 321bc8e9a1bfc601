"""`prefill` and `past=`: a prefix that is processed once, and continued as often as one likes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_table import error, ids
from torch import Tensor

import lenskit as lk
from lenskit.errors import InputError, SelectorError

CLOSE = 1e-5
PREFIX = "The Eiffel Tower"
ENDINGS = [" is in the city of", " can be found in", " was built in"]

ROW = st.lists(st.integers(0, 58), min_size=1, max_size=6)


def generated(model: lk.HookedTransformer, prompts: Any, **options: Any) -> lk.Generation:
    return model.generate(prompts, **{"max_new_tokens": 5, "eos_token_id": [], "return_logits": True, **options})


def same(found: lk.Generation, expected: lk.Generation) -> None:
    """The same tokens, by the same logits."""
    assert [row.tolist() for row in found.tokens] == [row.tolist() for row in expected.tokens]
    assert found.logits is not None
    assert expected.logits is not None
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert error(ours, theirs) < CLOSE


# -- a past is as good as the whole prompt


@settings(max_examples=10)
@given(prefix=ROW, endings=st.lists(ROW, min_size=1, max_size=3))
def test_a_prefix_that_all_prompts_share(
    shared: lk.HookedTransformer, prefix: list[int], endings: list[list[int]]
) -> None:
    past = shared.prefill(prefix)
    found = generated(shared, endings, past=past)
    same(found, generated(shared, [prefix + ending for ending in endings]))


@settings(max_examples=10)
@given(rows=st.lists(st.tuples(ROW, ROW), min_size=2, max_size=3))
def test_a_prefix_for_each_prompt(shared: lk.HookedTransformer, rows: list[tuple[list[int], list[int]]]) -> None:
    """Prefixes and endings of unequal lengths: padding between a row's tokens never counts."""
    past = shared.prefill([prefix for prefix, _ in rows])
    found = generated(shared, [ending for _, ending in rows], past=past)
    same(found, generated(shared, [prefix + ending for prefix, ending in rows]))


@settings(max_examples=8)
@given(parts=st.lists(ROW, min_size=3, max_size=5), rows=st.integers(1, 2))
def test_a_past_of_a_past(shared: lk.HookedTransformer, parts: list[list[int]], rows: int) -> None:
    past: lk.Past | None = None
    for part in parts[:-1]:
        past = shared.prefill([part] * rows, past=past)
    found = generated(shared, [parts[-1]] * rows, past=past)
    same(found, generated(shared, [[token for part in parts for token in part]] * rows))


def test_a_shared_past_grows_into_one_for_each_row(shared: lk.HookedTransformer) -> None:
    common = shared.prefill([1, 2, 3])
    both = shared.prefill([[4, 5], [6]], past=common)
    assert len(common) == 1
    assert len(both) == 2
    same(generated(shared, [[7], [8, 9]], past=both), generated(shared, [[1, 2, 3, 4, 5, 7], [1, 2, 3, 6, 8, 9]]))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_forward_pass_and_a_cache_continue_a_past_too(shared: lk.HookedTransformer, rows: int) -> None:
    tokens = ids(rows, 9)
    past = shared.prefill(tokens[:, :5])
    whole, cache = shared.run_with_cache(tokens)
    logits, rest = shared.run_with_cache(tokens[:, 5:], past=past)
    assert error(logits, whole[:, 5:]) < CLOSE
    assert rest.keys() == cache.keys()
    for name, tensor in rest.items():
        pattern = name.endswith(("hook_pattern", "hook_attn_scores"))
        expected = cache[name][:, :, 5:] if pattern else cache[name][:, 5:]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    result = shared.run_with_hooks(tokens[:, 5:], [lk.Save("blocks.0.hook_resid_post")], past=past)
    assert error(result.logits, whole[:, 5:]) < CLOSE
    assert error(result.saved["blocks.0.hook_resid_post"], cache["resid_post", 0][:, 5:]) < CLOSE


def test_gradients_flow_to_what_continues_a_past(shared: lk.HookedTransformer) -> None:
    past = shared.prefill([1, 2, 3])
    added = torch.zeros(shared.cfg.d_model, requires_grad=True)
    result = shared.run_with_hooks([[4, 5]], [lk.Add("blocks.0.hook_resid_pre", added, tokens=0)], past=past)
    result.logits[0, -1].logsumexp(-1).backward()
    found, added.grad = added.grad, None
    whole = shared.run_with_hooks([[1, 2, 3, 4, 5]], [lk.Add("blocks.0.hook_resid_pre", added, tokens=3)])
    whole.logits[0, -1].logsumexp(-1).backward()
    assert found is not None
    assert added.grad is not None
    assert error(found, added.grad) < CLOSE


# -- what hooks did to it


def test_edits_of_a_prefix_stay(shared: lk.HookedTransformer) -> None:
    """They are in the keys and values that later calls read."""
    prefix, endings = [1, 2, 3, 4], [[5, 6], [7]]
    edits = [
        lk.Set("blocks.0.attn.hook_v", 0.0, tokens=1, heads=0),
        lk.Add("blocks.1.hook_resid_pre", 0.5, tokens=2),
        ("blocks.2.attn.hook_k", lambda k, hook: k[:, :4].mul_(1.5) if hook.step == 0 else None),
    ]
    past = shared.prefill(prefix, edits)
    found = generated(shared, endings, past=past)
    # A whole prompt has its first tokens at step 0; counted from the front, they are the same.
    whole = [
        lk.Set("blocks.0.attn.hook_v", 0.0, tokens=1, heads=0, steps=0),
        lk.Add("blocks.1.hook_resid_pre", 0.5, tokens=2, steps=0),
        lk.Scale("blocks.2.attn.hook_k", 1.5, tokens=slice(0, 4), steps=0),
    ]
    for row, ending in enumerate(endings):
        alone = generated(shared, prefix + ending, hooks=whole)
        assert found.tokens[row].tolist() == alone.tokens[0].tolist()
        assert found.logits is not None
        assert alone.logits is not None
        assert error(found.logits[row], alone.logits[0]) < CLOSE
        plain = generated(shared, prefix + ending)
        assert plain.logits is not None
        assert error(found.logits[row], plain.logits[0]) > 1e-3, "the edits matter"


def test_what_a_prefill_saves(shared: lk.HookedTransformer) -> None:
    past = shared.prefill([[1, 2, 3], [4]], [lk.Save("blocks.0.hook_resid_post", tokens=-1), lk.Save("hook_embed")])
    assert past.saved["blocks.0.hook_resid_post"].shape == (2, shared.cfg.d_model)
    assert past.saved["hook_embed"].shape == (2, 3, shared.cfg.d_model)
    assert not past.saved["hook_embed"][1, :2].any()


def test_selectors_count_the_tokens_that_are_new(shared: lk.HookedTransformer) -> None:
    past = shared.prefill([1, 2, 3])
    hooks = [
        lk.Save("hook_embed", tokens=0, steps=0),
        lk.Save("blocks.0.attn.hook_pattern", steps=[0, 1]),
        lk.Save("blocks.0.attn.hook_pattern", steps=0, tokens=0, dims=3, name="the first new token on itself"),
    ]
    found = generated(shared, [[4, 5], [6]], past=past, hooks=hooks)
    assert torch.equal(found.saved["hook_embed"], shared.embed(torch.tensor([[4, 6]]))[0])
    first, second = found.saved["blocks.0.attn.hook_pattern"]
    assert first.shape[2:] == (2, 5), "queries are those of the step, keys all that they may see"
    assert second.shape[2:] == (1, 6)
    assert torch.equal(found.saved["the first new token on itself"][0], first[0, :, 0, 3])
    with pytest.raises(SelectorError, match="no tokens=1"):
        generated(shared, [[4, 5], [6]], past=past, hooks=[lk.Save("hook_embed", tokens=1, steps=0)])


def test_functions_are_told_positions_that_go_on(shared: lk.HookedTransformer) -> None:
    seen: list[Tensor] = []
    past = shared.prefill([[1, 2, 3], [1]])
    generated(
        shared, [[4], [5, 6]], past=past, max_new_tokens=2,
        hooks=[("blocks.0.hook_resid_pre", lambda _, hook: seen.append(hook.positions.clone()))],
    )  # fmt: skip
    assert seen[0][0, -1:].tolist() == [3]
    assert seen[0][1].tolist() == [1, 2]
    assert seen[1].tolist() == [[4], [3]]


# -- a past is a value


def test_later_calls_leave_a_past_as_it_was(shared: lk.HookedTransformer) -> None:
    past = shared.prefill([1, 2, 3, 4])
    held, nbytes = past.tokens.clone(), past.cache.nbytes
    first = generated(shared, [[5], [6]], past=past)
    ruin: list[Any] = [("blocks.*.attn.hook_v", lambda v, _: v.fill_(9.0)), lk.Set("blocks.*.attn.hook_k", 3.0)]
    generated(shared, [[7, 8], [9]], past=past, hooks=ruin, max_new_tokens=12)
    shared.prefill([7, 8], ruin, past=past)
    shared.run_with_hooks([[7, 8]], ruin, past=past)
    with pytest.raises(ZeroDivisionError):
        generated(shared, [[7]], past=past, hooks=[("blocks.1.hook_mlp_out", lambda *_: 1 / 0)])
    again = generated(shared, [[5], [6]], past=past)
    assert again.logits is not None
    assert first.logits is not None
    assert all(torch.equal(*pair) for pair in zip(again.logits, first.logits, strict=True))
    assert torch.equal(past.tokens, held)
    assert past.cache.nbytes == nbytes
    assert past.cache.length == 4


def test_a_past_does_not_know_the_tensor_it_came_from(shared: lk.HookedTransformer) -> None:
    given_ids = torch.tensor([[1, 2, 3]])
    past = shared.prefill(given_ids)
    given_ids.zero_()
    assert generated(shared, [[4]], past=past).tokens[0].tolist()[:4] == [1, 2, 3, 4]


def test_two_generations_may_continue_one_past_in_turn(shared: lk.HookedTransformer) -> None:
    past = shared.prefill([1, 2, 3])
    alone = [generated(shared, [[t]], past=past).new_tokens[0].tolist() for t in (4, 5)]
    runs = [shared.generate_steps([[t]], past=past, max_new_tokens=5, eos_token_id=[]) for t in (4, 5)]
    together = [[int(step.tokens[0]) for step in steps] for steps in zip(*runs, strict=True)]
    assert [list(row) for row in zip(*together, strict=True)] == alone


def test_text_continues_as_text(demo_gpt2: lk.HookedTransformer) -> None:
    past = demo_gpt2.prefill(PREFIX)
    found = demo_gpt2.generate(ENDINGS, past=past, max_new_tokens=6)
    whole = demo_gpt2.generate([PREFIX + ending for ending in ENDINGS], max_new_tokens=6)
    assert found.texts == whole.texts
    assert found.texts[0] == "The Eiffel Tower is in the city of Paris.<|endoftext|>"
    assert found.new_texts == whole.new_texts
    assert found.steps_run == whole.steps_run
    assert len(past) == 1
    assert repr(past).startswith("Past(1 x 6 tokens, ")


def test_special_tokens_are_not_added_in_the_middle(
    demo_llama: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that begins every text with a token of its own does so for the prefix alone."""
    tokenizer = demo_llama.tokenizer

    class Adding:
        pad_token_id = eos_token_id = 0

        def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
            rows = tokenizer(texts)["input_ids"]
            return {"input_ids": [[0, *row] for row in rows] if add_special_tokens else rows}

        def decode(self, tokens: Tensor) -> str:
            return str(tokenizer.decode(tokens))

    monkeypatch.setattr(demo_llama, "tokenizer", Adding())
    past = demo_llama.prefill(PREFIX)
    found = demo_llama.generate(ENDINGS[0], past=past, max_new_tokens=3)
    whole = demo_llama.generate(PREFIX + ENDINGS[0], max_new_tokens=3)
    assert found.texts == whole.texts
    assert whole.texts[0].count("<|endoftext|>The") == 1


def test_several_continuations_of_pasts(demo_gpt2: lk.HookedTransformer) -> None:
    """`num_return_sequences` repeats prompts, and so the pasts that they continue."""
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3, "seed": 4}
    prefixes = [PREFIX, "Hagia Sophia"]
    whole = generated(demo_gpt2, [prefix + ENDINGS[1] for prefix in prefixes], **options)
    same(generated(demo_gpt2, [ENDINGS[1]] * 2, past=demo_gpt2.prefill(prefixes), **options), whole)
    one = generated(demo_gpt2, [PREFIX + ENDINGS[1]], **options)
    same(generated(demo_gpt2, [ENDINGS[1]], past=demo_gpt2.prefill(PREFIX), **options), one)


def test_a_repetition_penalty_counts_the_past(demo_gpt2: lk.HookedTransformer) -> None:
    past = demo_gpt2.prefill([PREFIX, "Rome"])
    prompts = [ENDINGS[0]] * 2
    found = generated(demo_gpt2, prompts, past=past, repetition_penalty=5.0, max_new_tokens=8)
    same(
        found,
        generated(demo_gpt2, [PREFIX + ENDINGS[0], "Rome" + ENDINGS[0]], repetition_penalty=5.0, max_new_tokens=8),
    )


def test_cross_prompt_edits_on_a_shared_past(shared: lk.HookedTransformer) -> None:
    """Prompts that need two passes continue a past as they do a prompt."""
    hooks = [
        lk.Set(
            "blocks.1.hook_resid_pre", lk.Act("blocks.2.hook_resid_post", prompts=0, tokens=-1, steps=0),
            prompts=1, tokens=-1, steps=0,
        )
    ]  # fmt: skip
    past = shared.prefill([[1, 2], [3]])
    found = generated(shared, [[4], [5, 6]], past=past, hooks=hooks)
    same(found, generated(shared, [[1, 2, 4], [3, 5, 6]], hooks=hooks))


# -- errors


def test_a_past_of_other_rows(shared: lk.HookedTransformer) -> None:
    past = shared.prefill([[1, 2], [3, 4]])
    for call in (
        lambda: generated(shared, [[1], [2], [3]], past=past),
        lambda: generated(shared, [[1]], past=past),
        lambda: shared.prefill([[1], [2], [3]], past=past),
        lambda: shared.run_with_hooks([[1], [2], [3]], past=past),
    ):
        with pytest.raises(InputError, match="the past does not fit the prompts") as told:
            call()
        assert "a past of 2 rows" in told.value.got


def test_a_prefill_is_one_whole_pass(shared: lk.HookedTransformer) -> None:
    later = lk.Act("blocks.2.hook_resid_post", prompts=0)
    for hooks, got in [
        ([lk.Stop("blocks.1.hook_resid_pre")], "a Stop"),
        ([lk.Set("blocks.0.hook_resid_pre", later, prompts=1)], "take 2"),
    ]:
        with pytest.raises(InputError, match="a prefill is one") as told:
            shared.prefill([[1, 2], [3, 4]], hooks)
        assert got in told.value.got


def test_a_past_needs_all_layers(shared: lk.HookedTransformer) -> None:
    past = shared.prefill([1, 2])
    with pytest.raises(InputError, match="needs all layers"):
        shared.run_with_hooks([[3]], past=past, stop_at_layer=1)


def test_a_past_that_leaves_no_room(tiny: Callable[..., lk.HookedTransformer]) -> None:
    """Learned positions count what is in the past."""
    model = tiny("gpt2", n_positions=8)
    past = model.prefill([1, 2, 3, 4, 5])
    model.run_with_hooks([[6, 7, 8]], past=past)
    for call in (lambda: model.run_with_hooks([[6, 7, 8, 9]], past=past), lambda: model.prefill([1] * 4, past=past)):
        with pytest.raises(InputError, match="longer than"):
            call()
