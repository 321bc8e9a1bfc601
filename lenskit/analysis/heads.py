"""What kind of head is it: scores read off attention patterns."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenskit.errors import InputError
from lenskit.hooks import HookPoint
from lenskit.inputs import Batch, Input
from lenskit.interventions.scope import attached, on_points
from lenskit.transformer import HookedTransformer


def repeated_tokens(
    model: HookedTransformer, *, length: int = 50, rows: int = 8, seed: int = 0, first: int | None = None
) -> Int[Tensor, "rows pos"]:
    """Random ids, each row's twice in a row: only the repetition foretells the second copy.

    Args:
        length: of one copy; its ids differ, and none is a special token.
        rows: fresh ones each.
        seed: of a generator of its own.
        first: an id put before each row, e.g. the start token that some models cannot do without.

    Raises:
        InputError: the vocabulary is smaller than `length`.
    """
    special = set() if model.tokenizer is None else set(model.tokenizer.all_special_ids)
    plain = torch.tensor([token for token in range(model.cfg.d_vocab) if token not in special])
    if len(plain) < length:
        raise InputError(
            "too long a sequence of different tokens",
            got=f"length={length}",
            expected=f"at most {len(plain)}: the model's vocabulary without special tokens",
            fix="choose a smaller length",
        )
    generator = torch.Generator().manual_seed(seed)
    copies = torch.stack([plain[torch.randperm(len(plain), generator=generator)[:length]] for _ in range(rows)])
    start = torch.full((rows, 0 if first is None else 1), first or 0)
    return torch.cat([start, copies, copies], dim=1).to(model.device)


def induction_scores(
    model: HookedTransformer, *, length: int = 50, rows: int = 8, seed: int = 0, first: int | None = None
) -> Float[Tensor, "layer head"]:
    """How much each head attends, from the second copy of random tokens, to the token that followed the same token
    in the first copy (Olsson et al. 2022, arXiv 2209.11895: prefix matching).

    Arguments as `repeated_tokens`'s.

    Returns:
        Mean attention, from 0 to 1.

    Raises:
        InputError: the vocabulary is too small for that, or the context.
    """
    tokens = repeated_tokens(model, length=length, rows=rows, seed=seed, first=first)
    second_copy = torch.arange(tokens.shape[1], device=tokens.device) >= tokens.shape[1] - length
    return _attention_back(model, Batch(tokens), length - 1, second_copy.expand(tokens.shape))


def previous_token_scores(model: HookedTransformer, input: Input) -> Float[Tensor, "layer head"]:
    """How much each head attends to the token before, over all tokens of a batch that have one.

    Returns:
        Mean attention, from 0 to 1.

    Raises:
        InputError: the model cannot take the input, or every prompt has only one token.
    """
    batch = model.to_tokens(input)
    own = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.mask is None else batch.mask
    has_previous = own & own.roll(1, 1)
    has_previous[:, 0] = False
    if not has_previous.any():
        raise InputError(
            "a previous-token score needs a previous token",
            got=f"{len(own)} prompts of one token",
            expected="at least one prompt of two tokens",
            fix="give longer prompts",
        )
    return _attention_back(model, batch, 1, has_previous)


@torch.no_grad()
def _attention_back(
    model: HookedTransformer, batch: Batch, back: int, queries: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "layer head"]:
    """Mean attention from some queries to the key `back` positions before.

    No pattern is kept: each is read while its layer runs.
    """
    scores: dict[int, Tensor] = {}

    def read(pattern: Float[Tensor, "batch head query_pos key_pos"], hook: HookPoint) -> None:
        diagonal = pattern.diagonal(-back, -2, -1)  # [batch head pos-back], entry i is of query i + back
        scores[hook.layer or 0] = diagonal.movedim(1, -1)[queries[:, back:].to(pattern.device)].float().mean(0)

    points = [model.hook_points[name] for name in model.hook_names("blocks.*.attn.hook_pattern")]
    with attached(on_points(points, read, "read")):
        model(batch, stop_at_layer=model.cfg.n_layers)
    return torch.stack([scores[layer].to(model.device) for layer in sorted(scores)])
