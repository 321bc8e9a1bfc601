"""What each head is worth: the loss when its values or its output are zero."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.analysis.edited_runs import Edit, head_counts, score_edits
from lenskit.analysis.losses import mean_loss
from lenskit.hooks import HookPoint
from lenskit.inputs import Input
from lenskit.models.base import check_causal
from lenskit.transformer import HookedTransformer


@dataclass(frozen=True)
class Ablation:
    """Mean losses of a batch, in nats a token.

    whole: of the model as it is.
    without: [layer head], each with that head's activation zeroed.
    """

    whole: Float[Tensor, ""]
    without: Float[Tensor, "layer head"]

    @property
    def rise(self) -> Float[Tensor, "layer head"]:
        """How much worse the model is without each head, in nats a token; below zero where it is better."""
        return self.without - self.whole


@torch.no_grad()
def ablate_heads(model: HookedTransformer, input: Input, *, point: str = "attn.hook_z", max_rows: int = 32) -> Ablation:
    """The loss with one head at a time switched off, at every position: zero ablation, as in Olsson et al. 2022
    (arXiv 2209.11895).

    Args:
        point: what is zeroed, by its name within the block: "attn.hook_z", a head's output, or "attn.hook_v", its
            values, which comes to the same where every head has values of its own. Under grouped-query attention
            `hook_v` has the key-value heads: zeroing one silences the whole group of query heads that it serves,
            and the table has a column for each key-value head. Any other point with a head axis works too.
        max_rows: prompts times heads that go through the model at once, but at least one head's.

    Raises:
        UnknownHookPointError: a block has no such point.
        AxisError: the point has no head axis.
        InputError: the model cannot take the input, or every prompt has only one token.
        NotCausalError: the model is an encoder, which foretells no next token.
    """
    check_causal(model, "the loss of next tokens")
    batch = model.to_tokens(input)

    def loss(logits: Tensor) -> Tensor:
        return mean_loss(logits, batch.tokens, batch.mask)

    edits: list[list[Edit]] = [[partial(_zero, h) for h in range(n)] for n in head_counts(model, point)]
    whole = loss(model(batch))
    return Ablation(whole, score_edits(model, batch, point, edits, loss, max_rows=max_rows))


def _zero(head: int, activation: Tensor, hook: HookPoint) -> None:
    activation.select(hook.axis("head"), head).zero_()
