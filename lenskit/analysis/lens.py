"""The logit lens: what the residual stream would predict if the model ended after each layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit.cache import ActivationCache
from lenskit.errors import InputError
from lenskit.hooks import hooks_off
from lenskit.models.base import Decoder
from lenskit.transformer import HookedTransformer


class Guess(NamedTuple):
    """A next token: its text, and its probability (from 0 to 1)."""

    text: str
    probability: float


def logit_lens(
    model: Decoder, cache: ActivationCache, positions: int | Sequence[int] | None = -1
) -> Float[Tensor, "layer batch *pos d_vocab"]:
    """The final norm and the unembedding applied to the stream after each layer (nostalgebraist 2020,
    "interpreting GPT: the logit lens").

    The last layer's row is what the model itself says. Hooks on the final norm do not run.

    Args:
        cache: holds every `hook_resid_post`, e.g. `run_with_cache(text, "blocks.*.hook_resid_post")`.
        positions: counted over each row's own tokens, from the end if negative: an int drops the axis `pos`, a
            list keeps it, None takes all positions, padding (where nothing meaningful comes out) included.

    Returns:
        Logits, with gradients where the cache has them.

    Raises:
        UnknownHookPointError: the cache lacks a `hook_resid_post`.
        InputError: a position that a row does not have.
    """
    device = model.inputs_on or model.unembed.weight.device  # not on the meta device, where nothing would be seen
    stream = torch.stack([cache["resid_post", layer].to(device) for layer in range(cache.n_layers)])
    if positions is not None:
        wanted = [positions] if isinstance(positions, int) else list(positions)
        columns = _columns(wanted, cache, *stream.shape[1:3]).to(device)
        stream = stream[:, torch.arange(len(columns), device=device)[:, None], columns]
    if isinstance(positions, int):
        stream = stream.squeeze(2)
    with torch.set_grad_enabled(stream.requires_grad), hooks_off():  # hooks are about the model's own pass
        logits: Tensor = model.unembed(model.ln_final(stream))
    return logits


def top_tokens(model: HookedTransformer, logits: Float[Tensor, " d_vocab"], k: int = 5) -> list[Guess]:
    """The `k` likeliest next tokens, the likeliest first.

    Raises:
        InputError: the model has no tokenizer.
    """
    likeliest = logits.detach().float().softmax(-1).topk(k)
    return [
        Guess(model.to_string([token]), probability)
        for token, probability in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]


def _columns(positions: list[int], cache: ActivationCache, rows: int, n_pos: int) -> Int[Tensor, "batch pos"]:
    """Where in the padded batch each row's tokens of those positions are."""
    own = [torch.arange(n_pos)] * rows if cache.mask is None else [row.nonzero()[:, 0].cpu() for row in cache.mask]
    for row, columns in enumerate(own):
        for position in positions:
            if not -len(columns) <= position < len(columns):
                raise InputError(
                    f"prompt {row} has no token at position {position}",
                    got=f"position {position} of {len(columns)} tokens",
                    expected=f"from {-len(columns)} to {len(columns) - 1}",
                    fix="choose positions that every prompt has; negative ones count from the end",
                )
    return torch.stack([columns[positions] for columns in own])
