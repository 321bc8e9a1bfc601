"""Expressions: what they record, compute, refuse, and become as files."""

# ruff: noqa: SIM300 (0 > act is what is tested)

import copy
import json
import math
import operator
import pickle
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lenskit as lk
from lenskit.errors import ExpressionError, PlanFormatError
from lenskit.hooks import HookPoint
from lenskit.interventions.expressions import (
    Act,
    Call,
    Expression,
    ModuleCall,
    as_json,
    bind,
    evaluate,
    leaves,
    modules,
    order,
    shape_of,
)
from lenskit.interventions.expressions.as_json import nodes_from_json, nodes_to_json
from lenskit.interventions.expressions.closed_list import FUNCTIONS, METHODS
from lenskit.interventions.expressions.random_numbers import rand, rand_like, randn, randn_like
from lenskit.interventions.scope import attached, on_points
from lenskit.modules.linear import AbsentBias, Linear
from lenskit.modules.module import Identity, Module, Symbol
from lenskit.modules.qkv import FusedQKV

# -- activations by name, as tensors and as expressions


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


VALUES: dict[str, Tensor] = {
    "x": seeded(2, 3, 4),
    "y": seeded(2, 3, 4, seed=1),
    "positive": seeded(2, 3, 4, seed=2).abs() + 0.1,
    "mask": seeded(2, 3, 4, seed=3) > 0,
    "other_mask": seeded(2, 3, 4, seed=4) > 0,
    "ids": (seeded(2, 3, 4, seed=5) > 0).long() + (seeded(2, 3, 4, seed=6) > 0),
    "v": seeded(4, seed=7),
    "w": seeded(4, seed=8),
    "square": seeded(3, 3, seed=9),
    "rows": torch.tensor([2, 0, 1, 1]),
    "half": seeded(2, 3, 4, seed=10).half(),
    "one": torch.tensor(2.5),
    "strange": torch.tensor([0.0, math.nan, math.inf, -math.inf]),
}
REAL = SimpleNamespace(**VALUES)
ACTS = SimpleNamespace(**{name: Act(name) for name in VALUES})
CONSTANT = seeded(3, 4, seed=11)
CONSTANT_MASK = torch.tensor([True, False, True])


def written(x: Any, index: Any, value: Any) -> Any:
    """`x` as it is once `value` was written into a part of it."""
    if isinstance(x, Expression):
        return Call("setitem", (x, index, value))
    x = x.clone()
    x[index] = value
    return x


def leaf(act: Act) -> Tensor:
    return VALUES[act.at]


def meta_leaf(act: Act) -> Tensor:
    return VALUES[act.at].to("meta")


def compute(expression: Expression) -> Tensor:
    return evaluate(expression, leaf, like=None)


def round_trip(*expressions: Expression) -> list[Expression]:
    """Through JSON text, as a file would have it."""
    tensors: dict[str, Tensor] = {}

    def tensor_name(tensor: Tensor) -> str:
        return next((name for name, known in tensors.items() if known is tensor), None) or keep(tensor)

    def keep(tensor: Tensor) -> str:
        tensors[f"t{len(tensors)}"] = tensor
        return f"t{len(tensors) - 1}"

    nodes, roots = nodes_to_json(expressions, tensor_name, lambda module: type(module).__name__)
    read = nodes_from_json(json.loads(json.dumps(nodes, allow_nan=False)), tensors, "the test")
    assert len(read) == len(order(*expressions))
    return [read[root] for root in roots]


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got, expected)


def same_or_nan(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got.isnan(), expected.isnan()) and same(
        got.nan_to_num(), expected.nan_to_num()
    )  # fmt: skip


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    data: Any = 0
    for _ in range(depth):
        data = wrap(data)
    return data


# -- every function of the list, as users write it; `t` has tensors or expressions

CASES: dict[str, list[Callable[[Any], Any]]] = {
    "T": [lambda t: t.square.T],
    "abs": [lambda t: abs(t.x), lambda t: torch.abs(t.x), lambda t: t.x.abs()],
    "add": [lambda t: t.x + t.y, lambda t: torch.add(t.x, t.y, alpha=2), lambda t: t.x.add(1), lambda t: 1 + t.ids],
    "all": [lambda t: t.mask.all(), lambda t: torch.all(t.mask, dim=-1)],
    "amax": [lambda t: t.x.amax(-1), lambda t: torch.amax(t.x, dim=(0, 1), keepdim=True)],
    "amin": [lambda t: t.x.amin(-1)],
    "any": [lambda t: t.mask.any(), lambda t: (t.x > 9).any(1)],
    "argmax": [lambda t: t.x.argmax(-1), lambda t: torch.argmax(t.x)],
    "argmin": [lambda t: t.x.argmin(-1, keepdim=True)],
    "argsort": [lambda t: t.x.argsort(-1, descending=True)],
    "bfloat16": [lambda t: t.x.bfloat16()],
    "bitwise_and": [lambda t: t.mask & t.other_mask, lambda t: True & t.mask, lambda t: t.ids & 1],
    "bitwise_not": [lambda t: ~t.mask, lambda t: ~t.ids],
    "bitwise_or": [lambda t: t.mask | t.other_mask, lambda t: False | t.mask],
    "bitwise_xor": [lambda t: t.mask ^ t.other_mask, lambda t: True ^ t.mask],
    "bmm": [lambda t: torch.bmm(t.x, t.y.mT)],
    "bool": [lambda t: t.ids.bool()],
    "cat": [lambda t: torch.cat([t.x, t.y], dim=-1), lambda t: torch.cat((t.square, torch.ones(1, 3)))],
    "ceil": [lambda t: t.x.ceil()],
    "clamp": [lambda t: t.x.clamp(0, 1), lambda t: t.x.clamp(min=0.5), lambda t: torch.clamp(t.x, min=t.y)],
    "clone": [lambda t: t.x.clone()],
    "contiguous": [lambda t: t.x.mT.contiguous()],
    "cos": [lambda t: t.x.cos()],
    "cosine_similarity": [lambda t: F.cosine_similarity(t.x, t.y, dim=-1), lambda t: torch.cosine_similarity(t.x, t.v)],
    "count_nonzero": [lambda t: t.mask.count_nonzero(-1)],
    "cross_entropy": [
        lambda t: F.cross_entropy(t.x[0], torch.tensor([0, 1, 3])),
        lambda t: F.cross_entropy(t.x[0], t.ids[0, :, 0], reduction="none"),
    ],
    "cumprod": [lambda t: t.x.cumprod(1)],
    "cumsum": [lambda t: t.x.cumsum(1), lambda t: t.mask.cumsum(0)],
    "detach": [lambda t: t.x.detach()],
    "diagonal": [lambda t: t.square.diagonal(), lambda t: t.x.diagonal(1, 1, 2)],
    "div": [lambda t: t.x / t.y, lambda t: 1 / t.positive, lambda t: torch.div(t.x, 2, rounding_mode="floor"),
            lambda t: t.ids / 2],
    "dot": [lambda t: torch.dot(t.v, t.w), lambda t: t.v.dot(t.w)],
    "double": [lambda t: t.x.double()],
    "einsum": [lambda t: torch.einsum("bpd,d->bp", t.x, t.v), lambda t: torch.einsum("bpd,pd->bd", t.x, CONSTANT),
               lambda t: torch.einsum(t.v, [0], t.w, [1], [0, 1])],
    "eq": [lambda t: t.ids == 1, lambda t: t.x == t.x, lambda t: torch.eq(t.x, t.y)],
    "exp": [lambda t: t.x.exp(), lambda t: t.ids.exp()],
    "expand": [lambda t: t.v.expand(2, 3, -1), lambda t: t.v.expand((3, 4))],
    "expm1": [lambda t: t.x.expm1()],
    "flatten": [lambda t: t.x.flatten(1), lambda t: torch.flatten(t.x)],
    "flip": [lambda t: t.x.flip(0), lambda t: t.x.flip(0, 2), lambda t: torch.flip(t.x, (1,))],
    "float": [lambda t: t.half.float(), lambda t: t.ids.float()],
    "floor": [lambda t: t.x.floor()],
    "floor_divide": [lambda t: t.x // 2, lambda t: 7 // t.positive, lambda t: t.ids // 2],
    "full_like": [lambda t: torch.full_like(t.x, 3), lambda t: torch.full_like(t.ids, 1.5, dtype=torch.float64)],
    "gather": [lambda t: t.x.gather(-1, t.ids), lambda t: torch.gather(t.x, dim=1, index=t.ids)],
    "ge": [lambda t: t.x >= t.y, lambda t: 0 >= t.x],
    "gelu": [lambda t: F.gelu(t.x), lambda t: F.gelu(t.x, approximate="tanh")],
    "setitem": [
        lambda t: written(t.x, (0, slice(1, None), 2), 7.0), lambda t: written(t.x, ..., t.x * 2),
        lambda t: written(t.x, t.x > 0, 0.0), lambda t: written(t.x, (slice(None), [0, 2]), t.x[:, :1]),
    ],
    "getitem": [
        lambda t: t.x[0], lambda t: t.x[:, 1:, ::2], lambda t: t.x[..., -1], lambda t: t.x[:, None, 0],
        lambda t: t.x[[1, 0]], lambda t: t.x[:, [0, 2, 1]], lambda t: t.x[:, torch.tensor([0, 2])],
        lambda t: t.x[:, CONSTANT_MASK], lambda t: t.x[..., CONSTANT_MASK, 0], lambda t: t.x[:, [True, False, True]],
        lambda t: t.x[..., torch.ones(3, 4, dtype=torch.bool)], lambda t: t.square[t.rows],
        lambda t: t.x[torch.tensor([0, 1]), 1:, torch.tensor([0, 3])], lambda t: t.x[..., None, t.rows],
        lambda t: CONSTANT[t.ids[0, 0]], lambda t: CONSTANT[t.ids, 1], lambda t: t.x[np.int64(1)], lambda t: t.x[True],
        lambda t: t.x[torch.tensor(True)], lambda t: t.x[:, torch.tensor(1)],
        lambda t: t.x[torch.tensor([[0, 1], [1, 1]])], lambda t: t.x[:, t.rows.min()], lambda t: t.x[[]],
        lambda t: t.x[t.rows[2], :, t.rows], lambda t: t.x[:, True],
    ],
    "gt": [lambda t: t.x > t.y, lambda t: 0 > t.x, lambda t: CONSTANT > t.x],
    "half": [lambda t: t.x.half()],
    "index_select": [lambda t: t.x.index_select(1, torch.tensor([2, 0])),
                     lambda t: torch.index_select(t.square, 0, t.rows)],
    "int": [lambda t: t.x.int()],
    "isfinite": [lambda t: t.strange.isfinite()],
    "isinf": [lambda t: torch.isinf(t.strange)],
    "isnan": [lambda t: t.strange.isnan()],
    "kl_div": [lambda t: F.kl_div(t.x.log_softmax(-1), t.y.softmax(-1), reduction="batchmean")],
    "layer_norm": [lambda t: F.layer_norm(t.x, (4,)),
                   lambda t: F.layer_norm(t.x, (4,), weight=t.v, bias=t.w, eps=1e-3)],
    "le": [lambda t: t.x <= t.y, lambda t: 0 <= t.x],
    "linear": [lambda t: F.linear(t.x, CONSTANT), lambda t: F.linear(t.x, CONSTANT, bias=t.x[0, :, 0])],
    "log": [lambda t: t.positive.log()],
    "log10": [lambda t: t.positive.log10()],
    "log1p": [lambda t: t.positive.log1p()],
    "log2": [lambda t: t.positive.log2()],
    "log_softmax": [lambda t: t.x.log_softmax(-1), lambda t: F.log_softmax(t.x, dim=1),
                    lambda t: torch.log_softmax(t.x, 0)],
    "logical_and": [lambda t: torch.logical_and(t.mask, t.ids)],
    "logical_not": [lambda t: torch.logical_not(t.ids)],
    "logical_or": [lambda t: t.mask.logical_or(t.other_mask)],
    "logical_xor": [lambda t: t.mask.logical_xor(t.x)],
    "logsigmoid": [lambda t: F.logsigmoid(t.x)],
    "logsumexp": [lambda t: t.x.logsumexp(-1), lambda t: torch.logsumexp(t.x, (0, 1))],
    "long": [lambda t: t.x.long()],
    "lt": [lambda t: t.x < t.y, lambda t: 0 < t.x],
    "mT": [lambda t: t.x.mT],
    "masked_fill": [lambda t: t.x.masked_fill(t.mask, -1), lambda t: t.x.masked_fill(t.x[0] > 0, t.one),
                    lambda t: t.v.masked_fill(t.mask, float("-inf"))],
    "matmul": [lambda t: t.x @ t.y.mT, lambda t: t.x @ t.v, lambda t: CONSTANT @ t.v, lambda t: torch.matmul(t.v, t.w)],
    "max": [lambda t: t.x.max(), lambda t: t.x.max(-1).values, lambda t: torch.max(t.x, 1, True)[1],
            lambda t: torch.max(t.x, t.y), lambda t: t.x.max(dim=0, keepdim=True).indices],
    "maximum": [lambda t: torch.maximum(t.x, t.y), lambda t: torch.maximum(CONSTANT, t.x)],
    "mean": [lambda t: t.x.mean(), lambda t: t.x.mean(-1, keepdim=True), lambda t: t.ids.mean(0, dtype=torch.float32),
             lambda t: t.x.mean((0, 1)), lambda t: torch.mean(input=t.x, dim=1)],
    "median": [lambda t: t.x.median(), lambda t: t.x.median(-1)[0]],
    "min": [lambda t: t.x.min(), lambda t: t.x.min(-1).values, lambda t: torch.min(t.x, t.y)],
    "minimum": [lambda t: torch.minimum(t.x, t.y)],
    "movedim": [lambda t: t.x.movedim(0, -1), lambda t: torch.movedim(t.x, (0, 1), (1, 2))],
    "mse_loss": [lambda t: F.mse_loss(t.x, t.y), lambda t: F.mse_loss(t.x, t.y, reduction="none")],
    "mul": [lambda t: t.x * t.y, lambda t: t.x * 0.5, lambda t: 2 * t.x, lambda t: CONSTANT * t.x,
            lambda t: t.half * t.one, lambda t: t.ids * 0.5, lambda t: torch.tensor(2.0) * t.half,
            lambda t: np.float32(2) * t.x, lambda t: t.x * np.float64(2), lambda t: t.x * nn.Parameter(CONSTANT)],
    "nan_to_num": [lambda t: t.strange.nan_to_num(), lambda t: t.strange.nan_to_num(1.0, posinf=2.0)],
    "ne": [lambda t: t.ids != 1],
    "neg": [lambda t: -t.x],
    "norm": [lambda t: t.x.norm(), lambda t: t.x.norm(dim=-1), lambda t: torch.norm(t.x, p=1, dim=-1, keepdim=True)],
    "normalize": [lambda t: F.normalize(t.x, dim=-1)],
    "one_hot": [lambda t: F.one_hot(t.ids, 5), lambda t: F.one_hot(t.ids, num_classes=3)],
    "ones_like": [lambda t: torch.ones_like(t.x), lambda t: torch.ones_like(t.x, dtype=torch.int64)],
    "outer": [lambda t: torch.outer(t.v, t.w), lambda t: torch.outer(CONSTANT[0], t.v)],
    "pad": [lambda t: F.pad(t.x, (1, 2)), lambda t: F.pad(t.x, (0, 0, 1, 0), value=3.0)],
    "permute": [lambda t: t.x.permute(2, 0, 1), lambda t: torch.permute(t.x, (1, 0, 2))],
    "pow": [lambda t: t.x**2, lambda t: 2**t.x, lambda t: t.positive**t.x, lambda t: torch.pow(t.x, 3),
            lambda t: t.ids**2],
    "prod": [lambda t: t.x.prod(-1)],
    "reciprocal": [lambda t: t.positive.reciprocal()],
    "relu": [lambda t: torch.relu(t.x), lambda t: F.relu(t.x)],
    "remainder": [lambda t: t.x % 1.5, lambda t: 7 % t.positive, lambda t: t.ids % 2],
    "repeat": [lambda t: t.x.repeat(2, 1, 1), lambda t: t.v.repeat((2, 2))],
    "repeat_interleave": [lambda t: t.x.repeat_interleave(2, 1), lambda t: t.v.repeat_interleave(
        torch.tensor([1, 2, 0, 1]), output_size=4)],
    "reshape": [lambda t: t.x.reshape(6, -1), lambda t: torch.reshape(t.x, (-1,))],
    "rms_norm": [lambda t: F.rms_norm(t.x, (4,)), lambda t: F.rms_norm(t.x, (4,), weight=t.v)],
    "roll": [lambda t: t.x.roll(1, 0), lambda t: torch.roll(t.x, shifts=(1, 2), dims=(0, 1))],
    "round": [lambda t: t.x.round(), lambda t: torch.round(t.x, decimals=1)],
    "rsqrt": [lambda t: t.positive.rsqrt()],
    "sigmoid": [lambda t: t.x.sigmoid(), lambda t: F.sigmoid(t.x), lambda t: t.ids.sigmoid()],
    "sign": [lambda t: t.x.sign()],
    "silu": [lambda t: F.silu(t.x)],
    "sin": [lambda t: t.x.sin()],
    "softmax": [lambda t: t.x.softmax(-1), lambda t: torch.softmax(t.x, dim=0), lambda t: F.softmax(t.x, dim=1),
                lambda t: t.half.softmax(-1, dtype=torch.float32)],
    "softplus": [lambda t: F.softplus(t.x)],
    "sort": [lambda t: t.x.sort(-1).values, lambda t: torch.sort(t.x, descending=True)[1]],
    "sqrt": [lambda t: t.positive.sqrt()],
    "square": [lambda t: t.x.square()],
    "squeeze": [lambda t: t.x[:, :1].squeeze(1), lambda t: t.x[:1, :1].squeeze()],
    "stack": [lambda t: torch.stack([t.x, t.y]), lambda t: torch.stack((t.x[0], CONSTANT), -1)],
    "std": [lambda t: t.x.std(), lambda t: t.x.std(-1, correction=0), lambda t: torch.std(t.x, 1, unbiased=False)],
    "sub": [lambda t: t.x - t.y, lambda t: 1 - t.x, lambda t: CONSTANT - t.x, lambda t: t.x - CONSTANT],
    "sum": [lambda t: t.x.sum(), lambda t: t.mask.sum(-1), lambda t: t.x.sum((0, 2)), lambda t: sum([t.x, t.y])],
    "take_along_dim": [lambda t: torch.take_along_dim(t.x, t.x.argmax(-1, keepdim=True), dim=-1)],
    "tanh": [lambda t: t.x.tanh(), lambda t: F.tanh(t.x)],
    "to": [lambda t: t.x.to(torch.float64), lambda t: t.x.to(dtype=torch.bfloat16), lambda t: t.ids.to(torch.bool)],
    "topk": [lambda t: t.x.topk(2).values, lambda t: torch.topk(t.x, k=2, dim=1)[-1]],
    "transpose": [lambda t: t.x.transpose(0, 1), lambda t: torch.transpose(t.x, 1, 2)],
    "tril": [lambda t: t.square.tril(), lambda t: torch.tril(t.x, -1)],
    "triu": [lambda t: t.square.triu(1)],
    "trunc": [lambda t: t.x.trunc()],
    "unflatten": [lambda t: t.x.unflatten(-1, (2, 2)), lambda t: torch.unflatten(t.x, 2, (-1, 2))],
    "unsqueeze": [lambda t: t.x.unsqueeze(1)],
    "var": [lambda t: t.x.var(-1), lambda t: torch.var(t.x, dim=0, correction=0)],
    "view": [lambda t: t.x.view(6, 4), lambda t: t.x.view((2, -1))],
    "where": [lambda t: torch.where(t.mask, t.x, t.y), lambda t: torch.where(t.x > 0, t.x, 0.0),
              lambda t: t.x.where(t.mask, t.y), lambda t: t.x.where(condition=t.mask, other=t.v),
              lambda t: torch.where(condition=t.mask, input=t.x, other=t.y), lambda t: torch.where(t.mask, 1.0, 0.0),
              lambda t: CONSTANT.where(t.mask, 2.0), lambda t: torch.where(t.mask, t.ids, 0.5)],
    "zeros_like": [lambda t: torch.zeros_like(t.x)],
}  # fmt: skip
ALL = [pytest.param(case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)]


@pytest.mark.parametrize("name", CASES)
def test_cases_are_of_their_function(name: str) -> None:
    assert name in {node.function for case in CASES[name] for node in order(case(ACTS)) if isinstance(node, Call)}


def test_every_function_of_the_list_has_a_case() -> None:
    assert CASES.keys() | {"rand", "randn", "rand_like", "randn_like"} == FUNCTIONS.keys()


@pytest.mark.parametrize("case", ALL)
def test_computes_what_torch_computes(case: Callable[[Any], Any]) -> None:
    assert same_or_nan(compute(case(ACTS)), case(REAL))


@pytest.mark.parametrize("case", ALL)
def test_knows_shape_and_dtype_before(case: Callable[[Any], Any]) -> None:
    shape, expected = shape_of(case(ACTS), meta_leaf), case(REAL)
    assert shape.is_meta
    assert (shape.shape, shape.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("case", ALL)
def test_is_the_same_from_a_file(case: Callable[[Any], Any]) -> None:
    expression = case(ACTS)
    [read] = round_trip(expression)
    assert same_or_nan(compute(read), compute(expression))
    assert str(read) == str(expression)


# -- random numbers


@pytest.mark.parametrize(("ours", "torchs"), [(rand, torch.rand), (randn, torch.randn)])
def test_random_numbers_are_those_of_a_generator_of_their_own(ours: Any, torchs: Any) -> None:
    before = torch.get_rng_state()
    expected = torchs(2, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float32)
    [read] = round_trip(ours(2, 3, 4, seed=5))
    for expression in (ours(2, 3, 4, seed=5), read):
        assert same(compute(expression), expected)
        assert shape_of(expression, meta_leaf).shape == (2, 3, 4)
    assert not same(compute(ours(2, 3, 4, seed=6)), expected)
    like = rand_like if ours is rand else randn_like
    assert same(compute(like(ACTS.x, seed=5)), expected)
    assert same(compute(like(ACTS.half * 2, seed=5)), expected.half())
    assert shape_of(like(ACTS.half, seed=5), meta_leaf).dtype == torch.float16
    assert torch.equal(before, torch.get_rng_state())


def test_random_numbers_go_where_the_others_are() -> None:
    expression = ACTS.x + randn(4, seed=0) + CONSTANT
    result = evaluate(expression, meta_leaf, like=torch.empty(0, device="meta"))
    assert result.is_meta


# -- pairs


def test_a_pair_unpacks() -> None:
    values, indices = ACTS.x.topk(2)
    assert same(compute(values), REAL.x.topk(2).values)
    assert same(compute(indices), REAL.x.topk(2).indices)
    values, indices = torch.sort(ACTS.x, dim=1)
    assert same(compute(values + indices), sum(torch.sort(REAL.x, dim=1)))


# -- what is built


def test_python_says_what_was_built() -> None:
    act = Act("blocks.3.hook_mlp_out", tokens=-1)
    written = "Act('blocks.3.hook_mlp_out', tokens=-1)"
    for expression, text in [
        (act, written),
        (act * 0.5, f"{written} * 0.5"),
        (2 - (act - 1) - 3, f"2 - ({written} - 1) - 3"),
        ((act + 1) * 2, f"({written} + 1) * 2"),
        (act - (1 + act), f"{written} - (1 + {written})"),
        ((-act) ** 2, f"(-{written}) ** 2"),
        (-(act**2), f"-{written} ** 2"),
        ((act**2) ** act, f"({written} ** 2) ** {written}"),
        (act ** (act**2), f"{written} ** {written} ** 2"),
        (act * -0.5, f"{written} * -0.5"),
        ((-0.5) ** act, f"(-0.5) ** {written}"),
        ((act > 0) & ~(act < 1), f"({written} > 0) & ~({written} < 1)"),
        ((act == 0) == (act > 0), f"({written} == 0) == ({written} > 0)"),
        (act[:, 1:, ..., None, ::2, [0, 1]], f"{written}[:, 1:, ..., None, ::2, [0, 1]]"),
        ((act + 1)[0].mT, f"({written} + 1)[0].mT"),
        (act[(0,)], f"{written}[0,]"),
        ((act + 1).softmax(-1), f"({written} + 1).softmax(-1)"),
        (act.to(torch.float32), f"{written}.to(torch.float32)"),
        (torch.where(act > 0, act, 0.0), f"torch.where({written} > 0, {written}, 0.0)"),
        (torch.ones(4, 128) * act, f"tensor[4, 128] * {written}"),
        (torch.add(act, 1, alpha=2), f"torch.add({written}, 1, alpha=2)"),
        (F.gelu(act), f"F.gelu({written})"),
        (act + randn(4, seed=1), f"{written} + lk.randn(4, seed=1)"),
        (torch.cat((act, act)), f"torch.cat(({written}, {written}))"),
        (ModuleCall("ln_final", act), f"model.ln_final({written})"),
    ]:
        assert str(expression) == repr(expression) == text


def test_long_text_is_shortened() -> None:
    expression = ACTS.x
    for _ in range(300):
        expression = expression + expression  # 2 to the 300 terms, written out
    assert len(str(expression)) < 220
    assert len(str(ACTS.x[[0] * 10_000])) < 220


def test_nodes_come_once_arguments_first() -> None:
    total = ACTS.x + ACTS.y
    expression = total * torch.cat([total, ACTS.x.neg()])
    nodes = order(expression)
    assert nodes[-1] is expression
    assert len(nodes) == len(set(nodes)) == 6
    places = {node: place for place, node in enumerate(nodes)}
    assert all(places[given] < place for node, place in places.items() for given in node.inputs)
    assert [act.at for act in leaves(expression)] == ["x", "y"]
    assert modules(expression) == []
    assert len(order(total, expression)) == 6


def test_a_node_is_computed_once() -> None:
    asked: list[str] = []

    def counted(act: Act) -> Tensor:
        asked.append(act.at)
        return leaf(act)

    drawn = ACTS.x * 2
    assert same(evaluate(drawn + drawn.exp() + ACTS.x, counted, like=None), REAL.x * 2 + (REAL.x * 2).exp() + REAL.x)
    assert asked == ["x"]


def test_an_expression_is_a_thing_of_its_own() -> None:
    assert {ACTS.x: 1}[ACTS.x] == 1
    assert len({Act("x"), Act("x")}) == 2
    assert isinstance(ACTS.x == ACTS.x, Call)
    assert +ACTS.x is ACTS.x
    assert copy.copy(ACTS.x) is not None
    assert copy.deepcopy([ACTS.x])[0] is ACTS.x
    sent = pickle.loads(pickle.dumps(ACTS.x[:, 0] + 1))
    assert same(compute(sent), REAL.x[:, 0] + 1)
    assert {"softmax", "mT", "at"} <= set(dir(ACTS.x))
    assert set(FUNCTIONS) >= METHODS


def test_lists_are_copied() -> None:
    index = [0, 1]
    expression = ACTS.x[index]
    index.append(7)
    assert compute(expression).shape[0] == 2


def test_gradients_flow() -> None:
    x = REAL.x.clone().requires_grad_()
    evaluate((ACTS.x * 2).sum(), lambda act: x, like=None).backward()
    assert same(x.grad, torch.full_like(x, 2))


def test_zeros_that_stand_for_a_bias_take_part() -> None:
    absent = torch.zeros(4).as_subclass(AbsentBias)
    for expression in (ACTS.x + absent, absent + ACTS.x):
        assert same(compute(expression), REAL.x)


# -- depth


def test_chains_may_be_long() -> None:
    expression = ACTS.v
    for _ in range(10_000):
        expression = 1 + expression
    assert torch.allclose(compute(expression), VALUES["v"] + 10_000)
    assert shape_of(expression, meta_leaf).shape == (4,)
    assert len(str(expression)) < 220
    assert len(order(expression)) == 10_001
    assert str(round_trip(expression)[0]) == str(expression)
    named = ModuleCall("there", expression)
    assert len(order(bind(named * 2, lambda name: nn.Identity()))) == 10_003


# -- random graphs


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Expression, Tensor]:
    """An expression of a few nodes, and its value as torch computes it at once."""
    made: list[tuple[Any, Any]] = [(ACTS.x, REAL.x), (ACTS.v, REAL.v), (ACTS.one, REAL.one), (ACTS.half, REAL.half)]
    number = st.sampled_from([0, 1, -2, 0.5, True])
    binary = [operator.add, operator.sub, operator.mul, torch.maximum, operator.gt, operator.ne]
    unary = [
        torch.tanh, torch.square, operator.neg, lambda x: x.sum(), lambda x: x.mean(), lambda x: x[..., None],
        lambda x: x.float(), lambda x: x.unsqueeze(0), lambda x: torch.stack([x, x]), lambda x: x.flatten(),
        lambda x: torch.where(x > 0, x, 0), lambda x: x.reshape(-1)[:3], lambda x: x.reshape(-1).topk(1).values,
        lambda x: x.reshape(-1).softmax(0), lambda x: F.normalize(x.reshape(-1), dim=0), lambda x: x.reshape(-1, 1).mT,
    ]  # fmt: skip
    for _ in range(draw(st.integers(1, 8))):
        left = draw(st.sampled_from(made))
        if draw(st.booleans()):
            function = draw(st.sampled_from(unary))
            arguments = [left]
        else:
            function = draw(st.sampled_from(binary))
            constant = draw(number)
            right = (constant, constant) if draw(st.booleans()) else draw(st.sampled_from(made))
            arguments = [left, right] if draw(st.booleans()) else [right, left]
        try:
            value = function(*(value for _, value in arguments))
        except (RuntimeError, TypeError):
            continue  # these do not go together; what an expression says then is tested below
        made.append((function(*(expression for expression, _ in arguments)), value))
    return made[-1]


@settings(max_examples=150)
@given(graphs())
def test_any_graph_computes_what_torch_computes(graph: tuple[Expression, Tensor]) -> None:
    expression, value = graph
    assert same_or_nan(compute(expression), value)
    shape = shape_of(expression, meta_leaf)
    assert (shape.shape, shape.dtype) == (value.shape, value.dtype)
    [read] = round_trip(expression)
    assert same_or_nan(compute(read), value)
    assert str(read) == str(expression)


@settings(max_examples=100)
@given(st.sampled_from(ALL), st.sampled_from(ALL), st.sampled_from([operator.add, operator.matmul, torch.maximum]))
def test_what_torch_refuses_is_refused_before(one: Any, two: Any, function: Any) -> None:
    """Shapes and dtypes that do not go together are found without values, and the other way round."""
    (one,), (two,) = one.values, two.values
    expression = function(one(ACTS), two(ACTS))
    try:
        value = function(one(REAL), two(REAL))
    except RuntimeError:
        with pytest.raises(ExpressionError, match="cannot be computed"):
            shape_of(expression, meta_leaf)
        with pytest.raises(ExpressionError, match="cannot be computed"):
            compute(expression)
    else:
        shape = shape_of(expression, meta_leaf)
        assert (shape.shape, shape.dtype) == (value.shape, value.dtype)


# -- refusals

x = ACTS.x


def in_place() -> None:
    tensor = torch.zeros(4)
    tensor[0] = x


def set_item() -> None:
    x[0] = 1


def set_attribute() -> None:
    x.at = "y"


REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    # no value
    ("bool", lambda: bool(x > 0), r"is not a decision[\s\S]*torch.where"),
    ("and", lambda: x > 0 and x < 1, "is not a decision"),
    ("max", lambda: max(x, x), "is not a decision"),
    ("float", lambda: float(x), "is not a number"),
    ("int", lambda: int(x), "is not a number"),
    ("index", lambda: [1, 2][x], "is not an index into a list"),
    ("len", lambda: len(x), "is not a length"),
    ("iter", lambda: list(x), "is not a loop over entries"),
    ("unpack", lambda: (lambda a, b: a)(*x), "is not a loop over entries"),
    ("contains", lambda: 1 in x, "is not a search"),
    ("array", lambda: np.asarray(x), "is not a NumPy array"),
    ("item", lambda: x.item(), r"\.item cannot be[\s\S]*no value before the model runs"),
    ("tolist", lambda: x.tolist(), r"\.tolist cannot be"),
    ("shape", lambda: x.shape, r"\.shape cannot be[\s\S]*a shape depends on"),
    ("size", lambda: x.size(0), r"\.size cannot be"),
    # nothing is written
    ("setitem", set_item, r"build the value with torch\.where, or write a Set"),
    ("tensor setitem", in_place, r"torch\.Tensor\.__setitem__ cannot be"),
    ("setattr", set_attribute, "is immutable"),
    ("method in place", lambda: x.add_(1), r"\.add_ cannot be[\s\S]*use add"),
    ("function in place", lambda: torch.relu_(x), r"relu_ cannot be"),
    ("inplace=", lambda: F.relu(x, inplace=True), "relu cannot be part of an expression like that[\\s\\S]*inplace="),
    ("out=", lambda: torch.softmax(x, -1, out=torch.zeros(4)), "softmax cannot be[\\s\\S]*out="),
    # other functions
    ("svd", lambda: torch.linalg.svd(x), r"torch\.linalg\.svd cannot be part of[\s\S]*Python function"),
    ("functional", lambda: F.max_pool1d(x, 2), r"torch\.nn\.functional\.max_pool1d cannot be"),
    ("tensordot", lambda: torch.tensordot(x, x), r"torch\.tensordot cannot be"),
    ("method", lambda: x.svd(), r"\.svd cannot be part of an expression"),
    ("near", lambda: x.sofmax(-1), r"such as softmax, log_softmax"),
    ("near, of torch", lambda: torch.cumulative_trapezoid(x), r"one of \d+ functions, such as"),
    ("unknown call", lambda: Call("svd", (x,), {}), "svd cannot be part"),
    # random numbers
    ("dropout", lambda: F.dropout(x), r"functional\.dropout cannot be[\s\S]*with a seed"),
    ("randn_like", lambda: torch.randn_like(x), r"torch\.randn_like cannot be[\s\S]*lk\.randn_like"),
    ("no seed", lambda: Call("rand", (2,), {}), "no seed"),
    ("seed of another type", lambda: rand(2, seed=True), r"seed=True[\s\S]*an int from 0 on"),
    ("negative seed", lambda: randn(2, seed=-1), "seed=-1"),
    ("random shape", lambda: randn(2, 0.5, seed=1), "a shape: ints from 0 on"),
    ("random shape list", lambda: randn([2, 3], seed=1), "a shape: ints from 0 on"),
    ("random like two", lambda: Call("rand_like", (x, x), {"seed": 0}), "2 arguments"),
    # devices
    ("cuda", lambda: x.cuda(), r"\.cuda cannot be[\s\S]*device of the activations"),
    ("to string", lambda: x.to("cpu"), "one dtype"),
    ("to device", lambda: x.to(torch.device("cpu")), "cannot hold this[\\s\\S]*leave devices out"),
    ("to both", lambda: x.to(torch.float32, copy=True), "one dtype"),
    ("device=", lambda: torch.zeros_like(x, device="cpu"), "device="),
    ("cast", lambda: x.float(memory_format=1), "memory_format"),
    # arguments
    ("complex", lambda: x * 1j, r"cannot hold this[\s\S]*complex 1j"),
    ("dtype", lambda: x.to(torch.complex64), r"cannot hold this[\s\S]*torch\.complex64"),
    ("array", lambda: x + np.ones(3), r"cannot hold this[\s\S]*torch\.from_numpy"),
    ("array on the left", lambda: np.ones(3) * x, r"cannot hold this[\s\S]*torch\.from_numpy"),
    ("function", lambda: x.sum(dim=len), "cannot hold this"),
    ("string", lambda: x + "a", r"\+ cannot be part of[\s\S]*expressions, tensors and numbers"),
    ("string on the left", lambda: Call("remainder", ("%s", x)), "% cannot be part of"),
    ("list on the left", lambda: Call("mul", ([0], x)), r"\* cannot be part of"),
    ("getitem of a list", lambda: Call("getitem", ([x], 0), {}), "an expression or a tensor, and an index"),
    ("index of lists", lambda: x[[[0, 1], [1, 1]]], r"an index cannot be[\s\S]*torch\.tensor"),
    ("index of both", lambda: x[:, [0, True]], r"an index cannot be[\s\S]*torch\.tensor"),
    ("index of expressions", lambda: x[[x, 1]], r"an index cannot be[\s\S]*torch\.tensor"),
    ("depth", lambda: Call("stack", (nested(50, lambda data: [data]),)), r"cannot hold this[\s\S]*32 deep"),
    ("slice", lambda: x[: x.sum()], "a slice in an expression"),
    ("no activation", lambda: Call("pow", (9, 9), {}), "is of no activation"),
    ("where", lambda: torch.where(x > 0), "a condition and two values"),
    ("where with out", lambda: torch.where(x > 0, x, x, out=torch.zeros(4)), "out="),
    ("where of four", lambda: x.where(x > 0, x, x), "a condition and two values"),
    ("where without other", lambda: x.where(x > 0), "a condition and two values"),
    # pairs
    ("pair added", lambda: x.topk(2) + 1, r"two tensors[\s\S]*values, indices = act\.topk"),
    ("pair indexed", lambda: x.max(-1)[2], "two tensors"),
    ("pair in a list", lambda: torch.cat([x.sort(-1), x]), "two tensors"),
    ("pair through a module", lambda: ModuleCall("ln_final", x.topk(2)), "two tensors"),
    ("no pair", lambda: x.max().values, r"\.values cannot be"),
    # activations
    ("glob", lambda: Act("blocks.*.hook_z"), "an Act is one activation"),
    ("list", lambda: Act(["hook_embed"]), "an Act is one activation"),
    ("predicate", lambda: Act(lambda name: True), "an Act is one activation"),
    ("empty", lambda: Act(""), "an Act is one activation"),
    ("steps", lambda: Act("hook_embed", steps=slice(0, 2)), "is of one step"),
    ("steps as a list", lambda: Act("hook_embed", steps=[1]), "is of one step"),
    ("steps as a bool", lambda: Act("hook_embed", steps=True), "is of one step"),
    # modules
    ("no module", lambda: ModuleCall(3, x), "this is no module"),
    ("no name", lambda: ModuleCall("", x), "this is no module"),
    ("a tensor", lambda: ModuleCall("ln_final", torch.zeros(3)), "is not applied to an expression"),
]


@pytest.mark.parametrize(("use", "message"), [pytest.param(use, message, id=name) for name, use, message in REFUSED])
def test_refuses(use: Callable[[], Any], message: str) -> None:
    with pytest.raises(ExpressionError, match=message) as caught:
        use()
    assert isinstance(caught.value, TypeError)


def test_selectors_are_checked() -> None:
    with pytest.raises(lk.errors.SelectorError, match=r"Act\('hook_embed'\): tokens"):
        Act("hook_embed", tokens="last")
    with pytest.raises(lk.errors.SelectorError, match="steps cannot count from the end"):
        Act("hook_embed", steps=-1)


def test_protocols_are_not_mistaken_for_tensors() -> None:
    with pytest.raises(AttributeError):
        x._repr_html_  # noqa: B018
    assert getattr(x, "__cuda_array_interface__", None) is None


def test_a_tensor_is_rebound_not_written() -> None:
    tensor = sent = torch.zeros(4)
    tensor += x
    assert same(sent, torch.zeros(4))
    assert same(compute(tensor), REAL.x)


UNKNOWN_SHAPES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda t: t.x[t.mask], "how much a mask selects"),
    (lambda t: t.x[:, t.mask[0, :, 0]], "how much a mask selects"),
    (lambda t: F.one_hot(t.ids), "give num_classes"),
    (lambda t: F.one_hot(t.ids, num_classes=-1), "give num_classes"),
    (lambda t: t.v.repeat_interleave(t.rows), "give output_size"),
    (lambda t: t.v.repeat_interleave(repeats=torch.tensor([1, 0, 2, 0])), "give output_size"),
]


@pytest.mark.parametrize(("case", "message"), UNKNOWN_SHAPES)
def test_a_shape_that_depends_on_values_is_not_known_before(case: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ExpressionError, match=rf"depends on values[\s\S]*{message}"):
        shape_of(case(ACTS), meta_leaf)
    assert same(compute(case(ACTS)), case(REAL))  # whoever does not ask may compute it


WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda t: t.x + t.square, r"float32 \[2, 3, 4\], float32 \[3, 3\]"),
    (lambda t: t.x @ t.square, "cannot be computed"),
    (lambda t: torch.cat([t.x, t.v]), "cannot be computed"),
    (lambda t: t.x.softmax(7), "cannot be computed"),
    (lambda t: t.x.sort(7).values, "cannot be computed"),
    (lambda t: t.x.cumsum(-4), "cannot be computed"),
    (lambda t: t.ids.softmax(-1), "cannot be computed"),
    (lambda t: t.x[5], "cannot be computed"),
    (lambda t: t.x[:, torch.tensor([0, 3])], "cannot be computed"),
    (lambda t: t.x[:, [0, -4]], "cannot be computed"),
    (lambda t: t.x[0, 0, 0, 0], "cannot be computed"),
    (lambda t: t.x[CONSTANT_MASK], "cannot be computed"),
    (lambda t: t.mask - t.other_mask, "cannot be computed"),
    (lambda t: t.x & 1, "cannot be computed"),
    (lambda t: t.x.masked_fill(t.mask, t.v), "cannot be computed"),
    (lambda t: t.x.sum(dims=3), "cannot be computed"),
    (lambda t: torch.einsum("bp,d->bp", t.x, t.v), "cannot be computed"),
    (lambda t: t.ids.mean(), "cannot be computed"),
    (lambda t: rand_like(t.ids, seed=0), "random numbers are floating point"),
]


@pytest.mark.parametrize(("case", "message"), WRONG)
def test_what_fails_names_the_node_and_its_arguments(case: Callable[[Any], Any], message: str) -> None:
    for compute_it in (lambda e: shape_of(e, meta_leaf), compute):
        with pytest.raises(ExpressionError, match=message) as caught:
            compute_it(case(ACTS).exp())
        assert caught.value.__cause__ is not None
        assert "Act(" in caught.value.what


def test_the_value_is_one_tensor() -> None:
    for compute_it in (lambda e: shape_of(e, meta_leaf), compute):
        with pytest.raises(ExpressionError, match=r"is no tensor[\s\S]*\.values"):
            compute_it(x.topk(2))


def test_errors_of_the_leaf_are_its_own() -> None:
    def missing(act: Act) -> Tensor:
        raise KeyError(act.at)

    for compute_it in (lambda: evaluate(x + 1, missing, like=None), lambda: shape_of(x + 1, missing)):
        with pytest.raises(KeyError):
            compute_it()


# -- modules


def test_the_models_modules_are_applied_out_of_order(shared: lk.HookedTransformer) -> None:
    act, value = Act("hook_embed"), seeded(2, 5, shared.cfg.d_model)
    for apply in (
        lambda x: shared.unembed(shared.ln_final(x)),
        lambda x: shared.blocks[0].mlp(x * 2),
        lambda x: shared.blocks[1].ln1(x[:, -1]).softmax(-1),
        lambda x: shared.unembed(x.mean(1)).argmax(-1),
        lambda x: shared.embed(shared.unembed(x).argmax(-1)),
    ):
        expression, expected = apply(act), apply(value)
        assert torch.equal(evaluate(expression, lambda _: value, like=value), expected)
        shape = shape_of(expression, lambda _: value.to("meta"))
        assert (shape.shape, shape.dtype, shape.is_meta) == (expected.shape, expected.dtype, True)
    assert modules(shared.unembed(shared.ln_final(act))) == [shared.ln_final, shared.unembed]


def test_hooks_do_not_run_in_a_module_that_is_applied(demo_gpt2: lk.HookedTransformer) -> None:
    ran: list[str] = []

    def note(value: Tensor, hook: HookPoint) -> None:
        ran.append(hook.name)

    act, value = Act("hook_embed"), seeded(1, 3, demo_gpt2.cfg.d_model)
    mlp = demo_gpt2.blocks[0].mlp
    with attached(on_points([mlp.hook_pre, mlp.hook_post, demo_gpt2.ln_final.hook_scale], note, "edit")):
        expression = demo_gpt2.ln_final(mlp(act))
        result = evaluate(expression, lambda _: value, like=None)
        shape_of(expression, lambda _: value.to("meta"))
        assert ran == []
        demo_gpt2.ln_final(mlp(value))
        assert len(ran) == 3
    assert torch.allclose(result, demo_gpt2.ln_final(mlp(value)), atol=1e-5)


def test_modules_that_take_more_are_refused(demo_gpt2: lk.HookedTransformer) -> None:
    block = demo_gpt2.blocks[0]
    for apply in (
        lambda: block(x),
        lambda: block.attn(x, None),
        lambda: block.attn(x),
        lambda: demo_gpt2.pos_embed(x, None, 3),
        lambda: ModuleCall(block, x),
    ):
        with pytest.raises(ExpressionError, match="a module that takes one tensor"):
            apply()
    with pytest.raises(lk.LenskitError):
        demo_gpt2(x)
    with pytest.raises(lk.LenskitError):
        demo_gpt2.run_with_cache(x)


def test_a_module_that_gives_several_tensors_fails() -> None:
    qkv = FusedQKV(4, n_heads=2, d_head=2, bias=False)
    nn.init.normal_(qkv.joined.weight)
    for compute_it in (lambda e: shape_of(e, meta_leaf), compute):
        with pytest.raises(ExpressionError, match=r"FusedQKV[\s\S]*is no tensor"):
            compute_it(qkv(x))


def test_a_module_that_fails_is_named() -> None:
    linear = Linear(3, 3, bias=False)
    for compute_it in (lambda e: shape_of(e, meta_leaf), compute):
        with pytest.raises(ExpressionError, match=r"Linear\(Act\('x'\)\) cannot be computed[\s\S]*\[2, 3, 4\]"):
            compute_it(linear(x))


def test_identities_and_points_give_back_what_they_are_given() -> None:
    assert Identity()(x) is x
    assert HookPoint("batch pos")(x) is x


def test_torchs_own_modules_are_recorded_as_their_functions() -> None:
    linear = nn.Linear(4, 2)
    assert torch.equal(compute(linear(x)), linear(REAL.x))
    assert shape_of(nn.LayerNorm(4)(x), meta_leaf).shape == (2, 3, 4)


def test_names_are_bound_later() -> None:
    linear = Linear(4, 4, bias=False)
    nn.init.normal_(linear.weight)
    untouched = x * 2
    expression = ModuleCall("a.b", untouched) + ModuleCall("a.b", untouched)[..., :1] + untouched
    [read] = round_trip(expression)
    for unbound in (expression, read):
        assert modules(unbound) == ["a.b", "a.b"]
        for compute_it in (lambda e: shape_of(e, meta_leaf), compute):
            with pytest.raises(ExpressionError, match="is of no model yet"):
                compute_it(unbound)
        bound = bind(unbound, {"a.b": linear}.__getitem__)
        assert modules(bound) == [linear, linear]
        out = linear(REAL.x * 2)
        assert torch.equal(compute(bound), out + out[..., :1] + REAL.x * 2)
        assert len(order(bound)) == len(order(unbound))
    assert untouched in set(order(bind(expression, lambda name: linear)))
    assert bind(untouched, lambda name: linear) is untouched
    tree = nn.Module()
    for error in ("no.such", "training"):
        with pytest.raises(ExpressionError, match="the model has no module"):
            bind(ModuleCall(error, x), tree.get_submodule)


class Doubled(Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_torchs_hooks_still_run_where_expressions_were_made() -> None:
    module, seen = Doubled(), []
    assert isinstance(module(x), ModuleCall)
    assert same(module(REAL.x), REAL.x * 2)
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    assert same(module(REAL.x), REAL.x * 2)
    assert isinstance(module(x), ModuleCall)
    assert seen == [1]
    handle.remove()


def test_compiled_calls_are_the_same_after_an_expression_was_made(unchecked: Any) -> None:
    class Tripled(unchecked.modules.module.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x

    model = Tripled()
    model.inner = type("Twice", (unchecked.modules.module.Module,), {"forward": lambda self, x: x * 2})()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert same(compiled(REAL.x), REAL.x * 2 + REAL.x)
    unchecked.interventions.expressions.Act("hook_embed")
    assert same(compiled(REAL.x), REAL.x * 2 + REAL.x)
    torch._dynamo.reset()


def test_symbols_say_what_a_module_does_to_them() -> None:
    class Word(Symbol):
        def through(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
            return type(module).__name__, len(args)

    assert Doubled()(Word()) == ("Doubled", 1)
    assert Doubled()(Word(), 3) == ("Doubled", 2)


# -- as data


def whole() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """One node of every kind, with arguments of every kind."""
    act = Act("blocks.-1.hook_z", prompts=[0, 1], tokens=slice(1, None), heads=-1, dims=slice(0, 4, 2), steps=3)
    expression = torch.cat([act[:, ..., None, 1:], (act * CONSTANT).to(torch.float64)], dim=-1)
    expression = expression.masked_fill(expression > 0, float("-inf")) + randn(2, 3, seed=1)
    expression = ModuleCall("blocks.0.mlp", expression).sum((0, 1), keepdim=True) * float("nan")
    nodes, _ = nodes_to_json([expression], lambda tensor: "constant", lambda module: "")
    return nodes, {"constant": CONSTANT}


def test_what_a_file_says() -> None:
    nodes, tensors = whole()
    assert nodes == [
        {
            "act": {
                "at": "blocks.-1.hook_z",
                "prompts": [0, 1],
                "tokens": {"slice": [1, None, None]},
                "heads": -1,
                "dims": {"slice": [0, 4, 2]},
                "steps": 3,
            }
        },
        {
            "call": "getitem",
            "args": [
                {"node": 0},
                {"tuple": [{"slice": [None, None, None]}, {"ellipsis": True}, None, {"slice": [1, None, None]}]},
            ],
            "kwargs": {},
        },
        {"call": "mul", "args": [{"node": 0}, {"tensor": "constant"}], "kwargs": {}},
        {"call": "to", "args": [{"node": 2}, {"dtype": "float64"}], "kwargs": {}},
        {"call": "cat", "args": [[{"node": 1}, {"node": 3}]], "kwargs": {"dim": -1}},
        {"call": "gt", "args": [{"node": 4}, 0], "kwargs": {}},
        {"call": "masked_fill", "args": [{"node": 4}, {"node": 5}, {"float": "-inf"}], "kwargs": {}},
        {"call": "randn", "args": [2, 3], "kwargs": {"seed": 1}},
        {"call": "add", "args": [{"node": 6}, {"node": 7}], "kwargs": {}},
        {"module": "blocks.0.mlp", "argument": {"node": 8}},
        {"call": "sum", "args": [{"node": 9}, {"tuple": [0, 1]}], "kwargs": {"keepdim": True}},
        {"call": "mul", "args": [{"node": 10}, {"float": "nan"}], "kwargs": {}},
    ]
    read = nodes_from_json(nodes, tensors, "the test")
    assert nodes_to_json(read[-1:], lambda tensor: "constant", lambda module: "")[0] == nodes


def test_expressions_share_their_nodes_in_a_file() -> None:
    total = ACTS.x + 1
    nodes, roots = nodes_to_json([total * 2, total, total.exp()], lambda _: "", lambda _: "")
    assert (len(nodes), roots) == (4, [2, 1, 3])
    assert nodes_to_json([], lambda _: "", lambda _: "") == ([], [])


def test_modules_are_written_by_name(demo_gpt2: lk.HookedTransformer) -> None:
    names = {module: name for name, module in demo_gpt2.named_modules()}
    nodes, _ = nodes_to_json([demo_gpt2.ln_final(x)], lambda _: "", names.__getitem__)
    assert nodes[-1] == {"module": "ln_final", "argument": {"node": 0}}
    [_, read] = nodes_from_json(nodes, {}, "the test")
    assert modules(bind(read, demo_gpt2.get_submodule)) == [demo_gpt2.ln_final]


ACT = {"act": {"at": "hook_embed"}}


def call(function: Any = "add", args: Any = None, kwargs: Any = None) -> dict[str, Any]:
    return {"call": function, "args": [{"node": 0}, 1] if args is None else args, "kwargs": kwargs or {}}


NO_PLANS: dict[str, Any] = {
    "no list": {"0": ACT},
    "no object": [3],
    "an empty object": [{}],
    "an unknown kind": [{"lambda": "x"}],
    "an unknown key": [ACT, {**call(), "device": "cuda"}],
    "a missing key": [ACT, {"call": "exp", "args": [{"node": 0}]}],
    "two kinds": [{**ACT, **call()}],
    "an unknown function": [ACT, call("eval", [{"node": 0}])],
    "a private function": [ACT, call("__class__", [{"node": 0}])],
    "a function that is no string": [ACT, call(["exp"], [{"node": 0}])],
    "a later node": [ACT, call(args=[{"node": 2}, 1]), ACT],
    "itself": [ACT, call(args=[{"node": 1}, 1])],
    "a negative node": [ACT, call(args=[{"node": -1}, 1])],
    "a bool as a node": [ACT, ACT, call(args=[{"node": True}, 1])],
    "a float as a node": [ACT, call(args=[{"node": 0.0}, 1])],
    "a string as a node": [ACT, call(args=[{"node": "0"}, 1])],
    "an unknown tag": [ACT, call(args=[{"node": 0}, {"eval": "1"}])],
    "two tags": [ACT, call(args=[{"node": 0, "tensor": "t"}, 1])],
    "an unknown tensor": [ACT, call(args=[{"node": 0}, {"tensor": "u"}])],
    "an unknown dtype": [ACT, call("to", [{"node": 0}, {"dtype": "complex64"}])],
    "a dtype of another type": [ACT, call("to", [{"node": 0}, {"dtype": 3}])],
    "an unknown float": [ACT, call(args=[{"node": 0}, {"float": "1e999"}])],
    "a float that is not plain": [ACT, call(args=[{"node": 0}, math.nan])],
    "a short slice": [ACT, call("getitem", [{"node": 0}, {"slice": [1, 2]}])],
    "a slice of bools": [ACT, call("getitem", [{"node": 0}, {"slice": [True, None, None]}])],
    "a slice of nodes": [ACT, call("getitem", [{"node": 0}, {"slice": [{"node": 0}, None, None]}])],
    "no ellipsis": [ACT, call("getitem", [{"node": 0}, {"ellipsis": 1}])],
    "a tuple that is no list": [ACT, call("getitem", [{"node": 0}, {"tuple": "ab"}])],
    "arguments that are no list": [ACT, {"call": "exp", "args": {"node": 0}, "kwargs": {}}],
    "keywords that are no object": [ACT, {"call": "exp", "args": [{"node": 0}], "kwargs": []}],
    "keywords that are no names": [ACT, call(kwargs={"a b": 1})],
    "refused keywords": [ACT, call("softmax", [{"node": 0}, -1], {"out": {"node": 0}})],
    "no seed": [call("rand", [2])],
    "no activation": [call("pow", [9, 9])],
    "an operator on a string": [ACT, call("remainder", ["%999s", {"node": 0}])],
    "a pair as one tensor": [ACT, call("topk", [{"node": 0}, 2]), call("exp", [{"node": 1}])],
    "a device": [ACT, call("to", [{"node": 0}, "cuda"])],
    "an act without a name": [{"act": {"tokens": 1}}],
    "an act that is a string": [{"act": "hook_embed"}],
    "an act of many": [{"act": {"at": "blocks.*"}}],
    "an act of a list": [{"act": {"at": ["hook_embed"]}}],
    "an act with other keys": [{"act": {"at": "hook_embed", "layers": 1}}],
    "an act with a bad selector": [{"act": {"at": "hook_embed", "tokens": 1.5}}],
    "an act with bool selectors": [{"act": {"at": "hook_embed", "tokens": True}}],
    "an act of many steps": [{"act": {"at": "hook_embed", "steps": [0, 1]}}],
    "a module without a name": [ACT, {"module": "", "argument": {"node": 0}}],
    "a module of another type": [ACT, {"module": 3, "argument": {"node": 0}}],
    "a module of a number": [{"module": "ln_final", "argument": 3}],
    "deep lists": [ACT, call("cat", [nested(3000, lambda data: [data])])],
    "deep tuples": [ACT, call("cat", [nested(3000, lambda data: {"tuple": [data]})])],
    "deep junk": [nested(3000, lambda data: {"act": data})],
    "deep selectors": [{"act": {"at": "hook_embed", "tokens": nested(3000, lambda data: [data])}}],
    "a deep name": [{"act": {"at": nested(3000, lambda data: [data])}}],
    "a deep node": [ACT, call(args=[{"node": nested(3000, lambda data: [data])}, 1])],
    "a deep tag": [ACT, call(args=[{"dtype": nested(3000, lambda data: {"a": data})}, 1])],
    "too many": [ACT] * 100_001,
}


@pytest.mark.parametrize("data", NO_PLANS.values(), ids=NO_PLANS)
def test_refuses_to_read(data: Any) -> None:
    with pytest.raises(PlanFormatError, match=r"^the file"):
        nodes_from_json(data, {"t": CONSTANT}, "the file")


def test_too_many_nodes_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_json, "MOST_NODES", 3)
    assert len(nodes_to_json([ACTS.x] * 3 + [ACTS.x * ACTS.v], lambda _: "", lambda _: "")[0]) == 3
    with pytest.raises(ExpressionError, match="too large for a file"):
        nodes_to_json([ACTS.x.exp() * ACTS.v], lambda _: "", lambda _: "")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.just(2**70) | st.floats() | st.sampled_from(
        ["", "node", "x", "exp", "float32", "nan", "constant", "blocks.*", "__class__"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["node", "tensor", "dtype", "slice", "tuple", "float", "act", "call", "args", "kwargs", "at"]),
        inner, max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is, in nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(found for key, value in inner for found in places(value, (*path, key)))]


@settings(max_examples=400)
@given(st.data())
def test_a_file_that_was_tampered_with_is_refused_or_read(data: st.DataObject) -> None:
    nodes, tensors = whole()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(nodes)[1:]))
        parent: Any = nodes
        for key in path[:-1]:
            parent = parent[key]
        change = data.draw(st.sampled_from(["replace", "delete", "add", "swap"]))
        if change == "delete":
            del parent[path[-1]]
        elif change == "swap":
            other = data.draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
            parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
        elif change == "add" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=3) | st.just("dim"))] = data.draw(JUNK)
        elif change == "add":
            parent.insert(path[-1], data.draw(JUNK))
        else:
            parent[path[-1]] = data.draw(JUNK)
        if not places(nodes)[1:]:
            break
    try:
        read = nodes_from_json(nodes, tensors, "the file")
    except PlanFormatError:
        return
    for expression in read:
        assert str(expression)
        with suppress(ExpressionError):
            shape_of(expression, lambda act: torch.empty(2, 3, 4, device="meta"))


@settings(max_examples=200)
@given(JUNK)
def test_junk_is_refused(junk: Any) -> None:
    for data in (junk, [junk], [ACT, junk], [ACT, call(args=[junk, junk])]):
        with suppress(PlanFormatError):
            nodes_from_json(data, {}, "the file")
