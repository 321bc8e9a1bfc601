"""Every row of docs/from-nnsight.md: what the documents of nnsight, NDIF and GPI show and claim, lenskit does."""

# ruff: noqa: PT012, SIM117 (blocks of several lines, one within the other, are what is tested)

import json
import re
import shlex
import shutil
import threading
import tomllib
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tables
import torch
from fake_server import serving
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lenskit as lk
from lenskit import cli
from lenskit.analysis import mean_loss
from lenskit.checkpoints.source import EMBEDDED
from lenskit.errors import GenerationError, KeyRefusedError, NotSavedError, StepError, TraceError, ValueFitError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "from-nnsight.md"

prompt = "The Eiffel Tower is in the city of"  # 11 tokens of the demo models, 10 of GPT-2
garden = "Madison Square Garden is located in the city of New"
blanks = "_ _ _ _ _ _ _ _ _ _"
city = "Nyhavn lies in Copenhagen. Copenhagen is the home of Nyhavn."


@pytest.fixture(params=["demo_gpt2", "demo_llama"])
def model(request: pytest.FixtureRequest) -> lk.HookedTransformer:
    """Both demo models in turn. Read only: all tests share them."""
    return request.getfixturevalue(request.param)


def close(one: Tensor, two: Tensor, tolerance: float = 1e-4) -> bool:
    return one.shape == two.shape and bool(((one - two).abs() <= tolerance * (1 + two.abs().max())).all())


def shapes(values: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in values]


def watched(model: lk.HookedTransformer, site: str = "blocks.*.hook_resid_post") -> tuple[list[str], Any]:
    """A list that the names of the hook points are added to as the model comes by them, and the scope of that."""
    reached: list[str] = []
    return reached, model.hooks([(site, lambda act, hook: reached.append(hook.name))])


# -- installing and loading


def test_installing() -> None:
    command = "pip install lenskit-interp"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == command.split()[-1]
    assert any(name.startswith("accelerate") for name in project["dependencies"])


def test_loading() -> None:
    model = lk.HookedTransformer.from_pretrained("demo-gpt2")
    with model.trace(prompt, max_new_tokens=1) as run:
        pass
    assert run.texts == [f"{prompt} Paris"]


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_device_map(name: str) -> None:
    model = lk.HookedTransformer.from_pretrained(name, device_map="auto")
    with model.trace(prompt, max_new_tokens=1) as run:
        hidden = model.blocks[-1].output.save()
    assert run.texts == [f"{prompt} Paris"]
    assert hidden.value.device == next(model.blocks[-1].parameters()).device


def test_device_of_a_generation() -> None:
    model = lk.HookedTransformer.from_pretrained("demo-gpt2", device="cpu")
    assert model.device.type == "cpu"
    with pytest.raises(GenerationError, match="device_map"), model.trace(prompt, max_new_tokens=1, device_map="cpu"):
        pass


def test_when_weights_are_loaded() -> None:
    loaded = lk.HookedTransformer.from_pretrained("demo-gpt2")
    empty = lk.HookedTransformer.from_pretrained("demo-gpt2", device="meta")
    assert not any(weight.is_meta for weight in loaded.parameters())
    assert all(weight.is_meta for weight in empty.parameters())
    assert empty.shapes(prompt) == loaded.shapes(prompt)
    assert empty.shapes(prompt)["blocks.3.hook_resid_post"] == (1, 11, 128)


def test_checkpoint_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own cache, wherever its settings say that is."""
    commit = "c0ffee" * 6 + "c0de"
    repository = tmp_path / "models--some--demo"
    shutil.copytree(EMBEDDED / "demo-gpt2", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = lk.HookedTransformer.from_pretrained("some/demo")
    assert (model.source, model.cfg.d_model) == ("some/demo", 128)


def test_gated_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(repo: str, *, token: Any, **_: Any) -> Any:
        asked.append((repo, token))
        return EMBEDDED / "demo-llama"

    monkeypatch.setattr(huggingface_hub, "model_info", answer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    model = lk.HookedTransformer.from_pretrained("some/gated", token="hf_mine")
    assert set(asked) == {("some/gated", "hf_mine")}
    assert isinstance(model, lk.HookedTransformer)
    asked.clear()
    lk.HookedTransformer.from_pretrained("some/gated")
    assert set(asked) == {("some/gated", None)}, "None: the client uses its own login"


def test_the_tree(model: lk.HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    print(model)
    tree = capsys.readouterr().out
    for part in ("(embed): Embed(1280 tokens -> 128)", "(0-3): 4 x", "(attn): Attention", "(ln_final)", "(unembed)"):
        assert part in tree
    for name in model.hook_names():
        assert f"({name.rpartition('.')[2]}): HookPoint(" in tree
    assert "(hook_z): HookPoint(batch pos head d_head)" in tree


# Of layer 2: Hugging Face's modules, whose outputs nnsight reads, and ours.
THEIRS: dict[str, dict[str, str]] = {
    "demo_gpt2": {
        "transformer.wte": "embed",
        "transformer.wpe": "pos_embed",
        "transformer.h.2.ln_1": "blocks.2.ln1",
        "transformer.h.2.attn": "blocks.2.attn",
        "transformer.h.2.ln_2": "blocks.2.ln2",
        "transformer.h.2.mlp": "blocks.2.mlp",
        "transformer.h.2": "blocks.2",
        "transformer.ln_f": "ln_final",
        "lm_head": "unembed",
    },
    "demo_llama": {
        "model.embed_tokens": "embed",
        "model.layers.2.input_layernorm": "blocks.2.ln1",
        "model.layers.2.self_attn": "blocks.2.attn",
        "model.layers.2.post_attention_layernorm": "blocks.2.ln2",
        "model.layers.2.mlp": "blocks.2.mlp",
        "model.layers.2": "blocks.2",
        "model.norm": "ln_final",
        "lm_head": "unembed",
    },
}


@pytest.mark.parametrize("name", list(THEIRS))
def test_modules(name: str, request: pytest.FixtureRequest) -> None:
    """Their outputs are those that Hugging Face's modules have, which are what nnsight reads."""
    model: lk.HookedTransformer = request.getfixturevalue(name)
    theirs = AutoModelForCausalLM.from_pretrained(EMBEDDED / name.replace("_", "-"))
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    for path in THEIRS[name]:
        theirs.get_submodule(path).register_forward_hook(keep(path))
    with torch.no_grad():
        theirs(model.to_tokens(prompt).tokens)
        with model.trace(prompt):
            ours = {path: model.get_submodule(own).output.save() for path, own in THEIRS[name].items()}
            again = [
                model.embed.output.save(),
                model.blocks[2].ln1.output.save(),
                model.blocks[2].attn.output.save(),
                model.blocks[2].ln2.output.save(),
                model.blocks[2].mlp.output.save(),
                model.blocks[2].output.save(),
                model.ln_final.output.save(),
                model.unembed.output.save(),
            ]
    for path, proxy in ours.items():
        assert close(proxy.value.expand_as(found[path]), found[path]), path
    paths = [path for path in THEIRS[name] if path != "transformer.wpe"]
    for path, proxy in zip(paths, again, strict=True):
        assert torch.equal(proxy.value, ours[path].value), path


def test_the_last_layer(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        one = model.blocks[-1].output.save()
        two = model.blocks[3].hook_resid_post.output.save()
    assert torch.equal(one.value, two.value)


def test_tokenizer(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=1) as run:
        pass
    assert model.tokenizer.decode(run.tokens[0]) == f"{prompt} Paris"
    assert model.tokenizer.encode(prompt) == model.to_tokens(prompt).tokens[0].tolist()


# -- the block


def test_the_first_example(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=1) as run:
        hidden_states = model.blocks[-1].output.save()
    output = run.tokens
    hidden_states = hidden_states.value
    assert model.tokenizer.decode(output[0]) == f"{prompt} Paris"
    assert close(hidden_states, model.run_with_cache(prompt)[1]["resid_post", -1])
    assert shapes([hidden_states]) == [(1, 11, 128)]


def test_the_output(model: lk.HookedTransformer) -> None:
    """One row of ids a prompt, which has its prompt."""
    with model.trace(prompt, max_new_tokens=1) as run:
        pass
    ids = model.to_tokens(prompt).tokens[0]
    assert [row.tolist() for row in run.tokens] == [[*ids.tolist(), *model.to_tokens(" Paris").tokens[0].tolist()]]
    assert run.texts == [model.tokenizer.decode(row) for row in run.tokens]


def test_prompt_and_answer(model: lk.HookedTransformer) -> None:
    n_new_tokens = 2
    with model.trace(prompt, max_new_tokens=n_new_tokens) as run:
        pass
    out = run.tokens
    assert model.tokenizer.decode(out[0][:-n_new_tokens]) == prompt
    assert model.tokenizer.decode(out[0][-n_new_tokens:]) == " Paris."
    assert run.output.new_texts[0] == " Paris."
    with model.trace(prompt, max_new_tokens=50) as run:
        pass
    assert len(run.output.new_tokens[0]) == 3, "the text ended by itself, so the last 50 ids would be the prompt's too"


def test_options(model: lk.HookedTransformer) -> None:
    drawn = {"max_new_tokens": 5, "do_sample": True, "temperature": 2.0, "seed": 0}
    with model.trace(prompt, max_new_tokens=5, do_sample=True, temperature=2.0, seed=0) as run:
        pass
    assert run.texts == model.generate(prompt, **drawn).texts
    assert run.texts != model.generate(prompt, max_new_tokens=5).texts
    with pytest.raises(GenerationError, match="beam search"), model.trace(prompt, max_new_tokens=5, num_beams=2):
        pass


def test_greedy(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=3, do_sample=False) as run:
        pass
    with model.trace(prompt, max_new_tokens=3) as same:
        pass
    assert run.texts == same.texts == [f"{prompt} Paris.<|endoftext|>"]


def test_silence(model: lk.HookedTransformer, capfd: pytest.CaptureFixture[str]) -> None:
    with model.trace(prompt, max_new_tokens=3):
        pass
    assert capfd.readouterr() == ("", "")


def test_nothing_runs_before_the_end(model: lk.HookedTransformer) -> None:
    reached, watching = watched(model)
    with watching, model.trace(prompt, max_new_tokens=1):
        hidden = model.blocks[-1].output.save()
        (hidden * 2).sum().save()
        assert reached == []
    assert len(reached) == model.cfg.n_layers


def test_the_graph(model: lk.HookedTransformer) -> None:
    with model.trace(prompt) as run:
        hidden = model.blocks[1].output
        model.blocks[2].output = hidden * 2
        model.unembed.output.t[-1].save("last")
    [edit, save] = run.plan.ops
    assert isinstance(edit, lk.Set)
    assert isinstance(save, lk.Save)
    assert str(run.plan.ops[0]) == "Set('blocks.2.hook_resid_post', Act('blocks.1.hook_resid_post') * 2)"
    again = model.run_with_hooks(prompt, hooks=run.plan)
    assert torch.equal(again.saved["last"], run.saved["last"])


def test_an_invoke_is_about_its_prompt(model: lk.HookedTransformer) -> None:
    with model.trace(max_new_tokens=3) as run:
        with run.invoke(prompt):
            model.blocks[1].output = 0.0
            first = model.blocks[1].output.save()
        with run.invoke(garden):
            second = model.blocks[1].output.save()
    assert not first.value.any()
    assert second.value.any(-1).all()
    assert run.texts[1] == f"{garden} York City."


def test_failing_blocks(model: lk.HookedTransformer) -> None:
    """What an error leaves behind is nothing: the model has not run, and is as it was."""
    reached, watching = watched(model)
    with pytest.raises(ZeroDivisionError), watching, model.trace(prompt):
        model.blocks[1].output = 0.0
        1 / 0  # noqa: B018
    assert reached == []
    assert model.generate(prompt, max_new_tokens=1).texts == [f"{prompt} Paris"]


# -- what can be read


def test_output_is_a_tensor(model: lk.HookedTransformer) -> None:
    with model.trace([prompt, prompt]):
        hidden = model.blocks[-1].output.save()
        first_prompt = model.blocks[-1].output[0].save()
    assert shapes([hidden.value, first_prompt.value]) == [(2, 11, 128), (11, 128)]
    assert torch.equal(hidden.value[0], first_prompt.value)


def test_shapes(model: lk.HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    with model.trace(prompt):
        print(model.blocks[-1].output.shape)
        keys, values = model.blocks[-1].attn.hook_k.output.shape, model.blocks[-1].attn.hook_v.output.shape
        patched = model.blocks[-1].output.t[2:5].sum(-1)
        assert (patched.shape, patched.dtype, patched.ndim) == ((1, 3), torch.float32, 2)
    assert capsys.readouterr().out == "torch.Size([1, 11, 128])\n"
    assert keys == values == (1, 11, model.cfg.n_key_value_heads, model.cfg.d_head)


def test_save(model: lk.HookedTransformer) -> None:
    """A copy, which later edits leave alone."""
    with model.trace(prompt):
        before = model.blocks[1].output.save()
        model.blocks[1].output[:] = 0
        after = model.blocks[1].output.save()
    assert close(before.value, model.run_with_cache(prompt)[1]["resid_post", 1])
    assert not after.value.any()


def test_what_is_not_saved(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        hidden = model.blocks[-1].output
        total = hidden.sum().save()
    assert total.value.isfinite()
    with pytest.raises(NotSavedError, match=r"write \.save\(\)"):
        _ = hidden.value


def test_memory(model: lk.HookedTransformer) -> None:
    """What is not saved is gone as soon as nothing that comes later needs it."""
    seen: dict[tuple[int, int], weakref.ref[Tensor]] = {}
    alive: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def watch(act: Tensor, hook: lk.HookPoint) -> None:
        here = (len(seen) // model.cfg.n_layers, hook.layer or 0)  # the step, and the layer
        alive[here] = [there for there, ref in seen.items() if ref() is not None]
        seen[here] = weakref.ref(act)

    with model.hooks([("blocks.*.hook_mlp_out", watch)]):
        with model.trace(prompt, max_new_tokens=3) as run:
            with run.all():
                total = [block.mlp.output.sum().save() for block in model.blocks]
    assert [len(each.value) for each in total] == [3] * model.cfg.n_layers
    for step in range(3):
        assert alive[step, 0] == [], "nothing of an earlier step"
        assert set(alive[step, 3]) <= {(step, 2)}, "at most the layer before"
    assert not any(ref() is not None for ref in seen.values())


def test_value_within_the_block(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        hidden = model.blocks[-1].output.save()
        with pytest.raises(NotSavedError, match="after the block"):
            _ = hidden.value
    assert hidden.value.any()


def test_input(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        given = model.blocks[1].input.save()
        before = model.blocks[0].output.save()
        normalized, stream = model.blocks[1].attn.input.save(), model.blocks[1].ln1.input
        same = model.blocks[1].ln1(stream).save()
        ids = model.embed.input
    assert torch.equal(given.value, before.value)
    assert close(normalized.value, same.value)
    assert torch.equal(ids, model.to_tokens(prompt).tokens)


def test_inside_of_attention(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        value = model.blocks[0].attn.hook_v.output.save()
        pattern = model.blocks[0].attn.hook_pattern.output.save()
    assert value.value.shape == (1, 11, model.cfg.n_key_value_heads, model.cfg.d_head)
    assert pattern.value.shape == (1, 8, 11, 11)
    assert close(pattern.value.sum(-1), torch.ones(1, 8, 11))


# -- operations and setting


def test_operations(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=1):
        hidden_states_pre = model.blocks[-1].output.save()
        hs_sum = torch.sum(hidden_states_pre).save()
        hs_edited = hidden_states_pre + hs_sum
        hs_edited = hs_edited.save()
    assert close(hs_sum.value, hidden_states_pre.value.sum())
    assert close(hs_edited.value, hidden_states_pre.value + hs_sum.value)


def test_other_functions(model: lk.HookedTransformer) -> None:
    with model.trace(prompt) as run:
        hidden = model.blocks[1].output
        with pytest.raises(lk.errors.ExpressionError, match=r"torch\.linalg\.svd"):
            torch.linalg.svd(hidden)
        values = run.apply(torch.linalg.svdvals, hidden)
        hidden = hidden.save()
    assert close(values.value, torch.linalg.svdvals(hidden.value))


def test_setting(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=1) as run:
        hidden_states_pre = model.blocks[-1].output.save()
        noise = (0.001**0.5) * torch.randn(hidden_states_pre.shape)
        model.blocks[-1].output = hidden_states_pre + noise
        hidden_states_post = model.blocks[-1].output.save()
        logits = model.unembed.output.save()
    difference = hidden_states_post.value - hidden_states_pre.value
    assert torch.equal(hidden_states_post.value, hidden_states_pre.value + noise)
    assert 0.02 < float(difference.detach().std()) < 0.04
    assert close(logits.value, model.unembed(model.ln_final(hidden_states_post.value)))
    assert not close(logits.value, model(prompt))
    assert len(run.tokens[0]) == 12


def test_setting_in_place(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        hidden = model.blocks[1].output
        hidden[:, 7] = 0
        hidden += 1
        model.blocks[1].output *= 2
        hidden = model.blocks[1].output.save()
    expected = model.run_with_cache(prompt)[1]["resid_post", 1].clone()
    expected[:, 7] = 0
    assert close(hidden.value, (expected + 1) * 2)


def test_ablation(model: lk.HookedTransformer) -> None:
    """The loss rises without the head."""
    tokens = model.tokenizer.encode(city)
    with model.trace(max_new_tokens=1) as run:
        with run.invoke(tokens):
            normal_logits = model.unembed.output.save()
        with run.invoke(tokens):
            value = model.blocks[0].attn.hook_v.output
            value[:, :, 2] = 0.0
            ablated_logits = model.unembed.output.save()
    normal_loss = mean_loss(normal_logits.value, torch.tensor([tokens]))
    ablated_loss = mean_loss(ablated_logits.value, torch.tensor([tokens]))
    assert ablated_loss > normal_loss + 0.05
    assert close(normal_logits.value, model(tokens)), "the other prompt is as it was"


def test_ablation_of_a_query_head(model: lk.HookedTransformer) -> None:
    tokens = model.to_tokens(city).tokens
    with model.trace(tokens) as run:
        model.blocks[0].attn.hook_z.output[:, :, 2] = 0.0
    assert mean_loss(run.output.logits, tokens) > mean_loss(model(tokens), tokens) + 0.05


# -- modules out of order


def test_modules_out_of_order(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        hidden_states = model.blocks[-1].output
        hidden_states = model.unembed(model.ln_final(hidden_states)).save()
        tokens = torch.softmax(hidden_states, dim=2).argmax(dim=2).save()
    assert close(hidden_states.value, model(prompt))
    assert tokens.value.shape == (1, 11)
    assert model.tokenizer.decode(tokens.value[0]).endswith("Tower is a the country of Paris")


def test_any_module_at_any_point(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        early = model.blocks[0].output.save()
        lens = model.unembed(model.ln_final(model.blocks[1].output.t[-1])).argmax(-1).save()
        other = model.blocks[3].mlp(model.blocks[3].ln2(early)).save()
        with pytest.raises(lk.errors.ExpressionError, match="cannot be applied"):
            model.blocks[3].attn(early)
    assert close(other.value, model.blocks[3].mlp(model.blocks[3].ln2(early.value)))
    assert lens.value.shape == (1,)


# -- what goes in


def test_text_and_ids(model: lk.HookedTransformer) -> None:
    gpt2_tokens = model.tokenizer.encode(city)
    with model.trace(city):
        of_text = model.blocks[-1].output.save()
    for given in (gpt2_tokens, torch.tensor(gpt2_tokens), [gpt2_tokens], [city]):
        with model.trace(given) as run:
            of_ids = model.blocks[-1].output.save()
        assert torch.equal(of_ids.value, of_text.value)
    assert run.tokens[0].tolist() == gpt2_tokens


def test_encodings(model: lk.HookedTransformer) -> None:
    input_ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is Nyhavn?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with model.trace(input_ids, max_new_tokens=3) as run:
        pass
    assert run.output.new_texts == [" Copenhagen.<|endoftext|>"]
    assert torch.equal(run.tokens[0][:-3], input_ids["input_ids"][0]), "ids are used as given"
    padded = model.tokenizer([prompt, "Nyhavn lies in"], padding=True, return_tensors="pt")
    with model.trace(padded, max_new_tokens=1) as run:
        pass
    assert run.texts == [f"{prompt} Paris", "Nyhavn lies in Copenhagen"]


def test_device_of_inputs(model: lk.HookedTransformer) -> None:
    input_ids = model.tokenizer(prompt, return_tensors="pt").to(model.device)
    with model.trace(input_ids) as run:
        hidden = model.blocks[0].output
        assert hidden.device == model.device
    assert run.tokens[0].device == model.device


# -- steps


def test_next(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=3) as run:
        hidden_states1 = model.blocks[-1].output.save()
        run.next()
        hidden_states2 = model.blocks[-1].output.save()
        run.next()
        hidden_states3 = model.blocks[-1].output.save()
    saved = [hidden_states1.value, hidden_states2.value, hidden_states3.value]
    assert shapes(saved) == [(1, 11, 128), (1, 1, 128), (1, 1, 128)]
    whole = model.run_with_cache(run.tokens[0][:-1])[1]["resid_post", -1]
    assert close(torch.cat(saved, 1), whole), "those of all tokens that were processed"


def test_next_of_a_module(model: lk.HookedTransformer) -> None:
    """There is one counter: what follows next() is about the next step, whatever module it names."""
    with model.trace(prompt, max_new_tokens=3) as run:
        first = model.blocks[-1].output.save()
        with run.iter[1]:
            second = model.blocks[-1].output.save()
            other = model.blocks[0].output.save()
        again = model.unembed.output.save()
    assert shapes([first.value, second.value, other.value]) == [(1, 11, 128), (1, 1, 128), (1, 1, 128)]
    assert again.value.shape == (1, 11, 1280), "behind the block it is step 0 as before"
    with pytest.raises(AttributeError):
        _ = model.blocks[-1].next


def test_the_old_loop(model: lk.HookedTransformer) -> None:
    hidden_states = []
    with model.trace(prompt, max_new_tokens=50, eos_token_id=[]) as run:
        for step in range(50):
            if step > 0:
                run.next()
            model.blocks[0].output[:] = 0
            hidden_states.append(model.blocks[-1].output.save())
    values = [proxy.value for proxy in hidden_states]
    assert len(values) == 50
    assert shapes(values) == [(1, 11, 128)] + [(1, 1, 128)] * 49
    edit = lk.Set("blocks.0.hook_resid_post", 0.0)
    whole = model.generate(prompt, max_new_tokens=50, eos_token_id=[], hooks=[edit])
    assert whole.tokens[0].tolist() == run.tokens[0].tolist(), "the edit was made at every step"


def test_next_past_the_end(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=2) as run:
        run.next()
        run.next()
        with pytest.raises(StepError, match="steps from 0 to 1"):
            model.blocks[0].output.save()


def test_all(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=50, eos_token_id=[]) as run:
        with run.all():
            model.blocks[0].output[:] = 0
            hidden_states = model.blocks[-1].output.save()
            zeros = model.blocks[0].output.save()
    assert len(hidden_states.value) == 50
    assert shapes(hidden_states.value) == [(1, 11, 128)] + [(1, 1, 128)] * 49
    assert not any(step.any() for step in zeros.value)


def test_all_modules(model: lk.HookedTransformer) -> None:
    """Of every module, not of one and its children."""
    with model.trace(prompt, max_new_tokens=3, eos_token_id=[]) as run:
        with run.all():
            model.blocks[0].output[:] = 0
            hidden_states = model.unembed.output.save()
    assert shapes(hidden_states.value) == [(1, 11, 1280), (1, 1, 1280), (1, 1, 1280)]


def test_outside_of_all(model: lk.HookedTransformer) -> None:
    """How to have what the recursive .all() gave: an edit at every step, and a save at the first."""
    with model.trace(prompt, max_new_tokens=3, eos_token_id=[]) as run:
        with run.all():
            model.blocks[0].output[:] = 0
        hidden_states = model.unembed.output.save()
    assert hidden_states.value.shape == (1, 11, 1280)
    edit = lk.Set("blocks.0.hook_resid_post", 0.0)
    assert run.texts == model.generate(prompt, max_new_tokens=3, eos_token_id=[], hooks=[edit]).texts


def test_iter(model: lk.HookedTransformer) -> None:
    start_it = 2
    end_it = 5
    with model.trace(prompt, max_new_tokens=8, eos_token_id=[]) as run:
        with run.iter[start_it:end_it]:
            model.blocks[0].output[:] = 0
            inside = model.blocks[0].output.save()
        with run.all():
            everywhere = model.blocks[0].output.save()
    assert len(inside.value) == 3
    assert [bool(step.any()) for step in everywhere.value] == [True, True, False, False, False, True, True, True]


def test_texts_that_end(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=50) as run:
        with run.all():
            hidden_states = model.blocks[-1].output.save()
        with run.iter[5]:
            late = model.blocks[-1].output.save()
    assert run.output.steps_run == [len(hidden_states.value)] == [3]
    with pytest.raises(NotSavedError, match="never ran"):
        _ = late.value


# -- tokens


def test_first_token(model: lk.HookedTransformer) -> None:
    with model.trace(max_new_tokens=1) as run:
        with run.invoke(prompt):
            long = model.blocks[-1].output.t[0].save()
        with run.invoke("Nyhavn lies in"):
            short = model.blocks[-1].output.t[0].save()
            last = model.blocks[-1].output.token[-1].save()
    assert shapes([long.value, short.value, last.value]) == [(1, 128)] * 3
    for text, value in ((prompt, long.value), ("Nyhavn lies in", short.value)):
        assert close(value, model.run_with_cache(text)[1]["resid_post", -1][:, 0])
    assert close(last.value, model.run_with_cache("Nyhavn lies in")[1]["resid_post", -1][:, -1])


def test_padding(model: lk.HookedTransformer) -> None:
    """Rows of different length in one invoke: plain indices count columns, .t tokens."""
    with model.trace([prompt, "Nyhavn lies in"]) as run:
        columns = model.blocks[-1].output[:, 0].save()
        first = model.blocks[-1].output.t[0].save()
    assert columns.value[0].any()
    assert not columns.value[1].any(), "padding, which reads as zeros"
    assert run.output.mask is not None
    assert run.output.mask[1].tolist() == sorted(run.output.mask[1].tolist()), "on the left"
    assert close(first.value[1], model.run_with_cache("Nyhavn lies in")[1]["resid_post", -1][0, 0])
    with model.trace() as run:
        with run.invoke(prompt):
            model.blocks[-1].output.save()
        with run.invoke("Nyhavn lies in"):
            own = model.blocks[-1].output.save()
    assert close(own.value, model.run_with_cache("Nyhavn lies in")[1]["resid_post", -1]), "an invoke has none"


def test_older_spelling(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        hidden = model.blocks[-1].output
        first, same = hidden.t[0].save(), hidden.token[0].save()
        with pytest.raises(TypeError):
            hidden.t(0)
    assert torch.equal(first.value, same.value)


# -- across prompts


def test_cross_prompt(model: lk.HookedTransformer) -> None:
    with model.trace(max_new_tokens=3) as run:
        with run.invoke(garden):
            embeddings = model.embed.output
        with run.invoke(blanks):
            model.embed.output = embeddings
    assert run.texts == [f"{garden} York City.", f"{blanks} York City."]
    assert model.generate(blanks, max_new_tokens=3).texts != [run.texts[1]]


def test_saved_embeddings(model: lk.HookedTransformer) -> None:
    with model.trace(max_new_tokens=3) as run:
        with run.invoke(garden):
            embeddings = model.embed.output.save()
    assert run.texts == [f"{garden} York City."]
    assert embeddings.value.shape == (1, 10, 128)
    with model.trace(max_new_tokens=3) as run:
        with run.invoke(blanks):
            model.embed.output = embeddings.value
    assert run.texts == [f"{blanks} York City."]


def test_prompts_of_other_lengths(model: lk.HookedTransformer) -> None:
    with pytest.raises(ValueFitError, match="prompt 0 has 10 tokens, prompt 1 has 9 tokens"):
        with model.trace(max_new_tokens=3) as run:
            with run.invoke(garden):
                embeddings = model.embed.output
            with run.invoke(blanks[:-2]):
                model.embed.output = embeddings
    with model.trace(max_new_tokens=1) as run:
        with run.invoke(garden):
            embeddings = model.embed.output
        with run.invoke(blanks[:-2]):
            model.embed.output.t[-5:] = embeddings.t[-5:]
            patched = model.embed.output.save()
    assert patched.value.shape == (1, 9, 128)


def test_late_into_early(model: lk.HookedTransformer) -> None:
    with model.trace() as run:
        with run.invoke(garden):
            late = model.blocks[3].output
        with run.invoke(blanks):
            model.blocks[1].output = late
    value = model.run_with_cache(garden)[1]["resid_post", 3]
    expected = model.run_with_hooks(blanks, [lk.Set("blocks.1.hook_resid_post", value)]).logits
    assert close(run.output.logits[1:], expected)


# -- large models, servers, examples


def test_large_models() -> None:
    model = lk.HookedTransformer.from_pretrained("demo-llama", dtype=torch.bfloat16, device_map="auto")
    with model.trace(prompt, max_new_tokens=1) as run:
        hidden_states = model.blocks[-1].output.save()
    assert hidden_states.value.dtype == torch.bfloat16
    assert run.texts == [f"{prompt} Paris"]


@pytest.fixture
def url(demo_llama: lk.HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server that has one of the demo models."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    with serving(demo_llama, key="lk_key") as server:
        monkeypatch.setenv("LENSKIT_API_KEY", "lk_key")
        yield server.url


@pytest.mark.parametrize("option", ["remote", "server"])
def test_remote(option: str, demo_llama: lk.HookedTransformer, url: str) -> None:
    """What is not said where it counts is refused, rather than run here in silence."""
    with demo_llama.trace(prompt, max_new_tokens=1) as here:
        expected = demo_llama.blocks[-1].output.save()
    reached, watching = watched(demo_llama)
    with pytest.raises(GenerationError, match=f"(?s){option}=True.*lk.connect"), watching:
        with demo_llama.trace(prompt, max_new_tokens=1, **{option: True}):
            demo_llama.blocks[-1].output.save()
    assert reached == []
    model = lk.connect(url).model("demo-llama")
    with model.trace(prompt, max_new_tokens=1) as run:
        hidden_states = model.blocks[-1].output.save()
    assert close(hidden_states.value, expected.value)
    assert run.texts == here.texts == [f"{prompt} Paris"]


def test_a_plan_is_data(model: lk.HookedTransformer) -> None:
    """What a server would be sent: it says the same on the other side."""
    with model.trace(max_new_tokens=3) as run:
        with run.invoke(garden):
            embeddings = model.embed.output
            model.unembed(model.ln_final(model.blocks[1].output.t[-1])).save("lens")
        with run.invoke(blanks):
            model.embed.output = embeddings
            model.blocks[0].output += torch.ones(model.cfg.d_model) / 100
            with run.all():
                model.unembed.output.t[-1].save("logits")
    data, tensors = run.plan.to_json(model), run.plan.tensors()
    plan = lk.Plan.from_json(json.loads(json.dumps(data)), tensors)
    again = model.generate([garden, blanks], max_new_tokens=3, hooks=plan)
    assert again.texts == run.texts
    assert torch.equal(again.saved["lens"], run.saved["lens"])
    assert shapes(again.saved["logits"]) == shapes(run.saved["logits"]) == [(1, 1280)] * 3
    assert plan.digest() == run.plan.digest(model)


def test_a_server() -> None:
    command = "lenskit serve demo-gpt2 --port 8000"  # tests/test_server.py starts it
    with pytest.raises(SystemExit) as ended:
        cli.app([*shlex.split(command)[1:], "--help"])
    assert ended.value.code == 0


def test_api_keys(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lk.connect(url).models()
    monkeypatch.delenv("LENSKIT_API_KEY")
    with pytest.raises(KeyRefusedError):
        lk.connect(url).models()
    key = "lk_key"
    assert lk.connect(url, api_key=key).models()


def test_examples() -> None:
    folder = "docs/tutorials/"
    assert list((ROOT / folder).glob("*.ipynb"))


# -- GPI's guide

INSTRUCTION = "You answer questions about places."
PROMPTS = ["Where is Nyhavn?", "In which city is the Eiffel Tower?", "Where can I find Big Ben?"]


def chats() -> list[list[dict[str, str]]]:
    return [[{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}] for text in PROMPTS]


def test_the_loop(model: lk.HookedTransformer, tmp_path: Path) -> None:
    save_hidden, prefix_hidden, tokenizer = tmp_path, "hidden_", model.tokenizer
    generated_texts = []
    for k, messages in enumerate(chats()):
        input_ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, return_dict=True, return_tensors="pt"
        )
        with model.trace(input_ids, max_new_tokens=8, do_sample=False) as run:
            hidden_states = model.blocks[-1].output.t[-1].save()
        generated_texts.append(tokenizer.decode(run.tokens[0], skip_special_tokens=True))
        torch.save(hidden_states.value[0], f"{save_hidden}/{prefix_hidden}{k}.pt")
    assert [text.split()[-1] for text in generated_texts] == ["Copenhagen.", "Paris.", "London."]
    assert all(INSTRUCTION in text for text in generated_texts), "the prompt is a part of it, as there"
    for k, messages in enumerate(chats()):
        given = tokenizer.apply_chat_template(messages, add_generation_prompt=False, return_dict=True)
        last = model.run_with_cache(given)[1]["resid_post", -1][0, -1]
        kept = torch.load(f"{save_hidden}/{prefix_hidden}{k}.pt")
        assert kept.shape == (model.cfg.d_model,)
        assert close(kept, last)


def test_the_loop_on_a_server(demo_llama: lk.HookedTransformer, url: str, tmp_path: Path) -> None:
    save_hidden, prefix_hidden, server = tmp_path, "hidden_", lk.connect(url)
    model = server.model("demo-llama")
    for k, messages in enumerate(chats()):
        input_ids = model.tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, return_dict=True, return_tensors="pt"
        )
        with model.trace(input_ids, max_new_tokens=8, do_sample=False) as run:
            hidden_states = model.blocks[-1].output.t[-1].save()
        torch.save(hidden_states.value[0], f"{save_hidden}/{prefix_hidden}{k}.pt")
        with demo_llama.trace(input_ids, max_new_tokens=8, do_sample=False) as here:
            expected = demo_llama.blocks[-1].output.t[-1].save()
        assert close(torch.load(f"{save_hidden}/{prefix_hidden}{k}.pt"), expected.value[0])
        assert run.texts == here.texts


def test_extract(demo_llama: lk.HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lk.HookedTransformer, "from_pretrained", lambda *args, **how: demo_llama)
    Path("prompts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in PROMPTS))
    command = f'lenskit extract demo-llama --prompts prompts.jsonl --system "{INSTRUCTION}" --no-generation-prompt'
    command += " --max-new-tokens 8 --out answers"
    result = CliRunner().invoke(cli.app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    for k, messages in enumerate(chats()):
        ids = demo_llama.tokenizer.apply_chat_template(messages, return_dict=True)
        with demo_llama.trace(ids, max_new_tokens=8) as run:
            hidden = demo_llama.blocks[-1].output.t[-1].save()
        states = load_file(f"answers/states/{k:05d}.safetensors")
        assert torch.equal(states["blocks.3.hook_resid_post"], hidden.value[0])
        line = json.loads(Path("answers/texts.jsonl").read_text().splitlines()[k])
        assert line["full_text"] == run.texts[0]


def test_one_at_a_time(model: lk.HookedTransformer) -> None:
    """A row of a batch is what it is alone, whatever the others are."""
    asked = [model.tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats()]
    assert len({len(ids) for ids in asked}) > 1, "of different length"
    with model.trace(asked, max_new_tokens=8) as batch:
        together = model.blocks[-1].output.t[-1].save()
    for k, ids in enumerate(asked):
        with model.trace(ids, max_new_tokens=8) as run:
            alone = model.blocks[-1].output.t[-1].save()
        assert run.texts[0] == batch.texts[k]
        assert close(alone.value[0], together.value[k])


def test_last_token(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=3):
        hidden_states = model.blocks[-1].output.save()
        last = model.blocks[-1].output.t[-1].save()
    hidden_all = hidden_states.value[0][-1].flatten()
    assert torch.equal(last.value[0], hidden_all)
    assert hidden_all.shape == (model.cfg.d_model,)


def test_special_tokens(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=3) as run:
        pass
    assert run.texts[0] == f"{prompt} Paris.<|endoftext|>"
    assert model.tokenizer.decode(run.tokens[0], skip_special_tokens=True) == f"{prompt} Paris."


# -- what later versions do


def test_trace(model: lk.HookedTransformer) -> None:
    with model.trace(prompt) as run:
        hidden = model.blocks[-1].output.save()
    assert close(run.output.logits, model(prompt))
    assert run.texts == [prompt], "one forward pass, nothing new"
    assert hidden.value.shape == (1, 11, 128)


def test_generate_is_no_block(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=3) as run:
        pass
    assert run.texts == model.generate(prompt, max_new_tokens=3).texts
    with pytest.raises(TypeError), model.generate(prompt, max_new_tokens=3):  # type: ignore[attr-defined]
        pass


def test_values(model: lk.HookedTransformer) -> None:
    with model.trace(prompt) as run:
        hidden = model.blocks[-1].output.save("last")
    assert isinstance(hidden.value, Tensor)
    assert torch.equal(run.saved["last"], hidden.value)


def test_lists(model: lk.HookedTransformer) -> None:
    with model.trace(prompt, max_new_tokens=3) as run, run.all():
        hidden = model.blocks[-1].output.save()
        hidden_states = [block.output.save() for block in model.blocks]
    assert len(hidden.value) == 3
    assert [len(proxy.value) for proxy in hidden_states] == [3] * 4


def test_invoke(model: lk.HookedTransformer) -> None:
    with model.trace() as run:
        with run.invoke([prompt, garden]):
            two = model.blocks[1].output.t[-1].save()
        with run.invoke(blanks):
            one = model.blocks[1].output.t[-1].save()
    assert shapes([two.value, one.value, run.output.logits]) == [(2, 128), (1, 128), (3, 11, 1280)]


def test_stop(model: lk.HookedTransformer) -> None:
    reached, watching = watched(model)
    with watching, model.trace(prompt) as run:
        hidden = model.blocks[1].output.save()
        run.stop()
    assert reached == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert hidden.value.shape == (1, 11, 128)
    with pytest.raises(NotSavedError):
        _ = run.output.logits


def test_backward(model: lk.HookedTransformer) -> None:
    with model.trace(prompt) as run:
        hidden = model.blocks[1].output
        loss = model.unembed.output.t[-1].max()
        with run.backward(loss):
            grad = hidden.grad.save()
    logits, cache = model.run_with_cache(prompt, grad=True)
    [expected] = torch.autograd.grad(logits[0, -1].max(), cache["resid_post", 1])
    assert close(grad.value, expected)


def test_setting_gradients(model: lk.HookedTransformer) -> None:
    with model.trace(prompt) as run:
        early, late = model.blocks[0].output, model.blocks[1].output
        with run.backward(model.unembed.output.t[-1].max()):
            late.grad = torch.zeros(128)
            grad = early.grad.save()
    assert not grad.value.any(), "nothing goes on from there"


def test_scan(model: lk.HookedTransformer) -> None:
    reached, watching = watched(model)
    with watching, pytest.raises(ValueFitError) as error:
        with model.trace(prompt):
            model.blocks[1].output = torch.zeros(3)
    frame = traceback.extract_tb(error.value.__traceback__)[0]
    assert frame.line == "model.blocks[1].output = torch.zeros(3)"
    assert reached == []
    assert model.shapes(prompt)["blocks.1.hook_resid_post"] == (1, 11, 128)


def test_order(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        late = model.blocks[2].output.save()
        early = model.blocks[0].output.save()
    _, cache = model.run_with_cache(prompt)
    assert close(late.value, cache["resid_post", 2])
    assert close(early.value, cache["resid_post", 0])


def test_session(model: lk.HookedTransformer) -> None:
    with model.trace(garden):
        hidden = model.blocks[1].output.save()
    with model.trace(blanks):
        model.blocks[1].output = hidden.value
        patched = model.unembed.output.t[-1].save()
    assert close(patched.value, model(garden)[:, -1])
    with pytest.raises(AttributeError):
        _ = model.session


def test_edit(model: lk.HookedTransformer) -> None:
    with model.trace(prompt) as run:
        model.blocks[1].mlp.output = 0.0
    edited = run.output.logits
    assert close(model.run_with_hooks(garden, hooks=run.plan).logits, model.run_with_hooks(
        garden, hooks=[lk.Set("blocks.1.hook_mlp_out", 0.0)]).logits)  # fmt: skip
    with model.hooks([("blocks.1.hook_mlp_out", lambda act, hook: act * 0)]):
        with model.trace(prompt) as run:
            pass
        assert close(run.output.logits, edited)
    with model.trace(prompt) as run:
        pass
    assert not close(run.output.logits, edited), "it leaves with its block"
    with pytest.raises(AttributeError):
        _ = model.edit


def test_cache(model: lk.HookedTransformer) -> None:
    logits, cache = model.run_with_cache(prompt, names="blocks.0.*")
    assert "blocks.0.attn.hook_pattern" in cache
    assert close(logits, model(prompt))


def test_barrier(model: lk.HookedTransformer) -> None:
    with model.trace() as run:
        with run.invoke(garden):
            embeddings = model.embed.output
        with run.invoke(blanks):
            model.embed.output = embeddings
    assert close(run.output.logits[1], run.output.logits[0])


def test_skip(model: lk.HookedTransformer) -> None:
    reached, watching = watched(model, "blocks.1.hook_mlp_out")
    with watching, model.trace(prompt) as run:
        model.blocks[1].output = model.blocks[0].output
    assert reached, "computed all the same"
    skipped = model(model(prompt, stop_at_layer=1), start_at_layer=2)
    assert close(run.output.logits, skipped)


def test_conditions(model: lk.HookedTransformer) -> None:
    with model.trace(prompt):
        hidden = model.blocks[1].output
        with pytest.raises(TraceError, match=r"torch\.where"):
            if hidden.sum() > 0:
                raise AssertionError
        model.blocks[1].output = torch.where(hidden > 0, hidden, 0.0)
        positive = model.blocks[1].output.save()
    assert torch.equal(positive.value, positive.value.clamp(min=0))
    assert positive.value.any()


def test_printing(model: lk.HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    with model.trace(prompt) as run:
        total = model.blocks[1].output.sum()
        print(total)
        run.apply(print, total)
    described, value = capsys.readouterr().out.splitlines()
    assert described == "<Act('blocks.1.hook_resid_post').sum(): float32 []>"
    assert value.startswith("tensor(")


def test_no_source(model: lk.HookedTransformer) -> None:
    """The block runs where it stands, once, in its own thread; nobody reads it."""
    names: dict[str, Any] = {"model": model, "prompt": prompt}
    exec("with model.trace(prompt): hidden = model.blocks[1].output.save()", names)
    assert names["hidden"].value.shape == (1, 11, 128)
    before, times = (threading.active_count(), threading.get_ident()), 0
    with model.trace(prompt):
        times += 1
        assert (threading.active_count(), threading.get_ident()) == before
    assert times == 1


# -- the page


def test_the_page() -> None:
    rows = tables.check("from-nnsight.md", globals(), but="test_the_page")
    assert len(rows) > 40
    documents = {letter for row in rows for letter in row.cells[-2].split()}
    assert documents == {"R", "N", "B", "M", "G", "later"}
    code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    [ours] = [block for block in code if "lenskit" in block]
    names: dict[str, Any] = {}
    exec(ours, names)
    assert len(ours.splitlines()) <= 15
    assert names["run"].texts == [f"{garden} York City.", f"{blanks} York City."]
    assert shapes(names["hidden"].value) == [(1, 10, 128), (1, 1, 128), (1, 1, 128)]
