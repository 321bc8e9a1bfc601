"""`generate`: the tokens that Hugging Face makes, a row in a batch as if it were alone, and the options around it."""

import contextlib
import inspect
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_table import CAUSAL, Row, error, hf_folder, hf_model, ids
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, TextIteratorStreamer, TextStreamer

import lenskit as lk
from lenskit.checkpoints.source import EMBEDDED
from lenskit.errors import GenerationError, InputError, NotSavedError

CLOSE = 1e-5
N_NEW = 64
PROMPTS = [
    "The Eiffel Tower is in the city of",
    "Madison Square Garden is located in the city of New",
    "<|user|> What is the capital of Italy?<|assistant|>",
    "Rome",
]


def theirs(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """Hugging Face's `generate`, nothing ending a row unless it is said."""
    attention = torch.ones_like(tokens) if mask is None else mask.long()
    model.generation_config.eos_token_id = None
    return model.generate(
        tokens, attention_mask=attention, pad_token_id=0, **{"do_sample": False, "top_k": None, **options}
    )


@pytest.fixture(scope="module", params=["demo-gpt2", "demo-llama"])
def demo(request: pytest.FixtureRequest) -> tuple[lk.HookedTransformer, PreTrainedModel]:
    """Each embedded model, and the same folder as Hugging Face's."""
    return lk.HookedTransformer.from_pretrained(request.param), hf_model(EMBEDDED / request.param, attention="sdpa")


# -- the same tokens as Hugging Face


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_greedy_is_hugging_faces_on_trained_models(
    demo: tuple[lk.HookedTransformer, PreTrainedModel], prompt: str
) -> None:
    ours, hf = demo
    tokens = ours.to_tokens(prompt).tokens
    expected = theirs(hf, tokens, max_new_tokens=N_NEW)[0]
    found = ours.generate(prompt, max_new_tokens=N_NEW, eos_token_id=[])
    assert found.tokens[0].tolist() == expected.tolist()
    assert found.new_tokens[0].tolist() == expected[tokens.shape[1] :].tolist()
    assert (found.steps_run, found.finished) == ([N_NEW], [False])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_ends_where_hugging_faces_does(demo: tuple[lk.HookedTransformer, PreTrainedModel], prompt: str) -> None:
    """At the end of sequence that the checkpoint's own config names."""
    ours, hf = demo
    expected = theirs(hf, ours.to_tokens(prompt).tokens, max_new_tokens=N_NEW, eos_token_id=0)[0]
    found = ours.generate(prompt, max_new_tokens=N_NEW)
    assert found.tokens[0].tolist() == expected.tolist()
    assert found.finished == [bool(expected[-1] == 0)] == [True]
    assert found.steps_run == [len(found.new_tokens[0])]


# What the families call it, in which a position is a row of a table.
N_POSITIONS = {
    "gpt2": "n_positions", "gptj": "n_positions", "gpt_neo": "max_position_embeddings", "mpt": "max_seq_len",
    "opt": "max_position_embeddings",
}  # fmt: skip


def longer(row: Row) -> Row:
    """The variant, with as many positions as the test takes."""
    name = N_POSITIONS.get(row.model_type)
    if name is None or row.name == "full context":
        return row
    return replace(row, attributes={**row.attributes, name: 96})


@pytest.mark.parametrize("row", CAUSAL, ids=str)
def test_greedy_is_hugging_faces_in_every_variant(row: Row, tmp_path: Path) -> None:
    """And so are each step's logits. Short prompts grow past the lengths at which a variant changes."""
    folder = hf_folder(longer(row), tmp_path)
    ours = lk.HookedTransformer.from_pretrained(folder)
    for length in {5, *(row.lengths[-1:] if row.length_matters else ())}:
        n = N_NEW if row.name != "full context" else row.hf["n_positions"] - length + 1
        tokens = ids(2, length, seed=1)
        hf = hf_model(folder, attention="sdpa")  # a new one: some rope types remember how long a sequence was
        if row.length_matters:  # Phi 3's own way begins a new cache there, so that earlier tokens are computed twice
            hf.prepare_inputs_for_generation = MethodType(GenerationMixin.prepare_inputs_for_generation, hf)
        expected = theirs(hf, tokens, max_new_tokens=n, return_dict_in_generate=True, output_logits=True)
        found = ours.generate(tokens, max_new_tokens=n, return_logits=True)
        assert found.new_tokens[0].tolist() == expected.sequences[0, length:].tolist()
        assert found.new_tokens[1].tolist() == expected.sequences[1, length:].tolist()
        assert found.logits is not None
        assert error(torch.stack(found.logits, 1), torch.stack(expected.logits)) < CLOSE


def test_the_last_position_of_the_context_is_used_and_no_more(tmp_path: Path) -> None:
    """The last new token is not processed, so it needs no position."""
    folder = hf_folder(Row("", "gpt2", {"n_positions": 12}), tmp_path)
    ours, hf = lk.HookedTransformer.from_pretrained(folder), hf_model(folder)
    tokens = ids(1, 5)
    found = ours.generate(tokens, max_new_tokens=8)
    assert found.tokens[0].tolist() == theirs(hf, tokens, max_new_tokens=8)[0].tolist()
    with pytest.raises(GenerationError, match="longer than the model's context") as told:
        ours.generate(tokens, max_new_tokens=9)
    assert told.value.got == "a prompt of 5 tokens and max_new_tokens=9"
    assert "at most 8 new tokens" in told.value.fix
    # What counts is a row's own tokens, however they are padded.
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), tokens], 1)
    mask = torch.arange(11)[None] >= 6
    assert ours.generate(padded, max_new_tokens=8, mask=mask).new_tokens[0].tolist() == found.new_tokens[0].tolist()
    past = ours.prefill(tokens[:, :2])
    assert ours.generate(tokens[:, 2:], past=past, max_new_tokens=8).tokens[0].tolist() == found.tokens[0].tolist()
    with pytest.raises(GenerationError, match="longer than the model's context"):
        ours.generate(tokens[:, 2:], past=past, max_new_tokens=9)
    with pytest.raises(GenerationError) as told:
        ours.generate(ids(1, 13), max_new_tokens=1)
    assert "shorten the prompt" in told.value.fix


SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "huge temperature": {"temperature": 1e6},
    "top_k": {"top_k": 5, "temperature": 1.3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1, "temperature": 2.0},
    "all": {"top_k": 20, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.2},
    "eos": {"temperature": 2.0, "eos_token_id": [0, 13, 14]},
    "three each": {"num_return_sequences": 3, "temperature": 1.5},
}


@pytest.mark.parametrize("options", SAMPLED.values(), ids=SAMPLED)
def test_sampling_with_a_seed_is_hugging_faces(
    demo: tuple[lk.HookedTransformer, PreTrainedModel], options: dict[str, Any]
) -> None:
    ours, hf = demo
    for seed, prompts in enumerate([PROMPTS, PROMPTS[:1]]):
        tokens, mask, _ = ours.to_tokens(prompts)
        torch.manual_seed(seed)
        expected = theirs(hf, tokens, mask, max_new_tokens=12, **{"do_sample": True, "top_k": 0, **options})
        before = torch.get_rng_state()
        found = ours.generate(prompts, max_new_tokens=12, do_sample=True, seed=seed, **{"eos_token_id": [], **options})
        assert torch.equal(torch.get_rng_state(), before), "the seed is this generation's own"
        assert len(found.new_tokens) == len(expected) == len(prompts) * options.get("num_return_sequences", 1)
        for new, row in zip(found.new_tokens, expected[:, tokens.shape[1] :], strict=True):
            assert new.tolist() == row[: len(new)].tolist()
            assert not row[len(new) :].any(), "what Hugging Face pads with"


def test_without_a_seed_torchs_own_generator_decides(demo_gpt2: lk.HookedTransformer) -> None:
    def drawn(**options: Any) -> list[int]:
        return demo_gpt2.generate(
            "Rome", max_new_tokens=12, do_sample=True, temperature=3.0, eos_token_id=[], **options
        ).new_tokens[0].tolist()  # fmt: skip

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    assert first != second
    torch.manual_seed(3)
    assert drawn() == first
    assert drawn(seed=3) == first


def test_several_continuations_of_each_prompt_lie_next_to_each_other(demo_gpt2: lk.HookedTransformer) -> None:
    found = demo_gpt2.generate(
        ["Rome", "The Eiffel Tower is"], max_new_tokens=5, do_sample=True, temperature=5.0, num_return_sequences=3,
        seed=0, hooks=[lk.Save("hook_embed", tokens=-1, steps=0), lk.Save("hook_logits", prompts=4, steps=0)],
    )  # fmt: skip
    assert [text.startswith("Rome") for text in found.texts] == [True] * 3 + [False] * 3
    assert len({*map(tuple, (row.tolist() for row in found.new_tokens))}) == 6
    embedded = found.saved["hook_embed"]
    assert torch.equal(embedded[0], embedded[2])
    assert not torch.equal(embedded[2], embedded[3])
    assert found.saved["hook_logits"].dim() == 2, "prompts= counts rows, of which there are six"


def test_logits_and_logprobs(demo: tuple[lk.HookedTransformer, PreTrainedModel]) -> None:
    """Those by which each token was chosen, before any processor; in nats, of the tokens that were chosen."""
    ours, hf = demo
    for options in ({}, {"do_sample": True, "temperature": 2.0, "seed": 1, "repetition_penalty": 1.5}):
        found = ours.generate(PROMPTS, max_new_tokens=9, return_logits=True, **options)
        assert found.logits is not None
        assert found.logprobs is not None
        for row, prompt in enumerate(PROMPTS):
            new = found.new_tokens[row]
            n = len(ours.to_str_tokens(prompt))
            expected = hf(found.tokens[row][None]).logits[0, n - 1 : -1].detach()
            assert found.logits[row].shape == (len(new), ours.cfg.d_vocab)
            assert error(found.logits[row], expected) < CLOSE
            logprobs = expected.log_softmax(-1)[torch.arange(len(new)), new]
            torch.testing.assert_close(found.logprobs[row], logprobs, rtol=1e-4, atol=1e-4)
    without = ours.generate(PROMPTS, max_new_tokens=2)
    assert without.logits is without.logprobs is None


# -- batches: every row as if it were alone

POINTS = [
    "hook_embed", "blocks.0.hook_resid_post", "blocks.1.attn.hook_k", "blocks.1.hook_mlp_out", "blocks.-1.attn.hook_z",
    "hook_logits",
]  # fmt: skip
UNEQUAL = st.lists(st.lists(st.integers(0, 58), min_size=1, max_size=8), min_size=2, max_size=4)


@settings(max_examples=12)
@given(
    prompts=UNEQUAL,
    n=st.integers(1, 7),
    eos=st.sets(st.integers(0, 58), max_size=16),
    points=st.sets(st.sampled_from(POINTS)),
)
def test_a_row_is_as_if_it_were_alone(
    shared: lk.HookedTransformer, prompts: list[list[int]], n: int, eos: set[int], points: set[str]
) -> None:
    """Its tokens, its logits, where it ends, and what is saved of it, after which there are zeros."""
    options: dict[str, Any] = {"max_new_tokens": n, "eos_token_id": sorted(eos), "return_logits": True}
    hooks = [lk.Save(point, tokens=-1) for point in sorted(points)] + [lk.Save("blocks.0.hook_resid_pre")]
    together = shared.generate(prompts, hooks=hooks, **options)
    assert together.logits is not None
    for row, prompt in enumerate(prompts):
        alone = shared.generate(prompt, hooks=hooks, **options)
        assert alone.logits is not None
        steps = alone.steps_run[0]
        assert together.tokens[row].tolist() == alone.tokens[0].tolist() == prompt + alone.new_tokens[0].tolist()
        assert (together.steps_run[row], together.finished[row]) == (steps, alone.finished[0])
        assert error(together.logits[row], alone.logits[0]) < CLOSE
        for key, kept in together.saved.items():
            assert len(kept) == max(together.steps_run)
            for step, tensor in enumerate(kept):
                if step >= steps:
                    assert not tensor[row].any(), "zeros, once a row has ended"
                    continue
                expected = alone.saved[key][step][0]
                own = (
                    tensor[row] if key != "blocks.0.hook_resid_pre" else tensor[row, tensor.shape[1] - len(expected) :]
                )
                assert error(own, expected) < CLOSE
                assert own.shape == tensor[row].shape or not tensor[row, : -len(expected)].any(), (
                    "padding reads as zeros"
                )


# Three prompts that end at steps 3, 9 and 4 of demo-gpt2's.
ENDING = ["The Eiffel Tower is in the city of", "Hagia Sophia", "Madison Square Garden is located in the city of New"]


def test_rows_end_where_they_end(demo_gpt2: lk.HookedTransformer) -> None:
    found = demo_gpt2.generate(ENDING, max_new_tokens=12)
    assert found.steps_run == [3, 9, 4]
    assert found.finished == [True] * 3
    assert [len(new) for new in found.new_tokens] == [3, 9, 4]
    assert [int(new[-1]) for new in found.new_tokens] == [0, 0, 0], "the token that ends a row is the last of its own"
    cut = demo_gpt2.generate(ENDING, max_new_tokens=4)
    assert cut.steps_run == [3, 4, 4]
    assert cut.finished == [True, False, True], "a row may end in the last step there is"
    assert cut.new_tokens[1].tolist() == found.new_tokens[1][:4].tolist()


def test_the_loop_ends_with_the_last_row(demo_gpt2: lk.HookedTransformer) -> None:
    seen: list[int] = []
    demo_gpt2.generate(
        ENDING, max_new_tokens=100, hooks=[("blocks.0.hook_mlp_out", lambda _, hook: seen.append(hook.step))]
    )
    assert seen == list(range(9))


def test_lists_are_as_long_as_the_longest_selected_row(demo_gpt2: lk.HookedTransformer) -> None:
    def saved(**selectors: Any) -> list[Tensor]:
        found = demo_gpt2.generate(ENDING, max_new_tokens=12, hooks=[lk.Save("hook_embed", tokens=-1, **selectors)])
        return found.saved["hook_embed"]

    assert [len(saved(prompts=row)) for row in range(3)] == [3, 9, 4]
    assert [len(saved(prompts=[0])), len(saved(prompts=[0, 2])), len(saved())] == [3, 4, 9]
    assert [tensor.shape for tensor in saved(prompts=0)] == [(128,)] * 3
    # What is kept says by itself when each row ended.
    kept = torch.stack(saved()).any(-1)
    assert kept.sum(0).tolist() == [3, 9, 4]
    assert kept[:3].all()
    # A slice begins where it says and ends with the row; a list may ask for steps that never come.
    assert len(saved(steps=slice(2, None), prompts=0)) == 1
    assert len(saved(steps=slice(None, None, 4))) == 3
    assert len(saved(steps=[0, 3, 11])) == 2
    assert len(saved(steps=[10, 11])) == 0


def test_a_step_that_never_ran_is_an_error_when_it_is_asked_for(demo_gpt2: lk.HookedTransformer) -> None:
    hooks = [
        lk.Save("hook_embed", steps=2, prompts=0, name="ran"),
        lk.Save("hook_embed", steps=9, name="late"),
        lk.Save("hook_embed", steps=5, prompts=0, name="ended"),
        lk.Save("blocks.*.hook_resid_post", steps=10, tokens=-1, name="stack"),
    ]
    found = demo_gpt2.generate(ENDING, max_new_tokens=12, hooks=hooks)
    assert found.saved["ran"].shape == (1, 128)
    assert set(found.saved) == {"ran", "late", "ended", "stack"}, "it was asked for, after all"
    for key, step, over in [("late", 9, 9), ("ended", 5, 3)]:
        with pytest.raises(NotSavedError, match=f"step {step} of '{key}' never ran") as told:
            found.saved[key]
        assert f"after {over} steps" in told.value.got
    with pytest.raises(NotSavedError, match=r"step 10 of 'blocks.0.hook_resid_post' never ran"):
        found.saved["stack"]["blocks.0.hook_resid_post"]
    assert "never ran" in repr(found.saved)


def test_what_was_not_saved(demo_gpt2: lk.HookedTransformer) -> None:
    found = demo_gpt2.generate("Rome", max_new_tokens=1, hooks=[lk.Save("blocks.-1.hook_mlp_out")])
    assert found.saved["blocks.-1.hook_mlp_out"] is found.saved["blocks.3.hook_mlp_out"]
    assert "blocks.-1.hook_mlp_out" in found.saved
    assert found.saved.get("blocks.0.hook_mlp_out") is None
    with pytest.raises(NotSavedError, match=r"nothing was saved as 'blocks\.2\.hook_mlp_out'") as told:
        found.saved["blocks.2.hook_mlp_out"]
    assert told.value.expected == "one of blocks.3.hook_mlp_out"
    assert told.value.fix == "add lk.Save('blocks.2.hook_mlp_out') to the hooks"


# -- what ends a row


def test_nothing_ends_a_row_with_no_end_of_sequence(demo_gpt2: lk.HookedTransformer) -> None:
    found = demo_gpt2.generate(ENDING, max_new_tokens=20, eos_token_id=[])
    assert found.steps_run == [20] * 3
    assert found.finished == [False] * 3
    assert "<|endoftext|>The" in found.new_texts[0]


def test_a_model_of_ids_ends_where_it_is_told(shared: lk.HookedTransformer) -> None:
    """A model without a checkpoint's config has no end of sequence of its own."""
    free = shared.generate([[5, 6]], max_new_tokens=9).new_tokens[0].tolist()
    assert len(free) == 9
    eos, unused = free[4], next(token for token in range(shared.cfg.d_vocab) if token not in free)
    ended = shared.generate([[5, 6]], max_new_tokens=9, eos_token_id=[unused, eos]).new_tokens[0].tolist()
    assert ended == free[: free.index(eos) + 1]


def test_stop_strings_end_rows_as_in_hugging_face(demo: tuple[lk.HookedTransformer, PreTrainedModel]) -> None:
    ours, hf = demo
    strings = [" in the", "."]
    found = ours.generate(PROMPTS, max_new_tokens=30, stop_strings=strings)
    for row, prompt in enumerate(PROMPTS):
        tokens = ours.to_tokens(prompt).tokens
        expected = theirs(
            hf, tokens, max_new_tokens=30, stop_strings=strings, tokenizer=ours.tokenizer, eos_token_id=0
        )[0]
        assert found.tokens[row].tolist() == expected.tolist()
        assert any(string in found.new_texts[row] for string in strings)
    assert found.finished == [True] * len(PROMPTS)


def test_the_callers_processors_and_criteria(demo: tuple[lk.HookedTransformer, PreTrainedModel]) -> None:
    ours, hf = demo
    made: dict[str, Any] = {
        "logits_processor": transformers.LogitsProcessorList([transformers.NoRepeatNGramLogitsProcessor(2)]),
        "stopping_criteria": transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(20)]),
    }
    tokens = ours.to_tokens("Rome").tokens
    found = ours.generate("Rome", max_new_tokens=40, eos_token_id=[], **made)
    expected = theirs(hf, tokens, max_new_tokens=40, **made)[0]
    assert found.tokens[0].tolist() == expected.tolist()
    assert len(expected) == 20
    assert found.finished == [True]


def test_a_generation_config_of_hugging_faces(demo: tuple[lk.HookedTransformer, PreTrainedModel]) -> None:
    ours, hf = demo
    config = transformers.GenerationConfig(max_new_tokens=11, do_sample=True, temperature=1.7, top_k=9, eos_token_id=0)
    tokens = ours.to_tokens("Rome").tokens
    torch.manual_seed(5)
    expected = hf.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config, pad_token_id=0)
    assert ours.generate("Rome", generation_config=config, seed=5).tokens[0].tolist() == expected[0].tolist()
    assert ours.generate("Rome", generation_config=config, seed=5, max_new_tokens=2).steps_run == [2]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_beams": 4}, r"does not support num_beams[\s\S]*no beam search"),
        ({"max_length": 30}, r"does not support max_length[\s\S]*pass max_new_tokens"),
        ({"inputs_embeds": None}, "inputs_embeds"),
        ({"max_new_token": 3}, "did you mean max_new_tokens"),
        ({"stop_at_eos": False}, r"eos_token_id=\[\]"),
        ({"use_cache": False}, "there is one kind of cache"),
        ({"temperature": 0.5}, "do_sample=False"),
        ({"do_sample": True, "temperature": 0}, "temperature makes no sense"),
        ({"num_return_sequences": 2}, "pass do_sample=True"),
        ({"eos_token_id": 5000}, "ids from 0 to"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 2.5}, "at least 1"),
        ({"max_new_tokens": None}, "how many tokens to generate was not said"),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", ["generate", "generate_steps"])
def test_options_that_make_no_sense_are_refused_at_the_call(
    demo_gpt2: lk.HookedTransformer, verb: str, options: dict[str, Any], told: str
) -> None:
    """Nothing is swallowed, and nothing runs; the iterator says so before it is asked for a step."""
    with never_runs(demo_gpt2), pytest.raises(GenerationError, match=told):
        getattr(demo_gpt2, verb)("Rome", **{"max_new_tokens": 3, **options})


@contextlib.contextmanager
def never_runs(model: lk.HookedTransformer) -> Iterator[None]:
    """A block in which the model may not process a token."""

    def ran(*_: object) -> None:
        raise AssertionError("the model ran")

    with model.hooks([("hook_embed", ran)]):
        yield


def test_both_verbs_take_the_same() -> None:
    whole = inspect.signature(lk.HookedTransformer.generate).parameters
    steps = inspect.signature(lk.HookedTransformer.generate_steps).parameters
    named = {name for name, given in steps.items() if given.kind is not inspect.Parameter.VAR_KEYWORD}
    assert named <= set(whole)


# -- prompts of every form


def test_prompts_of_every_form(demo_gpt2: lk.HookedTransformer) -> None:
    text = "The Eiffel Tower is in the city of"
    tokens = demo_gpt2.to_tokens(text).tokens
    expected = demo_gpt2.generate(text, max_new_tokens=3).tokens[0].tolist()
    right = torch.cat([tokens, torch.zeros(1, 2, dtype=torch.long)], 1)
    assert demo_gpt2.tokenizer is not None
    forms: list[Any] = [
        [text], tokens, tokens[0], tokens.int(), tokens.tolist(), tokens[0].tolist(), tokens.numpy(), [tokens[0]],
        demo_gpt2.tokenizer(text), demo_gpt2.tokenizer([text], return_tensors="pt"),
        {"input_ids": right, "attention_mask": (torch.arange(13) < 11).long()[None]},
    ]  # fmt: skip
    for form in forms:
        assert demo_gpt2.generate(form, max_new_tokens=3).tokens[0].tolist() == expected
    # Padding of the caller's own, on either side, is none of the row's tokens.
    mask = torch.arange(13)[None] < 11
    assert demo_gpt2.generate(right, mask=mask, max_new_tokens=3).tokens[0].tolist() == expected


def test_a_chat_templates_encoding(demo: tuple[lk.HookedTransformer, PreTrainedModel]) -> None:
    ours, hf = demo
    assert ours.tokenizer is not None
    chats = [
        [{"role": "user", "content": "What is the capital of Italy?"}],
        [{"role": "user", "content": "Do you know where the Beehive is?"}],
    ]
    options = {"add_generation_prompt": True, "return_dict": True}
    one = ours.tokenizer.apply_chat_template(chats[0], return_tensors="pt", **options)
    assert type(one).__name__ == "BatchEncoding"
    found = ours.generate(one, max_new_tokens=8)
    assert found.new_texts == [" Rome.<|endoftext|>"]
    assert found.tokens[0].tolist() == theirs(hf, one["input_ids"], max_new_tokens=8, eos_token_id=0)[0].tolist()
    lists = ours.tokenizer.apply_chat_template(chats[0], **options)
    assert ours.generate(lists, max_new_tokens=8).tokens[0].tolist() == found.tokens[0].tolist()
    both = ours.tokenizer.apply_chat_template(chats, return_tensors="pt", padding=True, **options)
    assert ours.generate(both, max_new_tokens=8).new_texts == [" Rome.<|endoftext|>", " Wellington.<|endoftext|>"]


@pytest.mark.parametrize("prompts", ["", [], ["Rome", ""], [[]], torch.zeros(2, 0, dtype=torch.long)], ids=repr)
def test_prompts_of_nothing_are_refused(demo_gpt2: lk.HookedTransformer, prompts: Any) -> None:
    with pytest.raises(InputError, match="cannot take this input"):
        demo_gpt2.generate(prompts, max_new_tokens=3)


def test_the_models_inputs_and_outputs_are_not_shared(demo_gpt2: lk.HookedTransformer) -> None:
    """What comes back may be written to, and what was given is as it was."""
    tokens = demo_gpt2.to_tokens("The Eiffel Tower is in the city of").tokens
    before = tokens.clone()
    found = demo_gpt2.generate(tokens, max_new_tokens=4, eos_token_id=[], return_logits=True)
    found.tokens[0].fill_(0)
    assert torch.equal(tokens, before)
    assert found.new_tokens[0].any()
    assert not found.tokens[0].requires_grad
    assert found.logits is not None
    assert found.logits[0].requires_grad is False


def test_text_needs_a_tokenizer(shared: lk.HookedTransformer) -> None:
    found = shared.generate([[5, 6]], max_new_tokens=2)
    for text in (lambda: found.texts, lambda: found.new_texts):
        with pytest.raises(InputError, match="no text without a tokenizer"):
            text()


def test_one_new_token(demo: tuple[lk.HookedTransformer, PreTrainedModel]) -> None:
    ours, hf = demo
    for prompt in PROMPTS:
        tokens = ours.to_tokens(prompt).tokens
        found = ours.generate(prompt, max_new_tokens=1, return_logits=True)
        assert found.new_tokens[0].tolist() == [int(hf(tokens).logits[0, -1].argmax())]
        assert found.steps_run == [1]
        assert found.logits is not None
        assert error(found.logits[0][0], hf(tokens).logits[0, -1]) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """The answers are the same, and a step's logits are those of the whole sequence in that dtype."""
    model = lk.HookedTransformer.from_pretrained(name, dtype=dtype)
    hooks = [lk.Save("blocks.1.hook_mlp_out", tokens=-1), lk.Add("blocks.2.hook_resid_pre", 0.01, steps=[0, 2])]
    found = model.generate(ENDING, max_new_tokens=6, return_logits=True, hooks=hooks)
    assert found.new_texts[0] == " Paris.<|endoftext|>"
    assert found.new_texts[2] == " York City.<|endoftext|>"
    assert found.logits is not None
    assert found.logprobs is not None
    assert found.saved["blocks.1.hook_mlp_out"][0].dtype == found.logits[0].dtype == dtype
    assert found.logprobs[0].dtype == (dtype if dtype == torch.float64 else torch.float32)
    hf = hf_model(EMBEDDED / name, attention="sdpa", dtype=dtype)
    plain = model.generate(ENDING[0], max_new_tokens=6, return_logits=True)
    expected = hf(plain.tokens[0][None]).logits[0, -len(plain.new_tokens[0]) - 1 : -1]
    assert plain.logits is not None
    assert error(plain.logits[0], expected) < {torch.float64: 1e-6}.get(dtype, 0.03)
    sampled = model.generate(ENDING, max_new_tokens=6, do_sample=True, temperature=1e5, seed=0, eos_token_id=[])
    assert sampled.steps_run == [6] * 3


# -- who watches


class Heard:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.told.append(value.tolist())

    def end(self) -> None:
        self.told.append("end")


def test_a_streamer_hears_what_hugging_face_tells_it(demo: tuple[lk.HookedTransformer, PreTrainedModel]) -> None:
    ours, hf = demo
    mine, reference = Heard(), Heard()
    ours.generate(PROMPTS[0], max_new_tokens=8, streamer=mine)
    theirs(hf, ours.to_tokens(PROMPTS[0]).tokens, max_new_tokens=8, eos_token_id=0, streamer=reference)
    assert mine.told == reference.told
    assert mine.told[-1] == "end"


def test_hugging_faces_streamers(demo_gpt2: lk.HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "The Eiffel Tower is in the city of"
    demo_gpt2.generate(prompt, max_new_tokens=8, streamer=TextStreamer(demo_gpt2.tokenizer))
    assert capsys.readouterr().out == prompt + " Paris.<|endoftext|>\n"
    streamer = TextStreamer(demo_gpt2.tokenizer, skip_prompt=True, skip_special_tokens=True)
    demo_gpt2.generate(prompt, max_new_tokens=8, streamer=streamer)
    assert capsys.readouterr().out == " Paris.\n"
    queue = TextIteratorStreamer(demo_gpt2.tokenizer, skip_prompt=True)
    list(demo_gpt2.generate_steps(prompt, max_new_tokens=8, streamer=queue))
    assert "".join(queue) == " Paris.<|endoftext|>"


def test_a_streamer_for_one_row_refuses_several(demo_gpt2: lk.HookedTransformer) -> None:
    with never_runs(demo_gpt2), pytest.raises(ValueError, match="batch size 1"):
        demo_gpt2.generate(ENDING, max_new_tokens=3, streamer=TextStreamer(demo_gpt2.tokenizer))


class Terminal(io.StringIO):
    """A standard error that somebody looks at."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(True, True, True), (True, False, True), (False, True, False), (None, False, False), (None, True, False)],
)
def test_the_progress_bar(
    demo_gpt2: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch, progress: bool | None, terminal: bool, shown: bool
) -> None:
    """Where it was asked for. Unasked, only at a terminal, and for nothing that takes less than a second."""
    written = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    demo_gpt2.generate(ENDING, max_new_tokens=5, progress=progress)
    assert ("/5" in written.getvalue()) == shown
    assert bool(written.getvalue()) == shown


def test_a_long_generation_shows_a_bar_at_a_terminal(
    demo_gpt2: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    slow = [("blocks.0.hook_mlp_out", lambda act, hook: time.sleep(0.3))]
    demo_gpt2.generate("Rome", max_new_tokens=6, hooks=slow, eos_token_id=[])
    assert "/6" in written.getvalue()


def test_a_script_that_pipes_sees_no_bar() -> None:
    script = (
        "import time, lenskit as lk\n"
        "model = lk.HookedTransformer.from_pretrained('demo-gpt2')\n"
        "slow = [('blocks.0.hook_mlp_out', lambda act, hook: time.sleep(0.3))]\n"
        "print(model.generate('The Eiffel Tower', max_new_tokens=6, hooks=slow, eos_token_id=[]).texts)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "The Eiffel Tower" in done.stdout
