"""`Chooser`: logits and ids in, the next tokens and the rows that they end out; no text and no model.

What changes logits or ends a row are Hugging Face's LogitsProcessor and StoppingCriteria objects, called as its
`generate` calls them, except that padding never counts for those that stand for a parameter.
"""

from collections.abc import Sequence
from types import FunctionType
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenskit.errors import GenerationError

NO_ID = 2**31 - 1  # which no vocabulary has, so that it is part of no stop string


@final
class Chooser:
    """One generation's choices; holds the random generator.

    Args:
        do_sample: draw tokens by their probability; without it the likeliest is taken.
        seed: of this generation's own random numbers; None draws from torch's global generator.
        processors: called in this order with (ids, scores).
        criteria: called with (ids, scores) once the tokens are chosen; `ends` says what they get and may return.
        parameters: those of either kind that stand for a parameter: padding does not count for them. The others are
            the caller's own and see padding as `pad`.
        eos: ids that end a row.
        device: where the ids are.
        pad: any id.
    """

    def __init__(
        self,
        *,
        do_sample: bool,
        seed: int | None,
        processors: Sequence[Any],
        criteria: Sequence[Any],
        parameters: Sequence[Any],
        eos: Sequence[int],
        device: torch.device,
        pad: int,
    ) -> None:
        self._do_sample = do_sample
        self._generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        known = {id(parameter) for parameter in parameters}
        self._processors = [(processor, id(processor) in known) for processor in processors]
        self._criteria = [(criterion, id(criterion) in known) for criterion in criteria]
        self._eos = torch.tensor(eos, device=device) if len(eos) > 1 else eos[0] if eos else None
        self._pad = pad
        # Of the newest step: what processors made of the logits (None: nothing), and where rows are padded.
        self._scores: Tensor | None = None
        self._mask: Tensor | None = None

    def next_tokens(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        ids: Int[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"] | None,
    ) -> Int[Tensor, " batch"]:
        """The token that follows each row.

        Args:
            logits: at the rows' last position; left as they are.
            ids: all tokens so far.
            mask: True for a row's own tokens; None where nothing is padded.

        Raises:
            GenerationError: a processor returned no scores, or a row has no token that could be drawn.
        """
        self._mask = mask
        if not self._processors and not self._do_sample:
            return logits.argmax(-1)
        # A copy: processors may write into what they get, and somebody may keep the logits.
        scores = logits.to(device=ids.device, dtype=torch.float32, copy=True)
        if self._processors:
            own, shown = (ids, ids) if mask is None else (_own_only(ids, mask), ids.masked_fill(~mask, self._pad))
            for processor, is_parameter in self._processors:
                scores = _scores(processor, processor(own if is_parameter else shown, scores), scores)
            self._scores = scores
        return self._draw(scores.softmax(-1)) if self._do_sample else scores.argmax(-1)

    def _draw(self, probabilities: Tensor) -> Tensor:
        try:
            return torch.multinomial(probabilities, 1, generator=self._generator).squeeze(1)
        except RuntimeError as error:
            bad = (~probabilities.isfinite().all(-1)).nonzero().flatten().tolist()
            if not bad:
                raise
            raise GenerationError(
                f"no token can be drawn for row {bad[0]}",
                got="nan or inf among its scores, or -inf for every token",
                expected="finite scores, or -inf for tokens that must not be drawn",
                fix="look at what hooks and logits processors do to the logits",
            ) from error

    def ends(
        self,
        ids: Int[Tensor, "batch seq"],
        tokens: Int[Tensor, " batch"],
        logits: Float[Tensor, "batch d_vocab"] | None,
    ) -> Bool[Tensor, " batch"] | None:
        """Which rows the newest tokens end; None where nothing can end a row.

        A criterion of the caller's gets the ids, and a tuple with the newest step's scores in float32 alone: those of
        every step, which Hugging Face keeps on request, would fill the memory. It returns bools [batch], or one for
        all rows.

        Args:
            ids: all tokens so far, the newest included.
            tokens: the newest.
            logits: by which they were chosen.

        Raises:
            GenerationError: a criterion returned something else.
        """
        done: Tensor | None = None
        if self._eos is not None:
            done = torch.isin(tokens, self._eos) if isinstance(self._eos, Tensor) else tokens == self._eos
        if self._criteria:
            newest = logits if self._scores is None else self._scores
            # Again a copy, for the same reason.
            scores = None if newest is None else (newest.to(dtype=torch.float32, copy=True),)
            for criterion, is_parameter in self._criteria:
                shown = self._padded(ids, NO_ID if is_parameter else self._pad)
                found = _one_a_row(criterion, criterion(shown, scores), tokens)
                done = found if done is None else done | found
        return done

    def _padded(self, ids: Tensor, pad: int) -> Tensor:
        """The ids with `pad` where a row had no token of its own when the newest was chosen."""
        if self._mask is None:
            return ids
        ids = ids.clone()
        ids[:, : self._mask.shape[1]].masked_fill_(~self._mask, pad)
        return ids


def _own_only(ids: Tensor, mask: Tensor) -> Tensor:
    """Padding replaced by the row's first own token, which counts anyway."""
    return torch.where(mask, ids, ids.gather(1, mask.int().argmax(1, keepdim=True)))


def _scores(processor: Any, result: Any, before: Tensor) -> Tensor:
    """What a logits processor returned, if it can be scores."""
    if isinstance(result, Tensor) and result.shape == before.shape:
        return result
    raise GenerationError(
        f"the logits processor {_name(processor)} returned no scores",
        got=_kind(result),
        expected=f"a tensor [batch d_vocab], here {tuple(before.shape)}",
        fix="return the scores from it, also where it changes them in place",
    )


def _one_a_row(criterion: Any, result: Any, tokens: Tensor) -> Tensor:
    """A criterion's answer as bools [batch]."""
    if isinstance(result, bool | np.bool_ | Tensor):
        done = torch.as_tensor(result, device=tokens.device).bool()
        if done.numel() in (1, len(tokens)):
            return done.flatten().expand(len(tokens)).clone()  # the caller's criterion may keep what it returned
    raise GenerationError(
        f"the stopping criterion {_name(criterion)} did not say which rows end",
        got=_kind(result),
        expected=f"True or False, or a tensor of bools [batch], here ({len(tokens)},)",
        fix="return one bool a row",
    )


def _name(called: Any) -> str:
    return called.__name__ if isinstance(called, FunctionType) else type(called).__name__


def _kind(result: Any) -> str:
    return f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
