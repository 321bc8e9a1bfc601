"""What analysis returns, against the same computed another way: by hand, or through other verbs of the library."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lenskit as lk
from lenskit import analysis
from lenskit.errors import AxisError, InputError, UnknownHookPointError
from lenskit.hooks import HookPoint

Tiny = Callable[..., lk.HookedTransformer]
TEXTS = ["The Eiffel Tower is in the city of", "Mary gave", "When Tom and Anna went to the park,"]


def ids(rows: int, pos: int, *, seed: int = 0, d_vocab: int = 59) -> Tensor:
    return torch.randint(d_vocab, (rows, pos), generator=torch.Generator().manual_seed(seed))


def last_loss(logits: Tensor) -> Tensor:
    return logits[:, -1].logsumexp(-1).mean()


def assert_nothing_attached(model: lk.HookedTransformer) -> None:
    assert all(point.attachments is None for point in model.hook_points.values())


# -- losses


def test_token_losses_are_the_cross_entropies_of_the_next_tokens(shared: lk.HookedTransformer) -> None:
    tokens = ids(3, 7)
    logits = shared(tokens)
    expected = [F.cross_entropy(logits[row, :-1], tokens[row, 1:], reduction="none") for row in range(3)]
    torch.testing.assert_close(analysis.token_losses(logits, tokens), torch.stack(expected))


def test_the_loss_of_padded_prompts_is_that_of_each_prompt_alone(demo_gpt2: lk.HookedTransformer) -> None:
    together = demo_gpt2.run_with_hooks(TEXTS)
    alone = []
    for text in TEXTS:
        tokens = demo_gpt2.to_tokens(text).tokens
        alone.append(analysis.token_losses(demo_gpt2(tokens), tokens)[0])
    losses = analysis.token_losses(together.logits, together.tokens, together.mask)
    for row, expected in zip(losses, alone, strict=True):
        torch.testing.assert_close(row[~row.isnan()], expected, atol=1e-5, rtol=1e-5)
    mean = analysis.mean_loss(together.logits, together.tokens, together.mask)
    torch.testing.assert_close(mean, torch.cat(alone).mean(), atol=1e-5, rtol=1e-5)


def test_padding_on_the_right_is_left_out_as_well() -> None:
    logits, tokens = torch.randn(1, 5, 11), ids(1, 5, d_vocab=11)
    mask = torch.tensor([[True, True, True, False, False]])
    expected = F.cross_entropy(logits[0, :2], tokens[0, 1:3])
    torch.testing.assert_close(analysis.mean_loss(logits, tokens, mask), expected)


def test_losses_of_half_precision_logits_are_float32() -> None:
    logits, tokens = torch.randn(2, 5, 11), ids(2, 5, d_vocab=11)
    losses = analysis.token_losses(logits.bfloat16(), tokens)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, analysis.token_losses(logits.bfloat16().float(), tokens))


def test_a_loss_of_prompts_of_one_token_is_refused() -> None:
    with pytest.raises(InputError, match="2 prompts of one token"):
        analysis.mean_loss(torch.randn(2, 1, 11), ids(2, 1, d_vocab=11))


# -- the logit lens


def test_the_last_layer_of_the_lens_is_what_the_model_says(shared: lk.HookedTransformer) -> None:
    logits, cache = shared.run_with_cache(ids(2, 7))
    for positions in (None, [0, 3, -1], -1, 2):
        said = logits if positions is None else logits[:, positions]
        torch.testing.assert_close(analysis.logit_lens(shared, cache, positions)[-1], said)


def test_the_lens_is_a_model_that_ends_early(shared: lk.HookedTransformer) -> None:
    tokens = ids(2, 7)
    lens = analysis.logit_lens(shared, shared.run_with_cache(tokens)[1], None)
    for layer in range(1, shared.cfg.n_layers):
        with torch.no_grad():
            expected = shared.unembed(shared.ln_final(shared(tokens, stop_at_layer=layer)))
        torch.testing.assert_close(lens[layer - 1], expected)


def test_lens_positions_count_over_each_rows_own_tokens(demo_gpt2: lk.HookedTransformer) -> None:
    together = analysis.logit_lens(
        demo_gpt2, demo_gpt2.run_with_cache(TEXTS, "blocks.*.hook_resid_post")[1], [0, 1, -1]
    )
    for row, text in enumerate(TEXTS):
        alone = analysis.logit_lens(demo_gpt2, demo_gpt2.run_with_cache(text)[1], [0, 1, -1])
        torch.testing.assert_close(together[:, row], alone[:, 0], atol=1e-4, rtol=1e-4)


def test_hooks_on_the_final_norm_do_not_see_the_lens(shared: lk.HookedTransformer) -> None:
    _, cache = shared.run_with_cache(ids(1, 5))
    expected = analysis.logit_lens(shared, cache)
    seen = []
    with shared.hooks([("ln_final.*", lambda act, hook: seen.append(hook.name))]):
        torch.testing.assert_close(analysis.logit_lens(shared, cache), expected)
    assert not seen


def test_the_lens_has_gradients_where_the_cache_has_them(shared: lk.HookedTransformer) -> None:
    assert not analysis.logit_lens(shared, shared.run_with_cache(ids(1, 5))[1]).requires_grad
    assert analysis.logit_lens(shared, shared.run_with_cache(ids(1, 5), grad=True)[1]).requires_grad


def test_a_position_that_a_prompt_does_not_have_is_refused(demo_gpt2: lk.HookedTransformer) -> None:
    _, cache = demo_gpt2.run_with_cache(TEXTS)
    with pytest.raises(InputError, match="prompt 1 has no token at position 7"):
        analysis.logit_lens(demo_gpt2, cache, 7)
    with pytest.raises(UnknownHookPointError):
        analysis.logit_lens(demo_gpt2, demo_gpt2.run_with_cache(TEXTS, "blocks.0.*")[1])


def test_top_tokens_are_the_likeliest_with_their_probabilities(demo_gpt2: lk.HookedTransformer) -> None:
    logits = demo_gpt2(TEXTS[0])[0, -1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guesses = analysis.top_tokens(demo_gpt2, logits, 3)
    shares = logits.detach().softmax(-1).tolist()
    assert [guess.probability for guess in guesses] == pytest.approx(sorted(shares, reverse=True)[:3])
    assert guesses[0].text == demo_gpt2.to_string([shares.index(max(shares))])


# -- ablation


@pytest.mark.parametrize("point", ["attn.hook_z", "attn.hook_v"])
def test_ablation_is_the_loss_under_a_hook_that_zeroes_the_head(shared: lk.HookedTransformer, point: str) -> None:
    tokens = ids(2, 6)
    ablation = analysis.ablate_heads(shared, tokens, point=point)
    torch.testing.assert_close(ablation.whole, F.cross_entropy(shared(tokens)[:, :-1].mT, tokens[:, 1:]).detach())
    n_heads = shared.cfg.n_heads if point == "attn.hook_z" else shared.cfg.n_key_value_heads
    assert ablation.without.shape == (shared.cfg.n_layers, n_heads)
    for layer in range(shared.cfg.n_layers):
        for head in range(n_heads):

            def zero(act: Tensor, hook: HookPoint, head: int = head) -> None:
                act[:, :, head] = 0.0

            logits = shared.run_with_hooks(tokens, [(f"blocks.{layer}.{point}", zero)]).logits
            expected = F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:]).detach()
            torch.testing.assert_close(ablation.without[layer, head], expected)
    torch.testing.assert_close(ablation.rise, ablation.without - ablation.whole)
    assert_nothing_attached(shared)


def test_a_key_value_head_without_values_silences_its_group_of_heads(demo_llama: lk.HookedTransformer) -> None:
    group = demo_llama.cfg.n_heads // demo_llama.cfg.n_key_value_heads
    assert group > 1

    def zero_group(act: Tensor, hook: HookPoint) -> None:
        act[:, :, group : 2 * group] = 0.0

    tokens = demo_llama.to_tokens(TEXTS[0]).tokens
    logits = demo_llama.run_with_hooks(tokens, [("blocks.1.attn.hook_z", zero_group)]).logits.detach()
    values = analysis.ablate_heads(demo_llama, tokens, point="attn.hook_v")
    torch.testing.assert_close(values.without[1, 1], analysis.mean_loss(logits, tokens), atol=1e-5, rtol=1e-5)


def test_how_many_runs_share_a_pass_changes_nothing(demo_gpt2: lk.HookedTransformer) -> None:
    alone, some, all_at_once = (analysis.ablate_heads(demo_gpt2, TEXTS, max_rows=rows) for rows in (1, 10, 1000))
    torch.testing.assert_close(some.without, alone.without, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(all_at_once.without, alone.without, atol=1e-4, rtol=1e-4)


def test_ablating_what_has_no_heads_is_refused_before_anything_runs(shared: lk.HookedTransformer) -> None:
    with pytest.raises(AxisError, match="no axis 'head'"):
        analysis.ablate_heads(shared, ids(1, 4), point="hook_resid_pre")
    with pytest.raises(UnknownHookPointError, match=r"attn\.hook_nothing"):
        analysis.ablate_heads(shared, ids(1, 4), point="attn.hook_nothing")


# -- patching


def test_the_stream_patched_everywhere_is_the_clean_run(shared: lk.HookedTransformer) -> None:
    clean, corrupted = ids(1, 6), ids(1, 6, seed=1)
    table = analysis.patch_positions(shared, clean, corrupted, lambda logits: logits[0, -1], positions=[range(6)])
    expected = shared(clean)[0, -1].detach().expand(shared.cfg.n_layers, 1, -1)
    torch.testing.assert_close(table, expected)


def test_patching_a_prompt_into_itself_changes_nothing(shared: lk.HookedTransformer) -> None:
    tokens = ids(1, 6)
    expected = last_loss(shared(tokens)).detach()
    for table in (
        analysis.patch_positions(shared, tokens, tokens, last_loss),
        analysis.patch_heads(shared, tokens, tokens, last_loss),
    ):
        torch.testing.assert_close(table, expected.expand(table.shape))


@pytest.mark.parametrize("point", ["hook_resid_pre", "hook_mlp_out", "attn.hook_z", "attn.hook_v"])
def test_patching_positions_is_a_hook_that_copies_from_the_clean_cache(
    shared: lk.HookedTransformer, point: str
) -> None:
    clean, corrupted = ids(2, 5), ids(2, 5, seed=1)
    _, cache = shared.run_with_cache(clean)
    table = analysis.patch_positions(shared, clean, corrupted, last_loss, point=point, max_rows=5)
    assert table.shape == (shared.cfg.n_layers, 5)
    for layer in range(shared.cfg.n_layers):
        for pos in range(5):

            def copy(act: Tensor, hook: HookPoint, pos: int = pos) -> None:
                act[:, pos] = cache[hook.name][:, pos]

            logits = shared.run_with_hooks(corrupted, [(f"blocks.{layer}.{point}", copy)]).logits
            torch.testing.assert_close(table[layer, pos], last_loss(logits).detach())
    assert_nothing_attached(shared)


@pytest.mark.parametrize("point", ["attn.hook_z", "attn.hook_k", "attn.hook_pattern"])
def test_patching_heads_is_a_hook_that_copies_from_the_clean_cache(shared: lk.HookedTransformer, point: str) -> None:
    clean, corrupted = ids(1, 5), ids(1, 5, seed=1)
    _, cache = shared.run_with_cache(clean)
    table = analysis.patch_heads(shared, clean, corrupted, last_loss, point=point)
    heads = 1 if point == "attn.hook_pattern" else 2  # the axis
    assert table.shape == (shared.cfg.n_layers, cache[point.removeprefix("attn.hook_"), 0].shape[heads])
    for layer, head in ((0, 0), (1, -1), (2, 1)):

        def copy(act: Tensor, hook: HookPoint, head: int = head) -> None:
            act.select(heads, head).copy_(cache[hook.name].select(heads, head))

        logits = shared.run_with_hooks(corrupted, [(f"blocks.{layer}.{point}", copy)]).logits
        torch.testing.assert_close(table[layer, head], last_loss(logits).detach())


def test_heads_are_patched_in_pairs_of_different_length(shared: lk.HookedTransformer) -> None:
    clean, corrupted = [[1, 2, 3], [4, 5, 6, 7, 8]], [[9, 2, 3], [4, 10, 6, 7, 8]]
    together = analysis.patch_heads(shared, clean, corrupted, lambda logits: logits[:, -1])
    for row, pair in enumerate(zip(clean, corrupted, strict=True)):
        alone = analysis.patch_heads(shared, *pair, lambda logits: logits[0, -1])
        torch.testing.assert_close(together[:, :, row], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="prompts of 3 to 5 tokens"):
        analysis.patch_positions(shared, clean, corrupted, last_loss)


def test_a_metric_may_be_a_number_or_a_tensor(shared: lk.HookedTransformer) -> None:
    clean, corrupted = ids(1, 4), ids(1, 4, seed=1)
    numbers = analysis.patch_positions(shared, clean, corrupted, lambda logits: float(logits[0, -1, 3]))
    tensors = analysis.patch_positions(shared, clean, corrupted, lambda logits: logits[0, -1])
    assert tensors.shape == (shared.cfg.n_layers, 4, shared.cfg.d_vocab)
    torch.testing.assert_close(numbers, tensors[..., 3])


def test_prompts_of_different_token_length_are_refused_with_both_lengths(shared: lk.HookedTransformer) -> None:
    long, short = [1, 2, 3, 4], [1, 2, 3]
    for patch in (analysis.patch_positions, analysis.patch_heads):
        with pytest.raises(InputError, match="a clean prompt of 4 tokens and a corrupted one of 3\n"):
            patch(shared, long, short, last_loss)
        with pytest.raises(InputError, match=r"corrupted one of 3 \(pair 1\)"):
            patch(shared, [long, long], [long, short], last_loss)
        with pytest.raises(InputError, match="1 clean and 2 corrupted"):
            patch(shared, long, [long, short], last_loss)


def test_prompts_padded_on_different_sides_are_refused(shared: lk.HookedTransformer) -> None:
    tokens = ids(2, 4)
    left = {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])}
    right = {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    with pytest.raises(InputError, match="padded differently"):
        analysis.patch_heads(shared, left, right, last_loss)


@pytest.mark.parametrize("positions", [[4], [-5], [range(6)]])
def test_patching_a_position_that_is_not_there_is_refused(shared: lk.HookedTransformer, positions: list[int]) -> None:
    with pytest.raises(InputError, match="of 4 tokens"):
        analysis.patch_positions(shared, ids(1, 4), ids(1, 4, seed=1), last_loss, positions=positions)


def test_patching_leaves_no_gradients_behind(shared: lk.HookedTransformer) -> None:
    assert not analysis.patch_heads(shared, ids(1, 4), ids(1, 4, seed=1), last_loss).requires_grad


# -- kinds of heads


def attend(back: int, *, first_query: int) -> Callable[[Tensor, HookPoint], None]:
    """Make head 1 attend wholly to the token `back` before, from `first_query` on, and to itself earlier."""

    def edit(pattern: Tensor, hook: HookPoint) -> None:
        pattern[:, 1] = 0.0
        for query in range(pattern.shape[2]):
            pattern[:, 1, query, query - back if query >= first_query else query] = 1.0

    return edit


def test_a_head_that_copies_has_an_induction_score_of_one(shared: lk.HookedTransformer) -> None:
    for first in (None, 3):
        start = 0 if first is None else 1
        with shared.hooks([("blocks.2.attn.hook_pattern", attend(back=8, first_query=start + 9))]):
            scores = analysis.induction_scores(shared, length=9, rows=3, first=first)
        assert scores.shape == (shared.cfg.n_layers, shared.cfg.n_heads)
        assert scores[2, 1] == 1.0
        others = torch.cat([scores.flatten()[: 2 * shared.cfg.n_heads + 1], scores[2, 2:]])
        assert (others < 0.5).all()
    assert_nothing_attached(shared)


def test_a_head_that_looks_at_the_token_before_has_a_previous_token_score_of_one(
    shared: lk.HookedTransformer,
) -> None:
    with shared.hooks([("blocks.0.attn.hook_pattern", attend(back=1, first_query=1))]):
        assert analysis.previous_token_scores(shared, ids(2, 9))[0, 1] == 1.0


def test_previous_token_scores_are_means_over_the_prompts_own_tokens(demo_llama: lk.HookedTransformer) -> None:
    found = []
    for text in TEXTS:
        patterns = demo_llama.run_with_cache(text, "blocks.*.attn.hook_pattern")[1].stack("pattern")[:, 0]
        pos = patterns.shape[-1]
        found.append(torch.stack([patterns[:, :, query, query - 1] for query in range(1, pos)]))
    expected = torch.cat(found).mean(0)
    torch.testing.assert_close(analysis.previous_token_scores(demo_llama, TEXTS), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="1 prompts of one token"):
        analysis.previous_token_scores(demo_llama, [3])


def test_repeated_tokens_are_random_and_come_twice(demo_gpt2: lk.HookedTransformer) -> None:
    tokens = analysis.repeated_tokens(demo_gpt2, length=20, rows=4, first=0)
    assert tokens.shape == (4, 41)
    assert (tokens[:, 0] == 0).all()
    assert torch.equal(tokens[:, 1:21], tokens[:, 21:])
    assert all(len(set(row[1:21])) == 20 and 0 not in row[1:] for row in tokens.tolist())  # 0 is the special token
    assert torch.equal(tokens, analysis.repeated_tokens(demo_gpt2, length=20, rows=4, first=0))
    assert not torch.equal(tokens, analysis.repeated_tokens(demo_gpt2, length=20, rows=4, first=0, seed=1))


def test_more_different_tokens_than_there_are_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="at most 59"):
        analysis.repeated_tokens(tiny("gpt2"), length=60)


def test_scores_leave_the_random_state_alone(tiny: Tiny) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    analysis.induction_scores(tiny("gpt2"), length=5)
    assert torch.equal(before, torch.get_rng_state())
