"""How well a model foretells its input: the cross-entropy of each next token, or of masked ones, in nats."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenskit.errors import InputError

UNLABELLED = -100  # the label of what is not foretold


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos-1"]:
    """-log p(next token | the tokens before it), in nats; entry `i` is the loss of token `i + 1`.

    `result = model.run_with_hooks(texts)` has all three arguments: `result.logits, result.tokens, result.mask`.

    Args:
        tokens: the ids that went in.
        mask: True for a row's own tokens; None where nothing is padded. Where the token or the one before it is
            padding, nothing is foretold: the entry is nan.

    Returns:
        float32 at least, whatever the logits' dtype.
    """
    exact = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = exact.logsumexp(-1) - exact.gather(-1, tokens[:, 1:, None].long()).squeeze(-1)
    return losses if mask is None else losses.masked_fill(~(mask[:, 1:] & mask[:, :-1]), float("nan"))


def mean_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """The mean of `token_losses` over all tokens that are foretold, in nats: a long prompt counts for more.

    Raises:
        InputError: every prompt has one token, so nothing is foretold.
    """
    losses = token_losses(logits, tokens, mask)
    foretold = ~losses.isnan() if mask is None else mask[:, 1:] & mask[:, :-1]
    if losses.numel() == 0 or not foretold.any():
        raise InputError(
            "a loss needs a token that is foretold",
            got=f"{len(tokens)} prompts of one token",
            expected="at least one prompt of two tokens",
            fix="give longer prompts, or put a start token before them",
        )
    return losses[foretold].mean()


def masked_loss(logits: Float[Tensor, "batch pos d_vocab"], labels: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """The mean of -log p(label) where there is one, in nats: how well an encoder fills in what was masked.

    Args:
        labels: the id that stood where the input has the mask token; -100, as in Hugging Face's, elsewhere.

    Returns:
        float32 at least, whatever the logits' dtype.

    Raises:
        InputError: no position has a label, or a label is no id.
    """
    masked, d_vocab = labels != UNLABELLED, logits.shape[-1]
    wanted = labels[masked].long()
    if not len(wanted) or bool(((wanted < 0) | (wanted >= d_vocab)).any()):
        raise InputError(
            "a masked loss needs labels",
            got="none" if not len(wanted) else f"labels from {int(wanted.min())} to {int(wanted.max())}",
            expected=f"ids from 0 to {d_vocab - 1} where a token was masked, and {UNLABELLED} elsewhere",
            fix=f"labels = torch.where(tokens == tokenizer.mask_token_id, original, {UNLABELLED})",
        )
    exact = logits[masked].to(torch.promote_types(logits.dtype, torch.float32))
    return (exact.logsumexp(-1) - exact.gather(-1, wanted[:, None]).squeeze(-1)).mean()
