"""The verbs: running, caching, parts of the model, text; and the model as a torch module among others."""

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity_table import error, ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lenskit as lk
from lenskit.errors import HookError, InputError, UnknownHookPointError
from lenskit.hooks import HookPoint
from lenskit.modules.linear import Linear
from lenskit.modules.mlp import ACTIVATIONS
from lenskit.modules.module import Identity

CLOSE = 1e-5
TOKENS = ids(2, 9)
TEXT = "Madison Square Garden is located in the city of New"


def double(act: Tensor, hook: HookPoint) -> Tensor:
    return 2 * act


@pytest.fixture(scope="session")
def demo(model_type: str, demo_gpt2: lk.HookedTransformer, demo_llama: lk.HookedTransformer) -> lk.HookedTransformer:
    return {"gpt2": demo_gpt2, "llama": demo_llama}[model_type]


# -- forward


@torch.no_grad()
def test_a_trained_model_knows_what_it_was_taught(demo: lk.HookedTransformer) -> None:
    assert demo.to_string(int(demo(TEXT)[0, -1].argmax())) == " York"


def test_loaded_models_are_in_eval_mode(demo: lk.HookedTransformer) -> None:
    assert not any(module.training for module in demo.modules())


@torch.no_grad()
def test_text_and_its_ids_are_the_same_input(demo: lk.HookedTransformer) -> None:
    tokens = demo.to_tokens(TEXT).tokens
    for same in (tokens, [TEXT], tokens[0], tokens.tolist(), demo.tokenizer(TEXT), demo.to_tokens(TEXT).tokens.int()):
        assert torch.equal(demo(same), demo(TEXT))
    result = demo.run_with_hooks(TEXT)
    assert torch.equal(result.logits, demo(TEXT))
    assert torch.equal(result.tokens, tokens)
    assert torch.equal(demo.run_with_cache(TEXT)[0], result.logits) or error(demo(TEXT), result.logits) < CLOSE


@torch.no_grad()
def test_prompts_of_different_lengths_are_each_as_if_alone(demo: lk.HookedTransformer) -> None:
    prompts = [TEXT, "The Eiffel Tower is in the city of", "a"]
    together = demo(prompts)
    for row, prompt in enumerate(prompts):
        alone = demo(prompt)[0]
        assert error(together[row, -len(alone) :], alone) < CLOSE


# -- run_with_cache


@torch.no_grad()
def test_by_default_everything_is_cached_but_what_is_on_demand(shared: lk.HookedTransformer) -> None:
    _, cache = shared.run_with_cache(TOKENS)
    on_demand = (
        "hook_attn_in",
        "hook_q_input",
        "hook_k_input",
        "hook_v_input",
        "hook_mlp_in",
        "hook_result",
        "hook_out",
    )
    assert list(cache) == [name for name in shared.hook_points if not name.endswith(on_demand)]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("blocks.1.hook_resid_mid", ["blocks.1.hook_resid_mid"]),
        ("blocks.-1.attn.hook_result", ["blocks.2.attn.hook_result"]),
        ("*.hook_mlp_in", [f"blocks.{layer}.hook_mlp_in" for layer in range(3)]),
        (["hook_logits", "hook_embed"], ["hook_embed", "hook_logits"]),
        (lambda name: name.startswith("hook_l"), ["hook_logits"]),
    ],
)
@torch.no_grad()
def test_what_is_named_is_cached_and_nothing_else(
    shared: lk.HookedTransformer, names: object, wanted: list[str]
) -> None:
    logits, cache = shared.run_with_cache(TOKENS, names)
    assert list(cache) == wanted
    assert error(logits, shared(TOKENS)) < CLOSE


def test_a_cache_on_another_device(shared: lk.HookedTransformer) -> None:
    logits, cache = shared.run_with_cache(TOKENS, device="meta")
    assert {activation.device.type for activation in cache.values()} == {"meta"}
    assert logits.device.type == "cpu"
    assert cache["resid_post", 0].shape == (2, 9, shared.cfg.d_model)


def test_without_grad_nothing_is_kept_for_backward(shared: lk.HookedTransformer) -> None:
    logits, cache = shared.run_with_cache(TOKENS)
    assert not logits.requires_grad
    assert not any(activation.requires_grad for activation in cache.values())
    assert torch.is_grad_enabled()


def test_with_grad_the_cache_is_part_of_the_graph(shared: lk.HookedTransformer) -> None:
    streams = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    seen: list[Tensor] = []
    keep = (streams, lambda grad, hook: seen.append(grad))
    shared.run_with_hooks(TOKENS, bwd_hooks=[keep]).logits.square().sum().backward()
    logits, cache = shared.run_with_cache(TOKENS, streams, grad=True)
    gradients = torch.autograd.grad(logits.square().sum(), [cache[name] for name in streams])
    for gradient, wanted in zip(gradients, reversed(seen), strict=True):
        assert error(gradient, wanted) < 1e-4
    shared.zero_grad()


def test_with_grad_every_point_is_on_the_path_to_the_logits(shared: lk.HookedTransformer) -> None:
    """A scale, and a point in a layout of its own, too."""
    for name in shared.hook_points:
        logits, cache = shared.run_with_cache(TOKENS, name, grad=True)
        [gradient] = torch.autograd.grad(logits.square().sum(), [cache[name]])
        assert bool(gradient.any()), name


@torch.no_grad()
def test_a_cache_sees_what_hooks_around_it_made(shared: lk.HookedTransformer) -> None:
    _, before = shared.run_with_cache(TOKENS)
    with shared.hooks([("blocks.1.hook_mlp_out", double)]):
        logits, after = shared.run_with_cache(TOKENS)
    assert torch.equal(after["mlp_out", 1], 2 * before["mlp_out", 1])
    assert torch.equal(logits, after["logits"])


# -- what nobody asked for is not computed


class Made(TorchDispatchMode):
    """Records every tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.storages: dict[tuple[int, ...], set[int]] = {}

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        made = op(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.shapes.append(tuple(tensor.shape))
                storage = tensor.untyped_storage().data_ptr()
                self.storages.setdefault(tuple(tensor.shape), set()).add(storage)
        return made


LONG = ids(2, 37)  # a length that is no other size


@torch.no_grad()
def test_no_square_matrix_unless_somebody_asked(shared: lk.HookedTransformer) -> None:
    def squares(names: str | None) -> int:
        with Made() as made:
            shared(LONG) if names is None else shared.run_with_cache(LONG, names)
        return sum(shape == (2, shared.cfg.n_heads, 37, 37) for shape in made.shapes)

    with Made() as made:
        shared.run_with_cache(LONG, ["*.hook_resid_*", "*.hook_z", "*.hook_q", "*.hook_scale", "*.hook_result"])
    assert not [shape for shape in made.shapes if shape[-2:] == (37, 37)]
    assert squares(None) == 0
    in_one_layer, in_all = squares("blocks.1.attn.hook_pattern"), squares("*.hook_pattern")
    assert 0 < 3 * in_one_layer == in_all
    assert squares(None) == 0


@pytest.mark.parametrize("name", ["attn.hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"])
@torch.no_grad()
def test_no_stream_by_head_unless_somebody_asked(shared: lk.HookedTransformer, name: str) -> None:
    with Made() as unasked:
        shared.run_with_cache(LONG)
    by_head = shared.shapes(LONG)[f"blocks.1.{name}"]
    assert by_head not in unasked.shapes
    with Made() as asked:
        shared.run_with_cache(LONG, f"blocks.1.{name}")
    assert by_head in asked.shapes


@torch.no_grad()
def test_no_weight_is_copied_to_run(demo: lk.HookedTransformer) -> None:
    """As they lie on disk, which for one of the two is the other way round than torch's habit."""
    weights = {p.untyped_storage().data_ptr() for p in demo.parameters()}
    shapes = {tuple(shape) for p in demo.parameters() if p.dim() > 1 for shape in (p.shape, p.T.shape)}
    with Made() as made:
        demo(TEXT)
        demo.run_with_cache([TEXT, "a"])
    for shape in shapes & made.storages.keys():
        assert made.storages[shape] <= weights, shape


# -- parts of the model

LAYERS = [0, 1, 2, 3, -1, -2, -3]


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_stopping_and_starting_again_is_the_whole(shared: lk.HookedTransformer, layer: int) -> None:
    whole, cache = shared.run_with_cache(TOKENS, "*.hook_resid_*")
    n = layer % 3 if layer < 0 else layer
    stream = cache["resid_pre", n] if n < 3 else cache["resid_post", -1]
    assert torch.equal(shared(TOKENS, stop_at_layer=layer), stream)
    assert torch.equal(shared(stream, start_at_layer=layer), whole)
    for verb in (shared.run_with_hooks, shared.run_with_cache):
        stopped, started = verb(TOKENS, stop_at_layer=layer), verb(stream, start_at_layer=layer)
        stopped, started = (out.logits if isinstance(out, lk.Result) else out[0] for out in (stopped, started))
        assert error(stopped, stream) < CLOSE
        assert error(started, whole) < CLOSE


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (0, 1), (1, 2), (-2, -1), (1, 1), (0, 0), (3, 3)])
@torch.no_grad()
def test_some_layers_in_the_middle(shared: lk.HookedTransformer, start: int, stop: int) -> None:
    _, cache = shared.run_with_cache(TOKENS, "*.hook_resid_*")
    streams = [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in range(3))]
    start_stream = streams[start % 3 if start < 0 else start]
    stop_stream = streams[stop % 3 if stop < 0 else stop]
    assert torch.equal(shared(start_stream, start_at_layer=start, stop_at_layer=stop), stop_stream)


@torch.no_grad()
def test_stopping_computes_nothing_after(shared: lk.HookedTransformer) -> None:
    _, cache = shared.run_with_cache(TOKENS, stop_at_layer=1)
    assert [name for name in cache if name.endswith("resid_post")] == ["blocks.0.hook_resid_post"]
    assert "hook_logits" not in cache
    _, cache = shared.run_with_cache(cache["resid_post", 0], start_at_layer=1)
    assert "hook_embed" not in cache
    assert ("resid_post", 0) not in cache
    assert ("resid_post", 1) in cache


@torch.no_grad()
def test_a_stream_may_be_padded(shared: lk.HookedTransformer) -> None:
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    whole = shared(TOKENS, mask)
    stream = shared(TOKENS, mask, stop_at_layer=2)
    assert torch.equal(shared(stream, mask, start_at_layer=2)[mask], whole[mask])
    assert torch.equal(shared.run_with_hooks(stream, mask=mask, start_at_layer=2).mask, mask)


def test_hooks_apply_to_the_part_that_runs(shared: lk.HookedTransformer) -> None:
    with torch.no_grad():
        stream = shared(TOKENS, stop_at_layer=1)
        edited = shared.run_with_hooks(stream, [("blocks.1.hook_mlp_out", double)], start_at_layer=1).logits
        whole = shared.run_with_hooks(TOKENS, [("blocks.1.hook_mlp_out", double)]).logits
    assert torch.equal(edited, whole)


@pytest.mark.parametrize("layer", [4, -4, 100])
def test_a_layer_that_is_not_there(shared: lk.HookedTransformer, layer: int) -> None:
    with pytest.raises(InputError) as refused:
        shared(TOKENS, stop_at_layer=layer)
    assert str(refused.value).splitlines()[:3] == [
        "no such layer to start or stop at",
        f"  got:      {layer}",
        "  expected: from -3 to 3: the model has 3 layers",
    ]
    with pytest.raises(InputError, match="no such layer"):
        shared(shared(TOKENS, stop_at_layer=0), start_at_layer=layer)


@pytest.mark.parametrize("wrong", [TOKENS, "text", torch.zeros(2, 9, 5), [[1, 2]]])
def test_what_is_no_stream(shared: lk.HookedTransformer, wrong: object) -> None:
    with pytest.raises(InputError, match="start_at_layer takes the residual stream") as refused:
        shared.run_with_cache(wrong, start_at_layer=1)
    assert f"[batch pos {shared.cfg.d_model}]" in refused.value.expected


# -- the cache


def test_the_cache_is_a_mapping(shared: lk.HookedTransformer) -> None:
    _, cache = shared.run_with_cache(TOKENS)
    assert isinstance(cache, Mapping)
    assert isinstance(cache, lk.ActivationCache)
    assert len(cache) == len(list(cache)) == len(dict(cache)) == len(cache.keys())
    assert all(cache[name] is activation for name, activation in cache.items())
    assert cache.get("nothing") is None
    assert "hook_embed" in cache
    assert "embed" in cache
    assert ("resid_post", -1) in cache
    assert "nothing" not in cache
    assert ("nothing", 0) not in cache
    assert f"{len(cache)} activations, 3 layers" in repr(cache)


@given(data=st.data())
def test_every_name_has_a_short_key(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    _, cache = shared.run_with_cache(TOKENS, "*")
    name = data.draw(st.sampled_from(sorted(cache)))
    short = name.rpartition("hook_")[2]
    if not name.startswith("blocks."):
        keys = [name, name.removeprefix("hook_")]
    else:
        _, number, *parts, _ = name.split(".")
        layer = int(number)
        rest = name.split(".", 2)[2]
        keys = [name, f"blocks.{layer - 3}.{rest}", *((short, at, *parts) for at in (layer, layer - 3))]
        if short not in ("scale", "normalized", "out"):
            keys += [(short, layer), (short, layer - 3)]
    for key in keys:
        assert cache[key] is cache[name]
        assert cache.full_name(key) == name
        assert key in cache


@pytest.mark.parametrize(
    ("key", "stands_for"),
    [
        ("hook_q", "nothing here"),
        ("blocks.9.hook_resid_pre", "nothing here"),
        ("blocks.-9.hook_resid_pre", "nothing here"),
        (("resid_pre", 3), "nothing here"),
        (("resid_pre", -4), "nothing here"),
        (("scale", 0), "blocks.0.ln1.hook_scale, blocks.0.ln2.hook_scale"),
        (("scale", 0, "ln3"), "nothing here"),
        (("result", 0), "nothing here"),
        (("id_pre", 0), "nothing here"),
    ],
)
def test_keys_that_stand_for_no_single_activation(shared: lk.HookedTransformer, key: object, stands_for: str) -> None:
    _, cache = shared.run_with_cache(TOKENS)
    with pytest.raises(UnknownHookPointError) as refused:
        cache[key]
    lines = str(refused.value).splitlines()
    assert lines[0] == f"no single cached activation answers to {key!r}"
    assert lines[1] == f"  got:      {key!r}, which stands for {stands_for}"
    assert "hook_embed" in lines[2]
    assert "run_with_cache(names=...) decides what is kept" in lines[3]
    assert key not in cache
    assert cache.get(key) is None


@pytest.mark.parametrize("key", [0, None, ("resid_pre",), (), ("resid_pre", 0, "ln1", "more"), ("resid_pre", "0")])
def test_what_is_no_key_is_not_in_the_cache(shared: lk.HookedTransformer, key: object) -> None:
    _, cache = shared.run_with_cache(TOKENS)
    assert key not in cache
    with pytest.raises(UnknownHookPointError):
        cache[key]


def test_one_point_of_every_layer(shared: lk.HookedTransformer) -> None:
    _, cache = shared.run_with_cache(TOKENS)
    streams = cache.stack("resid_post")
    assert streams.shape == (3, 2, 9, shared.cfg.d_model)
    assert all(torch.equal(streams[layer], cache["resid_post", layer]) for layer in range(3))
    scales = cache.stack("scale", "ln2")
    assert torch.equal(scales[1], cache["blocks.1.ln2.hook_scale"])
    with pytest.raises(UnknownHookPointError, match=r"\('scale', 0\)"):
        cache.stack("scale")
    with pytest.raises(UnknownHookPointError, match=r"\('resid_post', 1\)"):
        shared.run_with_cache(TOKENS, "blocks.0.hook_resid_post")[1].stack("resid_post")


def test_a_cache_moves(shared: lk.HookedTransformer) -> None:
    _, cache = shared.run_with_cache([[1, 2, 3], [4]], ["hook_embed", "blocks.0.hook_resid_pre"])
    moved = cache.to("meta")
    assert list(moved) == list(cache)
    assert moved["embed"].device.type == "meta"
    assert cache["embed"].device.type == "cpu"
    assert moved["resid_pre", -3].shape == cache["resid_pre", -3].shape
    assert torch.equal(moved.mask, torch.tensor([[True, True, True], [False, False, True]]))


def test_the_mask_is_none_where_nothing_is_padded(shared: lk.HookedTransformer) -> None:
    assert shared.run_with_cache(TOKENS, "hook_embed")[1].mask is None
    assert shared.run_with_cache(TOKENS, "hook_embed", mask=torch.ones(2, 9))[1].mask is None


# -- text


def test_tokens_and_back(demo: lk.HookedTransformer) -> None:
    batch = demo.to_tokens(TEXT)
    assert batch.mask is None
    assert batch.tokens.tolist() == [demo.tokenizer(TEXT)["input_ids"]]
    assert demo.to_string(batch.tokens[0]) == TEXT
    assert demo.to_string(batch.tokens[0].tolist()) == TEXT
    pieces = demo.to_str_tokens(TEXT)
    assert "".join(pieces) == TEXT
    assert pieces == [demo.to_string(int(token)) for token in batch.tokens[0]]
    assert demo.to_str_tokens(batch.tokens) == demo.to_str_tokens(batch.tokens[0].tolist()) == pieces


def test_special_tokens_are_shown(demo: lk.HookedTransformer) -> None:
    assert demo.to_string([demo.tokenizer.eos_token_id]) == demo.tokenizer.eos_token


def test_str_tokens_are_one_prompts(demo: lk.HookedTransformer) -> None:
    with pytest.raises(InputError, match="to_str_tokens takes one prompt") as refused:
        demo.to_str_tokens(["one", "two"])
    assert refused.value.got == "2 prompts"


def test_text_without_a_tokenizer(shared: lk.HookedTransformer) -> None:
    for use in (shared, shared.to_tokens, shared.to_str_tokens, shared.run_with_cache, shared.shapes):
        with pytest.raises(InputError, match="text was given, but the model has no tokenizer") as refused:
            use("some text")
        assert refused.value.got == "the text 'some text'"
        assert "model.tokenizer" in refused.value.fix
    with pytest.raises(InputError, match="the model has no tokenizer"):
        shared.to_string([1, 2])


# -- looking


def test_printing_shows_the_tree_with_its_points(shared: lk.HookedTransformer) -> None:
    tree = str(shared)
    assert tree.startswith("HookedTransformer(\n")
    for line in (
        "(hook_embed): HookPoint(batch pos d_model)",
        f"(0-2): 3 x {type(shared.blocks[0]).__name__}(",
        "(hook_q_input): HookPoint(batch pos head d_model, on demand)",
        "(hook_pattern): HookPoint(batch head query_pos key_pos)",
        "(hook_scale): HookPoint(batch pos 1)",
        f"(embed): Embed(59 tokens -> {shared.cfg.d_model})",
        f"(unembed): Unembed({shared.cfg.d_model} -> 59)",
    ):
        assert line in tree
    for name, _ in shared.named_modules():
        local = name.rpartition(".")[2]
        assert not name or local.isdigit() or f"({local}): " in tree


def test_errors_in_a_function_name_the_point(shared: lk.HookedTransformer) -> None:
    def fail(act: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as failed:
        shared.run_with_hooks(TOKENS, [("blocks.1.attn.hook_z", fail)])
    [note] = failed.value.__notes__
    assert "'blocks.1.attn.hook_z'" in note
    assert str((2, 9, shared.cfg.n_heads, shared.cfg.d_head)) in note


# -- a torch module among others


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_are_whole_and_independent(
    fresh: lk.HookedTransformer, duplicate: Callable[[lk.HookedTransformer], lk.HookedTransformer]
) -> None:
    before, cached = fresh.run_with_cache(TOKENS, "*")
    other = duplicate(fresh)
    assert torch.equal(other(TOKENS), fresh(TOKENS))
    logits, cache = other.run_with_cache(TOKENS, "*")
    assert torch.equal(logits, before)
    assert list(cache) == list(cached)
    assert (other.unembed.weight is other.embed.weight) == fresh.cfg.tie_embeddings
    assert not set(other.modules()) & set(fresh.modules())

    edit = [("blocks.1.hook_mlp_out", double)]
    with other.hooks(edit):
        assert torch.equal(fresh(TOKENS), duplicate(fresh)(TOKENS))
        assert not torch.equal(other(TOKENS), fresh(TOKENS))
    with fresh.hooks(edit):
        assert not torch.equal(other(TOKENS), fresh(TOKENS))
    other.blocks[0].attn.W_V.mul_(2)
    assert not torch.equal(other(TOKENS), fresh(TOKENS))


@torch.no_grad()
def test_a_copy_does_not_inherit_the_hooks_of_a_scope(fresh: lk.HookedTransformer) -> None:
    """They leave with the scope, which knows nothing of the copy."""
    plain = fresh(TOKENS)
    with fresh.hooks([("blocks.1.hook_mlp_out", double)]):
        other = copy.deepcopy(fresh)
        pickled = pickle.dumps(fresh)
    assert torch.equal(other(TOKENS), plain)
    assert torch.equal(pickle.loads(pickled)(TOKENS), plain)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_function_can_be_pickled(tiny: Callable[..., lk.HookedTransformer], name: str) -> None:
    model = tiny("gpt2", activation_function=name)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS), model(TOKENS))


def test_saved_and_loaded_is_identical(demo: lk.HookedTransformer, tmp_path: Path) -> None:
    again = lk.HookedTransformer.from_pretrained(demo.save_pretrained(tmp_path / "saved"))
    assert again.cfg == demo.cfg
    assert again.to_tokens(TEXT).tokens.tolist() == demo.to_tokens(TEXT).tokens.tolist()
    with torch.no_grad():
        assert torch.equal(again(TEXT), demo(TEXT))


def test_state_dict_round_trip(fresh: lk.HookedTransformer, tiny: Callable[..., lk.HookedTransformer]) -> None:
    other = tiny(fresh.cfg.model_type, seed=1)
    with torch.no_grad():
        assert not torch.equal(other(TOKENS), fresh(TOKENS))
        other.load_state_dict(fresh.state_dict())
        assert torch.equal(other(TOKENS), fresh(TOKENS))
        parameters = {name: torch.zeros_like(parameter) for name, parameter in fresh.named_parameters()}
        assert not torch.func.functional_call(fresh, parameters, (TOKENS,)).any()


@torch.no_grad()
def test_torchs_forward_hooks_run_on_every_submodule(fresh: lk.HookedTransformer) -> None:
    """But for lists, which nobody calls, and the parts that this architecture does not have."""
    no_part = (nn.ModuleList, HookPoint, Identity)
    modules = {name: module for name, module in fresh.named_modules() if not isinstance(module, no_part)}
    ran: set[str] = set()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    fresh(TOKENS)
    assert ran == modules.keys()


@torch.no_grad()
def test_torchs_forward_hooks_replace_inputs_and_outputs(fresh: lk.HookedTransformer) -> None:
    plain, mlp, attn, block = fresh(TOKENS), fresh.blocks[1].mlp, fresh.blocks[1].attn, fresh.blocks[2]
    with mlp.register_forward_hook(lambda module, inputs, output: 2 * output):
        by_output = fresh(TOKENS)
    with block.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], *inputs[1:])):
        by_input = fresh(TOKENS)
    with nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 2 * output if module is attn else None
    ):
        by_any = fresh(TOKENS)
    assert torch.equal(fresh(TOKENS), plain)
    for logits, name in ((by_output, "1.hook_mlp_out"), (by_input, "2.hook_resid_pre"), (by_any, "1.hook_attn_out")):
        assert torch.equal(logits, fresh.run_with_hooks(TOKENS, [(f"blocks.{name}", double)]).logits)
        assert not torch.equal(logits, plain)


# The last is deprecated, and still there.
KINDS = ["forward", "forward_pre", "full_backward", "full_backward_pre", "backward"]


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_hooks_of_every_kind_run(new_import: ModuleType, kind: str) -> None:
    """Whichever is the first that a process registers."""
    model = new_import.HookedTransformer.from_pretrained("demo-llama")
    mlp, ran = model.blocks[1].mlp, []
    with getattr(mlp, f"register_{kind}_hook")(lambda module, *_: ran.append(module)):
        model(TEXT).sum().backward()
    assert ran == [mlp]


@torch.no_grad()
@pytest.mark.parametrize("whose", ["a module's", "a class's", "a copied module's", "an unpickled module's"])
def test_another_forward_is_what_runs(new_import: ModuleType, monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    """accelerate gives modules a forward of their own; a class may be given another."""
    model = new_import.HookedTransformer.from_pretrained("demo-llama")
    model(TEXT)
    mlp = model.blocks[1].mlp
    silenced = model.run_with_hooks(TEXT, [("blocks.1.hook_mlp_out", lambda act, _: 0 * act)]).logits
    if whose == "a class's":
        forward = type(mlp).forward
        monkeypatch.setattr(type(mlp), "forward", lambda self, x: forward(self, x) * (self is not mlp))
    elif whose == "a module's":
        monkeypatch.setattr(mlp, "forward", torch.zeros_like)
    else:
        vars(mlp)["forward"] = torch.zeros_like
        model.blocks[1].mlp = copy.deepcopy(mlp) if whose == "a copied module's" else pickle.loads(pickle.dumps(mlp))
    assert torch.equal(model(TEXT), silenced)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's own, for the embedding
def test_torchs_hooks_of_all_modules_run(new_import: ModuleType, kind: str) -> None:
    model = new_import.HookedTransformer.from_pretrained("demo-llama")
    ran: list[nn.Module] = []
    with getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda module, *_: ran.append(module)):
        model(TEXT).sum().backward()
    assert {id(model), id(model.embed), id(model.blocks[1]), id(model.blocks[1].mlp.w_in)} <= {id(m) for m in ran}


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_hooks_of_every_kind_are_refused_on_a_hook_point(shared: lk.HookedTransformer, kind: str) -> None:
    """They would not run."""
    with pytest.raises(HookError) as refused:
        getattr(shared.hook_points["blocks.0.hook_resid_pre"], f"register_{kind}_hook")(lambda *_: None)
    assert "torch's own hooks do not run on hook point 'blocks.0.hook_resid_pre'" in str(refused.value)
    assert "model.hooks" in refused.value.fix


def test_torchs_backward_hooks_see_gradients(fresh: lk.HookedTransformer) -> None:
    torchs, ours = [], []
    fresh.unembed.register_full_backward_hook(lambda module, inputs, outputs: torchs.extend((*inputs, *outputs)))
    keep = ("hook_logits", lambda grad, hook: ours.append(grad))
    fresh.run_with_hooks(TOKENS, bwd_hooks=[keep]).logits.square().sum().backward()
    assert torch.equal(torchs[1], ours[0])
    assert error(torchs[0], ours[0] @ fresh.unembed.weight) < CLOSE


class LowRank(nn.Module):
    """A linear map plus an update of rank one, as fine-tuning libraries put in its place."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base = base
        d_out, d_in = base.weight.shape
        self.down, self.up = nn.Parameter(0.1 * torch.ones(1, d_in)), nn.Parameter(0.1 * torch.ones(d_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


LINEAR = ["attn.o", "mlp.w_in", "mlp.w_out"]


@pytest.mark.parametrize(
    ("model_type", "part"),
    [("gpt2", part) for part in (*LINEAR, "attn.qkv.joined")] + [("llama", part) for part in (*LINEAR, "attn.qkv.v")],
    indirect=["model_type"],
)
def test_a_submodule_put_in_anothers_place_takes_effect(
    fresh: lk.HookedTransformer, model_type: str, part: str
) -> None:
    owner, _, name = f"blocks.1.{part}".rpartition(".")
    before = fresh(TOKENS)
    base = fresh.get_submodule(owner).get_submodule(name)
    setattr(fresh.get_submodule(owner), name, LowRank(base))
    updated = fresh(TOKENS)
    assert not torch.equal(updated, before)
    assert f"blocks.1.{part}.down" in dict(fresh.named_parameters())
    updated.logsumexp(-1).sum().backward()
    assert bool(fresh.get_submodule(f"blocks.1.{part}").down.grad.any())

    update = fresh.get_submodule(f"blocks.1.{part}")
    setattr(fresh.get_submodule(owner), name, base)
    assert torch.equal(fresh(TOKENS), before)
    with torch.no_grad():
        base.weight += update.up @ update.down
    assert error(fresh(TOKENS), updated) < CLOSE


@torch.no_grad()
def test_a_whole_part_can_be_replaced(fresh: lk.HookedTransformer) -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    zeroed = fresh.run_with_hooks(TOKENS, [("blocks.0.hook_mlp_out", lambda act, hook: act.zero_())]).logits
    mlp = fresh.blocks[0].mlp
    fresh.blocks[0].mlp = Silent()
    assert torch.equal(fresh(TOKENS), zeroed)
    assert not any(name.startswith("blocks.0.mlp") for name, _ in fresh.named_parameters())
    del fresh.blocks[0].mlp
    with pytest.raises(AttributeError, match="mlp"):
        fresh(TOKENS)
    fresh.blocks[0].mlp = mlp
    assert not torch.equal(fresh(TOKENS), zeroed)


@torch.no_grad()
def test_a_registered_replacement_takes_effect(fresh: lk.HookedTransformer) -> None:
    fresh.blocks[1].register_module("mlp", Identity())
    reads = fresh.run_with_cache(TOKENS, ["blocks.1.ln2.*", "blocks.1.hook_mlp_out"])[1]
    ln2 = fresh.blocks[1].ln2
    assert error(reads["mlp_out", 1], ln2.gain(reads["normalized", 1, "ln2"])) < CLOSE


@torch.no_grad()
def test_hooks_that_a_partial_pass_would_not_reach_are_refused(shared: lk.HookedTransformer) -> None:
    nothing: list[tuple[str, object]] = [("blocks.2.hook_resid_pre", double), ("hook_logits", double)]
    for hook in nothing:
        with pytest.raises(UnknownHookPointError, match="points that run"):
            shared.run_with_hooks(TOKENS, [hook], stop_at_layer=2)
    stream, cache = shared.run_with_cache(TOKENS, "blocks.*.hook_resid_pre", stop_at_layer=2)
    assert list(cache) == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    with pytest.raises(UnknownHookPointError, match="points that run"):
        shared.run_with_cache(stream, "hook_embed", start_at_layer=2)
    assert "hook_logits" in shared.run_with_cache(stream, start_at_layer=2)[1]
