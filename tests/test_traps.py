"""What rewritten models have got wrong before, one test each: the numbers that come out are often nearly right.

Each is a bug that TransformerLens has had reported of its own models. Most are covered by the parity table as well;
here each is by itself, against what the paper says or what Hugging Face computes.
"""

from pathlib import Path

import pytest
import torch
from parity_table import MODEL_TYPES, ROWS, TINY, Row, error, hf_folder, hf_model, ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import lenskit as lk

CLOSE = 1e-5


def model_of(row: Row, folder: Path, **options: object) -> lk.HookedTransformer:
    """The variant with random weights, norms' gains included."""
    return lk.HookedTransformer.from_pretrained(hf_folder(row, folder), **options)


# -- post-norms: the hooked output is what is added, after the norm


POST_NORMED = [model_type for model_type in ("olmo2", "gemma2", "gemma3_text") if model_type in MODEL_TYPES]


@pytest.mark.parametrize("model_type", POST_NORMED)
@torch.no_grad()
def test_a_sublayers_output_is_what_is_added_after_its_post_norm(model_type: str, tmp_path: Path) -> None:
    model = model_of(Row("default", model_type), tmp_path)
    _, cache = model.run_with_cache(ids(1, 9))
    for layer in range(model.cfg.n_layers):
        pre, mid, post = (cache[f"blocks.{layer}.hook_resid_{at}"] for at in ("pre", "mid", "post"))
        assert error(cache[f"blocks.{layer}.hook_attn_out"], mid - pre) < CLOSE
        assert error(cache[f"blocks.{layer}.hook_mlp_out"], post - mid) < CLOSE
    removed = [
        (f"blocks.1.hook_{sublayer}_out", lambda activation, hook: activation * 0) for sublayer in ("attn", "mlp")
    ]
    kept = model.run_with_hooks(
        ids(1, 9), [*removed, lk.Save("blocks.1.hook_resid_pre"), lk.Save("blocks.1.hook_resid_post")]
    ).saved
    assert torch.equal(kept["blocks.1.hook_resid_pre"], kept["blocks.1.hook_resid_post"])


# -- left padding: a row's positions begin at its own first token


LEARNED = ("gpt2", "opt", "gpt_neo")
PADDED = [
    row for row in ROWS if row.causal and (row.hf.get("alibi") or (row.model_type in LEARNED and row.name == "default"))
] + [Row("default", model_type) for model_type in ("bloom", "mpt")]


@pytest.mark.parametrize("row", PADDED, ids=str)
@torch.no_grad()
def test_left_padding_moves_no_positions(row: Row, tmp_path: Path) -> None:
    """Learned positions, and ALiBi's distances; at every length of padding, and while generating."""
    model = model_of(row, tmp_path)
    tokens = ids(1, 8)
    alone, new = model(tokens), model.generate(tokens, max_new_tokens=6, eos_token_id=[]).new_tokens[0]
    for n_pads in (1, 5):
        padded = torch.cat((ids(1, n_pads, seed=7), tokens), 1)
        batch = torch.cat((padded, ids(1, 8 + n_pads, seed=8)))
        mask = torch.ones_like(batch, dtype=torch.bool)
        mask[0, :n_pads] = False
        assert error(model(batch, mask=mask)[:1, n_pads:], alone) < CLOSE
        assert torch.equal(model.generate(batch, mask=mask, max_new_tokens=6, eos_token_id=[]).new_tokens[0], new)


# -- rotary angles: float32, also in a bfloat16 model


@torch.no_grad()
def test_angles_in_bfloat16_are_those_of_float32(tmp_path: Path) -> None:
    """bfloat16 has eight bits: position 1001 would be 1000, and its angle wrong by a radian."""
    attributes = {"max_position_embeddings": 1100, "num_hidden_layers": 1}
    half = model_of(Row("far", "llama", attributes), tmp_path, dtype=torch.bfloat16)
    tokens = ids(1, 1002)
    _, cache = half.run_with_cache(tokens, names=["blocks.0.attn.hook_q", "blocks.0.attn.hook_rot_q"])
    q, rotated = cache["blocks.0.attn.hook_q"].double(), cache["blocks.0.attn.hook_rot_q"].double()
    d_head, theta = half.cfg.d_head, half.cfg.rope.theta
    angles = torch.arange(1002.0, dtype=torch.float64)[:, None] / theta ** (torch.arange(0, d_head, 2) / d_head)
    cos, sin = (f(angles).repeat(1, 2)[None, :, None] for f in (torch.cos, torch.sin))
    first, second = q.chunk(2, -1)
    expected = q * cos + torch.cat((-second, first), -1) * sin
    assert error(rotated, expected) < 2**-7  # what bfloat16 itself rounds


# -- the attention scale is the config's, not always 1 / sqrt(d_head)


SCALES = {
    "gpt2-scaled by layer": lambda cfg, layer: cfg.d_head**-0.5 / (layer + 1),
    "gpt_neo-default": lambda cfg, layer: 1.0,
    "gemma2-default": lambda cfg, layer: 14**-0.5,  # query_pre_attn_scalar
    "granite-default": lambda cfg, layer: 0.2,  # attention_multiplier
    "llama-wide heads": lambda cfg, layer: 14**-0.5,
}


@pytest.mark.parametrize("name", SCALES)
@torch.no_grad()
def test_scores_are_scaled_as_the_config_says(name: str, tmp_path: Path) -> None:
    row = next(row for row in ROWS if str(row) == name)
    model = model_of(row, tmp_path)
    _, cache = model.run_with_cache(ids(1, 9))
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}.attn."
        q, k = (cache.get(f"{at}hook_rot_{x}", cache.get(f"{at}hook_{x}")) for x in "qk")
        k = k.repeat_interleave(model.cfg.n_heads // model.cfg.n_key_value_heads, 2)
        products = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALES[name](model.cfg, layer)
        cap = row.hf.get("attn_logit_softcapping")
        products = products if cap is None else cap * torch.tanh(products / cap)
        scores = cache[f"{at}hook_attn_scores"]
        seen = scores.isfinite() & (scores > -1e30)
        assert seen.any()
        assert error(scores[seen], products[seen]) < CLOSE


# -- soft caps come before the mask: a capped minus infinity would be a number


@torch.no_grad()
def test_what_is_masked_stays_masked_under_a_soft_cap(tmp_path: Path) -> None:
    model = model_of(Row("default", "gemma2"), tmp_path)
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    _, cache = model.run_with_cache(tokens, mask=mask)
    for layer in range(model.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        future = torch.ones(9, 9, dtype=torch.bool).triu(1)
        assert pattern[:, :, future].abs().max() == 0
        assert pattern[0, :, 3:, :3].abs().max() == 0
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"]
        assert torch.isneginf(scores[:, :, future]).all()
        assert scores[scores.isfinite()].abs().max() <= TINY["gemma2"]["attn_logit_softcapping"]


# -- tied embeddings: one matrix, read twice


TIED = [Row("tied", model_type, {"tie_word_embeddings": True}) for model_type in ("llama", "gemma", "gpt2", "cohere")]


@pytest.mark.parametrize("row", [row for row in TIED if row.model_type in MODEL_TYPES], ids=str)
def test_a_tied_unembedding_is_the_embedding(row: Row, tmp_path: Path) -> None:
    model = model_of(row, tmp_path / "a")
    hf = hf_model(tmp_path / "a")
    assert torch.equal(model.unembed.W_U, model.embed.W_E.T)
    with torch.no_grad():
        model.embed.W_E[3] *= 2
        hf.get_input_embeddings().weight[3] *= 2
        assert error(model(ids(1, 6)), hf(ids(1, 6)).logits) < CLOSE
    names = {name for name, _ in model.named_parameters()}
    assert len({id(parameter) for parameter in model.parameters()}) == len(names)  # trained once
    back = hf_model(lk.export(model.save_pretrained(tmp_path / "b"), tmp_path / "c"))
    with torch.no_grad():
        assert error(back(ids(1, 6)).logits, hf(ids(1, 6)).logits) < CLOSE


# -- padded vocabularies: more rows of the embedding than the tokenizer has tokens


N_WORDS = 50  # of 59 rows


@pytest.fixture(scope="module")
def padded_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose last rows no text has, and whose weights make them likely."""
    folder = hf_folder(Row("default", "llama"), tmp_path_factory.mktemp("padded"))
    words = {f"w{index}": index for index in range(N_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@torch.no_grad()
def test_rows_that_no_token_has_are_kept_and_sampled_as_hugging_face_does(padded_vocabulary: Path) -> None:
    model, hf = lk.HookedTransformer.from_pretrained(padded_vocabulary), hf_model(padded_vocabulary)
    assert model.cfg.d_vocab == 59
    assert model.tokenizer is not None
    assert len(model.tokenizer) == N_WORDS
    tokens: Tensor = model.to_tokens("w3 w4 w5").tokens
    assert error(model(tokens), hf(tokens).logits) < CLOSE
    torch.manual_seed(5)
    options = {
        "do_sample": True,
        "temperature": 3.0,
        "top_k": 0,
        "max_new_tokens": 25,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    theirs = hf.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, 3:]
    ours = model.generate("w3 w4 w5", do_sample=True, temperature=3.0, max_new_tokens=25, eos_token_id=[], seed=5)
    assert ours.new_tokens[0].tolist() == theirs.tolist()
    assert max(theirs.tolist()) >= N_WORDS  # one of those rows was drawn, and its text is none
    assert len(ours.new_texts[0].split()) == sum(token < N_WORDS for token in theirs.tolist())
