"""Under torch.compile: the same numbers from one graph, and hooks that come and go as if nothing was compiled."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from parity_table import DIVISORS, Row, error, hf_folder, ids, rope
from torch import Tensor

import lenskit as lk
from lenskit.hooks import HookPoint

CLOSE = 1e-5
TOKENS = ids(2, 9)

ROWS = [
    Row("encoder", "bert", {"num_hidden_layers": 2}),
    Row("scaled by layer", "gpt2", {"n_layer": 2, "scale_attn_by_inverse_layer_idx": True}),
    Row("biased", "llama", {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
    Row("yarn", "llama", {"num_hidden_layers": 2, **rope("yarn", factor=4.0, original_max_position_embeddings=8)}),
    Row(
        "longrope",
        "llama",
        {"num_hidden_layers": 2, **rope("longrope", original_max_position_embeddings=8, **DIVISORS)},
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {str(row): hf_folder(row, tmp_path_factory.mktemp("hf")) for row in ROWS}


@pytest.fixture
def model(unchecked: ModuleType, folders: dict[str, Path], model_type: str) -> lk.HookedTransformer:
    """A fresh one of each family, without the checks of shapes, which the compiler would trace."""
    row = next(row for row in ROWS if row.model_type == model_type)
    return unchecked.HookedTransformer.from_pretrained(folders[str(row)])


def turn(act: Tensor, hook: HookPoint) -> Tensor:
    """Swaps the rows of the batch: it matters at every point."""
    return act.flip(0)


@pytest.mark.parametrize("row", ROWS, ids=str)
@torch.no_grad()
def test_one_graph_with_the_same_logits(unchecked: ModuleType, folders: dict[str, Path], row: Row) -> None:
    model = unchecked.HookedTransformer.from_pretrained(folders[str(row)])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert error(compiled(TOKENS), model(TOKENS)) < CLOSE
    if not row.length_matters:
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[0, :4] = False
        assert error(compiled(TOKENS, mask)[mask], model(TOKENS, mask)[mask]) < CLOSE
    for length in (12, 5):
        assert error(compiled(ids(3, length)), model(ids(3, length))) < CLOSE


@torch.no_grad()
def test_rows_scaled_by_their_own_length(unchecked: ModuleType, folders: dict[str, Path]) -> None:
    """How long a row is depends on the data, so this is not one graph."""
    model = unchecked.HookedTransformer.from_pretrained(folders[str(ROWS[-1])])
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :7] = False  # within the original context; the other row is beyond it
    compiled = torch.compile(model, backend="eager")
    assert error(compiled(ids(2, 12), mask)[mask], model(ids(2, 12), mask)[mask]) < CLOSE


@torch.no_grad()
def test_no_graph_break(model: lk.HookedTransformer) -> None:
    explained = torch._dynamo.explain(model)(TOKENS)
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


@torch.no_grad()
def test_part_of_a_model_is_one_graph_too(model: lk.HookedTransformer) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    stream = model(TOKENS, stop_at_layer=1)
    assert torch.equal(compiled(TOKENS, stop_at_layer=1), stream)
    assert torch.equal(compiled(stream, start_at_layer=1), model(TOKENS))


SITES = ["*.attn.hook_q", "blocks.1.attn.hook_pattern", "blocks.0.hook_q_input", "ln_final.hook_scale"]


@torch.no_grad()
def test_hooks_attached_after_compiling_take_effect_and_leave(model: lk.HookedTransformer) -> None:
    plain = model(TOKENS)
    wanted = {site: model.run_with_hooks(TOKENS, [(site, turn)]).logits for site in SITES}
    compiled = torch.compile(model, backend="eager")
    assert error(compiled(TOKENS), plain) < CLOSE
    for site in SITES:
        with model.hooks([(site, turn)]):
            assert error(compiled(TOKENS), wanted[site]) < CLOSE, site
        assert error(compiled(TOKENS), plain) < CLOSE, f"after {site}"
        assert error(wanted[site], plain) > 1e-3, site


@torch.no_grad()
def test_the_verbs_of_a_compiled_model(model: lk.HookedTransformer) -> None:
    logits, cache = model.run_with_cache(TOKENS, "*")
    edited = model.run_with_hooks(TOKENS, [("*.hook_mlp_out", turn)]).logits
    model.compile(backend="eager")
    assert error(model(TOKENS), logits) < CLOSE
    again, cached = model.run_with_cache(TOKENS, "*")
    assert error(again, logits) < CLOSE
    assert list(cached) == list(cache)
    for name, activation in cache.items():
        assert error(cached[name].nan_to_num(neginf=0.0), activation.nan_to_num(neginf=0.0)) < CLOSE, name
    assert error(model.run_with_hooks(TOKENS, [("*.hook_mlp_out", turn)]).logits, edited) < CLOSE
    assert error(model(TOKENS), logits) < CLOSE


@torch.no_grad()
def test_compiled_blocks_notice_hooks(model: lk.HookedTransformer) -> None:
    plain = model(TOKENS)
    hooks = [("blocks.1.hook_attn_out", turn), ("blocks.*.attn.hook_z", lambda act, hook: act.neg_())]
    wanted = model.run_with_hooks(TOKENS, hooks).logits
    for block in model.blocks:
        block.compile(backend="eager")
    assert error(model(TOKENS), plain) < CLOSE
    for _ in range(2):
        assert error(model.run_with_hooks(TOKENS, hooks).logits, wanted) < CLOSE
        assert error(model(TOKENS), plain) < CLOSE


# torch's own, from the compiler's guards; nobody reads that .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_gradients_through_a_compiled_model(model: lk.HookedTransformer) -> None:
    compiled = torch.compile(model, backend="aot_eager")
    seen: list[Tensor] = []
    keep = ("blocks.1.hook_resid_mid", lambda grad, hook: seen.append(grad))
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(TOKENS).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with model.hooks(bwd_hooks=[keep]):
            run(TOKENS).square().mean().backward()
    for name, gradient in gradients[0].items():
        assert error(gradients[1][name], gradient) < 1e-4, name
    assert error(seen[1], seen[0]) < 1e-4


@torch.no_grad()
def test_compiling_while_hooks_are_attached(model: lk.HookedTransformer) -> None:
    plain = model(TOKENS)
    compiled = torch.compile(model, backend="eager")
    with model.hooks([("blocks.0.hook_mlp_out", turn)]):
        first = compiled(TOKENS)
    assert error(first, model.run_with_hooks(TOKENS, [("blocks.0.hook_mlp_out", turn)]).logits) < CLOSE
    assert error(compiled(TOKENS), plain) < CLOSE


@torch.no_grad()
def test_errors_reach_the_user_of_a_compiled_model(unchecked: ModuleType, model: lk.HookedTransformer) -> None:
    compiled = torch.compile(model, backend="eager")
    with (
        model.hooks([("blocks.0.hook_mlp_out", lambda act, hook: act[0])]),
        pytest.raises(unchecked.errors.ReplacementError, match=r"blocks\.0\.hook_mlp_out"),
    ):
        compiled(TOKENS)
    assert error(compiled(TOKENS), model(TOKENS)) < CLOSE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where inductor is imported
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_the_default_backend(model: lk.HookedTransformer) -> None:
    compiled = torch.compile(model, fullgraph=True)
    assert error(compiled(TOKENS), model(TOKENS)) < CLOSE
    hooked = torch.compile(model)
    with model.hooks([("blocks.1.hook_mlp_out", turn)]):
        assert error(hooked(TOKENS), model.run_with_hooks(TOKENS).logits) < CLOSE
    assert error(hooked(TOKENS), model(TOKENS)) < CLOSE


FIRST_HOOK = """
import torch, lenskit as lk
model = lk.HookedTransformer.from_pretrained("demo-llama")
compiled, mlp, ran = torch.compile(model, backend="eager"), model.blocks[1].mlp, []
note = lambda module, *_: ran.append(module) if module is mlp else None
with torch.no_grad():
    {register}
    compiled(torch.arange(8)[None])
assert ran == [mlp], ran
"""


@pytest.mark.parametrize(
    "register",
    [
        "compiled(torch.arange(8)[None]); mlp.register_forward_hook(note)",
        "torch.nn.modules.module.register_module_forward_hook(note)",
    ],
    ids=["a module's, later", "all modules', before"],
)
def test_the_first_torch_hook_of_a_process_is_noticed(register: str) -> None:
    """In a process of its own: the compiler's guards find a module by its name, of which there is one here only."""
    script = FIRST_HOOK.format(register=register)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
