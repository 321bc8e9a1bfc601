"""Every row of docs/from-transformerlens.md: what the page says lenskit does, it does."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity_table import Row, error, hf_folder, hf_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import lenskit as lk
from lenskit.analysis import (
    ablate_heads,
    induction_scores,
    logit_lens,
    mean_loss,
    patch_heads,
    patch_positions,
    previous_token_scores,
    token_losses,
    top_tokens,
)
from lenskit.checkpoints.source import EMBEDDED
from lenskit.models.gpt2 import GPT2Config
from lenskit.viz import heat_map

PAGE = Path(__file__).parent.parent / "docs" / "from-transformerlens.md"
text = "The Eiffel Tower is in the city of"
other = "Hagia Sophia can be found in the city of"


@pytest.fixture(params=["demo_gpt2", "demo_llama"])
def model(request: pytest.FixtureRequest) -> lk.HookedTransformer:
    """Both demo models in turn. Read only: all tests share them."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens(model: lk.HookedTransformer) -> Tensor:
    return model.to_tokens(text).tokens


def close(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-3)


def best(logits: Tensor) -> int:
    return int(logits[0, -1].argmax())


# -- loading


def test_loading() -> None:
    model = lk.HookedTransformer.from_pretrained("demo-gpt2")
    assert not model.training
    assert model.to_string(best(model(text))) == " Paris"
    with pytest.raises(lk.errors.CheckpointNotFoundError):
        lk.HookedTransformer.from_pretrained("./gpt2-small")


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_no_processing(name: str) -> None:
    """The checkpoint's own numbers, and so Hugging Face's logits."""
    model = lk.HookedTransformer.from_pretrained(name)
    stored = load_file(EMBEDDED / name / "model.safetensors")
    assert any(torch.equal(model.embed.W_E, tensor) for tensor in stored.values())
    theirs = AutoModelForCausalLM.from_pretrained(EMBEDDED / name)
    tokens = model.to_tokens(text).tokens
    assert close(model(tokens), theirs(tokens).logits)


def test_fold_by_hand(demo_llama: lk.HookedTransformer) -> None:
    block = demo_llama.blocks[1]
    folded = block.ln1.weight[:, None] * block.attn.W_Q
    _, cache = demo_llama.run_with_cache(text)
    normalized = cache["normalized", 1, "ln1"]
    assert close(torch.einsum("bpm,hmd->bphd", normalized, folded), cache["q", 1])


def test_dtype_and_device() -> None:
    model = lk.HookedTransformer.from_pretrained("demo-llama", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.device.type == "cpu"
    as_stored = lk.HookedTransformer.from_pretrained("demo-llama")
    assert {p.dtype for p in as_stored.parameters()} == {torch.float32}


def test_device_map() -> None:
    model = lk.HookedTransformer.from_pretrained("demo-llama", device_map="auto")
    assert model.to_string(best(model(text))) == " Paris"


def test_from_a_hugging_face_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf_model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "demo-llama")
    with torch.no_grad():
        hf_model.model.norm.weight.mul_(2)
    hf_model.save_pretrained("folder")
    model = lk.HookedTransformer.from_pretrained("folder")
    ids = torch.arange(9)[None]
    assert close(model(ids), hf_model(ids).logits)


def test_from_a_config() -> None:
    cfg = dataclasses.replace(lk.HookedTransformer.from_pretrained("demo-gpt2", device="meta").cfg, n_layers=2)
    assert isinstance(cfg, GPT2Config)
    model = lk.HookedTransformer(cfg)
    assert len(model.blocks) == 2
    assert model(torch.arange(5)).shape == (1, 5, cfg.d_vocab)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return hf_folder(Row("x", "bert"), tmp_path)


@torch.no_grad()
def test_an_encoder(encoder: Path) -> None:
    model = lk.HookedTransformer.from_pretrained(encoder)
    tokens = torch.arange(7)[None]
    hidden = hf_model(encoder)(tokens, output_hidden_states=True).hidden_states
    _, cache = model.run_with_cache(tokens)
    assert error(cache["resid_post", 1], hidden[2]) < 1e-5
    block = model.blocks[1]
    assert error(block.ln1_sum(cache["resid_pre", 1] + cache["attn_out", 1]), cache["resid_mid", 1]) < 1e-5
    assert {"unembed.hook_pre", "unembed.hook_post", "unembed.ln.hook_scale"} <= set(cache)
    with pytest.raises(lk.errors.NotCausalError):
        model.generate(tokens, max_new_tokens=1)


# -- text


def test_to_tokens(model: lk.HookedTransformer) -> None:
    batch = model.to_tokens([text, "Rome"])
    assert batch.tokens.shape == batch.mask.shape == (2, len(model.to_str_tokens(text)))
    assert batch.mask[0].all()
    assert batch.mask[1].tolist() == sorted(batch.mask[1].tolist()), "padded on the left"
    assert model.to_tokens(text).mask is None


def test_prepend_bos(model: lk.HookedTransformer) -> None:
    plain, begun = model.to_tokens(text).tokens[0], model.to_tokens(model.tokenizer.bos_token + text).tokens[0]
    assert plain[0] != model.tokenizer.bos_token_id, "this tokenizer is configured to add none"
    assert begun.tolist() == [model.tokenizer.bos_token_id, *plain.tolist()]
    assert plain.tolist() == model.tokenizer(text)["input_ids"]


def test_to_str_tokens(model: lk.HookedTransformer) -> None:
    assert "".join(model.to_str_tokens(text)) == text
    assert len(model.to_str_tokens(text)) == model.to_tokens(text).tokens.shape[1]


def test_to_string(model: lk.HookedTransformer, tokens: Tensor) -> None:
    assert model.to_string(tokens[0]) == text
    assert [model.to_string(row) for row in tokens] == [text]


def test_to_single_token(model: lk.HookedTransformer) -> None:
    [token] = model.to_tokens(" Paris").tokens[0].tolist()
    assert model.to_string(token) == " Paris"
    with pytest.raises(ValueError, match="too many values"):
        [token] = model.to_tokens(" New York").tokens[0].tolist()


def test_token_position(model: lk.HookedTransformer, tokens: Tensor) -> None:
    position = model.to_str_tokens(text).index(" city")
    assert model.to_string(tokens[0, position]) == " city"


def test_tokenizer(model: lk.HookedTransformer) -> None:
    assert isinstance(model.tokenizer, PreTrainedTokenizerBase)


# -- running


def test_logits(model: lk.HookedTransformer, tokens: Tensor) -> None:
    assert model(text).shape == (1, tokens.shape[1], model.cfg.d_vocab)
    assert torch.equal(model(text), model(tokens))


def test_loss(model: lk.HookedTransformer, tokens: Tensor) -> None:
    result = model.run_with_hooks(text)
    loss = mean_loss(result.logits, result.tokens, result.mask)
    per_token = token_losses(result.logits, result.tokens, result.mask)
    expected = F.cross_entropy(model(text)[0, :-1], tokens[0, 1:], reduction="none")
    assert close(per_token[0], expected)
    assert close(loss, expected.mean())
    padded = model.run_with_hooks([text, "Rome is in Italy"])
    rows = token_losses(padded.logits, padded.tokens, padded.mask)
    assert close(rows[0], expected), "padding counts for nothing"
    assert rows[1].isnan().any()


def test_no_logits(model: lk.HookedTransformer) -> None:
    reached = []
    watched = ("blocks.1.hook_resid_post", lambda act, hook: reached.append(hook.name))
    hooks = [lk.Save("blocks.0.hook_resid_post"), lk.Stop("blocks.0.hook_resid_post")]
    with model.hooks([watched]):
        result = model.run_with_hooks(text, hooks)
    assert "blocks.0.hook_resid_post" in result.saved
    assert reached == []
    with pytest.raises(lk.errors.NotSavedError):
        _ = result.logits


def test_layers(model: lk.HookedTransformer) -> None:
    resid = model(text, stop_at_layer=2)
    assert resid.shape[-1] == model.cfg.d_model
    assert torch.equal(model(resid, start_at_layer=2), model(text))


@torch.no_grad()
def test_token_types(encoder: Path) -> None:
    model, hf = lk.HookedTransformer.from_pretrained(encoder), hf_model(encoder)
    tokens, types = torch.arange(6)[None], torch.tensor([[0, 0, 0, 1, 1, 1]])
    logits = model({"input_ids": tokens, "token_type_ids": types})
    assert error(logits, hf(tokens, token_type_ids=types).logits) < 1e-5
    assert error(logits, hf(tokens).logits) > 1e-3


def test_attention_mask(model: lk.HookedTransformer, tokens: Tensor) -> None:
    for side in ((2, 0), (0, 2)):
        padded, mask = F.pad(tokens, side), F.pad(torch.ones_like(tokens), side)
        logits = model(padded, mask)
        assert close(logits[mask.bool()], model(tokens)[0])


def test_past_kv_cache(model: lk.HookedTransformer, tokens: Tensor) -> None:
    past = model.prefill(tokens[:, :4])
    for _ in range(2):
        assert close(model.run_with_hooks(tokens[:, 4:], past=past).logits, model(tokens)[:, 4:]), (
            "and is left as it was"
        )


# -- caching


def test_run_with_cache(model: lk.HookedTransformer) -> None:
    logits, cache = model.run_with_cache(text)
    assert close(logits, model(text))
    on_demand = {name for name, point in model.hook_points.items() if point.on_demand}
    assert set(cache) == set(model.hook_points) - on_demand
    assert not any(activation.requires_grad for activation in cache.values())
    _, cache = model.run_with_cache(text, grad=True)
    assert cache["resid_post", 0].requires_grad


def test_names_filter(model: lk.HookedTransformer) -> None:
    expected = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    for names in ("blocks.*.hook_resid_post", expected, lambda name: name.endswith("hook_resid_post")):
        _, cache = model.run_with_cache(text, names=names)
        assert list(cache) == expected
    [same] = model.run_with_cache(text, names="blocks.0.hook_resid_post")[1].values()
    assert torch.equal(same, cache["resid_post", 0])


def test_cache_keys(model: lk.HookedTransformer) -> None:
    _, cache = model.run_with_cache(text)
    for short, name in [
        (cache["blocks.0.attn.hook_q"], "blocks.0.attn.hook_q"),
        (cache["q", 0], "blocks.0.attn.hook_q"),
        (cache["resid_post", -1], f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"),
        (cache["scale", 0, "ln1"], "blocks.0.ln1.hook_scale"),
        (cache["embed"], "hook_embed"),
        (cache["ln_final.hook_scale"], "ln_final.hook_scale"),
    ]:
        assert torch.equal(short, dict(cache)[name])


def test_remove_batch_dim(model: lk.HookedTransformer) -> None:
    _, cache = model.run_with_cache(text)
    saved = model.run_with_hooks(text, [lk.Save("blocks.0.attn.hook_pattern", prompts=0)]).saved
    assert close(saved["blocks.0.attn.hook_pattern"], cache["pattern", 0][0])


def test_patterns(model: lk.HookedTransformer) -> None:
    _, cache = model.run_with_cache(text, names="blocks.*.attn.hook_pattern")
    pattern = cache["pattern", 0]
    assert pattern.shape[1] == model.cfg.n_heads
    assert close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    assert torch.equal(pattern, pattern.tril())
    labels = model.to_str_tokens(text)
    figure = heat_map(pattern[0, 3], rows=labels, columns=labels)
    assert len(figure.data[0].z) == len(labels)


def test_stack_activation(model: lk.HookedTransformer) -> None:
    _, cache = model.run_with_cache(text)
    assert torch.equal(cache.stack("resid_post")[2], cache["resid_post", 2])
    assert len(cache.stack("resid_post")) == model.cfg.n_layers
    assert torch.equal(cache.stack("scale", "ln1")[2], cache["scale", 2, "ln1"])


def test_decompose_resid(model: lk.HookedTransformer) -> None:
    _, cache = model.run_with_cache(text)
    parts = torch.cat([cache["embed"][None], cache.stack("attn_out"), cache.stack("mlp_out")])
    assert close(parts.sum(0) + cache.get("pos_embed", 0), cache["resid_post", -1])


def test_head_results(model: lk.HookedTransformer) -> None:
    _, cache = model.run_with_cache(text, names=["*.hook_attn_out", "*.hook_result"])
    results = cache.stack("result")
    assert results.shape[3] == model.cfg.n_heads
    assert close(results.sum(3) + model.b_O[:, None, None], cache.stack("attn_out"))


def test_neuron_results(model: lk.HookedTransformer) -> None:
    _, cache = model.run_with_cache(text)
    mlp = model.blocks[1].mlp
    results = cache["post", 1][..., None] * mlp.W_out
    assert close(results.sum(-2) + mlp.b_out, cache["mlp_out", 1])


def test_logit_lens(model: lk.HookedTransformer) -> None:
    logits, cache = model.run_with_cache(text)
    lens = logit_lens(model, cache)
    assert lens.shape == (model.cfg.n_layers, 1, model.cfg.d_vocab), "of the last token of each prompt"
    assert close(lens[-1], logits[:, -1])
    assert close(lens[1], model.unembed(model.ln_final(cache["resid_post", 1]))[:, -1])


def test_logit_attribution(model: lk.HookedTransformer) -> None:
    logits, cache = model.run_with_cache(text)
    token = best(logits)
    parts = torch.cat([cache["embed"][None], cache.stack("attn_out"), cache.stack("mlp_out")])
    offset = 0.0
    if "pos_embed" in cache:  # GPT-2, whose norm is a LayerNorm
        parts = torch.cat([parts, cache["pos_embed"][None]])
        parts = parts - parts.mean(-1, keepdim=True)
        offset = model.ln_final.bias @ model.unembed.W_U[:, token]
    direction = model.ln_final.weight * model.unembed.W_U[:, token]
    shares = parts @ direction / cache["ln_final.hook_scale"][..., 0]
    assert close(shares.sum(0) + offset, logits[..., token])


# -- hooks


def test_run_with_hooks(model: lk.HookedTransformer) -> None:
    def zero(act: Tensor, hook: lk.HookPoint) -> None:
        act[:] = 0

    result = model.run_with_hooks(text, hooks=[("blocks.0.hook_mlp_out", zero)])
    returned = model.run_with_hooks(text, hooks=[("blocks.0.hook_mlp_out", lambda act, hook: act * 0)])
    assert torch.equal(result.logits, returned.logits)
    assert not close(result.logits, model(text))


def test_an_edit_leaves_the_cache_alone(model: lk.HookedTransformer) -> None:
    """What somebody else keeps of a point is not what a later hook makes of it."""
    kept = []
    with model.hooks([("blocks.0.hook_mlp_out", lambda act, hook: kept.append(act))]):
        model.run_with_hooks(text, hooks=[("blocks.0.hook_mlp_out", lambda act, hook: act.zero_())])
    assert kept[0].any()


def test_bwd_hooks(model: lk.HookedTransformer) -> None:
    seen: list[Tensor] = []
    watch = ("blocks.0.hook_resid_post", lambda grad, hook: seen.append(grad))
    stop = ("blocks.1.hook_resid_post", lambda grad, hook: grad * 0)
    model.run_with_hooks(text, bwd_hooks=[watch]).logits[0, -1, 0].backward()
    model.run_with_hooks(text, bwd_hooks=[watch, stop]).logits[0, -1, 0].backward()
    model.zero_grad()
    assert seen[0].any()
    assert not seen[1].any(), "what a hook returns goes on as the gradient"


def test_hooks_in_a_block(model: lk.HookedTransformer) -> None:
    before = model(text)
    with model.hooks([("blocks.0.hook_mlp_out", lambda act, hook: act * 0)]):
        assert not close(model(text), before)
    assert torch.equal(model(text), before)
    with pytest.raises(AttributeError):
        _ = model.add_hook


def test_hook_points(model: lk.HookedTransformer) -> None:
    seen: list[Any] = []
    model.run_with_hooks(
        text, hooks=[("blocks.2.hook_mlp_out", lambda act, hook: seen.append((hook.name, hook.layer)))]
    )
    assert seen == [("blocks.2.hook_mlp_out", 2)]


# What transformer_lens.utilities.get_act_name gives for layer 0 (version 3.9).
NAMES = {
    "q": "blocks.0.attn.hook_q",
    "k": "blocks.0.attn.hook_k",
    "v": "blocks.0.attn.hook_v",
    "z": "blocks.0.attn.hook_z",
    "result": "blocks.0.attn.hook_result",
    "pattern": "blocks.0.attn.hook_pattern",
    "attn_scores": "blocks.0.attn.hook_attn_scores",
    "pre": "blocks.0.mlp.hook_pre",
    "post": "blocks.0.mlp.hook_post",
    "resid_pre": "blocks.0.hook_resid_pre",
    "resid_mid": "blocks.0.hook_resid_mid",
    "resid_post": "blocks.0.hook_resid_post",
    "attn_out": "blocks.0.hook_attn_out",
    "mlp_out": "blocks.0.hook_mlp_out",
    "attn_in": "blocks.0.hook_attn_in",
    "q_input": "blocks.0.hook_q_input",
    "k_input": "blocks.0.hook_k_input",
    "v_input": "blocks.0.hook_v_input",
    "mlp_in": "blocks.0.hook_mlp_in",
}


def test_names(model: lk.HookedTransformer) -> None:
    assert set(NAMES.values()) < set(model.hook_names())
    assert {"hook_embed", "ln_final.hook_scale", "blocks.0.ln1.hook_normalized"} < set(model.hook_names())
    _, cache = model.run_with_cache(text, names=list(NAMES.values()))
    for short, name in NAMES.items():
        assert cache.full_name((short, 0)) == name
    assert model.hook_names("blocks.*.attn.hook_z") == [f"blocks.{n}.attn.hook_z" for n in range(model.cfg.n_layers)]


def test_no_flags(model: lk.HookedTransformer) -> None:
    _, cache = model.run_with_cache(text, names="blocks.0.attn.hook_result")
    assert cache["result", 0].any()
    for point in ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in", "hook_mlp_in", "attn.hook_result"):
        edited = model.run_with_hooks(text, hooks=[(f"blocks.0.{point}", lambda act, hook: act * 0)])
        assert not close(edited.logits, model(text)), "asking for it is what turns it on"


def test_nothing_is_ignored(model: lk.HookedTransformer) -> None:
    with pytest.raises(lk.errors.UnknownHookPointError):
        model.run_with_hooks(text, hooks=[("blocks.0.hook_mlp_oat", lambda act, hook: act)])
    with pytest.raises(lk.errors.UnknownHookPointError):
        model.run_with_cache(text, names=lambda name: False)
    with pytest.raises(lk.errors.ReplacementError):
        model.run_with_hooks(text, hooks=[("blocks.0.hook_mlp_out", lambda act, hook: act[:, -1])])


# -- patching and ablation


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1].log_softmax(-1).max()


def fitting(model: lk.HookedTransformer) -> tuple[Tensor, Tensor]:
    """Two prompts of one length."""
    length = min(len(model.to_str_tokens(prompt)) for prompt in (text, other))
    one, two = (model.to_tokens(prompt).tokens[:, -length:] for prompt in (text, other))
    return one, two


def test_patch_positions(model: lk.HookedTransformer) -> None:
    clean, corrupted = fitting(model)
    table = patch_positions(model, clean, corrupted, metric, point="hook_resid_pre")
    assert table.shape == (model.cfg.n_layers, clean.shape[1])
    value = model.run_with_cache(clean)[1]["resid_pre", 2][:, 5]
    by_hand = model.run_with_hooks(corrupted, [lk.Set("blocks.2.hook_resid_pre", value, tokens=5)])
    assert close(table[2, 5], metric(by_hand.logits))


def test_patch_heads(model: lk.HookedTransformer) -> None:
    clean, corrupted = fitting(model)
    table = patch_heads(model, clean, corrupted, metric, point="attn.hook_z")
    assert table.shape == (model.cfg.n_layers, model.cfg.n_heads)
    value = model.run_with_cache(clean)[1]["z", 2][:, :, 5]
    by_hand = model.run_with_hooks(corrupted, [lk.Set("blocks.2.attn.hook_z", value, heads=5)])
    assert close(table[2, 5], metric(by_hand.logits))
    keys = patch_heads(model, clean, corrupted, metric, point="attn.hook_k")
    assert keys.shape[1] == model.cfg.n_key_value_heads


def test_patch_one_place(model: lk.HookedTransformer) -> None:
    clean, corrupted = fitting(model)
    _, cache = model.run_with_cache(clean)
    edit = lk.Set("blocks.1.attn.hook_z", cache["z", 1][:, 3, 5], tokens=3, heads=5)
    _, patched = model.run_with_cache(corrupted, hooks=[edit])
    _, before = model.run_with_cache(corrupted)
    changed = patched["z", 1] != before["z", 1]
    assert changed.nonzero()[:, 1].unique().tolist() == [3]
    assert changed.nonzero()[:, 2].unique().tolist() == [5]
    assert torch.equal(patched["z", 1][:, 3, 5], cache["z", 1][:, 3, 5])


def test_patch_from_the_batch(model: lk.HookedTransformer) -> None:
    point = "blocks.1.hook_resid_pre"
    edit = lk.Set(point, lk.Act(point, prompts=0, tokens=-1), prompts=1, tokens=-1)
    result = model.run_with_hooks([text, other], [edit, lk.Save(point, tokens=-1)])
    assert torch.equal(result.saved[point][1], result.saved[point][0])


def test_ablation(model: lk.HookedTransformer) -> None:
    edited = model.run_with_hooks(text, [lk.Set("blocks.0.attn.hook_z", 0.0, heads=7)])
    table = ablate_heads(model, text)
    assert table.without.shape == (model.cfg.n_layers, model.cfg.n_heads)
    assert close(table.without[0, 7], mean_loss(edited.logits, edited.tokens))


def test_mean_ablation(model: lk.HookedTransformer) -> None:
    point = "blocks.1.hook_mlp_out"
    mean = model.run_with_cache([text, other], names=point)[1][point].mean((0, 1))
    saved = model.run_with_hooks(text, [lk.Set(point, mean), lk.Save(point, tokens=0)]).saved
    assert torch.equal(saved[point][0], mean)


def test_head_detector(model: lk.HookedTransformer) -> None:
    scores = induction_scores(model)
    assert scores.shape == (model.cfg.n_layers, model.cfg.n_heads)
    assert scores.max() > 0.8
    assert previous_token_scores(model, text).shape == scores.shape


# -- generating


def test_generate(model: lk.HookedTransformer) -> None:
    generation = model.generate(text, max_new_tokens=3)
    assert generation.texts[0].startswith(f"{text} Paris.")
    assert generation.tokens[0].tolist() == [
        *model.to_tokens(text).tokens[0].tolist(),
        *generation.new_tokens[0].tolist(),
    ]
    assert int(generation.new_tokens[0][0]) == best(model(text)), "the likeliest, unless do_sample=True"


def test_generate_options(model: lk.HookedTransformer) -> None:
    assert model.generate(text, max_new_tokens=5, eos_token_id=[]).steps_run == [5]
    assert model.generate(text, max_new_tokens=5).steps_run == [3]
    drawn = model.generate(text, max_new_tokens=5, do_sample=True, temperature=2.0, seed=0).tokens[0]
    assert drawn.tolist() != model.generate(text, max_new_tokens=5).tokens[0].tolist()
    for option in ("stop_at_eos", "prepend_bos", "use_past_kv_cache", "freq_penalty", "return_type"):
        with pytest.raises(lk.errors.GenerationError, match="to do:"):
            model.generate(text, max_new_tokens=5, **{option: True})


def test_generate_with_hooks(model: lk.HookedTransformer) -> None:
    hooks = [("blocks.0.hook_mlp_out", lambda act, hook: act * 0), lk.Save("blocks.-1.hook_resid_post", tokens=-1)]
    generation = model.generate(text, max_new_tokens=3, hooks=hooks)
    assert len(generation.saved["blocks.-1.hook_resid_post"]) == generation.steps_run[0]
    with model.hooks(hooks[:1]):
        assert model.generate(text, max_new_tokens=3).texts == generation.texts


def test_generate_stream(model: lk.HookedTransformer) -> None:
    pieces = [step.texts[0] for step in model.generate_steps(text, max_new_tokens=3)]
    assert "".join(pieces) == model.generate(text, max_new_tokens=3).new_texts[0]


def test_test_prompt(model: lk.HookedTransformer) -> None:
    guesses = top_tokens(model, model(text)[0, -1], k=10)
    assert guesses[0].text == " Paris"
    assert len(guesses) == 10


# -- weights and configs


def test_embedding_weights(demo_gpt2: lk.HookedTransformer) -> None:
    model, cfg = demo_gpt2, demo_gpt2.cfg
    assert model.embed.W_E.shape == (cfg.d_vocab, cfg.d_model)
    assert model.unembed.W_U.shape == (cfg.d_model, cfg.d_vocab)
    assert model.unembed.b_U.shape == (cfg.d_vocab,)
    assert model.pos_embed.W_pos.shape == (cfg.n_ctx, cfg.d_model)


def test_stacked_weights(model: lk.HookedTransformer) -> None:
    cfg = model.cfg
    assert model.W_Q.shape == (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head)
    assert model.W_O.shape == (cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model)
    assert model.W_in.shape == (cfg.n_layers, cfg.d_model, cfg.d_mlp)
    assert model.W_out.shape == (cfg.n_layers, cfg.d_mlp, cfg.d_model)
    assert model.W_K.shape == (cfg.n_layers, cfg.n_key_value_heads, cfg.d_model, cfg.d_head)
    for_each_query_head = model.W_K.repeat_interleave(cfg.n_heads // cfg.n_key_value_heads, dim=1)
    assert for_each_query_head.shape == model.W_Q.shape
    assert torch.equal(model.b_Q[1], model.blocks[1].attn.b_Q)


def test_writing_weights() -> None:
    model = lk.HookedTransformer.from_pretrained("demo-gpt2")
    before = model(text)
    with torch.no_grad():
        model.W_O.zero_()
        assert torch.equal(model(text), before), "a copy"
        model.blocks[0].attn.W_O.zero_()
        assert not close(model(text), before)


def test_circuits(demo_gpt2: lk.HookedTransformer) -> None:
    model = demo_gpt2
    ov = model.W_V @ model.W_O
    qk = model.W_Q @ model.W_K.mT
    assert ov.shape == qk.shape == (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model, model.cfg.d_model)
    _, cache = model.run_with_cache(text, names=["blocks.1.ln1.hook_normalized", "blocks.1.attn.hook_*"])
    x = cache["normalized", 1, "ln1"] * model.blocks[1].ln1.weight + model.blocks[1].ln1.bias
    moved = torch.einsum("bhqk,bkm,hmn->bqhn", cache["pattern", 1], x, ov[1])
    biased = torch.einsum("hd,hdm->hm", model.b_V[1], model.W_O[1])
    assert close(moved + biased, model.run_with_cache(text, names="blocks.1.attn.hook_result")[1]["result", 1])


def test_residual_directions(model: lk.HookedTransformer) -> None:
    logits, cache = model.run_with_cache(text)
    token = best(logits)
    direction = model.unembed.W_U[:, token]
    assert close(model.ln_final(cache["resid_post", -1]) @ direction, logits[..., token])


def test_cfg(model: lk.HookedTransformer) -> None:
    cfg = model.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads) == (4, 128, 8)
    assert (cfg.d_vocab, cfg.n_ctx) == (1280, 256)
    assert cfg.d_head * cfg.n_heads >= cfg.d_model
    assert cfg.act_fn in ("gelu_new", "silu")
    assert cfg.eps > 0
    assert cfg.n_key_value_heads in (4, 8)
    assert model.device.type == "cpu"
    assert model.embed.W_E.dtype == torch.float32
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.n_ctx = 3


# -- the page


def rows() -> list[tuple[str, list[str]]]:
    """Of each row, its test's name and what it has in code in the column of lenskit."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        linked = re.fullmatch(r"\[`(\w+)`\]\(\.\./tests/test_from_transformerlens\.py\)", cells[-1] if cells else "")
        if linked:
            found.append((linked[1], re.findall(r"`([^`]+)`", cells[1])))
    return found


def test_every_row_has_its_test_and_every_test_its_row() -> None:
    names = {name for name in globals() if name.startswith("test_")}
    assert {f"test_{name}" for name, _ in rows()} == names - {"test_every_row_has_its_test_and_every_test_its_row"}
    assert len(rows()) > 30
    for name, spellings in rows():
        source = "".join(inspect.getsource(globals()[f"test_{name}"]).split())
        for spelling in spellings:
            assert "".join(spelling.split()) in source, f"{spelling} is not what test_{name} runs"
