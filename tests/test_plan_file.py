"""Plans as data: what a file holds, that it means the same, and what is refused to be read or written."""

import copy
import gc
import hashlib
import json
import math
import pickle
import stat
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity_table import ids
from safetensors.torch import load_file, save_file
from torch import Tensor

import lenskit as lk
from lenskit.errors import ExpressionError, LenskitError, PlanError, PlanFormatError
from lenskit.interventions.compiler import Compiler
from lenskit.interventions.forward import geometry_of

TOKENS = ids(2, 5)
PHASES = set(Phase) - {Phase.explain}
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(plan: lk.Plan, model: lk.HookedTransformer | None = None) -> lk.Plan:
    """Through text, and tensors as bytes would be."""
    data = json.loads(json.dumps(plan.to_json(model), allow_nan=False))
    return lk.Plan.from_json(data, {name: tensor.clone() for name, tensor in plan.tensors().items()})


def equal(one: Any, two: Any) -> bool:
    """Of an op's values: the same type, and every bit the same; of expressions, the text."""
    if type(one) is not type(two):
        return False
    if isinstance(one, Tensor):
        return (
            one.dtype == two.dtype
            and one.shape == two.shape
            and torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8))
        )
    if isinstance(one, int | float):
        return one == two or (math.isnan(one) and math.isnan(two))
    return repr(one) == repr(two)


def whole(model: lk.HookedTransformer) -> list[Any]:
    """Ops of every kind, with selectors of every kind and values of every kind."""
    act = lk.Act("blocks.0.hook_mlp_out", tokens=-1)
    shared = act * 2
    vector = seeded(model.cfg.d_model)
    return [
        lk.Save("blocks.-1.hook_resid_post", tokens=-1),
        lk.Save(["blocks.*.hook_attn_out", "hook_embed"], tokens=slice(0, 3, 2), dims=[0, -1], name="several"),
        lk.Set("blocks.0.attn.hook_v", 0.0, heads=-1),
        lk.Set("blocks.1.hook_resid_mid", vector, prompts=slice(1, None), tokens=[0, -1]),
        lk.Add("blocks.1.hook_mlp_out", shared + torch.where(act > 0, act, shared), tokens=-1, prompts=None),
        lk.Scale("blocks.2.attn.hook_pattern", 0.5, tokens=-1, dims=0),
        lk.Add("blocks.2.hook_resid_pre", vector, steps=0),
        lk.Save(model.unembed(model.ln_final(shared)).softmax(-1)[:, [0, 1]], name="lens"),
        lk.Save((lk.randn(3, seed=1) * lk.rand_like(act[0, :3], seed=2)).sum(), name="noise", steps=slice(0, 1)),
    ]


# -- round trips


VALUES = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(2**40), 2**40),
    st.builds(lambda dtype, shape, seed: seeded(*shape, seed=seed).mul(5).to(dtype), st.sampled_from(DTYPES),
              st.sampled_from([(), (1,), (3,), (2, 3), (0,), (1, 1, 2)]), st.integers(0, 9)),
)  # fmt: skip
INDEX = st.integers(-99, 99)
SELECTOR = st.one_of(
    st.none(), INDEX, st.lists(INDEX, min_size=1, max_size=4),
    st.builds(slice, st.none() | INDEX, st.none() | INDEX, st.none() | st.integers(1, 4)),
)  # fmt: skip
LATER = st.integers(0, 99)
STEPS = st.one_of(
    st.none(), LATER, st.lists(LATER, min_size=1, max_size=4),
    st.builds(slice, st.none() | LATER, st.none() | LATER, st.none() | st.integers(1, 4)),
)  # fmt: skip
NAME = st.text(min_size=1, max_size=12)
SITE = st.one_of(
    NAME, st.lists(NAME, min_size=1, max_size=3), st.lists(st.lists(NAME, min_size=1), min_size=1, max_size=2)
)
SELECTORS = st.fixed_dictionaries({}, optional=dict.fromkeys(("prompts", "tokens", "heads", "dims"), SELECTOR))
ACT = st.builds(
    lambda name, chosen, step: lk.Act(name, **chosen, steps=step),
    NAME.filter(lambda name: not set(name) & set("*?[")), SELECTORS, st.none() | LATER,
)  # fmt: skip


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    number = st.floats(-5, 5) | st.integers(-5, 5)
    return st.one_of(
        st.builds(lambda a, b: a + b, inner, inner | number),
        st.builds(lambda a: a * a - 2 * a, inner),  # one node, several times
        st.builds(lambda a, b: torch.where(a > b, a, torch.tensor([1.5, -1])), inner, number),
        st.builds(lambda a, b: torch.cat([a, b], dim=-1), inner, inner),
        st.builds(lambda a: a[..., 0, None, 1:5:2, [0, 2]], inner),
        st.builds(lambda a: a.topk(2).values.softmax(-1).to(torch.float16), inner),
        st.builds(lambda a, b: a.clamp(min=b, max=math.inf).masked_fill(a == b, math.nan), inner, number),
        st.builds(lambda a: torch.nn.functional.layer_norm(a, (3,), eps=1e-3), inner),
    )


EXPRESSION = st.recursive(ACT, grown, max_leaves=6)
OP = st.one_of(
    st.builds(lambda at, chosen, steps, name: lk.Save(at, **chosen, steps=steps, name=name), SITE, SELECTORS, STEPS,
              st.none() | NAME),
    st.builds(lambda kind, at, value, chosen, steps: kind(at, value, **chosen, steps=steps),
              st.sampled_from([lk.Set, lk.Add, lk.Scale]), SITE, VALUES | EXPRESSION, SELECTORS, STEPS),
    st.builds(lambda expression, steps, name: lk.Save(expression, steps=steps, name=name), EXPRESSION, STEPS, NAME),
    st.builds(lambda at, steps: lk.Stop(at, steps=steps), SITE, STEPS),
)  # fmt: skip


@settings(max_examples=100, phases=PHASES)
@given(st.lists(OP, max_size=5))
def test_any_plan_comes_back_as_it_was(ops: list[Any]) -> None:
    plan = lk.Plan(ops)
    again = round_trip(plan)
    assert repr(again) == repr(plan)
    assert json.dumps(again.to_json()) == json.dumps(plan.to_json())
    assert again.digest() == plan.digest()
    assert set(again.tensors()) == set(plan.tensors())
    for op, read in zip(plan.ops, again.ops, strict=True):
        assert type(op) is type(read)
        assert op.selectors == read.selectors
        if not isinstance(op, lk.Save | lk.Stop):
            assert equal(op.value, read.value)


@settings(max_examples=30, phases=PHASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OP, max_size=5))
def test_any_plan_comes_back_from_a_file(tmp_path: Path, ops: list[Any]) -> None:
    """Written over the one before."""
    plan = lk.Plan(ops)
    assert plan.save(tmp_path / "plan.json") == tmp_path / "plan.json"
    read = lk.Plan.load(tmp_path / "plan.json")
    assert read.digest() == plan.digest()
    assert repr(read) == repr(plan)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == (["plan.json", "plan.safetensors"] if plan.tensors() else ["plan.json"])


@torch.no_grad()
def test_a_plan_from_a_file_does_the_same(shared: lk.HookedTransformer, tmp_path: Path) -> None:
    plan = lk.Plan(whole(shared))
    plan.save(tmp_path / "plan.json", shared)
    read = lk.Plan.load(str(tmp_path / "plan.json"))
    one, two = (shared.run_with_hooks(TOKENS, hooks=hooks) for hooks in (plan, read))
    assert torch.equal(one.logits, two.logits)
    assert list(one.saved) == list(two.saved)
    for key, value in one.saved.items():
        if isinstance(value, Mapping):
            assert all(torch.equal(value[name], two.saved[key][name]) for name in value)
        elif isinstance(value, list):
            assert all(map(torch.equal, value, two.saved[key]))
        else:
            assert torch.equal(value, two.saved[key])
    every_step = [index for index, op in enumerate(plan.ops) if "tokens=[0, -1]" not in repr(op)]
    first, second = (
        shared.generate(TOKENS, max_new_tokens=3, hooks=[hooks.ops[index] for index in every_step])
        for hooks in (plan, read)
    )
    assert [row.tolist() for row in first.tokens] == [row.tolist() for row in second.tokens]


def test_a_plan_for_another_model(tiny: Callable[..., lk.HookedTransformer]) -> None:
    """Modules are names in a file: those of the model that runs are applied."""
    one, two = tiny("llama", seed=0), tiny("llama", seed=1)
    plan = lk.Plan([lk.Save(one.unembed(one.ln_final(lk.Act("blocks.0.hook_resid_post"))), name="lens")])
    with pytest.raises(ExpressionError, match="another model"):
        two.run_with_hooks(TOKENS, hooks=plan)
    read = round_trip(plan, one)
    assert "model.unembed(model.ln_final(" in repr(read)
    for model in (one, two):
        stream = model(TOKENS, stop_at_layer=1)
        expected = model.unembed(model.ln_final(stream))
        torch.testing.assert_close(model.run_with_hooks(TOKENS, hooks=read).saved["lens"], expected)
    assert read.digest() == plan.digest(one) == round_trip(plan, one).digest(two)


def test_modules_need_the_model_that_has_their_names(shared: lk.HookedTransformer, tmp_path: Path) -> None:
    plan = lk.Plan([lk.Save(shared.ln_final(lk.Act("hook_embed")), name="x")])
    other = copy.deepcopy(shared)
    for write in (
        lambda: plan.to_json(), lambda: plan.digest(), lambda: plan.save(tmp_path / "plan.json"),
        lambda: plan.to_json(other), lambda: plan.save(tmp_path / "plan.json", other),
    ):  # fmt: skip
        with pytest.raises(PlanFormatError, match="whose name is not known") as told:
            write()
        assert "plan.save(path, model)" in told.value.fix
    assert list(tmp_path.iterdir()) == []


def test_shared_nodes_are_written_once(shared: lk.HookedTransformer) -> None:
    act = lk.Act("hook_embed")
    chain = act
    for _ in range(30):
        chain = chain + chain  # 2 ** 30 activations, written out
    plan = lk.Plan([lk.Save(chain, name="x"), lk.Set("hook_embed", chain * 0)])
    data = plan.to_json()
    assert len(data["nodes"]) == 32
    read = round_trip(plan)
    assert len(read.to_json()["nodes"]) == 32
    saved = shared.run_with_hooks(TOKENS, hooks=read).saved["x"]
    assert torch.equal(saved, shared.embed.W_E[TOKENS] * 2**30)


# -- tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    for shape in ((), (3,), (2, 3)):
        value = seeded(*shape).mul(4).to(dtype)
        plan = lk.Plan([lk.Set("hook_embed", value), lk.Save(lk.Act("hook_embed") * value, name="x")])
        plan.save(tmp_path / "plan.json")
        [name] = plan.tensors()
        [found] = load_file(tmp_path / "plan.safetensors").values()
        assert equal(found, value)
        assert equal(lk.Plan.load(tmp_path / "plan.json").ops[0].value, value)
        assert name.startswith("sha256:")


VIEWS: dict[str, Callable[[], list[Tensor]]] = {
    "a whole and its part": lambda: (lambda x: [x, x[:2]])(seeded(4)),
    "overlapping parts": lambda: (lambda x: [x[:3], x[1:]])(seeded(4)),
    "parts side by side": lambda: (lambda x: [x[0], x[1]])(seeded(2, 4)),
    "the same twice": lambda: (lambda x: [x, x])(seeded(4)),
    "equal ones": lambda: [seeded(4), seeded(4)],
    "two shapes of one": lambda: (lambda x: [x, x.view(2, 2)])(seeded(4)),
    "a transpose": lambda: (lambda x: [x, x.T])(seeded(2, 3)),
    "expanded": lambda: [torch.tensor(2.0).expand(4)],
    "every other": lambda: [seeded(8)[::2]],
    "a parameter": lambda: [torch.nn.Parameter(seeded(4))],
    "one that was computed": lambda: [seeded(4).requires_grad_() * 2],
    "a conjugate": lambda: [seeded(4).to(torch.complex64).mul(1j).conj()],
    "an imaginary part": lambda: [seeded(4).to(torch.complex64).mul(1j).conj().imag],
}


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
def test_tensors_however_they_lie_in_memory(make: Callable[[], list[Tensor]], tmp_path: Path) -> None:
    values = make()
    plan = lk.Plan([lk.Add("hook_embed", value) for value in values])
    plan.save(tmp_path / "plan.json")
    read = lk.Plan.load(tmp_path / "plan.json")
    for op, value in zip(read.ops, values, strict=True):
        assert torch.equal(op.value, value.detach().resolve_conj().resolve_neg())
    plain = lk.Plan(
        [lk.Add("hook_embed", value.detach().clone().contiguous().resolve_conj().resolve_neg()) for value in values]
    )
    assert plain.digest() == plan.digest() == read.digest()
    size = sum(tensor.nbytes for tensor in plan.tensors().values())
    assert (tmp_path / "plan.safetensors").stat().st_size < size + 1000, "a part does not take the whole along"


@pytest.mark.parametrize(
    "value",
    [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.zeros(3, dtype=torch.complex128)],
    ids=["sparse", "meta", "complex128"],
)
def test_tensors_that_no_file_holds(value: Tensor, tmp_path: Path) -> None:
    """Are refused, whichever op has them; nothing is written."""
    for make in (
        lambda: lk.Set("hook_embed", value),
        lambda: lk.Save(lk.Act("hook_embed") + value, name="x"),
    ):
        with pytest.raises(PlanError):
            lk.Plan([lk.Save("hook_logits"), make()]).save(tmp_path / "plan.json")
        assert list(tmp_path.iterdir()) == []


# -- digests


def test_equal_plans_have_equal_digests(shared: lk.HookedTransformer) -> None:
    one, two = lk.Plan(whole(shared)), lk.Plan(whole(shared))
    assert one.ops[3].value is not two.ops[3].value
    assert one.digest(shared) == two.digest(shared)
    assert len(one.digest(shared)) == 64
    assert lk.Plan(one).digest(shared) == one.digest(shared)
    as_others = lk.Plan(
        [lk.Save(("hook_embed",), tokens=torch.tensor([0, 1])), lk.Set("hook_embed", 1.0, dims=range(2))]
    )
    assert (
        as_others.digest()
        == lk.Plan([lk.Save(["hook_embed"], tokens=(0, 1)), lk.Set("hook_embed", 1.0, dims=[0, 1])]).digest()
    )


def test_any_change_changes_the_digest(shared: lk.HookedTransformer) -> None:
    vector = seeded(4)
    other = vector.clone()
    other[2] += 1e-6
    act = lk.Act("hook_embed", tokens=-1)
    plans = [
        [],
        [lk.Save("hook_embed")],
        [lk.Save("hook_logits")],
        [lk.Save(["hook_embed"])],
        [lk.Save("hook_embed", name="x")],
        [lk.Save("hook_embed", tokens=0)],
        [lk.Save("hook_embed", tokens=[0])],
        [lk.Save("hook_embed", tokens=slice(0, 1))],
        [lk.Save("hook_embed", dims=0)],
        [lk.Save("hook_embed", steps=0)],
        [lk.Save("hook_embed", steps=[0])],
        [lk.Save("hook_embed", prompts=0)],
        [lk.Save("hook_embed", tokens=-1)],
        [lk.Stop("hook_embed")],
        [lk.Save("hook_embed"), lk.Save("hook_logits")],
        [lk.Save("hook_logits"), lk.Save("hook_embed")],
        [lk.Set("hook_embed", 0.0)],
        [lk.Set("hook_embed", -0.0)],
        [lk.Set("hook_embed", math.nan)],
        [lk.Set("hook_embed", math.inf)],
        [lk.Set("hook_embed", -math.inf)],
        [lk.Set("hook_embed", 1e-300)],
        [lk.Set("hook_embed", 0.1)],
        [lk.Set("hook_embed", 0.1 + 2**-55)],
        [lk.Add("hook_embed", 0.0)],
        [lk.Scale("hook_embed", 0.0)],
        [lk.Set("hook_embed", vector)],
        [lk.Set("hook_embed", other)],
        [lk.Set("hook_embed", vector.double())],
        [lk.Set("hook_embed", vector.bfloat16())],
        [lk.Set("hook_embed", vector.half())],
        [lk.Set("hook_embed", vector[None])],
        [lk.Set("hook_embed", vector.view(2, 2))],
        [lk.Set("hook_embed", vector.view(torch.int32))],
        [lk.Set("hook_embed", act)],
        [lk.Set("hook_embed", act * 2)],
        [lk.Set("hook_embed", act * 2.5)],
        [lk.Set("hook_embed", 2 * act)],
        [lk.Set("hook_embed", act * vector)],
        [lk.Set("hook_embed", act * other)],
        [lk.Set("hook_embed", act + act)],
        [lk.Set("hook_embed", act.softmax(-1))],
        [lk.Set("hook_embed", act.softmax(0))],
        [lk.Set("hook_embed", lk.randn(4, seed=0))],
        [lk.Set("hook_embed", lk.randn(4, seed=1))],
        [lk.Set("hook_embed", lk.rand(4, seed=0))],
        [lk.Set("hook_embed", shared.ln_final(act))],
        [lk.Set("hook_embed", shared.blocks[0].ln1(act))],
        [lk.Set("hook_embed", shared.blocks[1].ln1(act))],
        [lk.Set("hook_embed", act[0])],
        [lk.Set("hook_embed", act[0:1])],
        [lk.Set("hook_embed", act[(0,)])],
        [lk.Set("hook_embed", act[[0]])],
        [lk.Set("hook_embed", act[None])],
        [lk.Set("hook_embed", act[...])],
        [lk.Set("hook_embed", act.to(torch.float16))],
        [lk.Set("hook_embed", act.to(torch.bfloat16))],
    ]
    digests = [lk.Plan(ops).digest(shared) for ops in plans]
    assert len(set(digests)) == len(plans)
    assert all(set(digest) <= set("0123456789abcdef") for digest in digests)


def test_a_digest_is_the_same_on_every_machine() -> None:
    """Its definition, written out once more: of the JSON text, with tensors named by what they hold."""
    vector = torch.tensor([1.0, -2.5])
    plan = lk.Plan(
        [lk.Set("hook_embed", vector, tokens=slice(0, None)), lk.Save("hook_logits", steps=[0, 2], name="x")]
    )
    name = "sha256:" + hashlib.sha256(b"float32 [2] " + b"\x00\x00\x80\x3f\x00\x00\x20\xc0").hexdigest()
    assert list(plan.tensors()) == [name]
    data = {
        "format": "lenskit-plan",
        "version": 1,
        "nodes": [],
        "ops": [
            {
                "op": "set",
                "at": "hook_embed",
                "value": {"tensor": name},
                "selectors": {"tokens": {"slice": [0, None, None]}},
            },
            {"op": "save", "at": "hook_logits", "name": "x", "selectors": {"steps": [0, 2]}},
        ],
    }
    assert plan.to_json() == data
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert plan.digest() == hashlib.sha256(text.encode()).hexdigest()


def test_a_digest_is_the_same_in_another_process(tmp_path: Path) -> None:
    """Whatever a process's hash seed is, and in whatever order dictionaries were filled."""
    act = lk.Act("hook_embed", dims=[0], tokens=1)
    ops = [
        lk.Save(torch.where(act > 0, act, 0.0).sum(dim=-1, keepdim=True), name="x"),
        lk.Add("hook_embed", seeded(3).bfloat16()),
    ]
    plan = lk.Plan(ops)
    plan.save(tmp_path / "plan.json")
    code = f"import lenskit; print(lenskit.Plan.load({str(tmp_path / 'plan.json')!r}).digest())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == plan.digest()


# -- files


def test_what_a_plan_leaves_on_disk(tmp_path: Path) -> None:
    """No tensors of an earlier plan; readable text; what is there is replaced whole."""
    path = tmp_path / "plan.json"
    lk.Plan([lk.Set("hook_embed", seeded(4))]).save(path)
    lk.Plan([lk.Set("hook_embed", seeded(5)), lk.Set("hook_embed", seeded(6))]).save(path)
    assert {tuple(tensor.shape) for tensor in load_file(tmp_path / "plan.safetensors").values()} == {(5,), (6,)}
    lk.Plan([lk.Save("hook_embed")]).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads(path.read_text())["ops"] == [{"op": "save", "at": "hook_embed"}]
    assert lk.Plan.load(path).ops[0].at == "hook_embed"
    assert path.stat().st_mode & stat.S_IRUSR


def test_each_file_name_has_tensors_of_its_own(tmp_path: Path) -> None:
    """Also where names differ only behind a dot."""
    names = ["layer.1", "layer.2", "layer.json", "a.b.json", "a.c.json"]
    plans = {name: lk.Plan([lk.Set("hook_embed", seeded(4, seed=seed))]) for seed, name in enumerate(names)}
    for name, plan in plans.items():
        plan.save(tmp_path / name)
    for name, plan in plans.items():
        assert lk.Plan.load(tmp_path / name).digest() == plan.digest()


def test_a_file_of_tensors_is_no_place_for_a_plan(tmp_path: Path) -> None:
    """Where both would be one file, nothing is lost."""
    plan = lk.Plan([lk.Set("hook_embed", seeded(4))])
    path = tmp_path / "plan.safetensors"
    try:
        plan.save(path)
    except LenskitError:
        assert not path.exists()
    else:
        assert lk.Plan.load(path).digest() == plan.digest()


@pytest.mark.parametrize("there", [False, True])
def test_what_is_no_data_is_not_written(there: bool, tmp_path: Path) -> None:
    """The op is named; what was there stays."""

    def halve(act: Tensor, hook: lk.HookPoint) -> Tensor:
        return act / 2

    before = lk.Plan([lk.Set("hook_embed", seeded(4))])
    if there:
        before.save(tmp_path / "plan.json")
    for op, said in [
        (("hook_embed", halve), "a Python function"),
        (lk.Save(lambda name: True), "a predicate on names"),
        (lk.Set(["hook_logits", lambda name: True], seeded(9)), "a predicate on names"),
    ]:
        plan = lk.Plan([lk.Add("hook_embed", seeded(3)), op])
        for write in (plan.to_json, plan.digest, lambda plan=plan: plan.save(tmp_path / "plan.json")):
            with pytest.raises(PlanFormatError, match=r"hooks\[1\]") as told:
                write()
            assert said in told.value.got
            assert "hook_" in told.value.what or "predicate" in told.value.what
    if there:
        assert lk.Plan.load(tmp_path / "plan.json").digest() == before.digest()
    assert len(list(tmp_path.iterdir())) == 2 * there


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises((OSError, LenskitError)):
        lk.Plan([lk.Save("hook_embed")]).save(tmp_path / "none" / "plan.json")
    with pytest.raises((FileNotFoundError, LenskitError)):
        lk.Plan.load(tmp_path / "plan.json")


# -- what is refused


def good() -> dict[str, Any]:
    return {"format": "lenskit-plan", "version": 1, "ops": [{"op": "save", "at": "hook_embed"}], "nodes": []}


def with_op(**op: Any) -> dict[str, Any]:
    return {**good(), "ops": [op]}


SET = {"op": "set", "at": "hook_embed"}
ACTS: list[Any] = [{"act": {"at": "hook_embed"}}]
REFUSED: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "no plan": {},
    "another format": {**good(), "format": "other-plan"},
    "version 2": {**good(), "version": 2},
    "version 0": {**good(), "version": 0},
    "version '1'": {**good(), "version": "1"},
    "version true": {**good(), "version": True},
    "no version": {k: v for k, v in good().items() if k != "version"},
    "version null": {**good(), "version": None},
    "version [1]": {**good(), "version": [1]},
    "another key": {**good(), "comment": "x"},
    "no ops": {k: v for k, v in good().items() if k != "ops"},
    "no nodes": {k: v for k, v in good().items() if k != "nodes"},
    "ops no list": {**good(), "ops": {}},
    "nodes no list": {**good(), "nodes": {}},
    "an op that is none": {**good(), "ops": ["save"]},
    "an op that is a list": {**good(), "ops": [["save", "hook_embed"]]},
    "null": {**good(), "ops": [None]},
    "another op": with_op(op="delete", at="hook_embed"),
    "Save": with_op(op="Save", at="hook_embed"),
    "an op without a name": with_op(at="hook_embed"),
    "op null": with_op(op=None, at="hook_embed"),
    "a function": with_op(op="function", at="hook_embed", function="os.system"),
    "save of nothing": with_op(op="save"),
    "set of nothing": with_op(**SET),
    "set at nothing": with_op(op="set", value=0.0),
    "stop with a value": with_op(op="stop", at="hook_embed", value=0.0),
    "stop with a name": with_op(op="stop", at="x", name="x"),
    "set with a name": with_op(**SET, value=0.0, name="x"),
    "another key in an op": with_op(op="save", at="x", comment=""),
    "save at and value": {**with_op(op="save", at="x", value={"node": 0}), "nodes": ACTS},
    "save of a number": with_op(op="save", value=1.0, name="x"),
    "at null": with_op(op="save", at=None),
    "at a number": with_op(op="save", at=3),
    "at an object": with_op(op="save", at={"glob": "*"}),
    "at a list of numbers": with_op(op="save", at=["hook_embed", 3]),
    "name a number": with_op(op="save", at="x", name=3),
    "name empty": with_op(op="save", at="x", name=""),
    "value null": with_op(**SET, value=None),
    "value text": with_op(**SET, value="0"),
    "value true": with_op(**SET, value=True),
    "value list": with_op(**SET, value=[0.0]),
    "value nan": with_op(**SET, value=math.nan),
    "value inf": with_op(**SET, value=math.inf),
    "value float text": with_op(**SET, value={"float": "1.0"}),
    "value float infinity": with_op(**SET, value={"float": "Infinity"}),
    "value no tensor": with_op(**SET, value={"tensor": "sha256:00"}),
    "value no node": with_op(**SET, value={"node": 0}),
    "value node -1": {**with_op(**SET, value={"node": -1}), "nodes": ACTS},
    "value node true": {**with_op(**SET, value={"node": True}), "nodes": ACTS},
    "value node 0.0": {**with_op(**SET, value={"node": 0.0}), "nodes": ACTS},
    "value of two": with_op(**SET, value={"float": "nan", "node": 0}),
    "value unhashable": with_op(**SET, value={"float": []}),
    "tensor unhashable": with_op(**SET, value={"tensor": {}}),
    "a huge whole number": with_op(**SET, value=10**400),
    "a pair of values": {
        **with_op(op="save", value={"node": 1}, name="x"),
        "nodes": [*ACTS, {"call": "exec", "args": [{"node": 0}], "kwargs": {}}],
    },
    "a function that is not listed": {**good(), "nodes": [*ACTS, {"call": "eval", "args": ["1"], "kwargs": {}}]},
    "a later node": {**good(), "nodes": [{"call": "neg", "args": [{"node": 0}], "kwargs": {}}]},
    "save without a name": {**with_op(op="save", value={"node": 0}), "nodes": ACTS},
    "save with selectors": {**with_op(op="save", value={"node": 0}, name="x", selectors={"tokens": 0}), "nodes": ACTS},
    "selectors a list": with_op(op="save", at="x", selectors=[0]),
    "selectors null": with_op(op="save", at="x", selectors=None),
    "another selector": with_op(op="save", at="x", selectors={"layers": 0}),
    "a selector text": with_op(op="save", at="x", selectors={"tokens": "0"}),
    "a selector 1.0": with_op(op="save", at="x", selectors={"tokens": 1.0}),
    "a selector true": with_op(op="save", at="x", selectors={"tokens": True}),
    "an empty selector": with_op(op="save", at="x", selectors={"tokens": []}),
    "a slice of two": with_op(op="save", at="x", selectors={"tokens": {"slice": [0, 1]}}),
    "a slice of text": with_op(op="save", at="x", selectors={"tokens": {"slice": ["0", None, None]}}),
    "a slice backwards": with_op(op="save", at="x", selectors={"tokens": {"slice": [None, None, -1]}}),
    "a slice and more": with_op(op="save", at="x", selectors={"tokens": {"slice": [0, 1, 1], "x": 0}}),
    "steps from the end": with_op(op="save", at="x", selectors={"steps": -1}),
    "tokens of a stop": with_op(op="stop", at="x", selectors={"tokens": 0}),
}


def test_the_data_that_the_refused_differ_from_is_read() -> None:
    assert len(lk.Plan.from_json(good())) == 1
    assert len(lk.Plan.from_json({**good(), "nodes": ACTS})) == 1
    assert lk.Plan.from_json(with_op(**SET, value=0.5)).ops[0].value == 0.5
    assert len(lk.Plan.from_json(with_op(op="stop", at="x", selectors={"steps": 0}))) == 1


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_data_that_is_no_plan(data: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanFormatError) as told:
        lk.Plan.from_json(data)
    assert told.value.got
    assert told.value.expected
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanFormatError):
        lk.Plan.load(tmp_path / "plan.json")


def test_the_version_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlanFormatError) as told:
        lk.Plan.from_json({**good(), "version": 7})
    assert "version 7" in told.value.got
    assert "update lenskit" in told.value.expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"plan"',
        "\x00",
        "{'format': 'lenskit-plan'}",
        "\ufeff{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        "NaN",
    ],
    ids=lambda text: text[:8],
)
def test_text_that_is_no_plan(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanFormatError):
        lk.Plan.load(tmp_path / "plan.json")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFormatError):
        lk.Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("depth", [30, 300, *range(940, 1000, 6), 3000])
def test_deep_nesting_is_refused(depth: int, tmp_path: Path) -> None:
    """At every place where something may be nested, and at the depths at which Python itself gives up."""
    deep = "[" * depth + "]" * depth
    tagged = '{"tuple": ' * depth + "[]" + "}" * depth
    for place in ("at", "value", "selectors", "tokens", "op", "name", "ops", "nodes", "args"):
        for nested in (deep, tagged):
            op = {"op": "save", "at": "x"} if place != "value" else {"op": "set", "at": "x"}
            data = good()
            if place in ("ops", "nodes"):
                data[place] = ["HERE"]
            elif place == "args":
                data["nodes"] = [{"call": "neg", "args": ["HERE"], "kwargs": {}}]
            else:
                data["ops"] = [{**op, "selectors": {"tokens": "HERE"}} if place == "tokens" else {**op, place: "HERE"}]
            (tmp_path / "plan.json").write_text(json.dumps(data).replace('"HERE"', nested))
            with pytest.raises(PlanFormatError):
                lk.Plan.load(tmp_path / "plan.json")


# -- tensors that are not those that were written


def written(folder: Path) -> lk.Plan:
    plan = lk.Plan([lk.Set("hook_embed", seeded(4)), lk.Save(lk.Act("hook_embed") * seeded(3), name="x")])
    plan.save(folder / "plan.json")
    return plan


def test_altered_tensors_are_refused(tmp_path: Path) -> None:
    plan = written(tmp_path)
    path = tmp_path / "plan.safetensors"
    names = list(plan.tensors())
    for name in names:
        for change in (
            lambda x: x + 1, lambda x: x.double(), lambda x: x[None], lambda x: x[:-1], lambda x: x.view(torch.int32),
            lambda x: torch.where(torch.arange(len(x)) == 1, x.nextafter(torch.tensor(9.0)), x), lambda x: -x,
        ):  # fmt: skip
            tensors = {**plan.tensors()}
            tensors[name] = change(tensors[name])
            with pytest.raises(PlanFormatError, match=name[:20]):
                lk.Plan.from_json(plan.to_json(), tensors)
            save_file(tensors, path)
            with pytest.raises(PlanFormatError):
                lk.Plan.load(tmp_path / "plan.json")
    swapped = dict(zip(names, list(plan.tensors().values())[::-1], strict=True))
    missing = {names[0]: plan.tensors()[names[0]]}
    no_tensor: dict[str, Any] = {**plan.tensors(), names[0]: [0.0]}
    for tensors in (swapped, missing, no_tensor, {}, None):
        with pytest.raises(PlanFormatError):
            lk.Plan.from_json(plan.to_json(), tensors)
    path.unlink()
    with pytest.raises(PlanFormatError):
        lk.Plan.load(tmp_path / "plan.json")


def test_tensors_of_another_plan_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    lk.Plan([lk.Set("hook_embed", seeded(7))]).save(tmp_path / "other.json")
    (tmp_path / "other.safetensors").replace(tmp_path / "plan.safetensors")
    with pytest.raises(PlanFormatError):
        lk.Plan.load(tmp_path / "plan.json")


@settings(max_examples=150, phases=PHASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_that_were_changed(tmp_path: Path, data: st.DataObject) -> None:
    """In either file: refused, or, if the change says nothing, the same plan as before."""
    plan = written(tmp_path)
    path = tmp_path / data.draw(st.sampled_from(["plan.json", "plan.safetensors"]))
    there = bytearray(path.read_bytes())
    change = data.draw(st.sampled_from(["replace", "cut", "insert", "empty"]))
    at = data.draw(st.integers(0, len(there) - 1))
    if change == "replace":
        there[at] = data.draw(st.integers(0, 255))
    elif change == "cut":
        del there[at:]
    elif change == "insert":
        there[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    else:
        there.clear()
    path.write_bytes(there)
    with suppress(PlanFormatError):
        read = lk.Plan.load(tmp_path / "plan.json")
        if path.name == "plan.safetensors":
            assert read.digest() == plan.digest()


JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.just(10**400),
        st.floats(),
        st.sampled_from(
            ["set", "save", "stop", "hook_embed", "node", "x", "", "blocks.*", "neg", "nan", "ln_final", "__class__"]
        ),
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "op",
                    "at",
                    "value",
                    "name",
                    "selectors",
                    "tokens",
                    "steps",
                    "slice",
                    "node",
                    "tensor",
                    "float",
                    "act",
                    "call",
                    "args",
                    "kwargs",
                    "module",
                    "argument",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=5,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is, in nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(found for key, value in inner for found in places(value, (*path, key)))]


@settings(max_examples=120, phases=PHASES)
@given(data=st.data())
def test_data_that_was_tampered_with_is_refused_or_read(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    """And what is read is a plan like any other: it has a text and a digest, and says what is wrong with it."""
    plan = lk.Plan(whole(shared))
    found, tensors = copy.deepcopy(plan.to_json(shared)), plan.tensors()
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(found)[1:]))
        parent: Any = found
        for key in path[:-1]:
            parent = parent[key]
        change = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if change == "delete":
            del parent[path[-1]]
        elif change == "replace":
            parent[path[-1]] = data.draw(JUNK)
        elif isinstance(parent, dict):
            parent[data.draw(st.sampled_from(["name", "at", "value", "selectors", "steps", "other"]))] = data.draw(JUNK)
        else:
            parent.insert(path[-1], data.draw(JUNK))
    try:
        read = lk.Plan.from_json(found, tensors)
    except PlanFormatError:
        return
    assert repr(read)
    assert round_trip(read).digest() == read.digest()
    with suppress(LenskitError):
        read.compile(shared, shared.hook_points, geometry_of(shared.to_tokens(TOKENS), None), n_steps=None)


@settings(max_examples=100, phases=PHASES)
@given(JUNK, JUNK)
def test_junk_is_refused(junk: Any, other: Any) -> None:
    for data in (
        junk,
        {**good(), "ops": junk},
        {**good(), "nodes": junk},
        {**good(), "ops": [junk]},
        with_op(op="set", at=junk, value=other),
    ):
        with suppress(PlanFormatError):
            assert isinstance(lk.Plan.from_json(data), lk.Plan)


def test_nothing_is_executed(tmp_path: Path) -> None:
    """A pickle, and names of what could be run, are refused as anything else."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise SystemExit('executed')",))

    (tmp_path / "plan.json").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(PlanFormatError):
        lk.Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps(good()))
    (tmp_path / "plan.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(PlanFormatError):
        lk.Plan.load(tmp_path / "plan.json")
    for function in (
        "exec",
        "eval",
        "__import__",
        "os.system",
        "torch.load",
        "load",
        "apply_",
        "map_",
        "__class__",
        "__reduce__",
    ):
        nodes = [*ACTS, {"call": function, "args": [{"node": 0}], "kwargs": {}}]
        with pytest.raises(PlanFormatError):
            lk.Plan.from_json({**good(), "nodes": nodes})


@pytest.mark.parametrize(
    "name",
    ["", "__class__", "embed.weight", "_modules", "blocks.0.__dict__", "blocks", "../x", "tokenizer", "run_with_hooks"],
)
def test_names_that_are_no_module_to_apply(shared: lk.HookedTransformer, name: str) -> None:
    """Only the model's own modules are looked up."""
    data = {
        **with_op(op="save", value={"node": 1}, name="x"),
        "nodes": [*ACTS, {"module": name, "argument": {"node": 0}}],
    }
    with pytest.raises(PlanError):
        shared.run_with_hooks(TOKENS, hooks=lk.Plan.from_json(data))


# -- a plan that is run again


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of ops at every compilation."""
    counted: list[int] = []
    original = Compiler.compile

    def count(self: Any, ops: Any) -> Any:
        counted.append(len(ops))
        return original(self, ops)

    monkeypatch.setattr(Compiler, "compile", count)
    return counted


def test_a_plan_is_compiled_once_for_batches_that_are_alike(
    tiny: Callable[..., lk.HookedTransformer], compiled: list[int]
) -> None:
    one, two = tiny("llama"), tiny("llama", seed=1)
    plan = lk.Plan(
        [lk.Scale("blocks.1.hook_mlp_out", lk.Act("blocks.0.hook_mlp_out")), lk.Save("hook_logits", tokens=-1)]
    )
    for seed in range(3):
        tokens = ids(2, 5, seed=seed)
        found = one.run_with_hooks(tokens, hooks=plan).saved["hook_logits"]
        once = one.run_with_hooks(tokens, hooks=list(plan.ops)).saved["hook_logits"]
        assert torch.equal(found, once)
    assert compiled == [2] * 4, "the plan once, the list every time"
    steps = [
        lambda: one.run_with_hooks(ids(3, 5), hooks=plan),  # another batch
        lambda: one.run_with_hooks([[1, 2], [3, 4, 5, 6, 7]], hooks=plan),  # padding
        lambda: two.run_with_hooks(TOKENS, hooks=plan),  # another model
        lambda: one.generate(TOKENS, max_new_tokens=2, hooks=plan),  # steps
        lambda: one.generate(TOKENS, max_new_tokens=3, hooks=plan),  # more steps
        lambda: one.run_with_hooks(TOKENS, hooks=plan, past=one.prefill([1])),  # a past
        lambda: copy.deepcopy(one).double().run_with_hooks(TOKENS, hooks=plan),  # another dtype
    ]
    for step in steps:
        compiled.clear()
        step()
        assert compiled.count(2) == 1
    expected = [model.run_with_hooks(TOKENS, hooks=list(plan.ops)).logits for model in (one, two)]
    compiled.clear()
    for model, logits in zip((one, two), expected, strict=True):
        assert torch.equal(model.run_with_hooks(TOKENS, hooks=plan).logits, logits)
        model.prefill(TOKENS, hooks=plan)
    assert compiled == []


def test_a_plan_does_not_change_with_what_it_was_made_of(shared: lk.HookedTransformer) -> None:
    """Lists are its own; a generator is read once, however often the plan runs."""
    names, tokens = ["hook_embed"], [0]
    ops = [lk.Save(names, tokens=tokens), lk.Save((f"blocks.{layer}.hook_mlp_out" for layer in range(2)), tokens=0)]
    plan = lk.Plan(ops)
    digest, text = plan.digest(), repr(plan)
    names.append("hook_logits")
    tokens.append(9)
    ops.clear()
    for length in (3, 4):
        saved = shared.run_with_hooks(ids(1, length), hooks=plan).saved
        assert list(saved) == ["hook_embed", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    assert (plan.digest(), repr(plan)) == (digest, text)


def test_a_plan_of_functions_and_changed_parameters_is_not_frozen(shared: lk.HookedTransformer) -> None:
    vector = torch.nn.Parameter(torch.zeros(shared.cfg.d_model))
    factor = [1.0]
    plan = lk.Plan(
        [
            lk.Set("hook_embed", vector),
            ("hook_embed", lambda act, hook: act + factor[0]),
            lk.Save("hook_embed", tokens=0),
        ]
    )
    for value in (0.0, 2.0):
        factor[0] = value
        with torch.no_grad():
            vector.fill_(value)
            saved = shared.run_with_hooks(TOKENS, hooks=plan).saved["hook_embed"]
        assert torch.equal(saved, torch.full_like(saved, 2 * value))


def test_a_plan_forgets_what_it_does_not_use(tiny: Callable[..., lk.HookedTransformer]) -> None:
    """However many shapes a script runs; the model itself is not kept alive by it."""
    model = tiny("gpt2")
    plan = lk.Plan([lk.Save("hook_embed")])
    for length in range(1, 30):
        model.run_with_hooks(ids(1, length), hooks=plan)
    assert len(plan._programs) <= 10
    dead = weakref.ref(model)
    del model, plan
    gc.collect()
    assert dead() is None


def test_a_plan_of_a_plan_and_its_text(shared: lk.HookedTransformer) -> None:
    plan = lk.Plan([lk.Save("hook_embed", tokens=-1), ("hook_embed", print)])
    assert len(plan) == len(lk.Plan(plan)) == 2
    assert repr(plan) == "Plan([\n    Save('hook_embed', tokens=-1),\n    ('hook_embed', print),\n])"
    assert repr(lk.Plan()) == "Plan([])"
    assert (
        repr(lk.Set("a", torch.zeros(2, 3), heads=[0], dims=slice(1, None)))
        == "Set('a', tensor[2, 3], heads=[0], dims=slice(1, None))"
    )
    again = pickle.loads(
        pickle.dumps(
            lk.Plan([lk.Save(lk.Act("hook_embed") * 2, name="x"), lk.Set("hook_embed", 0.0, tokens=slice(0, 2))])
        )
    )
    assert torch.equal(shared.run_with_hooks(TOKENS, hooks=again).saved["x"], shared.embed.W_E[TOKENS] * 2)
    assert repr(copy.deepcopy(again)) == repr(again)
