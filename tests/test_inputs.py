"""Every kind of input that the verbs take, and what is refused with which words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BatchEncoding

import lenskit as lk
from lenskit.errors import InputError

LONG, SHORT = [5, 6, 7, 8], [9, 3]
TWO_ROWS = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 3]])
TWO_MASK = torch.tensor([[True, True, True, True], [False, False, True, True]])
PROMPTS = ["The Eiffel Tower is in the city of", "Hello"]


@pytest.fixture
def encode(demo_gpt2: lk.HookedTransformer) -> Callable[..., BatchEncoding]:
    return demo_gpt2.tokenizer


# -- ids


@pytest.mark.parametrize(
    "one_row",
    [
        LONG,
        tuple(LONG),
        [LONG],
        torch.tensor(LONG),
        torch.tensor([LONG]),
        torch.tensor(LONG, dtype=torch.int32),
        [torch.tensor(LONG)],
        {"input_ids": LONG},
        {"input_ids": [LONG], "attention_mask": [[1, 1, 1, 1]]},
        {"input_ids": torch.tensor([LONG])},
        {"input_ids": torch.tensor(LONG), "attention_mask": torch.ones(4, dtype=torch.long)},
        BatchEncoding({"input_ids": [LONG], "attention_mask": [[1] * 4], "token_type_ids": [[0] * 4]}),
        {"input_ids": [[0, 0, *LONG]], "attention_mask": [[0, 0, 1, 1, 1, 1]]},
    ],
)
def test_one_row_of_ids(shared: lk.HookedTransformer, one_row: Any) -> None:
    batch = shared.to_tokens(one_row)
    assert batch.tokens.tolist() == [LONG]
    assert batch.mask is None
    with torch.no_grad():
        assert torch.equal(shared(one_row), shared(torch.tensor([LONG])))


@pytest.mark.parametrize(
    "two_rows",
    [
        [LONG, SHORT],
        (LONG, tuple(SHORT)),
        [torch.tensor(LONG), torch.tensor(SHORT)],
        [LONG, torch.tensor(SHORT, dtype=torch.int32)],
        {"input_ids": [LONG, SHORT]},
        {"input_ids": [LONG, SHORT], "attention_mask": [[1] * 4, [1] * 2]},
        {"input_ids": [LONG, [0, 0, *SHORT]], "attention_mask": [[1] * 4, [0, 0, 1, 1]]},
        {"input_ids": [LONG, [*SHORT, 0, 0]], "attention_mask": [[1] * 4, [1, 1, 0, 0]]},
        {"input_ids": TWO_ROWS.tolist(), "attention_mask": TWO_MASK.tolist()},
        {"input_ids": TWO_ROWS, "attention_mask": TWO_MASK.long()},
        {"input_ids": TWO_ROWS, "attention_mask": TWO_MASK.tolist()},
    ],
)
def test_rows_of_unequal_length_are_padded_on_the_left(shared: lk.HookedTransformer, two_rows: Any) -> None:
    batch = shared.to_tokens(two_rows)
    assert torch.equal(batch.mask, TWO_MASK)
    assert torch.equal(batch.tokens[TWO_MASK], TWO_ROWS[TWO_MASK])
    with torch.no_grad():
        assert torch.equal(shared(two_rows)[TWO_MASK], shared(TWO_ROWS, TWO_MASK)[TWO_MASK])


def test_a_right_padded_tensor_stays_where_it_is(shared: lk.HookedTransformer) -> None:
    tokens, mask = torch.tensor([LONG, [*SHORT, 0, 0]]), torch.tensor([[1] * 4, [1, 1, 0, 0]])
    for batch in (
        shared.to_tokens({"input_ids": tokens, "attention_mask": mask}),
        shared.run_with_hooks(tokens, mask=mask),
    ):
        assert torch.equal(batch.tokens, tokens)
        assert torch.equal(batch.mask, mask.bool())


@given(rows=st.lists(st.lists(st.integers(0, 58), min_size=1, max_size=6), min_size=1, max_size=4))
def test_ids_are_used_as_given(shared: lk.HookedTransformer, rows: list[list[int]]) -> None:
    batch = shared.to_tokens(rows)
    mask = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.mask is None else batch.mask
    assert [tokens[own].tolist() for tokens, own in zip(batch.tokens, mask, strict=True)] == rows
    assert (batch.mask is None) == (len({len(row) for row in rows}) == 1)
    again = shared.to_tokens({"input_ids": batch.tokens, "attention_mask": mask})
    assert torch.equal(again.tokens, batch.tokens)


def test_ids_are_never_decoded_and_encoded_again(demo_gpt2: lk.HookedTransformer) -> None:
    pieces = [demo_gpt2.to_tokens(letter).tokens[0] for letter in "city"]
    spelled = torch.cat(pieces)
    assert demo_gpt2.to_string(spelled) == "city"
    assert len(spelled) > demo_gpt2.to_tokens("city").tokens.shape[1]
    assert demo_gpt2.to_tokens(spelled).tokens.tolist() == [spelled.tolist()]


def test_a_mask_of_ones_is_no_mask(shared: lk.HookedTransformer) -> None:
    for mask in (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)):
        assert shared.run_with_hooks(TWO_ROWS, mask=mask).mask is None


def test_a_mask_of_any_dtype(shared: lk.HookedTransformer) -> None:
    for dtype in (torch.bool, torch.long, torch.float32, torch.uint8):
        assert torch.equal(shared.run_with_hooks(TWO_ROWS, mask=TWO_MASK.to(dtype)).mask, TWO_MASK)
    one = torch.tensor([0, 1, 1, 1])
    assert shared.run_with_hooks(torch.tensor(LONG), mask=one).mask.tolist() == [[False, True, True, True]]


# -- text


def test_a_string_is_one_prompt(demo_gpt2: lk.HookedTransformer, encode: Callable[..., BatchEncoding]) -> None:
    assert demo_gpt2.to_tokens(PROMPTS[0]).tokens.tolist() == [encode(PROMPTS[0])["input_ids"]]
    assert demo_gpt2.to_tokens([PROMPTS[0]]).tokens.tolist() == [encode(PROMPTS[0])["input_ids"]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": True, "padding_side": "right"},
        {"padding": True, "return_tensors": "pt"},
        {"padding": True, "return_tensors": "pt", "padding_side": "right"},
    ],
)
@torch.no_grad()
def test_a_tokenizers_encoding_is_the_text_it_encodes(
    demo_gpt2: lk.HookedTransformer, encode: Callable[..., BatchEncoding], options: dict[str, Any]
) -> None:
    encoding = encode(PROMPTS, **options)
    given, text = demo_gpt2.to_tokens(encoding), demo_gpt2.to_tokens(PROMPTS)
    assert torch.equal(given.tokens[given.mask], text.tokens[text.mask])
    assert given.mask.sum(1).tolist() == text.mask.sum(1).tolist() == [len(encode(p)["input_ids"]) for p in PROMPTS]
    difference = demo_gpt2(encoding)[given.mask] - demo_gpt2(PROMPTS)[text.mask]
    assert float(difference.abs().max()) < 1e-4


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_a_chat_templates_encoding(
    demo_gpt2: lk.HookedTransformer, encode: Callable[..., BatchEncoding], tensors: str | None
) -> None:
    chat = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
    options = {"add_generation_prompt": True, "return_tensors": tensors}
    ids = encode.apply_chat_template(chat, **options, return_dict=False)
    encoding = encode.apply_chat_template(chat, **options, return_dict=True)
    for chat in (ids, encoding):
        batch = demo_gpt2.to_tokens(chat)
        assert batch.mask is None
        assert batch.tokens.flatten().tolist() == (ids if tensors is None else ids[0].tolist())
    assert demo_gpt2.to_string(batch.tokens[0]).endswith("<|assistant|>")


def test_special_tokens_are_those_that_the_tokenizer_adds(demo_gpt2: lk.HookedTransformer) -> None:
    eos = demo_gpt2.tokenizer.eos_token
    assert demo_gpt2.to_tokens(f"{eos}a").tokens[0, 0] == demo_gpt2.tokenizer.eos_token_id


# -- refused

WHAT = "the model cannot take this input"
ADVICE = "give text, a list of texts, ids (1-d or 2-d tensor, lists), or a tokenizer's encoding"


@pytest.mark.parametrize(
    ("given", "got", "expected"),
    [
        ([], "an empty list", "at least one prompt"),
        ((), "an empty list", "at least one prompt"),
        ([[]], "prompt 0 is empty: []", "at least one token a prompt"),
        ([[1], []], "prompt 1 is empty: []", "at least one token a prompt"),
        (torch.tensor([], dtype=torch.long), "ids of shape (1, 0)", "a shape [batch pos] with at least one token"),
        (torch.zeros(0, 3, dtype=torch.long), "ids of shape (0, 3)", "a shape [batch pos] with at least one token"),
        (torch.tensor(3), "ids of shape ()", "a shape [batch pos] with at least one token"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "ids of shape (1, 1, 1)", "a shape [batch pos]"),
        (torch.tensor([1.0, 2.0]), "a torch.float32 tensor", "token ids: int64 or int32"),
        (torch.tensor([True]), "a torch.bool tensor", "token ids: int64 or int32"),
        ([1.0, 2.0], "1.0", "token ids (integers), or text in every prompt"),
        ([1, 2.5], "[1, 2.5]", "token ids (integers), or text in every prompt"),
        ([True, False], "[True, False]", "token ids (integers), or text in every prompt"),
        ([[1, 2], "text"], "'text'", "token ids (integers), or text in every prompt"),
        (["text", [1, 2]], "'text'", "token ids (integers), or text in every prompt"),
        (["text", 3], "'text'", "token ids (integers), or text in every prompt"),
        ([[[1]]], "[[1]]", "token ids (integers), or text in every prompt"),
        ([torch.tensor([1.5])], "tensor([1.5000])", "token ids (integers), or text in every prompt"),
        ([1, 59], "the id 59", "ids from 0 to 58, the model's vocabulary"),
        ([-1, 5], "the id -1", "ids from 0 to 58, the model's vocabulary"),
        (torch.tensor([[3, -100]]), "the id -100", "ids from 0 to 58, the model's vocabulary"),
        ({"ids": [1]}, "a mapping with ids", "a tokenizer's encoding with input_ids"),
        ({}, "a mapping with no keys", "a tokenizer's encoding with input_ids"),
        ({"input_ids": []}, "an empty list", "at least one prompt"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "prompt 0 is empty: []", "at least one token a prompt"),
        (
            {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 3)},
            "a mask (1, 3) for ids (1, 2)",
            "one mask entry an id",
        ),
        (
            {"input_ids": torch.tensor([[1, 2], [3, 4]]), "attention_mask": torch.tensor([[1, 0], [0, 0]])},
            "a mask without any token in row 1",
            "a token in every row",
        ),
    ],
)
def test_what_the_model_cannot_take(shared: lk.HookedTransformer, given: Any, got: str, expected: str) -> None:
    for verb in (shared, shared.to_tokens, shared.run_with_hooks, shared.run_with_cache, shared.shapes):
        with pytest.raises(InputError) as refused:
            verb(given)
        what, came, wanted, to_do = str(refused.value).splitlines()
        assert what == WHAT
        assert came == f"  got:      {got}"
        assert wanted.startswith(f"  expected: {expected}")
        assert to_do == f"  to do:    {ADVICE}"


@pytest.mark.parametrize(
    "given",
    [
        None,
        5,
        object(),
        {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]},
        {"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1]]},
        {"input_ids": [[1, 2], [3, 4]], "attention_mask": [1, 1]},
        {"input_ids": None},
        [None],
        [[1, None]],
    ],
)
def test_whatever_else_is_given_is_an_input_error(shared: lk.HookedTransformer, given: Any) -> None:
    with pytest.raises(InputError, match=WHAT):
        shared(given)


def test_arrays_are_ids_too(shared: lk.HookedTransformer) -> None:
    for array in (np.array(LONG), np.array([LONG])):
        assert shared.to_tokens(array).tokens.tolist() == [LONG]


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(2, 3), "a mask (2, 3) for ids (2, 4)"),
        (torch.ones(4), "a mask (1, 4) for ids (2, 4)"),
        (torch.ones(1, 2, 4), "a mask (1, 2, 4) for ids (2, 4)"),
        (torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]), "a mask without any token in row 0"),
    ],
)
def test_masks_that_do_not_fit(shared: lk.HookedTransformer, mask: Tensor, got: str) -> None:
    for verb in (shared, shared.run_with_hooks, shared.run_with_cache, shared.shapes):
        with pytest.raises(InputError, match=WHAT) as refused:
            verb(TWO_ROWS, mask=mask)
        assert refused.value.got == got
    stream = torch.zeros(2, 4, shared.cfg.d_model)
    with pytest.raises(InputError, match=WHAT) as refused:
        shared(stream, mask, start_at_layer=0)
    assert refused.value.got == got


def test_an_empty_text(demo_gpt2: lk.HookedTransformer) -> None:
    for text, index in (("", 0), (["a", ""], 1)):
        with pytest.raises(InputError, match=WHAT) as refused:
            demo_gpt2(text)
        assert refused.value.got == f"prompt {index} is empty: ''"


def test_too_long_for_learned_positions(tiny: Callable[..., lk.HookedTransformer]) -> None:
    model = tiny("gpt2", n_positions=8)
    assert model([[1] * 8]).shape == (1, 8, 59)
    with pytest.raises(InputError) as refused:
        model([[1] * 9])
    assert str(refused.value).splitlines() == [
        "the sequence is longer than the model's context",
        "  got:      9 tokens",
        "  expected: at most 8 (cfg.n_ctx): this model learned one vector a position",
        "  to do:    shorten the prompt, or ask for fewer new tokens",
    ]
    with pytest.raises(InputError, match="longer than the model's context"):
        model.run_with_hooks([[1] * 9, [2]], [("hook_embed", lambda act, hook: None)])


def test_padding_does_not_count_against_the_context(tiny: Callable[..., lk.HookedTransformer]) -> None:
    model, tokens = tiny("gpt2", n_positions=8), torch.ones(2, 12, dtype=torch.long)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 4:], mask[1, 9:] = True, True
    with torch.no_grad():
        together, alone = model(tokens, mask), model(tokens[0, 4:])
    assert float((together[0, 4:] - alone[0]).abs().max()) < 1e-5


def test_rotary_positions_have_no_end(tiny: Callable[..., lk.HookedTransformer]) -> None:
    model = tiny("llama", max_position_embeddings=8)
    assert model([[1] * 9]).shape == (1, 9, 59)
