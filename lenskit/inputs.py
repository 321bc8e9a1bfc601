"""Inputs: what users give (text, ids, a tokenizer's encoding) becomes a left-padded batch of ids."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lenskit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A string, a list of strings, a 1-d or 2-d tensor, array or (nested) list of ids, a list of 1-d tensors, a tokenizer's
# encoding (`input_ids`, `attention_mask`, `token_type_ids`), or a `Batch`.
Input = str | Tensor | np.ndarray[Any, Any] | Sequence[Any] | Mapping[str, Any]


_ONE_EACH = "one mask entry an id"


class Batch(NamedTuple):
    """Ids, which of them are a row's own tokens (None: all of them), and their types (None: all are 0)."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None = None
    token_types: Int[Tensor, "batch pos"] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """With the same change to each of the three that is there."""
        tokens, mask, types = self
        return Batch(change(tokens), None if mask is None else change(mask), None if types is None else change(types))


def to_batch(
    given: Input,
    *,
    d_vocab: int,
    tokenizer: "PreTrainedTokenizerBase | None",
    device: torch.device,
    special_tokens: bool = True,
    n_token_types: int = 0,
) -> Batch:
    """A batch from anything a user may give. Ids are used as given; rows of unequal length are padded on the left.

    Args:
        d_vocab: ids must be below it.
        tokenizer: for text.
        device: where the batch goes.
        special_tokens: whether the tokenizer adds those that it is configured to add.
        n_token_types: token types must be below it, unless all are 0.

    Raises:
        InputError: nothing to process, text without a tokenizer, or ids or types that are none of this model.
    """
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, Batch):
        batch = given
    elif isinstance(given, torch.Tensor):
        batch = Batch(_as_rows(given))
    elif isinstance(given, Mapping):
        batch = _from_encoding(given)
    else:
        batch = _pad(_rows(given, tokenizer, special_tokens))
    if torch.compiler.is_compiling():
        return batch
    _check_ids(batch.tokens, d_vocab)
    if batch.token_types is not None:
        batch = batch._replace(token_types=_checked_types(batch.token_types, batch.tokens, n_token_types))
    return batch.each(lambda part: part.to(device))


def _rows(
    given: str | Sequence[Any], tokenizer: "PreTrainedTokenizerBase | None", special_tokens: bool = True
) -> list[list[int]]:
    """Each prompt's ids."""
    if not isinstance(given, Sequence):
        raise _refused(f"a {type(given).__name__}", "text, token ids, or a list of either")
    prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts:
        raise _refused("an empty list", "at least one prompt")
    if all(isinstance(prompt, str) for prompt in prompts):
        if tokenizer is None:
            raise InputError(
                "text was given, but the model has no tokenizer",
                got=f"the text {prompts[0]!r}",
                expected="token ids",
                fix="pass ids, or set model.tokenizer to a Hugging Face tokenizer",
            )
        rows: list[list[int]] = tokenizer(prompts, add_special_tokens=special_tokens)["input_ids"]
    else:
        rows = [_ids(prompt) for prompt in prompts]
    for index, row in enumerate(rows):
        if not row:
            raise _refused(f"prompt {index} is empty: {prompts[index]!r}", "at least one token a prompt")
    return rows


def _ids(prompt: Any) -> list[int]:
    ids = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(type(i) is int for i in ids):
        raise _refused(repr(prompt), "token ids (integers), or text in every prompt")
    return list(ids)


def _pad(rows: list[list[int]]) -> Batch:
    longest = max(len(row) for row in rows)
    if all(len(row) == longest for row in rows):
        return Batch(torch.tensor(rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)  # which id pads does not matter: nothing reads it
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = True
    return Batch(tokens, mask)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches as one, padded on the left as far as the longest needs."""
    if len(batches) == 1 and batches[0].mask is None:
        return batches[0]
    joint = _pad([row for batch in batches for row in _own(batch.tokens, batch.mask)])
    if any(batch.token_types is not None for batch in batches):
        types = [torch.zeros_like(b.tokens) if b.token_types is None else b.token_types for b in batches]
        rows = [row for batch, some in zip(batches, types, strict=True) for row in _own(some, batch.mask)]
        joint = joint._replace(token_types=_pad(rows).tokens)
    return joint.each(lambda part: part.to(batches[0].tokens.device))


def _own(values: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Each row's, without those of padding."""
    rows: list[list[int]] = [(row if mask is None else row[mask[i]]).tolist() for i, row in enumerate(values)]
    return rows


def _from_encoding(encoding: Mapping[str, Any]) -> Batch:
    """A tokenizer's output, as lists (padded or not) or tensors; its padding may be on either side."""
    if "input_ids" not in encoding:
        raise _refused(f"a mapping with {', '.join(encoding) or 'no keys'}", "a tokenizer's encoding with input_ids")
    ids, mask, types = encoding["input_ids"], encoding.get("attention_mask"), encoding.get("token_type_ids")
    if isinstance(ids, torch.Tensor):
        tokens = _as_rows(ids)
        batch = Batch(tokens) if mask is None else with_mask(tokens, torch.as_tensor(mask))
        return batch if types is None else batch._replace(token_types=_as_rows(torch.as_tensor(types)))
    rows = _rows(ids, None)
    types = None if types is None else _alike(_rows(types, None), rows, "token types", "one token type an id")
    if mask is not None:
        kept = _alike(_rows(_as_numbers(mask), None), rows, "a mask", _ONE_EACH)
        rows = _rows(_kept(rows, kept), None)
        types = None if types is None else _kept(types, kept)
    batch = _pad(rows)
    return batch if types is None else batch._replace(token_types=_pad(types).tokens)


def _as_rows(values: Tensor) -> Tensor:
    """One prompt's as a batch of one."""
    return values.unsqueeze(0) if values.dim() == 1 else values


def _alike(given: list[list[int]], rows: list[list[int]], what: str, expected: str) -> list[list[int]]:
    """What came with the ids, row by row: as many as there are."""
    if [len(row) for row in given] != [len(row) for row in rows]:
        raise _refused(f"{what} of {[len(row) for row in given]} for ids of {[len(row) for row in rows]}", expected)
    return given


def _kept(rows: list[list[int]], kept: list[list[int]]) -> list[list[int]]:
    return [[i for i, m in zip(row, keep, strict=True) if m] for row, keep in zip(rows, kept, strict=True)]


def _as_numbers(mask: Any) -> list[Any]:
    """A mask as (nested) lists of 0 and 1, whatever its entries are."""
    mask = mask.tolist() if isinstance(mask, torch.Tensor) else mask
    return [[int(bool(m)) for m in row] if isinstance(row, Sequence) else int(bool(row)) for row in mask]


def stream_batch(stream: Any, mask: Tensor | None, *, d_model: int) -> Batch:
    """A residual stream [batch pos d_model] in the place of ids.

    Raises:
        InputError: it is none of this model, or the mask does not fit.
    """
    if not (isinstance(stream, torch.Tensor) and stream.dim() == 3 and stream.shape[2] == d_model):
        raise InputError(
            "start_at_layer takes the residual stream",
            got=f"a tensor {tuple(stream.shape)}" if isinstance(stream, torch.Tensor) else repr(stream),
            expected=f"a tensor [batch pos {d_model}], as cache['resid_pre', layer] is",
            fix="pass the stream that enters that layer, or leave start_at_layer out",
        )
    return Batch(stream, None if mask is None else with_mask(stream[..., 0], mask.to(stream.device)).mask)


def with_mask(tokens: Tensor, mask: Tensor) -> Batch:
    """Ids with an attention mask of the same shape: nonzero for a row's own tokens.

    Raises:
        InputError: the shapes differ, or a row has no token of its own.
    """
    mask = _as_rows(mask).bool()
    if mask.shape != tokens.shape:
        raise _refused(f"a mask {tuple(mask.shape)} for ids {tuple(tokens.shape)}", _ONE_EACH)
    if torch.compiler.is_compiling():
        return Batch(tokens, mask)
    if not mask.any(1).all():
        raise _refused(f"a mask without any token in row {int((~mask.any(1)).nonzero()[0])}", "a token in every row")
    return Batch(tokens, None if mask.all() else mask)


def _check_ids(tokens: Tensor, d_vocab: int) -> None:
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise _refused(f"ids of shape {tuple(tokens.shape)}", "a shape [batch pos] with at least one token")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise _refused(f"a {tokens.dtype} tensor", "token ids: int64 or int32 (with start_at_layer: the stream)")
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= d_vocab:
        raise _refused(f"the id {low if low < 0 else high}", f"ids from 0 to {d_vocab - 1}, the model's vocabulary")


def _checked_types(types: Tensor, tokens: Tensor, n_types: int) -> Tensor | None:
    """None where all are 0, which needs no model that knows of types: many a tokenizer writes them unasked."""
    if types.shape != tokens.shape:
        raise _refused(f"token types {tuple(types.shape)} for ids {tuple(tokens.shape)}", "one token type an id")
    if not types.any():
        return None
    low, high = (int(bound) for bound in types.aminmax())
    if types.is_floating_point() or low < 0 or high >= n_types:
        got = f"the token type {low if low < 0 else high}" if not types.is_floating_point() else f"{types.dtype} types"
        raise _refused(got, f"types from 0 to {n_types - 1}" if n_types else "0 only: this model knows of no types")
    return types.long()


def _refused(got: str, expected: str) -> InputError:
    return InputError(
        "the model cannot take this input",
        got=got,
        expected=expected,
        fix="give text, a list of texts, ids (1-d or 2-d tensor, lists), or a tokenizer's encoding",
    )
