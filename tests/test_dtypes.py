"""Half precision: within the noise that Hugging Face's own half precision makes, and no more."""

import copy
from pathlib import Path

import pytest
import torch
from parity_table import LENGTH, ROWS, Row, error, hf_folder, hf_model, ids
from torch import Tensor

import lenskit as lk
from lenskit.modules.module import Module

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def noise(logits: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference."""
    return float((logits.double() - exact.double()).pow(2).mean().sqrt())


def usual_noise(logits: Tensor, exact: Tensor) -> float:
    """The median of the difference: where rounding sends a token to another expert, the others are dwarfed."""
    return float((logits.double() - exact.double()).abs().median())


@HALVES
@pytest.mark.parametrize("row", ROWS, ids=str)
@torch.no_grad()
def test_half_precision_is_as_near_as_hugging_faces(row: Row, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, off = hf_folder(row, tmp_path), usual_noise if row.routed else noise
    exact, theirs = hf_model(folder), hf_model(folder, dtype=dtype)
    ours = lk.HookedTransformer.from_pretrained(folder, dtype=dtype)
    for module in ours.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = isinstance(module, Module) and name in module.kept_exact
            assert parameter.dtype == (torch.float32 if kept else dtype), name
    tokens = ids(8, LENGTH)
    want, logits = exact(tokens).logits, ours(tokens)
    assert logits.dtype == dtype
    assert off(logits, want) <= 1.3 * off(theirs(tokens).logits, want)
    explicit, _ = ours.run_with_cache(tokens)
    assert off(explicit, want) <= 1.3 * off(theirs(tokens).logits, want)


@HALVES
@torch.no_grad()
def test_far_positions_are_as_exact_as_near_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rounded to half precision, an angle of hundreds of radians would be any angle."""
    folder = hf_folder(Row("long", "llama", {"num_hidden_layers": 1, "max_position_embeddings": 900}), tmp_path)
    exact, theirs = hf_model(folder), hf_model(folder, dtype=dtype)
    ours = lk.HookedTransformer.from_pretrained(folder, dtype=dtype)
    tokens = ids(1, 900)
    want = exact(tokens).logits
    assert noise(ours(tokens), want) <= 1.3 * noise(theirs(tokens).logits, want)


@HALVES
@torch.no_grad()
def test_activations_have_the_models_dtype_and_scales_are_float32(
    shared: lk.HookedTransformer, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(shared).to(dtype)
    _, cache = model.run_with_cache(ids(2, 7), "*")
    for name, activation in cache.items():
        assert activation.dtype == (torch.float32 if name.endswith("hook_scale") else dtype), name


@torch.no_grad()
def test_double_precision_stays_double_whoever_asks(shared: lk.HookedTransformer) -> None:
    model = copy.deepcopy(shared).double()
    logits, cache = model.run_with_cache(ids(2, 7), "*")
    assert {activation.dtype for activation in cache.values()} == {torch.float64}
    assert error(logits, model(ids(2, 7))) < 1e-13


@HALVES
@torch.no_grad()
def test_an_edit_that_changes_nothing_costs_no_precision(shared: lk.HookedTransformer, dtype: torch.dtype) -> None:
    model = copy.deepcopy(shared).to(dtype)
    tokens = ids(4, LENGTH)
    exact = shared(tokens)
    leave_alone = [("*.hook_scale", lambda act, hook: act.clone()), ("*.hook_pattern", lambda act, hook: None)]
    edited = model.run_with_hooks(tokens, leave_alone).logits
    assert noise(edited, exact) <= 1.3 * noise(model(tokens), exact)


@HALVES
def test_gradients_flow_in_half_precision(shared: lk.HookedTransformer, dtype: torch.dtype) -> None:
    model = copy.deepcopy(shared).to(dtype)
    model(ids(2, 7)).float().logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == dtype
        assert bool(parameter.grad.isfinite().all())
