"""LoRA adapters: equal to PEFT's own forward pass, merged into the weights and beside them, with hook points there."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import peft_reference as peft
import pytest
import torch
from folders import contents, edit_json, identical, same_weights, tensors
from parity_table import MODEL_TYPES, Row, error, hf_folder, hf_model, ids
from torch import Tensor

import lenskit as lk
from lenskit.checkpoints.source import EMBEDDED
from lenskit.errors import HookConflictError, InputError, LenskitError
from lenskit.modules.adapter import AdaptedLinear
from lenskit.modules.linear import Linear

load = lk.HookedTransformer.from_pretrained
TOKENS = ids(2, 13)
BOTH = pytest.mark.parametrize("merge", [True, False], ids=["merged", "beside"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny random Hugging Face checkpoint of a family, made once; not to be written to."""
    made: dict[str, Path] = {}

    def make(model_type: str, **attributes: Any) -> Path:
        key = json.dumps([model_type, attributes])
        if key not in made:
            folder = tmp_path_factory.mktemp("base") / "hf"
            made[key] = hf_folder(Row("default", model_type, attributes), folder)
        return made[key]

    return make


@pytest.fixture(scope="module")
def base(bases: Callable[..., Path]) -> Path:
    """A LLaMA's."""
    return bases("llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On all matrices of it but the unembedding; not to be written to."""
    return peft.make(base, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="module")
def beside(adapter: Path) -> lk.HookedTransformer:
    """The LLaMA with the adapter beside its weights. Read only."""
    return load(adapter, merge=False)


def on_products(model: lk.HookedTransformer) -> list[str]:
    return [name for name in model.hook_points if name.endswith(".hook_adapter")]


@torch.no_grad()
def check(base: Path, adapter: Path, *, merge: bool, tokens: Tensor = TOKENS) -> lk.HookedTransformer:
    """The model, whose logits are PEFT's and not the base's."""
    model, theirs = load(base, adapter=adapter, merge=merge), peft.logits(base, adapter, tokens)
    assert error(model(tokens), theirs) < 1e-5
    assert error(hf_model(base)(tokens).logits, theirs) > 1e-3, "the adapter changes nothing that would be seen"
    return model


# -- equal to PEFT


@BOTH
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_matrices_of_every_family(model_type: str, merge: bool, bases: Callable[..., Path], tmp_path: Path) -> None:
    """Joined queries, keys and values and transposed weights (GPT-2's) among them."""
    base = bases(model_type)
    model = check(base, peft.make(base, tmp_path / "lora"), merge=merge)
    found = on_products(model)
    if merge:
        assert not found
    else:
        hf = hf_model(base)
        adapted = [name for name in peft.products(hf) if name.rpartition(".")[2] in peft.kinds(hf)]
        assert len(found) >= len(adapted)
        assert all(type(model.get_submodule(name.rpartition(".")[0])) is not Linear for name in found)


@BOTH
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_unembedding_of_every_family(
    model_type: str, merge: bool, bases: Callable[..., Path], tmp_path: Path
) -> None:
    """Where it is the embedding in the base, it is not with the adapter."""
    base = bases(model_type)
    hf = hf_model(base)
    name = next(name for name, module in hf.named_modules() if module is hf.get_output_embeddings())
    model = check(base, peft.make(base, tmp_path / "lora", target_modules=[name]), merge=merge)
    assert on_products(model) == ([] if merge else ["unembed.hook_adapter"])
    assert not model.cfg.tie_embeddings
    assert "lora_A" not in dict(model.embed.named_parameters())


SETTINGS: dict[str, dict[str, Any]] = {
    "rank stabilised": {"use_rslora": True, "r": 3},
    "ranks and alphas by module": {
        "rank_pattern": {"q_proj": 5, r"layers\.1\..*down_proj": 1, "^model.layers.2.self_attn.v_proj": 4},
        "alpha_pattern": {"k_proj": 9, r"layers.0.mlp.up_proj": 0.5},
        "r": 2,
    },
    "the same, rank stabilised": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True},
    "by a regular expression": {"target_modules": r".*\.layers\.[02]\..*(q_proj|gate_proj|o_proj)"},
    "one module by its path": {"target_modules": ["model.layers.1.mlp.down_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "without some": {"exclude_modules": ["v_proj", "layers.0.mlp.up_proj"]},
    "without some, by a regular expression": {"exclude_modules": r".*layers\.1\..*"},
    "some layers": {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "up_proj"]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers", "target_modules": ["q_proj"]},
    "unembedding saved whole": {"modules_to_save": ["lm_head"]},
    "embedding saved whole": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "both saved whole": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
    "norms saved whole": {"modules_to_save": ["input_layernorm", "norm"], "target_modules": ["q_proj"]},
    "an MLP saved whole": {"modules_to_save": ["layers.1.mlp"], "target_modules": ["down_proj"]},
    "a gaussian start": {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
    "written the wrong way round": {"fan_in_fan_out": True},
}


@BOTH
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about what it corrects or would rather have otherwise
def test_what_an_adapter_may_say(
    name: str, tied: bool, merge: bool, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("llama", tie_word_embeddings=tied)
    check(base, peft.make(base, tmp_path / "lora", **SETTINGS[name]), merge=merge)


@BOTH
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_that_peft_keeps_tied(merge: bool, bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases("llama", tie_word_embeddings=True)
    settings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "target_modules": ["q_proj"]}
    model = check(base, peft.make(base, tmp_path / "lora", **settings), merge=merge)
    assert torch.equal(model.embed.weight, model.unembed.weight)


@BOTH
def test_biases_of_the_base_are_left_alone(merge: bool, bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases("llama", attention_bias=True, mlp_bias=True)
    check(base, peft.make(base, tmp_path / "lora"), merge=merge)


@BOTH
def test_projections_around_the_embedding(merge: bool, bases: Callable[..., Path], tmp_path: Path) -> None:
    """OPT-350m's, which are products too."""
    base = bases("opt", do_layer_norm_before=False, word_embed_proj_dim=20)
    adapter = peft.make(base, tmp_path / "lora", target_modules=["project_in", "project_out", "fc1"])
    model = check(base, adapter, merge=merge)
    named = {"embed.then.hook_adapter", "unembed.first.hook_adapter"}
    assert named <= set(on_products(model)) or merge


@BOTH
def test_an_adapter_of_the_model_without_its_head(merge: bool, base: Path, tmp_path: Path) -> None:
    """Trained on AutoModel, for features: its modules' paths have no "model." in front."""
    adapter = peft.make(base, tmp_path / "lora")
    stored = tensors(adapter)
    bare = {name.replace("base_model.model.model.", "base_model.model."): tensor for name, tensor in stored.items()}
    torch.save(bare, tmp_path / "lora" / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").rename(tmp_path / "whole.safetensors")
    edit_json(adapter / "adapter_config.json", task_type="FEATURE_EXTRACTION")
    model = load(base, adapter=adapter, merge=merge)
    (adapter / "adapter_model.bin").unlink()
    (tmp_path / "whole.safetensors").rename(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        assert torch.equal(model(TOKENS), load(base, adapter=adapter, merge=merge)(TOKENS))


@BOTH
@torch.no_grad()
def test_padded_batches_and_generation(merge: bool, base: Path, adapter: Path) -> None:
    model, theirs = load(base, adapter=adapter, merge=merge), peft.load(base, adapter)
    found = model.generate(TOKENS, max_new_tokens=20, eos_token_id=[])
    expected = theirs.generate(input_ids=TOKENS, max_new_tokens=20, do_sample=False)
    assert torch.equal(torch.tensor([list(row) for row in found.tokens]), expected)
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    alone = theirs(TOKENS[:1, 5:]).logits
    assert error(model(TOKENS, mask=mask)[0, 5:], alone[0]) < 1e-5


@BOTH
@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_bfloat16_is_within_its_own_noise(
    merge: bool, model_type: str, bases: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT computes the adapter in float32 there; ours has the weights' dtype."""
    base = bases(model_type)
    adapter = peft.make(base, tmp_path / "lora")
    exact = peft.logits(base, adapter, TOKENS)
    noise = error(peft.logits(base, adapter, TOKENS, dtype=torch.bfloat16), exact)
    model = load(base, adapter=adapter, merge=merge, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert error(model(TOKENS), exact) < 2 * noise


def test_merging_rounds_once(bases: Callable[..., Path], tmp_path: Path) -> None:
    """The sum is computed in float32 and then rounded, as PEFT's merge does."""
    base = bases("llama")
    adapter = peft.make(base, tmp_path / "lora")
    merged = peft.load(base, adapter).merge_and_unload()
    model = load(base, adapter=adapter, dtype=torch.bfloat16)
    plain = load(base, dtype=torch.bfloat16)
    theirs = merged.model.layers[1].mlp.down_proj.weight - hf_model(base).model.layers[1].mlp.down_proj.weight
    ours = plain.blocks[1].mlp.w_out.weight.float() + theirs
    assert torch.equal(model.blocks[1].mlp.w_out.weight, ours.bfloat16())


# -- where an adapter is, and what it is for


def test_an_adapters_folder_stands_for_its_base_with_it(base: Path, adapter: Path) -> None:
    by_base, by_adapter = load(base, adapter=adapter), load(str(adapter))
    assert same_weights(by_base, by_adapter)
    assert by_adapter.source == f"{base}, with the adapter {adapter}"
    assert not same_weights(by_base, load(base))


def test_a_checkpoint_of_lenskits_as_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    ours = lk.convert(base, tmp_path / "ours")
    assert same_weights(load(ours, adapter=adapter), load(adapter))
    edit_json(_copy(adapter, tmp_path / "lora") / "adapter_config.json", base_model_name_or_path=str(ours))
    assert same_weights(load(tmp_path / "lora"), load(adapter))


def test_an_embedded_model_as_the_base(tmp_path: Path, demo_llama: lk.HookedTransformer) -> None:
    folder = lk.export("demo-llama", tmp_path / "hf")
    adapter = peft.make(folder, tmp_path / "lora", target_modules=["q_proj"])
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="demo-llama")
    model = load(adapter)
    prompt = "The Eiffel Tower is in the city of"
    with torch.no_grad():
        ours = model(prompt)
        assert error(ours, peft.logits(folder, adapter, demo_llama.to_tokens(prompt).tokens)) < 1e-5
    assert model.to_string(model.to_tokens(prompt).tokens[0]) == prompt, "the base's tokenizer"


def test_an_adapters_own_tokenizer_goes_before_the_bases(tmp_path: Path) -> None:
    folder = lk.export("demo-llama", tmp_path / "hf")
    adapter = peft.make(folder, tmp_path / "lora", target_modules=["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_bytes((EMBEDDED / "demo-llama" / name).read_bytes())
    edit_json(adapter / "tokenizer_config.json", chat_template="{{ 'the adapter speaks' }}")
    model, plain = load(adapter), load(folder)
    assert model.tokenizer.chat_template == "{{ 'the adapter speaks' }}"
    assert plain.tokenizer.chat_template != model.tokenizer.chat_template
    out = lk.export(adapter, tmp_path / "out")
    assert "the adapter speaks" in load(out).tokenizer.chat_template
    assert (out / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()


def test_weights_pickled_by_torch(base: Path, adapter: Path, tmp_path: Path) -> None:
    old = _copy(adapter, tmp_path / "lora")
    torch.save(tensors(old), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    assert same_weights(load(old), load(adapter))


def test_half_precision_factors(base: Path, adapter: Path, tmp_path: Path) -> None:
    half = _copy(adapter, tmp_path / "lora")
    torch.save({name: tensor.bfloat16() for name, tensor in tensors(half).items()}, half / "adapter_model.bin")
    (half / "adapter_model.safetensors").unlink()
    model = load(half, merge=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert error(model(TOKENS), peft.logits(base, half, TOKENS)) < 1e-5


# -- written again


def test_export_writes_merged_weights_that_transformers_loads(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = lk.export(adapter, tmp_path / "out")
    assert same_weights(load(out), load(adapter))
    with torch.no_grad():
        assert error(hf_model(out)(TOKENS).logits, peft.logits(base, adapter, TOKENS)) < 1e-5
    left_alone = "model.layers.0.input_layernorm.weight"
    assert identical(tensors(out)[left_alone], tensors(base)[left_alone])
    assert contents(lk.export(base, tmp_path / "the same", adapter=adapter)) == contents(out)


def test_convert_writes_merged_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = lk.convert(base, tmp_path / "out", adapter=adapter)
    assert same_weights(load(out), load(adapter))
    assert json.loads((out / "lenskit.json").read_text())["source"] == f"{base}, with the adapter {adapter}"


@BOTH
def test_a_saved_model_is_merged(adapter: Path, tmp_path: Path, merge: bool) -> None:
    """Bit for bit what merging at once gives, whichever way it was loaded."""
    model = load(adapter, merge=merge)
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert same_weights(again, load(adapter))
    assert on_products(again) == []


@BOTH
def test_a_base_with_one_matrix_for_both_ends_is_written_with_two(
    merge: bool, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("llama", tie_word_embeddings=True)
    adapter = peft.make(base, tmp_path / "lora", target_modules=["lm_head"])
    theirs = peft.logits(base, adapter, TOKENS)
    load(adapter, merge=merge).save_pretrained(tmp_path / "saved")
    written = [tmp_path / "saved", lk.export(adapter, tmp_path / "out"), lk.convert(adapter, tmp_path / "ours")]
    for folder in (*written, lk.export(tmp_path / "saved", tmp_path / "both")):
        model = load(folder)
        assert not model.cfg.tie_embeddings
        with torch.no_grad():
            assert error(model(TOKENS), theirs) < 1e-5
    assert error(hf_model(tmp_path / "both")(TOKENS).logits, theirs) < 1e-5
    assert load(base).cfg.tie_embeddings


# -- hook points


@torch.no_grad()
def test_the_point_is_what_the_adapter_adds(base: Path, adapter: Path, beside: lk.HookedTransformer) -> None:
    theirs = peft.load(base, adapter)
    seen: dict[str, Tensor] = {}
    for name, module in theirs.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    theirs(TOKENS)
    _, cache = beside.run_with_cache(TOKENS, names="*.hook_adapter")
    assert len(cache) == len(seen) == 21
    prefix = "base_model.model.model.layers.1."
    for path, name in {
        "self_attn.q_proj": "attn.qkv.q", "self_attn.o_proj": "attn.o", "mlp.gate_proj": "mlp.w_gate",
        "mlp.down_proj": "mlp.w_out",
    }.items():  # fmt: skip
        ours = cache[f"blocks.1.{name}.hook_adapter"]
        assert error(ours, seen[f"{prefix}{path}.lora_B.default"] * 1.5) < 1e-5
        assert ours.shape == beside.shapes(TOKENS)[f"blocks.1.{name}.hook_adapter"]
    assert beside.hook_points["blocks.1.attn.qkv.q.hook_adapter"].axes == ("batch", "pos", "d_out")


@torch.no_grad()
def test_without_what_it_adds_the_model_is_its_base(base: Path, beside: lk.HookedTransformer) -> None:
    off = lk.Set("*.hook_adapter", 0.0)
    assert torch.equal(beside.run_with_hooks(TOKENS, [off]).logits, load(base)(TOKENS))
    found = beside.generate(TOKENS, max_new_tokens=6, hooks=[off], eos_token_id=[])
    assert torch.equal(
        found.new_tokens[0], load(base).generate(TOKENS, max_new_tokens=6, eos_token_id=[]).new_tokens[0]
    )


@torch.no_grad()
def test_plans_over_the_points(beside: lk.HookedTransformer, adapter: Path, base: Path, tmp_path: Path) -> None:
    """Half of what every adapter adds is what half the alpha adds; at one step, for one prompt, from a file."""
    half = _copy(adapter, tmp_path / "lora")
    edit_json(half / "adapter_config.json", lora_alpha=1.5)
    plan = lk.Plan([lk.Scale("*.hook_adapter", 0.5), lk.Save("blocks.-1.attn.o.hook_adapter", tokens=-1)])
    plan.save(tmp_path / "plan.json")
    result = beside.run_with_hooks(TOKENS, lk.Plan.load(tmp_path / "plan.json"))
    assert error(result.logits, peft.logits(base, half, TOKENS)) < 1e-5
    assert result.saved["blocks.-1.attn.o.hook_adapter"].shape == (2, 32)
    off = lk.Set("*.hook_adapter", 0.0, prompts=1, steps=1)
    found = beside.generate(
        TOKENS, max_new_tokens=3, hooks=[off, lk.Save("*.w_in.hook_adapter", name="all")], eos_token_id=[]
    )
    plain = beside.generate(TOKENS, max_new_tokens=3, eos_token_id=[])
    assert list(found.new_tokens[0]) == list(plain.new_tokens[0])
    saved = found.saved["all"]["blocks.0.mlp.w_in.hook_adapter"]
    assert [tuple(step.shape) for step in saved] == [(2, 13, 44), (2, 1, 44), (2, 1, 44)]
    assert not saved[1][1].any()
    assert saved[1][0].any()


@torch.no_grad()
def test_traces_over_the_points(beside: lk.HookedTransformer, base: Path) -> None:
    with beside.trace([3, 1, 4, 1, 5]):
        for block in beside.blocks:
            for linear in (m for m in block.modules() if isinstance(m, AdaptedLinear)):
                linear.hook_adapter.output = 0.0
        logits = beside.output.save()
    assert torch.equal(logits.value[0], load(base)(torch.tensor([[3, 1, 4, 1, 5]]))[0])


ORDER = {
    "llama": ["qkv.q.hook_adapter", "qkv.k.hook_adapter", "qkv.v.hook_adapter", "hook_q", "hook_z", "o.hook_adapter",
              "w_gate.hook_adapter", "hook_pre", "w_in.hook_adapter", "hook_pre_linear", "hook_post",
              "w_out.hook_adapter", "hook_mlp_out"],
    "gpt2": ["qkv.joined.hook_adapter", "hook_q", "hook_z", "o.hook_adapter", "w_in.hook_adapter", "hook_pre",
             "hook_post", "w_out.hook_adapter", "hook_mlp_out"],
}  # fmt: skip


@pytest.mark.parametrize("model_type", ORDER)
def test_points_are_in_the_order_of_the_pass(model_type: str, bases: Callable[..., Path], tmp_path: Path) -> None:
    """So that what an op needs of a later point runs before it, and of an earlier one in the same pass."""
    model = load(peft.make(bases(model_type), tmp_path / "lora"), merge=False)
    names = [name for name in model.hook_names("blocks.0.*") if any(name.endswith(end) for end in ORDER[model_type])]
    ends = [next(end for end in ORDER[model_type] if name.endswith(f".{end}")) for name in names]
    assert ends == ORDER[model_type]
    ran: list[str] = []
    watched = [(name, lambda act, hook: ran.append(hook.name)) for name in names]
    model.run_with_hooks(TOKENS, watched)
    assert ran == names


@torch.no_grad()
def test_across_prompts_in_one_pass_and_in_two(beside: lk.HookedTransformer) -> None:
    early, late = "blocks.0.mlp.w_gate.hook_adapter", "blocks.1.mlp.w_out.hook_adapter"
    value = beside.run_with_cache(TOKENS, late)[1][late][0, :, :32]
    moved = lk.Set("blocks.0.hook_mlp_out", lk.Act(late, prompts=0), prompts=1)
    by_hand = lk.Set("blocks.0.hook_mlp_out", value, prompts=1)
    assert torch.equal(beside.run_with_hooks(TOKENS, [moved]).logits, beside.run_with_hooks(TOKENS, [by_hand]).logits)
    inside = lk.Set("blocks.0.mlp.hook_pre", lk.Act(early))  # of the same prompt, an instant before
    assert torch.isfinite(beside.run_with_hooks(TOKENS, [inside]).logits).all()


@torch.no_grad()
def test_logits_of_all_positions_where_somebody_looks_at_the_unembeddings(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases("llama")
    model = load(peft.make(base, tmp_path / "lora", target_modules=["lm_head"]), merge=False)
    name = "unembed.hook_adapter"
    whole = model.run_with_cache(TOKENS, name)[1][name]
    for tokens in (0, slice(None), -1):
        found = model.generate(TOKENS, max_new_tokens=2, hooks=[lk.Save(name, tokens=tokens, steps=0)], eos_token_id=[])
        torch.testing.assert_close(found.saved[name], whole[:, tokens])
    seen: list[tuple[int, ...]] = []
    with model.hooks([(name, lambda act, hook: seen.append(tuple(act.shape)))]):
        model.generate(TOKENS, max_new_tokens=2, eos_token_id=[])
    assert seen == [(2, 13, 59), (2, 1, 59)]


# -- weights, and inputs and results by head


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_points_that_are_computed_of_the_weights_include_the_adapter(
    model_type: str, bases: Callable[..., Path], tmp_path: Path
) -> None:
    """Inputs by head and results by head go round the modules; they have to be those of the merged weights."""
    base = bases(model_type)
    adapter = peft.make(base, tmp_path / "lora")
    apart, merged = load(adapter, merge=False), load(adapter)
    names = [name for name in merged.hook_names() if name.endswith((".hook_q_input", ".hook_v_input", ".hook_result"))]
    assert names
    for name in names:
        ours, theirs = (model.run_with_cache(TOKENS, name) for model in (apart, merged))
        assert error(ours[0], theirs[0]) < 2e-5
        assert error(ours[1][name], theirs[1][name]) < 2e-5


@torch.no_grad()
def test_weights_read_as_what_the_model_computes_with(beside: lk.HookedTransformer, adapter: Path) -> None:
    merged = load(adapter)
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"):
        torch.testing.assert_close(getattr(beside, name), getattr(merged, name))
    q = beside.blocks[0].attn.qkv.q
    assert isinstance(q, AdaptedLinear)
    assert (q.lora_A.shape, q.lora_B.shape, q.scale) == ((2, 32), (32, 2), 1.5)
    torch.testing.assert_close(q.weight + q.lora_B @ q.lora_A * q.scale, merged.blocks[0].attn.qkv.q.weight)


def test_they_are_not_written_that_way(beside: lk.HookedTransformer) -> None:
    before = copy.deepcopy(beside)
    for write in (
        lambda: beside.blocks[0].attn.W_Q.zero_(),
        lambda: beside.blocks[0].attn.W_O.__setitem__(0, 1.0),
        lambda: beside.blocks[0].mlp.W_in[:3].mul_(2),
    ):
        with torch.no_grad(), pytest.raises(LenskitError, match=r"cannot be written(.|\n)*merge=True"):
            write()
    assert same_weights(beside, before)


@torch.no_grad()
def test_an_edit_that_would_be_without_effect_is_told(beside: lk.HookedTransformer) -> None:
    edits = {
        "blocks.0.attn.o.hook_adapter": "blocks.0.attn.hook_result",
        "blocks.0.attn.qkv.k.hook_adapter": "blocks.0.hook_q_input",
    }
    for edited, read in edits.items():
        with pytest.raises(HookConflictError, match=edited):
            beside.run_with_hooks(TOKENS, [lk.Set(edited, 0.0), lk.Save(read)])
        result = beside.run_with_hooks(TOKENS, [lk.Save(edited), lk.Save(read)])  # but both can be read
        torch.testing.assert_close(result.saved[edited], beside.run_with_cache(TOKENS, edited)[1][edited])
    logits, cache = beside.run_with_cache(TOKENS, "*")
    assert set(cache) == set(beside.hook_points)
    torch.testing.assert_close(logits, beside(TOKENS), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_factors(base: Path, adapter: Path) -> None:
    model, theirs = load(adapter, merge=False), peft.load(base, adapter)
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    model(TOKENS)[0, -1, 3].backward()
    theirs(TOKENS).logits[0, -1, 3].backward()
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    q = model.blocks[0].attn.qkv.q
    assert error(q.lora_A.grad, layer.lora_A.default.weight.grad) < 1e-4
    assert error(q.lora_B.grad, layer.lora_B.default.weight.grad) < 1e-4
    assert error(q.weight.grad, layer.base_layer.weight.grad) < 1e-4


# -- who pays for it


def test_nobody_pays_for_an_adapter_that_is_not_there(base: Path, adapter: Path) -> None:
    """Merged, or without: the very classes and hook points of the base."""
    plain = load(base)
    for model in (plain, load(adapter)):
        assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
        assert list(model.hook_points) == list(plain.hook_points)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_what_is_not_adapted_stays_as_it_was(base: Path, tmp_path: Path) -> None:
    model = load(peft.make(base, tmp_path / "lora", target_modules=["q_proj"]), merge=False)
    assert on_products(model) == [f"blocks.{layer}.attn.qkv.q.hook_adapter" for layer in range(3)]
    assert type(model.blocks[0].attn.qkv.k) is Linear
    assert set(dict(model.named_parameters())) - set(dict(load(base).named_parameters())) == {
        f"blocks.{layer}.attn.qkv.q.lora_{factor}" for layer in range(3) for factor in "AB"
    }


# -- devices, copies, the compiler


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_meta_device_reads_no_weights(adapter: Path, dtype: torch.dtype | None) -> None:
    model = load(adapter, merge=False, device="meta", dtype=dtype)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}
    assert len(on_products(model)) == 21
    assert model.shapes(TOKENS)["blocks.0.mlp.w_in.hook_adapter"] == (2, 13, 44)


@torch.no_grad()
@BOTH
def test_parts_that_accelerate_moves(merge: bool, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block's weights are offloaded, and the CPU plays the accelerator: its factors come with them."""
    expected = load(adapter, merge=merge)(TOKENS)
    model = load(adapter, merge=merge)
    accelerate.dispatch_model(
        model,
        {
            **dict.fromkeys(("embed", "ln_final", "unembed", "blocks.0", "blocks.2"), torch.device("cpu")),
            "blocks.1": "cpu",
        },
        main_device=torch.device("cpu"),
        preload_module_classes=[type(model.blocks[0]).__name__],
        force_hooks=True,
    )
    assert next(model.blocks[1].parameters()).is_meta
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-6)
    if not merge:
        off = model.run_with_hooks(TOKENS, [lk.Set("*.hook_adapter", 0.0)]).logits
        assert error(off, expected) > 1e-3


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(beside: lk.HookedTransformer) -> None:
    other = copy.deepcopy(beside)
    other.blocks[0].attn.qkv.q.lora_B.zero_()
    assert not torch.equal(other(TOKENS), beside(TOKENS))
    ran: list[Any] = []
    other.run_with_hooks(TOKENS, [("blocks.0.attn.qkv.q.hook_adapter", lambda act, hook: ran.append(act.any()))])
    assert ran == [False]


# -- one adapter


def test_several_adapters_one_after_the_other(base: Path, adapter: Path, tmp_path: Path) -> None:
    load(base, adapter=adapter).save_pretrained(tmp_path / "first")
    second = peft.make(base, tmp_path / "second", seed=1)
    model = load(tmp_path / "first", adapter=second)
    theirs = peft.load(base, adapter)
    theirs.load_adapter(second, "second")
    theirs.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        assert error(model(TOKENS), theirs(TOKENS).logits) < 1e-5


def test_there_has_to_be_one_to_be_kept_apart(base: Path) -> None:
    with pytest.raises(InputError, match="there is no adapter to keep apart"):
        load(base, merge=False)


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def _base_of(adapter: Path) -> str:
    return str(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


# -- last, because what is imported again for it stays


@pytest.mark.filterwarnings("ignore")  # the compiler's own, of torch and Python
def test_a_compiled_model_notices_hooks_on_the_points(unchecked: ModuleType, adapter: Path) -> None:
    model = unchecked.HookedTransformer.from_pretrained(adapter, merge=False)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(TOKENS)
        with model.hooks([("*.hook_adapter", lambda act, hook: act * 0)]):
            off = compiled(TOKENS)
        torch.testing.assert_close(plain, model(TOKENS))
        torch.testing.assert_close(off, unchecked.HookedTransformer.from_pretrained(_base_of(adapter))(TOKENS))
