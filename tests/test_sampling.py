"""How tokens are chosen and rows end, held against Hugging Face's own `generate`.

The loop below is as plain as can be: Hugging Face's model computes the whole sequence anew at every step, and only
what is chosen from its logits, and when a row ends, is lenskit's.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from folders import in_a_process, write_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_table import DECODERS, Row, hf_folder, hf_model, ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import lenskit as lk
from lenskit import sampling as module
from lenskit.checkpoints import companions
from lenskit.checkpoints import write as writing
from lenskit.checkpoints.source import EMBEDDED, find
from lenskit.choosing import Chooser
from lenskit.errors import CorruptCheckpointError, GenerationError
from lenskit.sampling import Sampling, default_eos, refuse_unknown, sampling_from

D_VOCAB, PAD, CPU = 59, 7, torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    """A tiny random model of each family, Hugging Face's."""
    return {name: hf_model(hf_folder(Row("", name), tmp_path_factory.mktemp(name))) for name in DECODERS}


@pytest.fixture(scope="module")
def demo() -> tuple[PreTrainedModel, Any]:
    """The embedded GPT-2 as Hugging Face's, and its tokenizer."""
    return hf_model(EMBEDDED / "demo-gpt2"), AutoTokenizer.from_pretrained(EMBEDDED / "demo-gpt2")


def chooser(*, tokenizer: Any = None, pad: int = PAD, d_vocab: int = D_VOCAB, **options: Any) -> Chooser:
    sampling = Sampling(**options)
    sampling.check(d_vocab)
    return sampling.chooser(tokenizer=tokenizer, device=CPU, pad=pad)


def ours(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None, *, steps: int, tokenizer: Any = None, pad: int = PAD,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The plain loop."""
    choose = chooser(tokenizer=tokenizer, pad=pad, d_vocab=model.config.vocab_size, **options)
    done = torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(steps):
        attention = torch.ones_like(tokens) if mask is None else mask.long()
        with torch.no_grad():
            logits = model(
                tokens, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0)
            ).logits[:, -1]
        chosen = choose.next_tokens(logits, tokens, mask)
        if "eos_token_id" in options:  # as Hugging Face does: without any, a finished row goes on till all are
            chosen = torch.where(done, pad, chosen)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        ends = choose.ends(tokens, chosen, logits)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        done = done if ends is None else done | ends
        if done.all():
            break
    return tokens


def theirs(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None, *, steps: int, **options: Any) -> Tensor:
    """Hugging Face's `generate`. Its top_k of 50, where none is given, is nothing that the caller asked for."""
    attention = torch.ones_like(tokens) if mask is None else mask.long()
    return model.generate(
        tokens, attention_mask=attention, max_new_tokens=steps, use_cache=False, pad_token_id=PAD,
        **{"top_k": 0, **options},
    )  # fmt: skip


def left_padded(rows: int, length: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Ids, whose padding is no particular id, and which of them are a row's own; the last row has no padding."""
    tokens = ids(rows, length, seed=seed)
    return tokens, torch.arange(length) >= length - torch.linspace(1, length, rows).int()[:, None]


class Forbids:
    """A processor that writes into what it gets."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter_(1, input_ids[:, -2:], -torch.inf)


def doubled(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A processor that is a plain function."""
    return scores * 2 + input_ids[:, :1]


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


# Made anew for each side, since processors may keep what they saw.
PROCESSORS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "no bigram twice": lambda: [NoRepeatNGramLogitsProcessor(2)],
    "hugging face's list": lambda: LogitsProcessorList([NoRepeatNGramLogitsProcessor(3), Forbids()]),
    "a function": lambda: [doubled],
    "one twice": lambda: [doubled, doubled],
    "a penalty of its own": lambda: [Forbids(), transformers.RepetitionPenaltyLogitsProcessor(3.0), doubled],
    "warpers": lambda: [transformers.TopKLogitsWarper(9), transformers.TemperatureLogitsWarper(0.5)],
}
DRAWN = st.fixed_dictionaries(
    {"do_sample": st.just(True)},
    optional={
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.5]),
        "top_k": st.integers(1, 70),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    },
)
OPTIONS = st.fixed_dictionaries(
    {}, optional={"eos_token_id": st.integers(0, 58) | st.lists(st.integers(0, 58), min_size=1, max_size=20)}
)
PENALTY = st.fixed_dictionaries({}, optional={"repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 20.0])})


# -- the same tokens as Hugging Face


@given(
    name=st.sampled_from(DECODERS),
    rows=st.integers(1, 3),
    length=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    sampled=st.just({}) | DRAWN,
    others=OPTIONS,
    penalty=PENALTY,
    processors=st.sampled_from(list(PROCESSORS)),
)
def test_the_same_tokens_as_hugging_face(
    models: dict[str, PreTrainedModel], name: str, rows: int, length: int, seed: int,
    sampled: dict[str, Any], others: dict[str, Any], penalty: dict[str, Any], processors: str,
) -> None:  # fmt: skip
    model, tokens = models[name], ids(rows, length, seed=seed)
    options = {**sampled, **others, **penalty}
    torch.manual_seed(seed)
    expected = theirs(model, tokens, None, steps=12, logits_processor=PROCESSORS[processors](), **options)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    got = ours(model, tokens, None, steps=12, seed=seed, logits_processor=PROCESSORS[processors](), **options)
    assert got.tolist() == expected.tolist()
    assert torch.equal(torch.get_rng_state(), before), "the seed is the generation's own"


@given(
    rows=st.integers(2, 4),
    length=st.integers(3, 8),
    seed=st.integers(0, 2**32),
    sampled=st.just({}) | DRAWN,
    others=OPTIONS,
    processors=st.sampled_from(["none", "no bigram twice", "hugging face's list", "a function", "warpers"]),
)
def test_the_same_tokens_as_hugging_face_left_padded(
    models: dict[str, PreTrainedModel], rows: int, length: int, seed: int,
    sampled: dict[str, Any], others: dict[str, Any], processors: str,
) -> None:  # fmt: skip
    """A caller's processors see padding as Hugging Face shows it, whatever it was."""
    tokens, mask = left_padded(rows, length, seed=seed)
    torch.manual_seed(seed)
    expected = theirs(
        models["llama"], tokens.masked_fill(~mask, PAD), mask, steps=9,
        logits_processor=PROCESSORS[processors](), **sampled, **others,
    )  # fmt: skip
    got = ours(
        models["llama"],
        tokens,
        mask,
        steps=9,
        seed=seed,
        logits_processor=PROCESSORS[processors](),
        **sampled,
        **others,
    )
    assert got[:, length:].tolist() == expected[:, length:].tolist()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("penalty", [0.5, 1.7, 100.0])
def test_a_padded_row_is_penalised_as_it_is_alone(
    models: dict[str, PreTrainedModel], name: str, penalty: float
) -> None:
    """Also where the id that pads is one that the model likes."""
    model, (tokens, mask) = models[name], left_padded(4, 7, seed=3)
    alone = [
        theirs(model, tokens[row : row + 1, mask[row]], None, steps=8, repetition_penalty=penalty)[0, -8:].tolist()
        for row in range(4)
    ]
    for pad in {token for row in alone for token in row}:
        shown = tokens.masked_fill(~mask, pad)
        padded = ours(model, shown, mask, steps=8, pad=pad, repetition_penalty=penalty)
        assert padded[:, 7:].tolist() == alone


@given(
    seed=st.integers(0, 2**32),
    sampled=DRAWN,
    penalty=PENALTY,
    processors=st.sampled_from(list(PROCESSORS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=200)
def test_the_same_scores_as_hugging_face(
    models: dict[str, PreTrainedModel], seed: int, sampled: dict[str, Any], penalty: dict[str, Any], processors: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Bit for bit, and so in the same order, for logits of any dtype."""
    logits = 4 * torch.randn(3, D_VOCAB, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tokens, options, seen = ids(3, 8, seed=seed), {**sampled, **penalty}, []
    reference = models["gpt2"]._get_logits_processor(
        GenerationConfig(**options), input_ids_seq_length=8, logits_processor=PROCESSORS[processors]()
    )
    choose = chooser(
        **options,
        seed=seed,
        logits_processor=PROCESSORS[processors](),
        stopping_criteria=lambda *given: seen.append(given[1][0]) or False,
    )
    choose.ends(tokens, choose.next_tokens(logits, tokens, None), logits)
    assert torch.equal(seen[0], reference(tokens, logits.to(torch.float32, copy=True)))


def test_the_callers_processors_see_padding_as_the_id_that_pads() -> None:
    seen: list[Tensor] = []

    def processor(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids.clone())
        input_ids.fill_(0)  # no harm: where rows are padded, the ids are a copy
        return scores

    tokens, mask = left_padded(3, 5, seed=0)
    kept = tokens.clone()
    chooser(repetition_penalty=2.0, logits_processor=processor).next_tokens(torch.randn(3, D_VOCAB), tokens, mask)
    assert torch.equal(seen[0], tokens.masked_fill(~mask, PAD))
    assert torch.equal(tokens, kept)


def test_without_a_seed_tokens_come_from_the_global_generator(models: dict[str, PreTrainedModel]) -> None:
    tokens = ids(2, 4)
    torch.manual_seed(11)
    expected = theirs(models["gpt2"], tokens, None, steps=10, do_sample=True)
    torch.manual_seed(11)
    assert ours(models["gpt2"], tokens, None, steps=10, do_sample=True).tolist() == expected.tolist()
    assert ours(models["gpt2"], tokens, None, steps=10, do_sample=True).tolist() != expected.tolist()


def test_two_seeded_generations_do_not_see_each_other() -> None:
    logits, tokens = torch.zeros(2, D_VOCAB), ids(2, 3)
    one, other = chooser(do_sample=True, seed=5), chooser(do_sample=True, seed=5)
    pairs = [(one.next_tokens(logits, tokens, None), other.next_tokens(logits, tokens, None)) for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len({tuple(a.tolist()) for a, _ in pairs}) > 1


# -- logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 0}, {"repetition_penalty": 2.0}])
def test_logits_stay_as_they_are(dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits = torch.randn(3, D_VOCAB).to(dtype)
    for processor in (None, Forbids()):
        kept = logits.clone()
        chosen = chooser(logits_processor=processor, **options).next_tokens(logits, ids(3, 4), None)
        assert torch.equal(logits, kept)
        assert chosen.dtype == torch.int64
        assert chosen.shape == (3,)


def test_the_likeliest_token_is_chosen() -> None:
    logits = torch.randn(5, D_VOCAB)
    assert chooser().next_tokens(logits, ids(5, 2), None).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_nothing_can_be_drawn_by(value: float) -> None:
    logits = torch.zeros(3, D_VOCAB)
    logits[1] = value
    with pytest.raises(GenerationError, match="no token can be drawn for row 1") as caught:
        chooser(do_sample=True).next_tokens(logits, ids(3, 2), None)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("result", "told"), [(None, "a NoneType"), (torch.zeros(2), r"a tensor \(2,\)"), (1.0, "a float")]
)
def test_a_processor_has_to_return_scores(result: Any, told: str) -> None:
    def forgetful(input_ids: Tensor, scores: Tensor) -> Any:
        return result

    with pytest.raises(GenerationError, match=rf"logits processor forgetful returned no scores\n  got:      {told}\n"):
        chooser(logits_processor=forgetful).next_tokens(torch.zeros(2, D_VOCAB), ids(2, 2), None)


# -- what ends a row


def test_nothing_ends_a_row_unless_it_is_said() -> None:
    for options in ({}, {"eos_token_id": []}, {"stop_strings": []}, {"stopping_criteria": []}):
        assert chooser(**options).ends(ids(2, 3), ids(2, 1)[:, 0], None) is None


@pytest.mark.parametrize(
    ("eos", "expected"), [(4, [0, 1, 0]), ([4], [0, 1, 0]), ((9, 4, 3), [1, 1, 0]), (range(9), [1, 1, 1])]
)
def test_ids_end_rows(eos: Any, expected: list[int]) -> None:
    tokens = torch.tensor([3, 4, 8])
    done = chooser(eos_token_id=eos).ends(torch.tensor([[4, 3], [3, 4], [4, 8]]), tokens, None)
    assert done.tolist() == list(map(bool, expected))


@pytest.mark.parametrize("strings", ["the", [" of", "."], ["zebra"], ["ing t", "s a"], ["\n", "e"]])
def test_stop_strings_end_rows_as_in_hugging_face(demo: tuple[PreTrainedModel, Any], strings: Any) -> None:
    model, tokenizer = demo
    for prompt in ("The Eiffel Tower is in the city of", "Once upon a time", "When John and Mary went"):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        options = {"steps": 25, "tokenizer": tokenizer, "stop_strings": strings, "eos_token_id": 0}
        got, expected = ours(model, tokens, None, **options), theirs(model, tokens, None, **options)
        assert got.tolist() == expected.tolist()
        assert got.shape[1] < tokens.shape[1] + 25 or strings == ["zebra"] or "ing" in strings[0]


def test_stop_strings_and_ids_in_a_batch(demo: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = demo
    tokens = torch.tensor(
        [tokenizer(t).input_ids[:4] for t in ("The Eiffel Tower is in the city", "Once upon a time, the")]
    )
    options = {"steps": 20, "tokenizer": tokenizer, "stop_strings": ["."], "eos_token_id": [0, 13, 262]}
    assert ours(model, tokens, None, **options).tolist() == theirs(model, tokens, None, **options).tolist()


def test_padding_is_part_of_no_stop_string(demo: tuple[PreTrainedModel, Any]) -> None:
    _, tokenizer = demo
    new, york = (tokenizer(text).input_ids[-1] for text in ("city of New", "city of New York"))
    choose = chooser(stop_strings=" New York", tokenizer=tokenizer, pad=new, d_vocab=len(tokenizer))
    tokens = torch.tensor([[new, new], [york, new]])
    choose.next_tokens(torch.zeros(2, 9), tokens, torch.tensor([[True, False], [False, True]]))
    ends = choose.ends(torch.cat([tokens, torch.tensor([[york], [york]])], 1), torch.tensor([york, york]), None)
    assert ends.tolist() == [False, True]


def test_criteria_get_what_hugging_face_gives_them() -> None:
    seen: list[Any] = []

    def criterion(input_ids: Tensor, scores: Any) -> bool:
        seen.append((input_ids.clone(), scores))
        scores[-1].fill_(0)  # no harm
        input_ids.fill_(0)
        return False

    logits, tokens = torch.randn(2, D_VOCAB).bfloat16(), torch.tensor([[1, 2], [3, 4]])
    kept, mask = logits.clone(), torch.tensor([[False, True], [True, True]])
    longer = torch.tensor([[1, 2, 5], [3, 4, 6]])
    choose = chooser(stopping_criteria=criterion)
    choose.next_tokens(logits, tokens, mask)
    assert choose.ends(longer, longer[:, -1], logits).tolist() == [False, False]
    assert seen[0][0].tolist() == [[PAD, 2, 5], [3, 4, 6]]
    assert [scores.dtype for scores in seen[0][1]] == [torch.float32]
    assert torch.equal(logits, kept)
    assert longer.tolist() == [[1, 2, 5], [3, 4, 6]], "nor here"


def test_criteria_see_the_scores_that_tokens_were_drawn_by() -> None:
    seen: list[Tensor] = []
    choose = chooser(
        do_sample=True, top_k=3, stopping_criteria=[lambda input_ids, scores: bool(seen.append(scores[0]))]
    )
    logits = torch.randn(2, D_VOCAB)
    chosen = choose.next_tokens(logits, ids(2, 3), None)
    choose.ends(ids(2, 4), chosen, logits)
    assert seen[0].isfinite().sum(1).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (True, [1, 1, 1]), (False, [0, 0, 0]), (np.bool_(True), [1, 1, 1]), (torch.tensor(True), [1, 1, 1]),
        (torch.tensor([True, False, True]), [1, 0, 1]), (torch.tensor([[True], [False], [False]]), [1, 0, 0]),
    ],
)  # fmt: skip
def test_criteria_answer_for_all_rows_or_for_each(result: Any, expected: list[int]) -> None:
    kept = result.clone() if isinstance(result, Tensor) else result
    for both in ([lambda input_ids, scores: result], [lambda *_: False, lambda *_: result]):
        done = chooser(stopping_criteria=both).ends(ids(3, 2), ids(3, 1)[:, 0], None)
        assert done.tolist() == list(map(bool, expected))
        done |= True
    assert np.all(np.asarray(result == kept)), "the criterion's own"


@pytest.mark.parametrize("result", [None, "yes", torch.tensor([True, False]), torch.ones(3, 3)])
def test_criteria_have_to_answer(result: Any) -> None:
    with pytest.raises(GenerationError, match="did not say which rows end"):
        chooser(stopping_criteria=lambda *_: result).ends(ids(3, 2), ids(3, 1)[:, 0], None)


CRITERIA: dict[str, tuple[dict[str, Any], Callable[[], list[Any]]]] = {
    "length": ({}, lambda: [transformers.MaxLengthCriteria(9)]),
    "the caller's ids": ({"eos_token_id": list(range(30))}, lambda: [transformers.EosTokenCriteria([40, 41])]),
    "time": ({"eos_token_id": 1}, lambda: [transformers.MaxTimeCriteria(0.0)]),
}


@pytest.mark.parametrize("case", CRITERIA)
def test_criteria_merge_as_in_hugging_face(models: dict[str, PreTrainedModel], case: str) -> None:
    options, criteria = CRITERIA[case]
    for seed in range(5):
        tokens = ids(2, 4, seed=seed)
        got = ours(models["gpt2"], tokens, None, steps=15, stopping_criteria=criteria(), **options)
        expected = theirs(models["gpt2"], tokens, None, steps=15, stopping_criteria=criteria(), **options)
        assert got.tolist() == expected.tolist()


def test_the_callers_stop_strings_take_the_parameters_place(demo: tuple[PreTrainedModel, Any]) -> None:
    _, tokenizer = demo
    own = transformers.StopStringCriteria(tokenizer, ["zebra"])
    dot = tokenizer("a.").input_ids[-1:]
    for criteria, expected in ((None, True), ([own], False)):
        choose = chooser(stop_strings=".", stopping_criteria=criteria, tokenizer=tokenizer)
        assert choose.ends(torch.tensor([dot]), torch.tensor(dot), None).tolist() == [expected]


# -- values that make no sense


REFUSED: list[tuple[dict[str, Any], str]] = [
    *[({"do_sample": value}, "True or False") for value in (1, "yes", None)],
    *[({"temperature": value, "do_sample": True}, "do_sample=False") for value in (0, 0.0, -1, True, torch.inf, "1")],
    *[({"top_p": value, "do_sample": True}, "above 0, at most 1") for value in (0, 1.5, torch.nan, True)],
    *[({"min_p": value, "do_sample": True}, "0 to 1") for value in (-0.1, 1.1, False, "0")],
    *[({"top_k": value, "do_sample": True}, "an integer of at least 1") for value in (0, -3, 2.0, True, "5")],
    *[({"repetition_penalty": value}, "above 0") for value in (0, -1.0, True, torch.nan)],
    *[({"eos_token_id": value}, "ids from 0 to 58") for value in (59, -1, True, 1.0, [3, 59], [None], "</s>", [[1]])],
    *[({"stop_strings": value}, "at least one character") for value in ("", ["a", ""], 3, [None], b"a")],
    *[({"seed": value}, "an integer of at least") for value in (1.0, True, 2**64, -(2**63) - 1, "0")],
    *[
        ({"logits_processor": value}, "objects, not classes")
        for value in ("a", NoRepeatNGramLogitsProcessor, [Forbids])
    ],
    *[({"stopping_criteria": value}, "objects, not classes") for value in ([None], transformers.MaxLengthCriteria)],
    ({"temperature": 0.5}, "pass do_sample=True"),
    ({"top_k": 5, "min_p": 0.1}, "top_k and min_p would be without effect"),
    ({"top_p": 1.0, "do_sample": False}, "got:      top_p=1.0 with do_sample=False"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=str)
def test_values_that_make_no_sense(options: dict[str, Any], told: str) -> None:
    with pytest.raises(GenerationError) as caught:
        Sampling(**options).check(D_VOCAB)
    message = str(caught.value)
    assert told in message
    assert min(options, key=lambda name: name == "do_sample") in message
    assert all(part in message for part in ("got:", "expected:", "to do:"))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2}, {"temperature": np.float32(0.5), "top_k": np.int64(3)}, {"top_p": 1}, {"min_p": 0},
        {"repetition_penalty": 2}, {"seed": -(2**63)}, {"seed": 2**64 - 1}, {"eos_token_id": np.int64(5)},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_any_kind_are_numbers(options: dict[str, Any]) -> None:
    chosen = chooser(do_sample=True, **options).next_tokens(torch.randn(2, D_VOCAB), ids(2, 3), None)
    assert chosen.shape == (2,)


def test_stop_strings_that_cannot_be_found(demo: tuple[PreTrainedModel, Any]) -> None:
    with pytest.raises(GenerationError, match="stop_strings need a tokenizer"):
        chooser(stop_strings="a")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"abcdef": 0, "b": 1}, unk_token="b")))
    with pytest.raises(GenerationError, match="texts that tokens can make") as caught:
        chooser(stop_strings="xyz", tokenizer=words)
    assert isinstance(caught.value.__cause__, ValueError)


# -- options of generate


def test_options_over_a_generation_config_over_the_checkpoints_eos() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=9, max_new_tokens=5, num_return_sequences=2)
    for given_config in (config, {name: v for name, v in vars(config).items() if v is not None}):
        found = sampling_from({"top_k": 3, "seed": 1, "top_p": None}, given_config, {"eos_token_id": 4, "top_p": 0.1})
        assert found == (Sampling(do_sample=True, temperature=0.7, top_k=3, seed=1, eos_token_id=4), 5, 2)
    assert sampling_from({"eos_token_id": [], "max_new_tokens": 8}, None, {"eos_token_id": 4})[:2] == (
        Sampling(eos_token_id=[]), 8,
    )  # fmt: skip
    assert sampling_from({}, {"eos_token_id": [1, 2]}, {"eos_token_id": 4})[0].eos_token_id == [1, 2]
    assert sampling_from({}) == (Sampling(), None, 1)


def test_a_checkpoint_says_nothing_but_what_ends_a_row() -> None:
    defaults = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "num_beams": 4}
    assert sampling_from({}, None, defaults) == (Sampling(), None, 1)


def test_greedy_in_spite_of_a_config_that_samples() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    assert sampling_from({"do_sample": False}, config)[0] == Sampling(repetition_penalty=1.2)
    assert sampling_from({"do_sample": None}, config)[0].temperature == 0.7


def test_sampling_values_in_a_config_need_do_sample() -> None:
    with pytest.raises(GenerationError, match="temperature would be without effect"):
        sampling_from({}, {"temperature": 0.7})[0].check(D_VOCAB)
    sampling_from({}, {"temperature": 1.0, "top_k": 50, "top_p": 1.0})[0].check(D_VOCAB)
    sampling_from({"do_sample": True}, {"top_k": 0})[0].check(D_VOCAB)
    assert sampling_from({"do_sample": True}, {"top_k": 50})[0].top_k == 50


def test_hugging_faces_defaults_ask_for_nothing() -> None:
    assert sampling_from({}, GenerationConfig()) == (Sampling(), None, 1)
    written_out = GenerationConfig._get_default_generation_params()
    sampling, max_new_tokens, rows = sampling_from({}, GenerationConfig(**written_out))
    sampling.check(D_VOCAB)
    assert (sampling, max_new_tokens, rows) == (Sampling(repetition_penalty=1.0), None, 1)
    embedded = GenerationConfig.from_pretrained(EMBEDDED / "demo-gpt2")
    assert sampling_from({}, embedded)[0] == Sampling(eos_token_id=0)


@pytest.mark.parametrize("penalty", [None, 1.4])
def test_a_generation_config_means_what_it_means_in_hugging_face(
    models: dict[str, PreTrainedModel], penalty: float | None
) -> None:
    config = GenerationConfig(do_sample=True, temperature=0.8, top_k=50, min_p=0.01, repetition_penalty=penalty)
    sampling, _, _ = sampling_from({"seed": 3}, config)
    options = {name: value for name, value in vars(sampling).items() if value is not None}
    tokens = ids(2, 5)
    torch.manual_seed(3)
    expected = models["llama"].generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=config, max_new_tokens=10, use_cache=False
    )
    assert ours(models["llama"], tokens, None, steps=10, **options).tolist() == expected.tolist()


REFUSED_ATTRIBUTES = {
    "num_beams": (4, "no beam search"),
    "penalty_alpha": (0.6, "decoding is greedy or by drawing"),
    "no_repeat_ngram_size": (2, "pass Hugging Face's NoRepeatNGramLogitsProcessor in logits_processor"),
    "typical_p": (0.9, "TypicalLogitsWarper in logits_processor, where it runs before temperature"),
    "max_time": (3.0, "MaxTimeCriteria in stopping_criteria"),
    "max_length": (100, "pass max_new_tokens"),
    "bad_words_ids": ([[3]], "NoBadWordsLogitsProcessor"),
    "guidance_scale": (1.5, "both prompts in one batch"),
    "output_scores": (True, "return_logits=True"),
    "use_cache": (False, "one kind of cache"),
    "chat_format": ("chatml", "leave it out"),
    "temperatur": (3, "did you mean temperature?"),
}


@pytest.mark.parametrize("name", REFUSED_ATTRIBUTES)
def test_attributes_that_would_be_ignored_are_refused(name: str) -> None:
    value, told = REFUSED_ATTRIBUTES[name]
    for config in (GenerationConfig(**{name: value}), {name: value}):
        with pytest.raises(GenerationError, match=f"generation_config .* {name}\n  got:      {name}=") as caught:
            sampling_from({}, config)
        assert told in caught.value.fix
        assert f"set {name} to None in generation_config" in caught.value.fix


def test_max_new_tokens_replaces_max_length_as_in_hugging_face() -> None:
    assert sampling_from({"max_new_tokens": 3}, {"max_length": 4096})[1] == 3
    assert sampling_from({}, {"max_length": 4096, "max_new_tokens": 3})[1] == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 0}, "an integer of at least 1"), ({"max_new_tokens": 2.5}, "pass how many"),
        ({"num_return_sequences": 0}, "at least 1"), ({"num_return_sequences": 3}, "pass do_sample=True"),
        ({"num_return_sequences": True, "do_sample": True}, "at least 1"), ({"num_beams": 1}, "no beam search"),
    ],
    ids=str,
)  # fmt: skip
def test_counts_that_make_no_sense(options: dict[str, Any], told: str) -> None:
    with pytest.raises(GenerationError) as caught:
        sampling_from(options)
    assert told in str(caught.value)


def test_a_generation_config_is_one() -> None:
    with pytest.raises(GenerationError, match="a GenerationConfig of transformers, or a dict"):
        sampling_from({}, "greedy")


REFUSED_OPTIONS = {
    **{name: told for name, (_, told) in REFUSED_ATTRIBUTES.items()},
    "num_beam_groups": "no beam search", "length_penalty": "no beam search", "assistant_model": "leave it out",
    "min_new_tokens": "MinNewTokensLengthLogitsProcessor", "input_ids": "pass the prompts as the first argument",
    "attention_mask": "pass it as mask",
    "pad_token_id": "padding is masked", "prefix_allowed_tokens_fn": "PrefixConstrainedLogitsProcessor",
    "tokenizer": "set model.tokenizer", "freq_penalty": "repetition_penalty", "stop_at_eos": "eos_token_id=[]",
    "return_type": ".texts", "use_past_kv_cache": "always used", "prepend_bos": "into the prompt",
    "verbose": "progress=False", "padding_side": "on the left", "temprature": "did you mean temperature?",
    "max_tokens": "did you mean max_new_tokens?", "num_beam": "if you meant num_beams: there is no beam search",
    "hook": "did you mean hooks?", "qqqq": "leave it out",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_keywords_that_generate_does_not_have(name: str) -> None:
    with pytest.raises(GenerationError, match=rf"generate .* {name}\n  got:      {name}=\[") as caught:
        refuse_unknown({name: ["x\n" * 99] * 99})
    assert REFUSED_OPTIONS[name] in caught.value.fix
    assert len(caught.value.got) < 300


def test_no_keywords_are_fine() -> None:
    refuse_unknown({})


def test_everything_that_hugging_face_knows_is_known() -> None:
    attributes = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert attributes <= {*module.CHOICES, *module._HINTS, *module._MEANINGLESS}
    assert arguments <= {*module._OPTIONS, *module._HINTS}
    assert not {*module._OPTIONS} & {*module._HINTS}
    ours = set(inspect.signature(lk.HookedTransformer.generate).parameters) - {"self", "unsupported"}
    assert ours == {*module._OPTIONS}
    assert {*module._NEUTRAL} <= {*module._HINTS}


@pytest.mark.parametrize("name", module._OBJECTS)
def test_objects_that_messages_name_exist(name: str) -> None:
    kind = getattr(transformers, module._OBJECTS[name])
    base = transformers.StoppingCriteria if "Criteria" in kind.__name__ else transformers.LogitsProcessor
    assert issubclass(kind, base)


# -- checkpoints


def test_what_ends_a_row_of_a_checkpoint() -> None:
    tokenizer = SimpleNamespace(eos_token_id=3)
    assert default_eos({"eos_token_id": [1, 2]}, {"eos_token_id": 5}, tokenizer) == [1, 2]
    assert default_eos({"eos_token_id": None}, {"eos_token_id": 5}, tokenizer) == [5]
    assert default_eos({}, {"eos_token_id": None}, tokenizer) == [3]
    assert default_eos({}, None, tokenizer) == [3]
    assert default_eos({}, None, SimpleNamespace(eos_token_id=None)) == []
    assert default_eos({}, {}, None) == []
    assert default_eos({"eos_token_id": 0}, {"eos_token_id": 5}, tokenizer) == [0]
    assert default_eos({"eos_token_id": [50256, 7, -1]}, {"vocab_size": 59}, None) == [7]


def test_an_empty_tokenizer_is_asked_too() -> None:
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))
    assert default_eos({}, None, empty) == []


def test_generation_configs_of_checkpoints(tmp_path: Path) -> None:
    assert companions.generation_config_of(find("demo-gpt2"))["eos_token_id"] == 0
    folder = write_hf(tmp_path / "hf", "gpt2")
    written = folder / "generation_config.json"
    written.write_text(json.dumps({"eos_token_id": [3, 4], "top_p": 0.9}))
    for copied in (folder, writing.convert(folder, tmp_path / "a"), writing.export(folder, tmp_path / "b")):
        assert companions.generation_config_of(find(copied)) == {"eos_token_id": [3, 4], "top_p": 0.9}
    for broken in ("{", "[]", "\udcff"):
        written.write_text(broken, errors="surrogateescape")
        with pytest.raises(CorruptCheckpointError, match=r"generation_config\.json cannot be read"):
            companions.generation_config_of(find(folder))
    written.unlink()
    assert companions.generation_config_of(find(folder)) == {}


@pytest.mark.parametrize("generation_config", [None, {}, {"eos_token_id": [3, 4], "temperature": 0.5}])
def test_saving_keeps_the_generation_config(
    generation_config: dict[str, Any] | None, tiny: Callable[..., lk.HookedTransformer], tmp_path: Path
) -> None:
    model = tiny("gpt2")
    writing.save(
        tmp_path / "saved", model, hf_config=None, tokenizer=None,
        source="new weights", generation_config=generation_config,
    )  # fmt: skip
    assert (tmp_path / "saved" / "generation_config.json").exists() == bool(generation_config)
    assert companions.generation_config_of(find(tmp_path / "saved")) == (generation_config or {})


# -- importing


def test_transformers_is_not_loaded_for_plain_choices() -> None:
    script = (
        "import sys, torch\n"
        "from lenskit.sampling import Sampling, default_eos, refuse_unknown, sampling_from\n"
        "logits, ids = torch.randn(2, 9), torch.tensor([[1, 2], [3, 4]])\n"
        "def own(ids, logits): return logits + 1\n"
        "for options in ({}, {'do_sample': True, 'seed': 1}, {'logits_processor': own, 'eos_token_id': [1, 2]}):\n"
        "    defaults = {'eos_token_id': default_eos({}, {}, None)}\n"
        "    sampling, _, _ = sampling_from(options, {'max_new_tokens': 4}, defaults)\n"
        "    sampling.check(9)\n"
        "    chooser = sampling.chooser(tokenizer=None, device=ids.device, pad=0)\n"
        "    chooser.ends(ids, chooser.next_tokens(logits, ids, None), logits)\n"
        "print('transformers' in sys.modules)\n"
        "Sampling(do_sample=True, top_k=3).chooser(tokenizer=None, device=ids.device, pad=0)\n"
        "print('transformers' in sys.modules)\n"
    )
    assert in_a_process(script).split() == ["False", "True"]
