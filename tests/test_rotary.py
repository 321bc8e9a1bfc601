"""Rotary embeddings against transformers' own, and the properties that make them what they are."""

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CohereConfig, GPTNeoXConfig, LlamaConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.gptj import modeling_gptj
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lenskit.errors import UnsupportedConfigError
from lenskit.modules import rotary
from lenskit.modules.rope_types import ROPE_TYPES, RopeConfig
from lenskit.modules.rotary import Rotary

D_HEAD, N_CTX, ORIGINAL = 16, 64, 32

DIVISORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 1.5 * i for i in range(8)]}
FEW_DIVISORS = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [2.0, 3.5, 8.0]}

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default, large base": {"rope_type": "default", "rope_theta": 1_000_000},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "linear, partial": {"rope_type": "linear", "rope_theta": 500.5, "factor": 3, "partial_rotary_factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic, uneven": {"rope_type": "dynamic", "rope_theta": 123456.7, "factor": 1.3},
    "dynamic, partial": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 8, "partial_rotary_factor": 0.25
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 1e6},
    "proportional, quarter": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "proportional, scaled": {
        "rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.6, "factor": 8.0
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": ORIGINAL},
    "yarn, small base": {
        "rope_type": "yarn", "rope_theta": 3.0, "factor": 4.0, "original_max_position_embeddings": 256
    },
    "yarn, betas": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False,
    },
    "yarn, one beta": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4, "original_max_position_embeddings": 2048,
        "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False,
    },
    "yarn, mscales": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "original_max_position_embeddings": 4096,
        "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
    },
    "yarn, one mscale": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "original_max_position_embeddings": 4096,
        "mscale": 0.707,
    },
    "yarn, amplitude": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
        "attention_factor": 0.9, "partial_rotary_factor": 0.5,
    },
    "yarn, shrunk": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 0.5, "original_max_position_embeddings": ORIGINAL
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
        "factor": 2.0, **DIVISORS,
    },
    "longrope, amplitude": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
        "factor": 32.0, "attention_factor": 1.19, **DIVISORS,
    },
    "longrope, partial": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
        "factor": 0.5, "partial_rotary_factor": 0.375, **FEW_DIVISORS,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
    "llama3, short": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 32, "original_max_position_embeddings": ORIGINAL,
        "low_freq_factor": 1, "high_freq_factor": 6, "partial_rotary_factor": 0.75,
    },
}  # fmt: skip

TYPES = sorted(ROPE_TYPES)
# Below, at and above the original context and the model's.
LENGTHS = [5, ORIGINAL, ORIGINAL + 1, N_CTX, N_CTX + 1, 4000]


def hf_config(parameters: dict[str, Any], kind: Any = LlamaConfig) -> Any:
    return kind(
        hidden_size=4 * D_HEAD,
        num_attention_heads=4,
        max_position_embeddings=N_CTX,
        rope_parameters=copy.deepcopy(parameters),
    )


def build(parameters: dict[str, Any], *, interleaved: bool = False, d_head: int = D_HEAD) -> Rotary:
    config = RopeConfig.from_hf(parameters, n_ctx=N_CTX)
    return Rotary(config, d_head=d_head, n_ctx=N_CTX, interleaved=interleaved)


def up_to(seq_len: int) -> Tensor:
    """Positions of two rows: the last tokens of a sequence of seq_len, and the first ones."""
    n = min(seq_len, 7)
    return torch.stack((torch.arange(seq_len - n, seq_len), torch.arange(n)))


def turn(module: Rotary, x: Tensor, positions: Tensor, seq_len: int | None = None) -> Tensor:
    seq_len = int(positions.max()) + 1 if seq_len is None else seq_len
    return module(x, *module.tables(positions, seq_len, x.dtype))


def hf_turn(cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' partial models do: the first dimensions are turned, the others passed on."""
    d = cos.shape[-1]
    turned = apply_rotary_pos_emb(q[..., :d], k[..., :d], cos, sin)
    return tuple(torch.cat((new, old[..., d:]), -1) for new, old in zip(turned, (q, k), strict=True))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


# --- against transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_equals_transformers(name: str, seq_len: int) -> None:
    module, positions = build(PARAMETERS[name]), up_to(seq_len)
    q, k = torch.randn(2, 4, positions.shape[1], D_HEAD), torch.randn(2, 2, positions.shape[1], D_HEAD)
    cos, sin = LlamaRotaryEmbedding(hf_config(PARAMETERS[name]))(q, positions)
    expected_q, expected_k = hf_turn(cos, sin, q, k)
    assert_equal(turn(module, q, positions, seq_len), expected_q)
    assert_equal(turn(module, k, positions, seq_len), expected_k)


def test_every_rope_type_is_compared() -> None:
    assert {parameters["rope_type"] for parameters in PARAMETERS.values()} == set(ROPE_TYPES)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 1.0])  # of 16 dimensions, 0.4 are 6
def test_partial_rotation_equals_transformers(share: float) -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    x, positions = torch.randn(2, 4, 7, D_HEAD), up_to(1000)
    cos, sin = GPTNeoXRotaryEmbedding(hf_config(parameters, GPTNeoXConfig))(x, positions)
    expected, _ = hf_turn(cos, sin, x, x)
    assert_equal(turn(build(parameters), x, positions), expected)


def test_odd_share_is_rounded_up_to_a_pair_as_in_transformers() -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.35}  # 5 of 16
    x, positions = torch.randn(2, 4, 7, D_HEAD), up_to(100)
    cos, sin = GPTNeoXRotaryEmbedding(hf_config(parameters, GPTNeoXConfig))(x, positions)
    module = build(parameters)
    assert module.d_rotary == cos.shape[-1] == 6
    assert_equal(turn(module, x, positions), hf_turn(cos, sin, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["default", "yarn", "longrope"])
def test_tables_equal_transformers_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    positions = up_to(4000)
    cos, sin = LlamaRotaryEmbedding(hf_config(PARAMETERS[name]))(torch.empty(0, dtype=dtype), positions)
    ours = build(PARAMETERS[name]).tables(positions, 4000, dtype)
    signed = torch.cat((-sin[..., : D_HEAD // 2], sin[..., D_HEAD // 2 :]), -1)
    for actual, expected in zip(ours, (cos, signed), strict=True):
        torch.testing.assert_close(actual, expected[:, None], atol=0, rtol=0)


@pytest.mark.parametrize("d_rotary", [4, 16])
def test_interleaved_equals_transformers(d_rotary: int) -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": d_rotary / D_HEAD}
    x, positions = torch.randn(2, 4, 7, D_HEAD), up_to(50)
    sin, cos = modeling_gptj.create_sinusoidal_positions(64, d_rotary)[positions].chunk(2, -1)
    turned = modeling_gptj.apply_rotary_pos_emb(x.transpose(1, 2)[..., :d_rotary], sin, cos).transpose(1, 2)
    expected = torch.cat((turned, x[..., d_rotary:]), -1)
    assert_equal(turn(build(parameters, interleaved=True), x, positions), expected)


@pytest.mark.parametrize("name", ["default", "linear", "dynamic", "yarn", "longrope", "llama3"])
def test_interleaved_equals_transformers_for_scaled_types(name: str) -> None:
    x, positions = torch.randn(2, 4, 7, D_HEAD), up_to(100)
    embedding = modeling_cohere.CohereRotaryEmbedding(hf_config(PARAMETERS[name], CohereConfig))
    expected, _ = modeling_cohere.apply_rotary_pos_emb(x, x, *embedding(x, positions))
    assert_equal(turn(build(PARAMETERS[name], interleaved=True), x, positions), expected)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_frequencies_depend_on_this_batch_alone(name: str) -> None:
    module = build(PARAMETERS[name])
    for seq_len in (4000, 5, 90, N_CTX + 1, 33, 4000):
        fresh = LlamaRotaryEmbedding(hf_config(PARAMETERS[name]))
        cos, _ = fresh(torch.empty(0), up_to(seq_len))
        assert_equal(module.tables(up_to(seq_len), seq_len, torch.float32)[0], cos[:, None])


@pytest.mark.parametrize("name", ["yarn", "longrope"])
def test_a_missing_factor_is_the_ratio_of_the_contexts(name: str) -> None:
    parameters = {**PARAMETERS[name], "factor": None}
    cos, _ = LlamaRotaryEmbedding(hf_config(parameters))(torch.empty(0), up_to(50))
    assert_equal(build(parameters).tables(up_to(50), 50, torch.float32)[0], cos[:, None])
    assert build(parameters).rope.factor == N_CTX / ORIGINAL


# --- properties ------------------------------------------------------------------------------------------

position = st.integers(0, 500)
layout = st.booleans()


@st.composite
def plain_modules(draw: st.DrawFn) -> Rotary:
    """Of every type, with random sizes and an amplitude of 1."""
    pairs, rest = draw(st.integers(2, 8)), draw(st.integers(0, 4))
    fields: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 2.0},
        "proportional": {},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 100, "attention_factor": 1.0},
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": 100,
            "short_factor": (1.0,) * pairs,
            "long_factor": tuple(2.0 + i for i in range(pairs)),
            "attention_factor": 1.0,
        },
        "llama3": {
            "factor": 4.0,
            "original_max_position_embeddings": 100,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    }
    rope_type = draw(st.sampled_from(TYPES))
    d_head = 2 * (pairs + rest)
    share = (2 * pairs + 0.5) / d_head if rest else 1.0  # the half keeps int() from rounding the wrong way
    theta = draw(st.sampled_from([100.0, 1e4, 1e6]))
    config = RopeConfig(rope_type=rope_type, theta=theta, partial_rotary_factor=share, **fields[rope_type])
    return Rotary(config, d_head=d_head, n_ctx=200, interleaved=draw(layout))


def at(module: Rotary, x: Tensor, place: int, seq_len: int) -> Tensor:
    return turn(module, x, torch.tensor([[place]]), seq_len)


@settings(deadline=None, max_examples=60)
@given(plain_modules(), position, st.integers(0, 2**16))
def test_rotation_preserves_norms(module: Rotary, place: int, seed: int) -> None:
    x = torch.randn(1, 2, 1, module.d_head, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(at(module, x, place, 501).norm(dim=-1), x.norm(dim=-1))


@settings(deadline=None, max_examples=60)
@given(plain_modules(), position, position, position, st.integers(0, 2**16))
def test_scores_depend_on_the_distance_alone(module: Rotary, i: int, j: int, shift: int, seed: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, module.d_head, generator=torch.Generator().manual_seed(seed)).unbind()
    seq_len = 1001
    here = (at(module, q, i, seq_len) * at(module, k, j, seq_len)).sum()
    there = (at(module, q, i + shift, seq_len) * at(module, k, j + shift, seq_len)).sum()
    # An angle near 1,000 is known to 6e-5 in float32.
    torch.testing.assert_close(here, there, atol=1e-4 * float(q.norm() * k.norm()), rtol=0)


@settings(deadline=None, max_examples=30)
@given(plain_modules(), st.integers(1, 1000), st.integers(0, 2**16))
def test_position_zero_leaves_x_unchanged(module: Rotary, seq_len: int, seed: int) -> None:
    x = torch.randn(1, 2, 1, module.d_head, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(at(module, x, 0, seq_len), x)


def test_amplitude_multiplies_the_rotated_dimensions() -> None:
    module = build(PARAMETERS["yarn, amplitude"])
    x = torch.randn(1, 2, 1, D_HEAD)
    expected = torch.cat((0.9 * x[..., :8], x[..., 8:]), -1)
    torch.testing.assert_close(at(module, x, 0, 1), expected)


def test_a_row_for_all_equals_a_row_each() -> None:
    module, x = build(PARAMETERS["default"]), torch.randn(3, 4, 5, D_HEAD)
    positions = torch.arange(5)[None]
    assert torch.equal(turn(module, x, positions), turn(module, x, positions.expand(3, -1)))


# --- precision -------------------------------------------------------------------------------------------


def test_angles_are_float32_whatever_the_dtype() -> None:
    place = 100_000
    module = Rotary(RopeConfig(), d_head=64, n_ctx=2 * place)
    cos, sin = (t.flatten().double() for t in module.tables(torch.tensor([[place]]), place + 1, torch.bfloat16))
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    exact = place * torch.cat((frequencies, frequencies))
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(32)

    def error_of(cos: Tensor, sin: Tensor) -> float:
        return max(float((cos - exact.cos()).abs().max()), float((sin * sign - exact.sin()).abs().max()))

    # An angle of 1e5 is known to 4e-3 in float32, and bfloat16 has a relative precision of 4e-3.
    assert error_of(cos, sin) < 0.02
    careless = (torch.tensor(place, dtype=torch.bfloat16) * frequencies.bfloat16()).repeat(2)
    assert error_of(careless.cos().double(), careless.sin().double() * sign) > 0.5


def to_half(module: Rotary) -> Rotary:
    return module.half()


def to_bfloat16(module: Rotary) -> Rotary:
    return module.to(torch.bfloat16)


def through_pickle(module: Rotary) -> Rotary:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("change", [to_half, to_bfloat16, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("name", ["default", "dynamic", "longrope", "llama3"])
def test_tables_outlive_what_happens_to_the_module(change: Any, used_before: bool, name: str) -> None:
    positions = up_to(4000)
    expected = build(PARAMETERS[name]).tables(positions, 4000, torch.float32)
    module = build(PARAMETERS[name])
    if used_before:
        module.tables(positions, 4000, torch.float32)
    for actual, wanted in zip(change(module).tables(positions, 4000, torch.float32), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name", ["default", "dynamic", "longrope", "yarn", "proportional"])
def test_tables_are_the_same_for_a_module_built_on_meta(name: str) -> None:
    expected = build(PARAMETERS[name]).tables(up_to(4000), 4000, torch.float32)
    rotary._cached.cache_clear()
    with torch.device("meta"):
        module = build(PARAMETERS[name])
    module = module.to_empty(device="cpu")
    for actual, wanted in zip(module.tables(up_to(4000), 4000, torch.float32), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name", PARAMETERS)
def test_module_holds_nothing_that_a_checkpoint_would_store(name: str) -> None:
    module = build(PARAMETERS[name])
    assert not module.state_dict()
    assert not list(module.buffers())


# --- autograd, devices, compilers ------------------------------------------------------------------------

LAYOUTS = [("default", False), ("default", True), ("linear, partial", False), ("linear, partial", True)]


@pytest.mark.parametrize(("name", "interleaved"), LAYOUTS)
def test_gradients(name: str, interleaved: bool) -> None:
    module = build(PARAMETERS[name], interleaved=interleaved)
    x = torch.randn(2, 2, 3, D_HEAD, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: turn(module, x, up_to(3)), (x,))


@pytest.mark.parametrize(("name", "interleaved"), LAYOUTS)
def test_x_is_not_modified(name: str, interleaved: bool) -> None:
    x = torch.randn(2, 7, 4, D_HEAD).transpose(1, 2)
    before = x.clone()
    turned = turn(build(PARAMETERS[name], interleaved=interleaved), x, up_to(30))
    assert torch.equal(x, before)
    assert x._version == 0
    assert turned.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "interleaved"), LAYOUTS)
def test_dtype_and_shape_are_those_of_x(name: str, interleaved: bool, dtype: torch.dtype) -> None:
    module = build(PARAMETERS[name], interleaved=interleaved)
    x = torch.randn(2, 4, 7, D_HEAD)
    turned = turn(module, x.to(dtype), up_to(30))
    assert turned.dtype == dtype
    torch.testing.assert_close(turned.float(), turn(module, x, up_to(30)), atol=0.05, rtol=0)


@pytest.mark.parametrize("seq_len", [5, 4000])
@pytest.mark.parametrize("name", PARAMETERS)
def test_meta_tensors(name: str, seq_len: int) -> None:
    x, positions = torch.empty(2, 4, 5, D_HEAD, device="meta"), torch.empty(2, 5, dtype=int, device="meta")
    module = build(PARAMETERS[name])
    cos, sin = module.tables(positions, seq_len, torch.float32)
    assert cos.shape == sin.shape == (2, 1, 5, module.d_rotary)
    assert module(x, cos, sin).shape == x.shape
    assert module(x, cos, sin).is_meta


def test_the_cache_is_safe_from_fake_tensors_and_modes() -> None:
    module, positions = build(PARAMETERS["default"]), up_to(5)
    expected = module.tables(positions, 5, torch.float32)[0]
    rotary._cached.cache_clear()
    with FakeTensorMode():
        module.tables(torch.zeros(2, 5, dtype=torch.int64), 5, torch.float32)
    with torch.inference_mode():
        module.tables(positions, 5, torch.float32)
    assert torch.equal(module.tables(positions, 5, torch.float32)[0], expected)
    assert not module._frequencies(positions, 5).is_inference()


class Compiled(torch.nn.Module):
    def __init__(self, module: Rotary) -> None:
        super().__init__()
        self.rotary = module

    def forward(self, x: Tensor, positions: Tensor, seq_len: int) -> Tensor:
        return self.rotary(x, *self.rotary.tables(positions, seq_len, x.dtype))


@pytest.mark.parametrize(
    ("name", "interleaved", "backend"),
    [
        ("default", False, "aot_eager"),
        ("linear, partial", True, "eager"),
        ("dynamic", False, "eager"),
        ("longrope", False, "eager"),
    ],
)
@pytest.mark.usefixtures("new_import")
def test_compiles_without_graph_breaks(name: str, interleaved: bool, backend: str) -> None:
    torch._dynamo.reset()
    unchecked = importlib.import_module("lenskit.modules.rotary")
    config = unchecked.RopeConfig.from_hf(PARAMETERS[name], n_ctx=N_CTX)
    model = Compiled(unchecked.Rotary(config, d_head=D_HEAD, n_ctx=N_CTX, interleaved=interleaved))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seq_len in (5, 6, N_CTX, N_CTX + 1, N_CTX + 2):  # from the second on, lengths are symbolic
        positions = torch.arange(seq_len)[None]
        x = torch.randn(1, 2, seq_len, D_HEAD, requires_grad=True)
        assert_equal(compiled(x, positions, seq_len), model(x, positions, seq_len))
    torch._dynamo.reset()


# --- configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_round_trip(name: str) -> None:
    config = RopeConfig.from_hf(PARAMETERS[name], n_ctx=N_CTX)
    assert config.to_hf() == PARAMETERS[name]
    assert RopeConfig.from_hf(config.to_hf(), n_ctx=N_CTX) == config
    assert hash(config) == hash(RopeConfig.from_hf(config.to_hf(), n_ctx=N_CTX))


def test_older_spelling_of_the_type() -> None:
    older = {"type": "linear", "rope_theta": 1e4, "factor": 2.0}
    newer = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert RopeConfig.from_hf(older, n_ctx=8) == RopeConfig.from_hf(newer, n_ctx=8)
    assert RopeConfig.from_hf({**older, **newer}, n_ctx=8).to_hf() == newer
    assert RopeConfig.from_hf({"rope_theta": 10000.0}, n_ctx=8) == RopeConfig()


def test_what_is_none_counts_as_absent() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4, "factor": None, "mrope_section": None}
    assert RopeConfig.from_hf(parameters, n_ctx=8) == RopeConfig()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"rope_type": "spiral", "rope_theta": 1e4}, "rope type 'spiral' is not supported"),
        ({"rope_type": "default"}, "rope parameters of type 'default' lack rope_theta"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "of type 'linear' lack factor"),
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
            "of type 'yarn' lack original_max_position_embeddings",
        ),
        (
            {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8},
            "of type 'llama3' lack low_freq_factor, high_freq_factor",
        ),
        (
            {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "of type 'default' have mrope_section, which the type does not read",
        ),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 32},
            "of type 'linear' have beta_fast, which the type does not read",
        ),
    ],
)
def test_what_cannot_be_read_whole_is_refused(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedConfigError) as caught:
        RopeConfig.from_hf(parameters, n_ctx=N_CTX)
    assert says in caught.value.what
    assert parameters["rope_type"] in caught.value.got


def test_error_says_what_came_what_was_expected_and_what_to_do() -> None:
    with pytest.raises(UnsupportedConfigError) as caught:
        RopeConfig.from_hf({"rope_type": "linear", "rope_theta": 1e4, "factr": 2.0, "factor": 2.0}, n_ctx=8)
    assert str(caught.value) == (
        "rope parameters of type 'linear' have factr, which the type does not read\n"
        "  got:      rope_type='linear', rope_theta=10000.0, factr=2.0, factor=2.0\n"
        "  expected: rope_type, rope_theta, factor; and at most partial_rotary_factor\n"
        "  to do:    remove factr if the model was trained without; if not, its positions are not supported"
    )
    with pytest.raises(UnsupportedConfigError, match="one of default, linear, proportional, dynamic, yarn, longrope"):
        RopeConfig(rope_type="spiral")


def test_a_config_built_by_hand_is_checked_too() -> None:
    with pytest.raises(UnsupportedConfigError, match="lack factor"):
        RopeConfig(rope_type="dynamic")
    with pytest.raises(UnsupportedConfigError, match="have factor"):
        RopeConfig(factor=2.0)


@pytest.mark.parametrize(
    ("parameters", "d_head", "says"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 7, "head of 7 dimensions"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}, 8, "partial_rotary_factor=1.5"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.0}, 8, "partial_rotary_factor=0.0"),
        (PARAMETERS["longrope"], 8, "8 numbers in short_factor, 8 in long_factor"),
        ({**PARAMETERS["longrope"], "long_factor": [1.0]}, 16, "8 numbers in short_factor, 1 in long_factor"),
    ],
)
def test_config_that_does_not_fit_the_head(parameters: dict[str, Any], d_head: int, says: str) -> None:
    with pytest.raises(UnsupportedConfigError, match="that do not fit a head of") as caught:
        build(parameters, d_head=d_head)
    assert says in str(caught.value)
