"""What is an encoder's own: tokens that see both ways, token types, the head that fills in masks, and no generation.

What it shares with decoders (parity, padding, half precision, weights) is tested with theirs, over the parity table.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_reference
import pytest
import torch
from folders import contents, save, tensors
from parity_table import LENGTH, Row, error, hf_folder, hf_model, ids
from torch import Tensor
from transformers import BertForPreTraining, BertTokenizer, PreTrainedModel

import lenskit as lk
from lenskit.analysis import ablate_heads, logit_lens, masked_loss, patch_positions, top_tokens
from lenskit.errors import (
    InputError,
    MissingTensorError,
    NotCausalError,
    UnknownTensorError,
)
from lenskit.inputs import Batch
from lenskit.modules.kv_cache import KVCache

CLOSE = 1e-5
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    "the", "capital", "of", "france", "italy", "is", "paris", "rome", "in", ".",
]  # fmt: skip
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer of a few words."""
    folder = hf_folder(Row("x", "bert"), tmp_path_factory.mktemp("hf"))
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> lk.HookedTransformer:
    return lk.HookedTransformer.from_pretrained(folder)


@pytest.fixture(scope="module")
def hf(folder: Path) -> PreTrainedModel:
    return hf_model(folder)


def types(rows: int, length: int, *, seed: int = 3) -> Tensor:
    return torch.randint(2, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- both ways


@torch.no_grad()
def test_a_token_sees_those_after_it(model: lk.HookedTransformer) -> None:
    tokens, changed = ids(1, LENGTH), ids(1, LENGTH)
    changed[0, -1] = (changed[0, -1] + 1) % 59
    assert error(model(tokens)[:, 0], model(changed)[:, 0]) > 1e-3
    _, cache = model.run_with_cache(tokens, "*.hook_pattern")
    assert all(bool((pattern > 0).all()) for pattern in cache.values())
    assert not model.causal


# -- text


def test_text_gets_the_tokenizers_special_tokens(model: lk.HookedTransformer) -> None:
    texts = ["The capital of France is [MASK].", "Rome [MASK]"]
    batch = model.to_tokens(texts)
    one, other = ([WORDS[token] for token in row.tolist()] for row in batch.tokens)
    assert one == ["[CLS]", "the", "capital", "of", "france", "is", "[MASK]", ".", "[SEP]"]
    assert other[-4:] == ["[CLS]", "rome", "[MASK]", "[SEP]"]
    assert batch.mask is not None
    assert batch.mask.sum(1).tolist() == [9, 4]
    assert model.to_str_tokens(texts[0])[6] == "[MASK]"


@torch.no_grad()
def test_what_fills_a_mask_is_what_hugging_face_says(model: lk.HookedTransformer, hf: PreTrainedModel) -> None:
    texts = ["the capital of france is [MASK] .", "[MASK] is in italy"]
    encoding = model.tokenizer(texts, padding=True, return_tensors="pt")  # on the right
    masked = encoding["input_ids"] == model.tokenizer.mask_token_id
    theirs = hf(**encoding).logits[masked]
    batch = model.to_tokens(texts)  # padded on the left
    ours = model(texts)[batch.tokens == model.tokenizer.mask_token_id]
    assert error(ours, theirs) < CLOSE
    assert error(model(encoding)[masked], theirs) < CLOSE
    named = [token for token in range(59) if token < len(WORDS)]
    best = top_tokens(model, ours[0, named], k=1)[0]
    assert best.text == WORDS[int(theirs[0, named].argmax())]


# -- token types


@torch.no_grad()
def test_token_types_come_with_an_encoding(model: lk.HookedTransformer, hf: PreTrainedModel) -> None:
    tokens, kinds = ids(2, 9), types(2, 9)
    given = {"input_ids": tokens, "token_type_ids": kinds}
    theirs = hf(**given).logits
    assert error(model(given), theirs) < CLOSE
    assert error(model(tokens), theirs) > 1e-3
    assert error(model({name: each.tolist() for name, each in given.items()}), theirs) < CLOSE
    assert error(model(Batch(tokens, None, kinds)), theirs) < CLOSE
    one_row = {name: each[0] for name, each in given.items()}
    assert error(model(one_row), theirs[:1]) < CLOSE


@torch.no_grad()
def test_types_stay_with_their_tokens_whatever_pads(model: lk.HookedTransformer, hf: PreTrainedModel) -> None:
    pairs = (["the capital of france", "rome"], ["paris", "italy is in rome"])
    tokenizer = model.tokenizer
    whole = tokenizer(*pairs, padding=True, return_tensors="pt")
    ragged = tokenizer(*pairs)
    assert sorted({kind for row in ragged["token_type_ids"] for kind in row}) == [0, 1]
    padded_lists = {name: value.tolist() for name, value in whole.items()}
    alone = [hf(**tokenizer(one, other, return_tensors="pt")).logits[0] for one, other in zip(*pairs, strict=True)]
    for given in (whole, ragged, padded_lists, dict(ragged)):
        batch = model.to_tokens(given)
        own = batch.tokens >= 0 if batch.mask is None else batch.mask
        logits = model(given)
        for row, theirs in enumerate(alone):
            assert error(logits[row, own[row]], theirs) < CLOSE
    # A mask of its own goes before the encoding's, and leaves the types alone.
    left_out = whole["attention_mask"].clone()
    left_out[:, 0] = 0
    positions = (left_out.cumsum(1) - 1).clamp(min=0)
    theirs = hf(**{**whole, "attention_mask": left_out}, position_ids=positions).logits
    assert error(model(whole, left_out)[left_out.bool()], theirs[left_out.bool()]) < CLOSE


@torch.no_grad()
def test_what_types_add_is_a_hook_point(model: lk.HookedTransformer) -> None:
    tokens, kinds = ids(2, 9), types(2, 9)
    given = {"input_ids": tokens, "token_type_ids": kinds}
    names = list(model.hook_points)
    assert names[:3] == ["hook_embed", "hook_pos_embed", "hook_token_type_embed"]
    _, cache = model.run_with_cache(given)
    assert torch.equal(cache["token_type_embed"], model.token_type_embed.W_token_type[kinds])
    untyped = model.run_with_cache(tokens)[1]
    assert torch.equal(untyped["token_type_embed"][1, 4], model.token_type_embed.W_token_type[0])
    ablated = model.run_with_hooks(given, [lk.Set("hook_token_type_embed", untyped["token_type_embed"])])
    assert error(ablated.logits, model(tokens)) < CLOSE
    # It belongs to what comes before the blocks, and the head to what comes after them.
    stream = model(given, stop_at_layer=1)
    assert error(stream, cache["resid_pre", 1]) < CLOSE
    assert error(model(stream, start_at_layer=1), model(given)) < CLOSE
    before, after = model.points_between(None, 0), model.points_between(3, None)
    assert [n for n in names if "blocks" not in n] == [*before, *after]
    assert {"hook_token_type_embed", "ln_embed.hook_scale"} <= before.keys()
    assert {"unembed.hook_pre", "unembed.ln.hook_scale", "hook_logits"} <= after.keys()


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ([[0, 2, 0]], ("the token type 2", "from 0 to 1")),
        ([[0, -1, 0]], ("the token type -1", "from 0 to 1")),
        (torch.ones(1, 2, dtype=torch.long), ("(1, 2)", "one token type an id")),
        ([[0, 1]], ("[2]", "one token type an id")),
        (torch.ones(1, 3), ("float32", "from 0 to 1")),
    ],
    ids=str,
)
def test_types_that_are_none(model: lk.HookedTransformer, kinds: Any, words: tuple[str, str]) -> None:
    tokens = ids(1, 3) if isinstance(kinds, Tensor) else ids(1, 3).tolist()
    with pytest.raises(InputError) as told:
        model({"input_ids": tokens, "token_type_ids": kinds})
    assert words[0] in told.value.got
    assert words[1] in told.value.expected


@torch.no_grad()
def test_a_model_without_types_takes_zeros_only(shared: lk.HookedTransformer) -> None:
    """Which many tokenizers write."""
    tokens = ids(2, 5)
    given = {"input_ids": tokens, "token_type_ids": torch.zeros_like(tokens)}
    assert torch.equal(shared(given), shared(tokens))
    with pytest.raises(InputError, match="this model knows of no types"):
        shared({**given, "token_type_ids": types(2, 5)})


# -- the verbs


@torch.no_grad()
def test_interventions_are_those_of_torchs_hooks_on_hugging_faces_model(
    model: lk.HookedTransformer, hf: PreTrainedModel
) -> None:
    tokens = ids(1, 11)
    _, cache = model.run_with_cache(tokens, ["*.hook_attn_out", "*.hook_mlp_out"])
    places = hf_reference.looked_for(hf, tokens, cache)
    assert len(places) == 12
    for edited in places:
        seen: dict[str, Tensor] = {}

        def watch(name: str, act: Tensor, edited: str = edited, seen: dict[str, Tensor] = seen) -> Tensor:
            if name == edited:
                act = torch.cat((act[:4], -act[4:6] + 0.5, act[6:]))
            seen[name] = act
            return act

        with hf_reference.watched(places, watch):
            theirs = hf(tokens).logits
        chosen = {"tokens": slice(4, 6)}
        ops = [lk.Scale(edited, -1.0, **chosen), lk.Add(edited, 0.5, **chosen), *map(lk.Save, places)]
        ours = model.run_with_hooks(tokens, ops)
        assert error(ours.logits, theirs) < CLOSE, edited
        assert error(ours.logits, model(tokens)) > 1e-3, edited
        for name, act in seen.items():
            assert error(ours.saved[name][0], act) < 5 * CLOSE, (edited, name)


@torch.no_grad()
def test_traces_carry_types(model: lk.HookedTransformer) -> None:
    first = {"input_ids": ids(1, 9), "token_type_ids": types(1, 9)}
    second = {"input_ids": ids(1, 5, seed=1)}
    with model.trace() as run:
        with run.invoke(first):
            stream = model.ln_embed.output.save()
            by_type = model.token_type_embed.output.save()
            head = model.unembed.hook_post.output.save()
        with run.invoke(second):
            logits = model.output.save()
    _, cache = model.run_with_cache(first)
    assert error(by_type.value, cache["token_type_embed"]) == 0.0
    assert error(stream.value, cache["resid_pre", 0]) < CLOSE
    assert error(head.value, cache["unembed.hook_post"]) < CLOSE
    assert error(logits.value, model(second)) < CLOSE


@torch.no_grad()
def test_prompts_that_need_each_others_later_activations_keep_their_types(model: lk.HookedTransformer) -> None:
    given = {"input_ids": ids(2, 9), "token_type_ids": types(2, 9)}
    late = lk.Act("blocks.2.hook_resid_post", prompts=1)
    plan = lk.Plan([lk.Set("blocks.0.hook_resid_post", late, prompts=0)])
    found = model.run_with_hooks(given, plan)
    _, cache = model.run_with_cache(given)
    by_hand = model.run_with_hooks(given, [lk.Set("blocks.0.hook_resid_post", cache["resid_post", 2][1], prompts=0)])
    assert error(found.logits, by_hand.logits) < CLOSE
    assert error(found.logits[1], model(given)[1]) < CLOSE


def test_a_plan_is_data_and_gradients_flow(model: lk.HookedTransformer) -> None:
    with model.trace("the capital of france is [MASK] .") as run:
        pre = model.unembed.hook_pre.output.save()
        scaled = model.unembed.ln.output
        model.unembed.ln.output = scaled * 2
        with run.backward(model.output.t[6].max()):
            gradient = model.hook_token_type_embed.output.grad.save()
    assert pre.value.shape == gradient.value.shape == (1, 9, 32)
    assert bool(gradient.value.any())
    again = lk.Plan.from_json(json.loads(json.dumps(run.plan.to_json(model))), run.plan.tensors())
    assert torch.equal(model.run_with_hooks("the capital of france is [MASK] .", again).logits, run.output.logits)


@torch.no_grad()
def test_the_logit_lens_goes_through_the_head(model: lk.HookedTransformer) -> None:
    text = "the capital of france is [MASK] ."
    logits, cache = model.run_with_cache(text, "blocks.*.hook_resid_post")
    lens = logit_lens(model, cache, positions=6)
    assert lens.shape == (3, 1, 59)
    assert error(lens[-1], logits[:, 6]) < CLOSE


@torch.no_grad()
def test_patching_works_both_ways(model: lk.HookedTransformer) -> None:
    clean, corrupted = "the capital of france is [MASK] .", "the capital of italy is [MASK] ."
    table = patch_positions(model, clean, corrupted, lambda logits: logits[0, 6, 11])
    assert table.shape == (3, 9)
    assert float(table[0, 4]) == pytest.approx(float(model(clean)[0, 6, 11]), abs=1e-5)  # all that differs


VERBS: dict[str, Callable[[lk.HookedTransformer], object]] = {
    "generate": lambda model: model.generate(ids(1, 3), max_new_tokens=2),
    "generate_steps": lambda model: model.generate_steps(ids(1, 3), max_new_tokens=2),
    "prefill": lambda model: model.prefill(ids(1, 3)),
    "trace": lambda model: model.trace(ids(1, 3), max_new_tokens=2),
    "a cache": lambda model: model.decode(ids(1, 3), cache=KVCache()),
    "next tokens": lambda model: ablate_heads(model, ids(1, 3)),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_takes_a_causal_model_is_refused(model: lk.HookedTransformer, verb: str) -> None:
    ran = []
    with model.hooks([("hook_embed", lambda act, hook: ran.append(act))]), pytest.raises(NotCausalError) as told:
        VERBS[verb](model)
    assert "bert" in told.value.got
    assert "mask token" in told.value.fix
    assert not ran


def test_another_models_past_is_refused(model: lk.HookedTransformer, tiny: Callable[..., lk.HookedTransformer]) -> None:
    past = tiny("gpt2").prefill(ids(1, 3))
    with pytest.raises(NotCausalError):
        model.run_with_hooks(ids(1, 3), past=past)


# -- the loss


def test_the_masked_loss_is_hugging_faces(model: lk.HookedTransformer, hf: PreTrainedModel) -> None:
    original = ids(3, 9)
    masked = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    labels = torch.where(masked, original, -100)
    tokens = torch.where(masked, torch.tensor(4), original)
    theirs = hf(tokens, labels=labels).loss
    assert error(masked_loss(model(tokens), labels), theirs) < CLOSE
    half = model(tokens).detach().bfloat16()
    assert masked_loss(half, labels).dtype == torch.float32


@pytest.mark.parametrize(("label", "got"), [(-100, "none"), (59, "labels from 59 to 59"), (-1, "labels from -1 to -1")])
def test_a_masked_loss_needs_labels(label: int, got: str) -> None:
    with pytest.raises(InputError) as told:
        masked_loss(torch.zeros(2, 3, 59), torch.full((2, 3), label))
    assert told.value.got == got


@pytest.mark.parametrize("model_type", ["bert"])
def test_filling_in_is_learned(model_type: str, tiny: Callable[..., lk.HookedTransformer]) -> None:
    """A masked token between two that count: what comes after it is needed."""
    model = lk.HookedTransformer(tiny(model_type).cfg, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(150):
        after = torch.randint(1, 20, (32, 1), generator=generator)
        row = torch.cat((torch.randint(1, 20, (32, 4), generator=generator), torch.full((32, 1), 58), after), 1)
        labels = torch.full_like(row, -100)
        labels[:, 4] = after[:, 0] + 20
        loss = masked_loss(model(row), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 3.5
    assert losses[-1] < 0.5


# -- checkpoints as they are found


def gamma_and_beta(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the first checkpoints got from TensorFlow."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        found = {key.replace(new, name): tensor for key, tensor in found.items()}
    return found


def with_the_classifier_of_pairs(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """As google-bert/bert-base-uncased: the pooler, the classifier, copies of what is tied, and a buffer."""
    return {
        **found,
        "bert.pooler.dense.weight": torch.randn(32, 32),
        "bert.pooler.dense.bias": torch.randn(32),
        "cls.seq_relationship.weight": torch.randn(2, 32),
        "cls.seq_relationship.bias": torch.randn(2),
        "cls.predictions.decoder.weight": found["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": found["cls.predictions.bias"].clone(),
        "bert.embeddings.position_ids": torch.arange(40)[None],
    }


def without_the_prefix(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("bert."): tensor for name, tensor in found.items()}


LAYOUTS: dict[str, Edit] = {
    "gamma and beta": gamma_and_beta,
    "pre-training's": with_the_classifier_of_pairs,
    "the oldest": lambda found: gamma_and_beta(with_the_classifier_of_pairs(found)),
    "no prefix": without_the_prefix,
}


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name, data in contents(folder).items():
        (to / name).write_bytes(data)
    return to


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_layouts_of_the_hub_are_read(
    folder: Path, model: lk.HookedTransformer, tmp_path: Path, layout: str
) -> None:
    found = copied(folder, tmp_path / "found")
    save(found, LAYOUTS[layout](tensors(folder)))
    assert torch.equal(lk.HookedTransformer.from_pretrained(found)(ids(2, 9)), model(ids(2, 9)))
    exported = tensors(lk.export(found, tmp_path / "exported"))
    assert exported.keys() == tensors(folder).keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors(folder).items())


@torch.no_grad()
def test_a_checkpoint_of_both_heads_is_read(tmp_path: Path, folder: Path) -> None:
    both = BertForPreTraining.from_pretrained(folder)
    both.save_pretrained(tmp_path / "both")
    tokens = ids(2, 9)
    ours = lk.HookedTransformer.from_pretrained(tmp_path / "both")(tokens)
    assert error(ours, both.eval()(tokens).prediction_logits) < CLOSE


def test_a_folder_with_a_vocabulary_alone_has_a_tokenizer(tmp_path: Path, folder: Path) -> None:
    """As the first checkpoints have."""
    found = copied(folder, tmp_path / "found")
    for path in found.glob("tokenizer*"):
        path.unlink()
    (found / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    model = lk.HookedTransformer.from_pretrained(found)
    assert model.to_str_tokens("Rome [MASK]") == ["[CLS]", "rome", "[MASK]", "[SEP]"]


def test_an_encoder_without_its_head_is_refused(tmp_path: Path, folder: Path) -> None:
    """By the names of the tensors that are missing."""
    found = copied(folder, tmp_path / "found")
    save(found, {name: tensor for name, tensor in tensors(folder).items() if not name.startswith("cls")})
    with pytest.raises(MissingTensorError, match=r"cls\.predictions\.transform"):
        lk.HookedTransformer.from_pretrained(found)


def test_an_output_that_is_no_copy_of_the_embedding_is_refused(tmp_path: Path, folder: Path) -> None:
    found = copied(folder, tmp_path / "found")
    save(found, {**tensors(folder), "cls.predictions.decoder.weight": torch.randn(59, 32)})
    with pytest.raises(UnknownTensorError, match="tie_word_embeddings"):
        lk.HookedTransformer.from_pretrained(found)
