"""Activation patching: what a run's activations carry, shown by putting them into another run.

Vig et al. 2020 (arXiv 2004.12265), Meng et al. 2022 (arXiv 2202.05262), Wang et al. 2022 (arXiv 2211.00593).
Two prompts that differ in what matters (the subject, say) run through the model, the clean one and the corrupted
one. Then the corrupted prompt runs again and again, each time with another piece of the clean run's activations in
the place of its own: where the clean answer comes back, that piece carries what made the difference.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.analysis.edited_runs import Edit, Score, head_counts, score_edits
from lenskit.cache import ActivationCache
from lenskit.errors import InputError
from lenskit.hooks import HookPoint
from lenskit.inputs import Batch, Input
from lenskit.transformer import HookedTransformer


def patch_positions(
    model: HookedTransformer,
    clean: Input,
    corrupted: Input,
    metric: Score,
    *,
    point: str = "hook_resid_pre",
    positions: Sequence[int | Sequence[int]] | None = None,
    max_rows: int = 32,
) -> Float[Tensor, "layer column *metric"]:
    """The corrupted run with the clean run's activation, layer by layer, at some positions.

    Args:
        clean, corrupted: a prompt each, or as many each, all of the same number of tokens.
        metric: of the logits [batch pos d_vocab] of a patched run: a number (mostly), or a tensor, whose axes then
            come last in the table, e.g. `lambda logits: logits[0, -1].softmax(-1)`.
        point: what is patched, by its name within the block; any with an axis `pos`.
        positions: what is patched together: an entry for each column of the table, an int or several. The
            default is a column for each position.
        max_rows: prompts times columns that go through the model at once, but at least one column's.

    Raises:
        InputError: the prompts differ in number or in length, or lack a position.
        UnknownHookPointError: a block has no such point.
        AxisError: the point has no axis `pos`.
    """
    ours, batch = _pair(model, clean, corrupted)
    if batch.mask is not None:
        lengths = batch.mask.sum(1).tolist()
        raise _unequal(f"prompts of {min(lengths)} to {max(lengths)} tokens", "prompts of one length")
    n_pos = batch.tokens.shape[1]
    columns = [_positions(entry, n_pos) for entry in (range(n_pos) if positions is None else positions)]
    cache = _cached(model, ours, point)
    edits: list[Edit] = [partial(_copy_positions, cache, column) for column in columns]
    return score_edits(model, batch, point, [edits] * model.cfg.n_layers, metric, max_rows=max_rows)


def patch_heads(
    model: HookedTransformer,
    clean: Input,
    corrupted: Input,
    metric: Score,
    *,
    point: str = "attn.hook_z",
    max_rows: int = 32,
) -> Float[Tensor, "layer head *metric"]:
    """The corrupted run with the clean run's activation of one head at a time, at every position.

    Args:
        clean, corrupted: a prompt each, or as many each; the two of a pair have the same number of tokens.
        metric, max_rows: as `patch_positions`'s.
        point: what is patched, by its name within the block; any with an axis `head`. Under grouped-query attention
            "attn.hook_k" and "attn.hook_v" have the key-value heads, each of which serves a group of query heads.

    Raises:
        InputError: the prompts differ in number, or those of a pair in length.
        UnknownHookPointError: a block has no such point.
        AxisError: the point has no axis `head`.
    """
    ours, batch = _pair(model, clean, corrupted)
    counts, cache = head_counts(model, point), _cached(model, ours, point)
    edits: list[list[Edit]] = [[partial(_copy_head, cache, head) for head in range(n)] for n in counts]
    return score_edits(model, batch, point, edits, metric, max_rows=max_rows)


def _cached(model: HookedTransformer, batch: Batch, point: str) -> ActivationCache:
    names = [f"blocks.{layer}.{point}" for layer in range(model.cfg.n_layers)]
    return model.run_with_cache(batch, names)[1]


def _copy_positions(clean: ActivationCache, positions: Sequence[int], activation: Tensor, hook: HookPoint) -> None:
    axis, source = hook.axis("pos"), clean[hook.name]
    index = torch.tensor(positions, device=source.device)
    activation.index_copy_(axis, index, source.index_select(axis, index))


def _copy_head(clean: ActivationCache, head: int, activation: Tensor, hook: HookPoint) -> None:
    axis = hook.axis("head")
    activation.select(axis, head).copy_(clean[hook.name].select(axis, head))


def _positions(entry: int | Sequence[int], n_pos: int) -> list[int]:
    """Counted from the start."""
    positions = [entry] if isinstance(entry, int) else list(entry)
    for position in positions:
        if not -n_pos <= position < n_pos:
            raise InputError(
                "no such position to patch",
                got=f"position {position} of {n_pos} tokens",
                expected=f"from {-n_pos} to {n_pos - 1}",
                fix="choose positions that the prompts have; negative ones count from the end",
            )
    return [position % n_pos for position in positions]


def _pair(model: HookedTransformer, clean: Input, corrupted: Input) -> tuple[Batch, Batch]:
    """Both batches, which fit each other position by position."""
    one, other = model.to_tokens(clean), model.to_tokens(corrupted)
    ours, theirs = _own(one), _own(other)
    if len(ours) != len(theirs):
        raise _unequal(f"{len(ours)} clean and {len(theirs)} corrupted prompts", "as many of both")
    for row, lengths in enumerate(zip(ours.sum(1).tolist(), theirs.sum(1).tolist(), strict=True)):
        if lengths[0] != lengths[1]:
            where = f" (pair {row})" if len(ours) > 1 else ""
            raise _unequal(
                f"a clean prompt of {lengths[0]} tokens and a corrupted one of {lengths[1]}{where}",
                "as many tokens in both, so that a position is the same place in both",
            )
    if not torch.equal(ours, theirs):
        raise _unequal("prompts of equal length, padded differently", "the same padding in both")
    return one, other


def _own(batch: Batch) -> Tensor:
    return torch.ones_like(batch.tokens, dtype=torch.bool) if batch.mask is None else batch.mask


def _unequal(got: str, expected: str) -> InputError:
    return InputError(
        "the prompts do not fit each other",
        got=got,
        expected=expected,
        fix="model.to_str_tokens(prompt) shows a prompt's tokens: choose wordings, names or subjects of equal length",
    )
