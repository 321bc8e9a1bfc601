"""Interventions on a forward pass: what ops select, what they change, what they keep, and what they leave behind."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from ops_reference import Plain, selector_of
from parity_table import ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lenskit as lk
from lenskit.errors import NotSavedError

LENGTH = 7
TOKENS = ids(3, LENGTH)
BY_HEAD = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
PHASES = set(Phase) - {Phase.explain}  # which takes minutes where a model is among the arguments
KINDS = {"Set": lk.Set, "Add": lk.Add, "Scale": lk.Scale}


def nothing_attached(model: lk.HookedTransformer) -> bool:
    return all(point.attachments is None for point in model.hook_points.values())


@pytest.fixture(autouse=True)
def leaves_nothing_attached(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to the shared models, no hook outlives it."""
    yield
    for name in {"shared", "demo_gpt2", "demo_llama"} & set(request.fixturenames):
        assert nothing_attached(request.getfixturevalue(name))


def same(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the order of sums; infinities and nan in the same places."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    finite = theirs.detach()[theirs.detach().isfinite()].double()
    largest = float(finite.abs().max()) if len(finite) else 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(largest, 1e-3), equal_nan=True)


def padded(draw: st.DrawFn, *, at_most: int = 3) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts of any lengths, padded on the left, on the right, or anyhow."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=at_most))
    width = max(lengths)
    side = draw(st.sampled_from(["left", "right", "anyhow"]))
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        if side == "anyhow":
            mask[row, draw(st.permutations(range(width)))[:length]] = True
        else:
            mask[row, :length] = True
    mask = mask.flip(1) if side == "left" else mask
    return ids(len(lengths), width, seed=draw(st.integers(0, 99))), mask


def selector(draw: st.DrawFn, shortest: int, longest: int, *, repeats: bool) -> Any:
    """An int, slice or list that every row has something of; numbers may count from the end."""
    kind = draw(st.sampled_from(["int", "slice", "step", "list"]))
    index = st.integers(-shortest, shortest - 1)
    if kind == "int":
        return draw(index)
    if kind == "list":
        if repeats:
            return draw(st.lists(index, min_size=1, max_size=3))
        return draw(st.lists(index, min_size=1, max_size=3, unique_by=lambda i: i % shortest)) if shortest else None
    bound = st.none() | st.integers(-longest - 1, longest + 1)
    step = draw(st.integers(1, 3)) if kind == "step" else None
    made = slice(draw(bound), draw(bound), step)
    return made if len(range(longest)[made]) else slice(draw(st.none() | st.just(0)), None, step)


def selectors(
    draw: st.DrawFn, hook: lk.HookPoint, mask: Tensor, *, repeats: bool, prompts: bool = True
) -> dict[str, Any]:
    """Random selectors that a point has, and that a batch has the prompts and tokens for."""
    found: dict[str, Any] = {}
    if prompts and draw(st.booleans()):
        # Where rows are not padded on the left, several of them are in the way of where each has its padding.
        rows = selector(draw, len(mask), len(mask), repeats=repeats)
        found["prompts"] = rows if bool(mask[:, -1].all() and (mask.int().diff(dim=1) >= 0).all()) else 0
    lengths = mask.sum(1)[Plain(mask).rows(found)]
    for i in range(1, len(hook.axes)):
        name = selector_of(hook.axes, i)
        if name is None or draw(st.booleans()):
            continue
        if hook.axes[i] in ("pos", "query_pos", "key_pos"):
            # Where a short row has all that is asked for by number, numbers from either end are another token each.
            found[name] = selector(draw, int(lengths.min()), int(lengths.max()), repeats=repeats)
            if not repeats and isinstance(found[name], list) and len(set(lengths.tolist())) > 1:
                found[name] = sorted(index for index in found[name] if index >= 0) or [0]
        else:
            size = hook.sizes[hook.axes[i]]
            found[name] = selector(draw, size, size, repeats=repeats)
    return found


def excluded(name: str) -> bool:
    """Whether a point is left to other tests: an edit of `ln1` and the inputs by head exclude each other."""
    return name.startswith("blocks.1.ln1.") or (name.endswith(BY_HEAD) and not name.startswith("blocks.1."))


# -- what is read


@settings(max_examples=45, phases=PHASES)
@given(data=st.data())
@torch.no_grad()
def test_a_save_is_what_numpy_would_select(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    """An int drops its axis, a slice or list keeps it; tokens are the row's own; padding reads as zeros."""
    draw = data.draw
    tokens, mask = padded(draw)
    hook = shared.hook_points[draw(st.sampled_from(list(shared.hook_points)))]
    chosen = selectors(draw, hook, mask, repeats=True)
    result = shared.run_with_hooks(tokens, hooks=[lk.Save(hook.name, **chosen)], mask=mask)
    _, cache = shared.run_with_cache(tokens, hook.name, mask=mask)
    expected = Plain(mask).read(cache[hook.name], hook.axes, chosen)
    assert torch.equal(result.saved[hook.name], expected)


def test_every_point_has_the_selectors_of_its_axes(shared: lk.HookedTransformer) -> None:
    """One case a point: all selectors that it has at once, as ints and as lists."""
    names = [name for name in shared.hook_points if not excluded(name)]
    _, cache = shared.run_with_cache(TOKENS, names)
    plain = Plain(torch.ones_like(TOKENS, dtype=torch.bool))
    for of in (lambda i: i, lambda i: [i], lambda i: slice(i, None)):
        ops, expected = [], {}
        for name in names:
            hook = shared.hook_points[name]
            chosen = {kind: of(-1) for i in range(1, len(hook.axes)) if (kind := selector_of(hook.axes, i))}
            chosen |= {"prompts": of(1), **({"tokens": of(3)} if "tokens" in chosen else {})}
            ops.append(lk.Save(name, **chosen))
            expected[name] = plain.read(cache[name], hook.axes, chosen)
        saved = shared.run_with_hooks(TOKENS, hooks=ops).saved
        for name in names:
            same(saved[name], expected[name])
        assert saved["blocks.0.attn.hook_pattern"].dim() == (0 if of(1) == 1 else 4)


def test_rows_of_unequal_length_are_left_padded_with_zeros(shared: lk.HookedTransformer) -> None:
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    point = "blocks.1.hook_resid_post"
    result = shared.run_with_hooks(prompts, hooks=[lk.Save(point), lk.Save(point, tokens=0, name="first")])
    saved, first = result.saved[point], result.saved["first"]
    assert saved.shape == (3, 4, shared.cfg.d_model)
    assert result.mask.tolist() == [[False, True, True, True], [False, False, False, True], [True] * 4]
    assert not saved[~result.mask].any()
    for row, prompt in enumerate(prompts):
        alone = shared.run_with_hooks(prompt, hooks=[lk.Save(point)]).saved[point][0]
        same(saved[row][result.mask[row]], alone)
        same(first[row], alone[0])
    assert torch.equal(result.tokens[result.mask], torch.tensor([5, 6, 7, 8, 9, 10, 11, 12]))


MASKS = {
    "left": ["..xxx", "....x", ".xxxx"],
    "right": ["xxx..", "x....", "xxxx."],
    "full and right": ["xxxxx", "x....", "xxx.."],
    "both": ["..xx.", "x....", "xxxxx"],
    "holes": ["x.x.x", "xx..x", "xxxxx"],
    "all alike, left": ["..xxx", "..xxx", "..xxx"],
    "all alike, right": ["xxx..", "xxx..", "xxx.."],
    "one, left": ["..xxx"],
    "one, right": ["xxx.."],
    "one, holes": [".x.x."],
}


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_the_mask_says_where_saves_and_logits_are_a_rows_own(shared: lk.HookedTransformer, rows: list[str]) -> None:
    """However ids were padded: tokens, mask, saves and logits go together."""
    mask = torch.tensor([[sign == "x" for sign in row] for row in rows])
    tokens = ids(len(rows), 5).masked_fill(~mask, 0)
    points = ["hook_embed", "blocks.1.attn.hook_z", "hook_logits"]
    pattern = "blocks.1.attn.hook_pattern"
    result = shared.run_with_hooks(tokens, hooks=[lk.Save([*points, pattern])], mask=mask)
    assert torch.equal(result.tokens[result.mask], tokens[mask])
    same(result.saved["hook_embed"][result.mask], shared.embed.W_E[tokens[mask]])
    same(result.saved["hook_logits"][result.mask], result.logits[result.mask])
    for point in points:
        assert not result.saved[point][~result.mask].any()
    for row, own in enumerate(result.mask):
        alone = shared.run_with_hooks(result.tokens[row][own], hooks=[lk.Save([*points, pattern])])
        same(result.logits[row][own], alone.logits[0])
        for point in points:
            same(result.saved[point][row][own], alone.saved[point][0])
        same(result.saved[pattern][row][:, own][:, :, own], alone.saved[pattern][0])
        assert not result.saved[pattern][row][:, ~own].any()
        assert not result.saved[pattern][row][:, :, ~own].any()


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_a_tensor_for_all_tokens_lies_as_the_batch_does(shared: lk.HookedTransformer, rows: list[str]) -> None:
    """What is saved of one run goes into another one of the same batch as it is."""
    mask = torch.tensor([[sign == "x" for sign in row] for row in rows])
    tokens = ids(len(rows), 5)
    point, into = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre"
    value = shared.run_with_hooks(tokens, hooks=[lk.Save(point)], mask=mask).saved[point]
    by_hand = shared.run_with_hooks(tokens, hooks=[(into, lambda act, hook: act + value)], mask=mask)
    for again in (value, lk.Act(point)):
        found = shared.run_with_hooks(tokens, hooks=[lk.Add(into, again)], mask=mask)
        same(found.logits[found.mask], by_hand.logits[by_hand.mask])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_token_is_the_first_real_one(demo_gpt2: lk.HookedTransformer, side: str) -> None:
    texts = ["The Eiffel Tower is in the city of", "Rome"]
    demo_gpt2.tokenizer.padding_side = side
    encoding = demo_gpt2.tokenizer(texts, padding=True, return_tensors="pt")
    for prompts in (texts, encoding):
        result = demo_gpt2.run_with_hooks(
            prompts,
            hooks=[lk.Save("hook_embed", tokens=0, name="first"), lk.Save("hook_embed", tokens=-1, name="last")],
        )
        for row, text in enumerate(texts):
            own = demo_gpt2.to_tokens(text).tokens[0]
            assert torch.equal(result.saved["first"][row], demo_gpt2.embed.W_E[own[0]])
            assert torch.equal(result.saved["last"][row], demo_gpt2.embed.W_E[own[-1]])


def test_a_slice_ends_where_a_row_ends(shared: lk.HookedTransformer) -> None:
    """As in Python; what a shorter row lacks of it reads as zeros, and is nothing that could be edited."""
    prompts = [[5, 6, 7, 8], [9, 10]]
    saved = shared.run_with_hooks(prompts, hooks=[lk.Save("hook_embed", tokens=slice(1, None))]).saved["hook_embed"]
    assert torch.equal(saved[0], shared.embed.W_E[[6, 7, 8]])
    assert torch.equal(saved[1], torch.cat([torch.zeros(2, shared.cfg.d_model), shared.embed.W_E[[10]]]))
    saved = shared.run_with_hooks(prompts, hooks=[lk.Save("hook_embed", tokens=slice(2, None))]).saved["hook_embed"]
    assert not saved[1].any()
    edited = shared.run_with_hooks(prompts, hooks=[lk.Set("hook_embed", 7.0, tokens=slice(2, None))])
    same(edited.logits[1, -2:], shared([[9, 10]])[0])


def test_a_list_keeps_its_order_in_any_batch(shared: lk.HookedTransformer) -> None:
    """Also where it has as many entries as the longest row has tokens, and the rows selected are alike."""
    prompts = [[5, 6, 7], [8, 9, 10], [11]]
    for tokens in ([2, 1, 0], [0, 0, 0], [1, 2, 0]):
        hooks = [lk.Save("hook_embed", prompts=[0, 1], tokens=tokens)]
        saved = shared.run_with_hooks(prompts, hooks=hooks).saved["hook_embed"]
        assert torch.equal(saved, shared.embed.W_E[torch.tensor(prompts[:2])[:, tokens]])
    value = torch.randn(2, 3, shared.cfg.d_model, generator=torch.Generator().manual_seed(0))
    hooks = [lk.Set("hook_embed", value, prompts=[0, 1], tokens=[2, 1, 0]), lk.Save("hook_embed")]
    assert torch.equal(shared.run_with_hooks(prompts, hooks=hooks).saved["hook_embed"][:2], value.flip(1))
    saved = shared.run_with_hooks([[5, 6, 7], [8]], hooks=[lk.Save("hook_embed", tokens=[-1, -1, -1])]).saved
    assert torch.equal(saved["hook_embed"], shared.embed.W_E[torch.tensor([[7, 7, 7], [8, 8, 8]])])


def test_numbers_from_numpy_and_torch_select_as_pythons(shared: lk.HookedTransformer) -> None:
    for one in (np.int64(2), torch.tensor(2), np.array(2)):
        saved = shared.run_with_hooks(TOKENS, hooks=[lk.Save("hook_embed", tokens=one)]).saved["hook_embed"]
        assert torch.equal(saved, shared.embed.W_E[TOKENS[:, 2]])
    for several in (np.array([2, 0]), torch.tensor([2, 0]), (2, 0), range(2, -1, -2)):
        saved = shared.run_with_hooks(TOKENS, hooks=[lk.Save("hook_embed", tokens=several)]).saved["hook_embed"]
        assert torch.equal(saved, shared.embed.W_E[TOKENS[:, [2, 0]]])


# -- keys of what was saved


def test_sites_of_many_points(shared: lk.HookedTransformer) -> None:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    sites = [
        "blocks.*.hook_resid_post",
        names,
        lambda name: name.endswith("resid_post"),
        [names[0], "blocks.[12].hook_resid_post"],
    ]
    _, cache = shared.run_with_cache(TOKENS, names)
    for site in sites:
        saved = shared.run_with_hooks(TOKENS, hooks=[lk.Save(site, tokens=-1)]).saved
        assert list(saved) == names
        named = shared.run_with_hooks(TOKENS, hooks=[lk.Save(site, tokens=-1, name="all")]).saved
        assert list(named) == ["all"]
        for name in names:
            same(saved[name], cache[name][:, -1])
            assert torch.equal(named["all"][name], saved[name])
    edited = shared.run_with_hooks(TOKENS, hooks=[lk.Add(sites[0], 1.0)]).logits
    for site in sites[1:]:
        assert torch.equal(shared.run_with_hooks(TOKENS, hooks=[lk.Add(site, 1.0)]).logits, edited)


def test_negative_layers(shared: lk.HookedTransformer) -> None:
    saved = shared.run_with_hooks(
        TOKENS, hooks=[lk.Save("blocks.-1.hook_resid_post"), lk.Save("blocks.-3.*mlp_out")]
    ).saved
    assert list(saved) == ["blocks.2.hook_resid_post", "blocks.0.hook_mlp_out"]
    assert saved["blocks.-1.hook_resid_post"] is saved["blocks.2.hook_resid_post"]
    assert len(saved) == 2
    assert saved.get("blocks.-1.hook_resid_post") is saved["blocks.2.hook_resid_post"]


def test_what_can_be_looked_up_is_in(shared: lk.HookedTransformer) -> None:
    saved = shared.run_with_hooks(TOKENS, hooks=[lk.Save("blocks.-1.hook_resid_post")]).saved
    assert "blocks.2.hook_resid_post" in saved
    assert "blocks.-1.hook_resid_post" in saved
    assert "blocks.0.hook_resid_post" not in saved
    assert "blocks.-2.hook_resid_post" not in saved


def test_what_was_not_saved_says_so(shared: lk.HookedTransformer) -> None:
    saved = shared.run_with_hooks(TOKENS, hooks=[lk.Save("hook_embed")]).saved
    with pytest.raises(NotSavedError, match="nothing was saved as 'hook_logits'") as told:
        saved["hook_logits"]
    assert "hook_embed" in told.value.expected
    assert "lk.Save('hook_logits')" in told.value.fix
    assert repr(saved) == f"Saved(hook_embed: [3, 7, {shared.cfg.d_model}])"


# -- random lists of ops


@dataclass
class Script:
    """A list of ops, and the same as Python functions.

    data: whether all of it can be written to a file. found: what the functions saw where the ops save.
    """

    ops: list[Any] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    data: bool = True
    found: dict[str, Tensor] = field(default_factory=dict)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "Set": lambda part, value: value if isinstance(value, Tensor) else torch.full_like(part, value),
    "Add": lambda part, value: part + value,
    "Scale": lambda part, value: part * value,
}
# The same code computes on tensors and builds expressions.
EXPRESSIONS: list[Callable[[Any], Any]] = [
    lambda a: a,
    lambda a: a * 0.5 + 0.25,
    lambda a: -a,
    lambda a: torch.where(a > 0, a, 0.1),
    lambda a: (a > 0) * a - a.sigmoid(),
    lambda a: a.clamp(-1, 1).masked_fill(a < -0.5, 0.0),
    lambda a: torch.nn.functional.normalize(a.flatten(), dim=0).sum() + torch.tanh(a),
    lambda a: a.exp().log1p() / 2,
]


def value_of(draw: st.DrawFn, shape: tuple[int, ...]) -> float | Tensor:
    """A number, or a tensor that broadcasts to the shape."""
    if draw(st.booleans()):
        return draw(st.sampled_from([0.0, 1.5, -0.25, 2]))
    cut = shape[draw(st.integers(0, len(shape))) :]
    cut = tuple(1 if draw(st.integers(0, 3)) == 0 else size for size in cut)
    return torch.randn(cut, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


def empty_of(hook: lk.HookPoint, mask: Tensor) -> Tensor:
    """Zeros in the shape of a point's activation."""
    rows, width = mask.shape
    return torch.zeros(hook.shape(batch=rows, pos=width, query_pos=width, key_pos=width))


def add_edit(draw: st.DrawFn, model: lk.HookedTransformer, plain: Plain, script: Script, names: list[str]) -> None:
    """One more `Set`, `Add` or `Scale`, of a number, a tensor or an expression."""
    hook = model.hook_points[draw(st.sampled_from(names))]
    chosen = selectors(draw, hook, plain.mask, repeats=False)
    kind = draw(st.sampled_from(sorted(KINDS)))
    shape = plain.read(empty_of(hook, plain.mask), hook.axes, chosen).shape
    alike = [
        name for name in names[: names.index(hook.name) + 1]
        if model.hook_points[name].axes == hook.axes and model.hook_points[name].sizes == hook.sizes
    ]  # fmt: skip
    if draw(st.booleans()):
        value: Any = value_of(draw, tuple(shape))
        script.ops.append(KINDS[kind](hook.name, value, **chosen))

        def edit(act: Tensor, hook: lk.HookPoint) -> Tensor:
            return plain.edit(act, hook.axes, chosen, CHANGES[kind], value)

    else:
        source = draw(st.sampled_from(alike))
        compute = draw(st.sampled_from(EXPRESSIONS))
        read: list[Tensor] = []
        script.ops.append(KINDS[kind](hook.name, compute(lk.Act(source, **chosen)), **chosen))

        def keep(act: Tensor, hook: lk.HookPoint) -> None:
            read[:] = [plain.read(act, hook.axes, chosen)]

        def edit(act: Tensor, hook: lk.HookPoint) -> Tensor:
            return plain.edit(act, hook.axes, chosen, CHANGES[kind], compute(read[0]))

        script.functions.append((source, keep))
    script.functions.append((hook.name, edit))


def add_save(draw: st.DrawFn, model: lk.HookedTransformer, plain: Plain, script: Script, names: list[str]) -> None:
    """One more `Save`, of an activation or of an expression."""
    hook = model.hook_points[draw(st.sampled_from(names))]
    chosen = selectors(draw, hook, plain.mask, repeats=True)
    key = f"saved {len(script.ops)}"
    compute = draw(st.none() | st.sampled_from(EXPRESSIONS))
    if compute is None:
        script.ops.append(lk.Save(hook.name, **chosen, name=key))
    else:
        script.ops.append(lk.Save(compute(lk.Act(hook.name, **chosen)), name=key))

    def keep(act: Tensor, hook: lk.HookPoint) -> None:
        part = plain.read(act, hook.axes, chosen)
        script.found[key] = part.clone() if compute is None else compute(part)

    script.functions.append((hook.name, keep))


def scripts(draw: st.DrawFn, model: lk.HookedTransformer, plain: Plain, often: Sequence[str] = ()) -> Script:
    """Up to six ops, on few points, so that several meet on one."""
    everything = [name for name in model.hook_points if not excluded(name)]
    few = draw(st.lists(st.sampled_from([*everything, *often * 10]), min_size=1, max_size=4, unique=True))
    names = [name for name in everything if name in few]
    script = Script()
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["edit", "edit", "save", "save", "function"]))
        if kind == "edit":
            add_edit(draw, model, plain, script, names)
        elif kind == "save":
            add_save(draw, model, plain, script, names)
        else:
            factor = draw(st.sampled_from([0.5, 2.0]))
            pair = (draw(st.sampled_from(names)), lambda act, hook, factor=factor: act.mul_(factor))
            script.ops.append(pair)
            script.functions.append(pair)
            script.data = False
    return script


@settings(max_examples=45, phases=PHASES)
@given(data=st.data())
@torch.no_grad()
def test_ops_are_the_same_written_as_functions_and_read_from_a_file(
    shared: lk.HookedTransformer, data: st.DataObject
) -> None:
    """In list order, whatever is mixed: a save after an edit on its point sees it, one before does not."""
    tokens, mask = padded(data.draw)
    script = scripts(data.draw, shared, Plain(mask))
    result = shared.run_with_hooks(tokens, hooks=script.ops, mask=mask)
    by_functions = shared.run_with_hooks(tokens, hooks=script.functions, mask=mask)
    same(result.logits[mask], by_functions.logits[mask])
    assert set(result.saved) == set(script.found)
    for key, expected in script.found.items():
        same(result.saved[key], expected)
    if script.data:
        plan = lk.Plan(script.ops)
        read = lk.Plan.from_json(json.loads(json.dumps(plan.to_json(shared))), plan.tensors())
        again = shared.run_with_hooks(tokens, hooks=read, mask=mask)
        assert torch.equal(again.logits[mask].nan_to_num(), result.logits[mask].nan_to_num())
        for key in script.found:
            assert torch.equal(again.saved[key].nan_to_num(), result.saved[key].nan_to_num())


@settings(max_examples=35, phases=PHASES)
@given(data=st.data())
@torch.no_grad()
def test_a_batch_is_each_prompt_alone(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    """What ops do to a row, and what they save of it, does not depend on the rows beside it, nor on the padding."""
    draw = data.draw
    tokens, mask = padded(draw)
    names = [name for name in shared.hook_points if not excluded(name)]
    ops: list[list[Any]] = [[] for _ in mask]  # those that each row gets alone
    together: list[Any] = []
    for _ in range(draw(st.integers(1, 4))):
        hook = shared.hook_points[draw(st.sampled_from(names))]
        rows = draw(st.lists(st.integers(0, len(mask) - 1), min_size=1, unique=True))
        chosen = selectors(draw, hook, mask[rows], repeats=False, prompts=False)
        kind = draw(st.sampled_from(sorted(KINDS)))
        if draw(st.booleans()):
            value: Any = draw(st.sampled_from([0.0, 1.5, -0.25]))
        else:
            value = torch.randn(1, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        together.append(KINDS[kind](hook.name, value, prompts=rows, **chosen))
        for row in rows:
            if 0 not in Plain(mask[[row]]).read(empty_of(hook, mask[[row]]), hook.axes, chosen).shape:
                ops[row].append(KINDS[kind](hook.name, value, **chosen))  # alone, it would select nothing
    saved = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    result = shared.run_with_hooks(tokens, hooks=[*together, lk.Save(saved)], mask=mask)
    for row, own in enumerate(mask):
        alone = shared.run_with_hooks(tokens[row][own], hooks=[*ops[row], lk.Save(saved)])
        same(result.logits[row][own], alone.logits[0])
        for name in saved:
            axes, expected = shared.hook_points[name].axes, alone.saved[name][0]
            same(Plain(mask).of_row(result.saved[name], axes, row, {"prompts": row}), expected)
            part = Plain(mask).of_row(result.saved[name], axes, row, {})
            assert torch.equal(part.nan_to_num(), result.saved[name][row].nan_to_num()), "padding reads as zeros"


@settings(max_examples=20, phases=PHASES)
@given(data=st.data())
@torch.no_grad()
def test_after_a_past_it_is_the_last_part_of_the_whole(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    """Edits of the new tokens alone: what they do, and what is read, is what it would be without the cut."""
    draw = data.draw
    rows = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
    prompts = [ids(1, old + new, seed=draw(st.integers(0, 99)))[0].tolist() for old, new in rows]
    past = shared.prefill([prompt[:old] for prompt, (old, _) in zip(prompts, rows, strict=True)])
    names = [
        name for name in shared.hook_points if not excluded(name) and "key_pos" not in shared.hook_points[name].axes
    ]
    edited, seen = (shared.hook_points[draw(st.sampled_from(names))] for _ in range(2))
    index = draw(st.integers(-min(new for _, new in rows), -1))
    op = {"tokens": index, "dims": draw(st.sampled_from([slice(None), slice(0, 1)]))}
    hooks = [
        lk.Add(edited.name, 0.5, **op),
        lk.Save(seen.name, tokens=-1),
        lk.Save("blocks.0.attn.hook_pattern", tokens=-1, dims=0, name="first key"),
        lk.Save("blocks.2.attn.hook_pattern", tokens=-1, dims=[-1], name="own key"),
    ]
    whole = shared.run_with_hooks(prompts, hooks=hooks)
    found = shared.run_with_hooks(
        [prompt[old:] for prompt, (old, _) in zip(prompts, rows, strict=True)], hooks=hooks, past=past
    )
    for row, (_, new) in enumerate(rows):
        same(found.logits[row, -new:], whole.logits[row, -new:])
    for key in whole.saved:
        same(found.saved[key], whole.saved[key])


def test_a_past_may_be_started_from_any_number_of_times(shared: lk.HookedTransformer) -> None:
    past = shared.prefill([5, 6, 7], hooks=[lk.Scale("blocks.0.attn.hook_v", 0.5), lk.Save("hook_embed", tokens=-1)])
    assert torch.equal(past.saved["hook_embed"], shared.embed.W_E[[7]])
    plain = shared.run_with_hooks([[8, 9], [10]], past=past)
    edits = [
        lk.Set("*.attn.hook_v", torch.nan), lk.Set("*.attn.hook_pattern", 0.0), lk.Add("*.attn.hook_attn_scores", 3.0),
        lk.Scale("*.hook_k", 9.0, tokens=-1), ("blocks.*.attn.hook_k", lambda act, hook: act.zero_()),
    ]  # fmt: skip
    for op in edits:
        shared.run_with_hooks([[8, 9], [10]], hooks=[op], past=past)
        with suppress(ZeroDivisionError):
            shared.run_with_hooks([[8, 9], [10]], hooks=[op, ("hook_logits", lambda act, hook: 1 / 0)], past=past)
        assert torch.equal(shared.run_with_hooks([[8, 9], [10]], past=past).logits, plain.logits)


# -- order, and what a save holds


def test_saves_on_one_point_see_what_came_before_them_in_the_list(shared: lk.HookedTransformer) -> None:
    point = "blocks.1.hook_mlp_out"
    saved = shared.run_with_hooks(
        TOKENS,
        hooks=[
            lk.Save(point, name="first"),
            lk.Add(point, 1.0),
            lk.Save(lk.Act(point) * 2, name="expression"),
            lk.Save(point, name="second"),
            (point, lambda act, hook: act.neg_()),
            lk.Save(point, name="third"),
            lk.Set(point, lk.Act(point, tokens=0, dims=0)[:, None, None] * 3),
            lk.Save(point, name="fourth"),
        ],
    ).saved
    _, cache = shared.run_with_cache(TOKENS, point)
    same(saved["first"], cache[point])
    assert torch.equal(saved["second"], saved["first"] + 1)
    assert torch.equal(saved["expression"], saved["second"] * 2)
    assert torch.equal(saved["third"], -saved["second"])
    assert torch.equal(saved["fourth"], (saved["third"][:, :1, :1] * 3).expand_as(saved["third"]))


def test_noise_in_the_last_layer_shows_after_it_and_not_before(demo_gpt2: lk.HookedTransformer) -> None:
    last = demo_gpt2.cfg.n_layers - 1
    prompt = "The Eiffel Tower is in the city of"
    hooks = [
        lk.Save("blocks.-1.hook_resid_pre"), lk.Save("blocks.-1.hook_mlp_out", name="before"),
        lk.Add("blocks.-1.hook_mlp_out", lk.randn_like(lk.Act("blocks.-1.hook_mlp_out"), seed=0)),
        lk.Save("blocks.-1.hook_mlp_out", name="after"), lk.Save("blocks.-1.hook_resid_post"),
    ]  # fmt: skip
    result = demo_gpt2.run_with_hooks(prompt, hooks=hooks)
    logits, cache = demo_gpt2.run_with_cache(prompt)
    same(result.saved[f"blocks.{last}.hook_resid_pre"], cache["resid_pre", last])
    same(result.saved["before"], cache["mlp_out", last])
    noise = torch.randn(result.saved["before"].shape, generator=torch.Generator().manual_seed(0))
    same(result.saved["after"], cache["mlp_out", last] + noise)
    same(result.saved["blocks.-1.hook_resid_post"], cache["resid_post", last] + noise)
    assert (result.logits - logits).abs().max() > 0.1


def test_zeroing_one_heads_values_changes_the_loss(demo_gpt2: lk.HookedTransformer) -> None:
    tokens = demo_gpt2.to_tokens("The Eiffel Tower is in the city of Paris").tokens

    def loss(logits: Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()

    head = demo_gpt2.cfg.n_heads - 1
    ablated = demo_gpt2.run_with_hooks(tokens, hooks=[lk.Set("blocks.0.attn.hook_v", 0.0, heads=head)]).logits

    def by_hand(act: Tensor, hook: lk.HookPoint) -> None:
        act[:, :, head] = 0

    same(ablated, demo_gpt2.run_with_hooks(tokens, hooks=[("blocks.0.attn.hook_v", by_hand)]).logits)
    assert abs(loss(ablated) - loss(demo_gpt2(tokens))) > 1e-3


def test_a_save_is_a_snapshot(shared: lk.HookedTransformer) -> None:
    """Nothing that is done to logits, to other saves, to a function's activation or to a value changes it."""
    value = torch.full((shared.cfg.d_model,), 2.0)
    given = torch.ones(3, LENGTH, shared.cfg.d_model)
    hooks = [
        lk.Set("blocks.0.hook_mlp_out", value),
        lk.Save("blocks.0.hook_mlp_out"),
        lk.Save("blocks.0.hook_mlp_out", tokens=slice(0, 2), name="part"),
        lk.Save("hook_logits"),
        lk.Save(lk.Act("hook_logits"), name="all of it"),
        lk.Save(lk.Act("hook_logits")[:, 0], name="view"),
        ("blocks.0.hook_mlp_out", lambda act, hook: act.zero_()),
        lk.Set("blocks.1.hook_mlp_out", given),
        lk.Save("blocks.1.hook_mlp_out"),
        ("blocks.1.hook_mlp_out", lambda act, hook: act.zero_()),
    ]
    with torch.no_grad():
        result = shared.run_with_hooks(TOKENS, hooks=hooks)
        before = {key: tensor.clone() for key, tensor in result.saved.items()}
        assert torch.equal(value, torch.full_like(value, 2))
        assert torch.equal(given, torch.ones_like(given))
        result.logits.zero_()
        value.zero_()
        given.zero_()
        for key in before:
            assert torch.equal(result.saved[key], before[key]), key
            result.saved[key].fill_(9)
            before[key].fill_(9)
    pointers = [tensor.untyped_storage().data_ptr() for tensor in (result.logits, value, given, *result.saved.values())]
    assert len(set(pointers)) == len(pointers)
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in result.saved.items()}
    assert sizes["view"] == result.saved["view"].nbytes, "a small save keeps no large activation alive"


def test_what_an_expression_read_is_not_changed_by_a_later_function(shared: lk.HookedTransformer) -> None:
    """A function may keep what it returned, and write into it at another point."""
    kept = torch.randn(3, LENGTH, shared.cfg.d_model, generator=torch.Generator().manual_seed(0))
    original = kept.clone()
    act = lk.Act("blocks.0.hook_mlp_out")
    saved = shared.run_with_hooks(
        TOKENS,
        hooks=[
            ("blocks.0.hook_mlp_out", lambda act, hook: kept),
            lk.Save("blocks.0.hook_mlp_out"),
            lk.Save(act[...], name="expression"),
            ("blocks.0.hook_resid_post", lambda act, hook: (kept.zero_(), act)[1]),
            lk.Set("blocks.1.hook_mlp_out", act),
            lk.Save("blocks.1.hook_mlp_out"),
        ],
    ).saved
    assert torch.equal(saved["blocks.0.hook_mlp_out"], original)
    assert torch.equal(saved["expression"], original)
    assert torch.equal(saved["blocks.1.hook_mlp_out"], original)


def test_activations_of_a_cache_do_not_share_memory_through_an_edit(shared: lk.HookedTransformer) -> None:
    """Where an expression is an activation itself, the two points still have a tensor each."""
    _, cache = shared.run_with_cache(
        TOKENS, ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"],
        hooks=[lk.Set("blocks.1.hook_mlp_out", lk.Act("blocks.0.hook_mlp_out"))],
    )  # fmt: skip
    before = cache["mlp_out", 1].clone()
    assert torch.equal(cache["mlp_out", 0], before)
    cache["mlp_out", 0].zero_()
    assert torch.equal(cache["mlp_out", 1], before)


def test_a_value_that_is_changed_before_the_run_is_the_new_one_or_the_old_one_everywhere(
    shared: lk.HookedTransformer,
) -> None:
    """A plan that was run does not remember another value than one that was not."""
    value = torch.zeros(shared.cfg.d_model)
    for chosen in ({}, {"tokens": 0}, {"tokens": [0, 2]}, {"prompts": 1}):
        value.zero_()
        used, unused = (lk.Plan([lk.Set("hook_embed", value, **chosen), lk.Save("hook_embed")]) for _ in range(2))
        shared.run_with_hooks(TOKENS, hooks=used)
        value.fill_(3)
        first, second = (shared.run_with_hooks(TOKENS, hooks=plan).saved["hook_embed"] for plan in (used, unused))
        assert torch.equal(first, second)


# -- expressions


def test_expressions_of_the_models_own_modules(shared: lk.HookedTransformer) -> None:
    """The logit lens: hooks that are attached do not run in it."""
    middle = lk.Act("blocks.0.hook_resid_post", tokens=-1)
    seen: list[str] = []
    result = shared.run_with_hooks(
        TOKENS,
        hooks=[
            lk.Save(shared.unembed(shared.ln_final(middle)), name="lens"),
            lk.Save(shared.unembed(shared.ln_final(middle)).softmax(-1).max(-1).values, name="confidence"),
            ("ln_final.*", lambda act, hook: seen.append(hook.name)),
        ],
    )
    _, cache = shared.run_with_cache(TOKENS, "blocks.0.hook_resid_post")
    by_hand = shared.unembed(shared.ln_final(cache["resid_post", 0][:, -1]))
    same(result.saved["lens"], by_hand)
    same(result.saved["confidence"], by_hand.softmax(-1).amax(-1))
    assert seen == ["ln_final.hook_scale", "ln_final.hook_normalized", "ln_final.hook_out"]


def test_an_expression_of_several_activations(shared: lk.HookedTransformer) -> None:
    """Of other prompts and layers, at a point after all of them."""
    clean, corrupt = lk.Act("blocks.0.hook_mlp_out", prompts=0), lk.Act("blocks.1.hook_attn_out", prompts=1)
    mask = (clean - corrupt).abs() > 0.1
    value = torch.where(mask, clean * 2 + 1, corrupt)
    result = shared.run_with_hooks(
        TOKENS, hooks=[lk.Set("blocks.1.hook_mlp_out", value, prompts=2), lk.Save(value.mean(0), name="mean")]
    )
    _, cache = shared.run_with_cache(TOKENS)
    a, b = cache["mlp_out", 0][0], cache["attn_out", 1][1]
    expected = torch.where((a - b).abs() > 0.1, a * 2 + 1, b)

    def by_hand(act: Tensor, hook: lk.HookPoint) -> None:
        act[2] = expected

    same(result.saved["mean"], expected.mean(0))
    same(result.logits, shared.run_with_hooks(TOKENS, hooks=[("blocks.1.hook_mlp_out", by_hand)]).logits)


def test_constants_and_random_numbers_are_expressions_too(shared: lk.HookedTransformer) -> None:
    noise = lk.randn(shared.cfg.d_model, seed=3)
    result = shared.run_with_hooks(
        TOKENS, hooks=[lk.Set("hook_embed", noise), lk.Save(noise * 2, name="twice"), lk.Save("hook_embed")]
    )
    expected = torch.randn(shared.cfg.d_model, generator=torch.Generator().manual_seed(3))
    assert torch.equal(result.saved["twice"], expected * 2)
    assert torch.equal(result.saved["hook_embed"], expected.expand(3, LENGTH, -1))


def test_one_expression_in_several_ops(shared: lk.HookedTransformer) -> None:
    """It is computed for each of them, at each one's place in the list."""
    act = lk.Act("hook_embed", tokens=0)
    twice = act * 2
    saved = shared.run_with_hooks(
        TOKENS,
        hooks=[
            lk.Save(twice, name="before"), lk.Add("hook_embed", twice, tokens=0), lk.Save(twice, name="after"),
            lk.Set("blocks.1.hook_resid_pre", twice, tokens=1), lk.Save("blocks.1.hook_resid_pre", tokens=1),
        ],
    ).saved  # fmt: skip
    embedded = shared.embed.W_E[TOKENS[:, 0]]
    same(saved["before"], embedded * 2)
    same(saved["after"], embedded * 6)
    same(saved["blocks.1.hook_resid_pre"], embedded * 6)


# -- gradients


def gradients_of(model: lk.HookedTransformer, hooks: list[Any], tensors: list[Tensor]) -> list[Tensor]:
    result = model.run_with_hooks([[5, 6, 7], [8, 9]], hooks=hooks)
    loss = result.logits[result.mask].logsumexp(-1).square().mean()
    loss = loss + sum((tensor.square().mean() for tensor in result.saved.values()), torch.zeros(()))
    parameters = [model.embed.weight, model.blocks[0].mlp.w_out.weight]
    return list(torch.autograd.grad(loss, [*tensors, *parameters], allow_unused=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "chosen",
    [{}, {"tokens": -1}, {"tokens": slice(1, None)}, {"tokens": [0, -1], "dims": [3, 1]}, {"prompts": 1}],
    ids=str,
)
def test_gradients_flow_into_values_and_through_edits(
    shared: lk.HookedTransformer, kind: str, chosen: dict[str, Any]
) -> None:
    point = "blocks.1.hook_resid_mid"
    plain = Plain(torch.tensor([[True, True, True], [False, True, True]]))
    width = len(chosen["dims"]) if "dims" in chosen else shared.cfg.d_model
    one, two = (torch.randn(width, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))

    def by_hand(act: Tensor, hook: lk.HookPoint) -> Tensor:
        return plain.edit(act, hook.axes, chosen, CHANGES[kind], two)

    found = gradients_of(shared, [KINDS[kind](point, one, **chosen)], [one])
    expected = gradients_of(shared, [(point, by_hand)], [two])
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs)


def test_gradients_flow_through_saves_and_expressions(shared: lk.HookedTransformer) -> None:
    source, point = "blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre"
    scale, again = (torch.tensor(0.7, requires_grad=True) for _ in range(2))
    read: list[Tensor] = []
    found = gradients_of(
        shared,
        [
            lk.Add(point, lk.Act(source, tokens=-1) * scale, tokens=-1), lk.Save(source, tokens=-1),
            lk.Save((lk.Act(point, dims=0) * scale).sum(-1), name="sum"),
        ],
        [scale],
    )  # fmt: skip

    def add(act: Tensor, hook: lk.HookPoint) -> Tensor:
        return torch.cat([act[:, :-1], act[:, -1:] + read[0][:, -1:] * again], 1)

    def keep(act: Tensor, hook: lk.HookPoint) -> None:
        read.append(act)

    result = shared.run_with_hooks([[5, 6, 7], [8, 9]], hooks=[(source, keep), (point, add), (point, keep)])
    mask = result.mask
    loss = result.logits[mask].logsumexp(-1).square().mean() + read[0][:, -1].square().mean()
    loss = loss + ((read[1][..., 0] * mask) * again).sum(-1).square().mean()
    weights = [shared.embed.weight, shared.blocks[0].mlp.w_out.weight]
    for ours, theirs in zip(found, torch.autograd.grad(loss, [again, *weights]), strict=True):
        same(ours, theirs)


def test_a_steering_vector_is_trained(tiny: Callable[..., lk.HookedTransformer]) -> None:
    """A parameter, in a plan that is run again and again while an optimizer writes into it."""
    model = tiny("gpt2").requires_grad_(False)
    vector = torch.nn.Parameter(torch.zeros(24))
    plan = lk.Plan([lk.Add("blocks.1.hook_resid_post", vector), lk.Save("hook_logits", tokens=-1)])
    optimizer = torch.optim.Adam([vector], lr=0.1)
    losses = []
    for _ in range(20):
        logits = model.run_with_hooks([1, 2, 3], hooks=plan).saved["hook_logits"]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([17]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_a_parameter_gets_gradients_wherever_the_op_was_made(shared: lk.HookedTransformer) -> None:
    vector = torch.nn.Parameter(torch.zeros(shared.cfg.d_model))
    with torch.no_grad():
        op = lk.Add("hook_embed", vector)
    shared.run_with_hooks(TOKENS, hooks=[op]).logits.sum().backward()
    shared.zero_grad()
    assert vector.grad is not None


def test_without_grad_nothing_is_recorded(shared: lk.HookedTransformer) -> None:
    vector = torch.zeros(shared.cfg.d_model, requires_grad=True)
    hooks = [lk.Add("hook_embed", vector), lk.Save("hook_embed"), lk.Save(lk.Act("hook_embed") * 2, name="twice")]
    with torch.no_grad():
        result = shared.run_with_hooks(TOKENS, hooks=hooks)
    assert not any(tensor.requires_grad for tensor in (result.logits, *result.saved.values()))
    with torch.inference_mode():
        shared.run_with_hooks(TOKENS, hooks=hooks)


# -- nan and infinities


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_it_was_put(shared: lk.HookedTransformer, number: float) -> None:
    """In its prompt, and behind the last attention in its token; whatever is padded beside it."""
    prompts = [[5, 6, 7, 8], [9], [10, 11, 12]]
    plain = shared.run_with_hooks(prompts)
    for kind in KINDS.values():
        for point in (
            "hook_embed",
            "blocks.1.attn.hook_v",
            "blocks.1.hook_resid_mid",
            "blocks.1.attn.hook_attn_scores",
        ):
            for rows in (1, [1], slice(1, 2)):
                broken = shared.run_with_hooks(prompts, hooks=[kind(point, number, prompts=rows)])
                same(broken.logits[0], plain.logits[0])
                same(broken.logits[2, -3:], plain.logits[2, -3:])
            broken = shared.run_with_hooks(prompts, hooks=[kind(point, number, prompts=[2, 0], tokens=0)])
            same(broken.logits[1, -1], plain.logits[1, -1])
        for point in ("blocks.2.hook_mlp_out", "hook_logits", "ln_final.hook_normalized"):
            broken = shared.run_with_hooks(prompts, hooks=[kind(point, number, tokens=-1)])
            assert not broken.logits[:, -1].isfinite().all(-1).any()
            same(broken.logits[0, :-1], plain.logits[0, :-1])
            same(broken.logits[2, -3:-1], plain.logits[2, -3:-1])


def test_nothing_of_a_value_reaches_the_padding(shared: lk.HookedTransformer) -> None:
    """A tensor for all rows has entries where a shorter row has none; and what is saved there is zeros."""
    prompts = [[5, 6, 7, 8], [9, 10]]
    value = torch.randn(2, 4, shared.cfg.d_model, generator=torch.Generator().manual_seed(0))
    spoiled = value.clone()
    spoiled[1, :2] = torch.nan
    for kind in KINDS.values():
        hooks = [kind("blocks.1.hook_resid_pre", value), lk.Save("blocks.1.hook_resid_pre")]
        clean = shared.run_with_hooks(prompts, hooks=hooks)
        hooks[0] = kind("blocks.1.hook_resid_pre", spoiled)
        found = shared.run_with_hooks(prompts, hooks=hooks)
        assert torch.equal(found.logits[found.mask], clean.logits[found.mask])
        assert torch.equal(found.saved["blocks.1.hook_resid_pre"], clean.saved["blocks.1.hook_resid_pre"])
        assert not found.saved["blocks.1.hook_resid_pre"][1, :2].any()
    everything = lk.Save([name for name in shared.hook_points if not excluded(name)])
    ops = [lk.Set("hook_embed", torch.nan), everything]
    saved = shared.run_with_hooks(prompts, hooks=ops).saved
    for name, tensor in saved.items():
        for i, axis in enumerate(shared.hook_points[name].axes):
            if axis in ("pos", "query_pos", "key_pos"):
                assert not tensor[1].narrow(i - 1, 0, 2).any(), name


def test_gradients_are_finite_beside_padding(shared: lk.HookedTransformer) -> None:
    prompts = [[5, 6, 7, 8], [9, 10]]
    value = torch.randn(2, 4, shared.cfg.d_model, generator=torch.Generator().manual_seed(0))
    value[1, :2] = torch.nan
    value.requires_grad_()
    result = shared.run_with_hooks(prompts, hooks=[lk.Set("blocks.1.hook_resid_pre", value)])
    result.logits[result.mask].square().mean().backward()
    shared.zero_grad()
    assert value.grad.isfinite().all()
    assert not value.grad[1, :2].any()
    assert value.grad[0].any()


# -- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(shared: lk.HookedTransformer, dtype: torch.dtype) -> None:
    """Saves have the activation's own dtype, and edits are what functions do."""
    model = deepcopy(shared).to(dtype)
    width = model.cfg.d_model
    value = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(dtype)
    factor = torch.rand(1, generator=torch.Generator().manual_seed(1))
    plain = Plain(torch.tensor([[True] * 3, [False, True, True]]))
    source = "blocks.0.hook_resid_mid"
    ops = [
        (lk.Set, "blocks.1.hook_resid_pre", value, {"tokens": 0}),
        (lk.Add, "blocks.1.attn.hook_z", 0.25, {"heads": [1, 0]}),
        (lk.Scale, "blocks.1.hook_mlp_out", value, {}),
        (lk.Scale, "ln_final.hook_scale", factor, {"prompts": 0}),
        (lk.Set, "blocks.2.hook_attn_out", 0.0, {"tokens": slice(1, None)}),
        (lk.Scale, "blocks.2.attn.hook_pattern", 0.5, {"dims": 0}),
    ]
    functions = [
        (at, lambda act, hook, kind=kind, chosen=chosen, value=value: plain.edit(
            act, hook.axes, chosen, CHANGES[kind.__name__], value))
        for kind, at, value, chosen in ops
    ]  # fmt: skip
    saves = [lk.Save([source, "ln_final.hook_scale", "hook_logits"]), lk.Save(lk.Act(source) * 2, name="twice")]
    hooks = [*(kind(at, value, **chosen) for kind, at, value, chosen in ops), *saves]
    result = model.run_with_hooks([[5, 6, 7], [8, 9]], hooks=hooks)
    expected = model.run_with_hooks([[5, 6, 7], [8, 9]], hooks=[*functions, *saves])
    assert torch.equal(result.logits[result.mask], expected.logits[result.mask])
    for key, tensor in result.saved.items():
        assert tensor.dtype == (torch.float32 if key.endswith("hook_scale") else dtype), key
        assert torch.equal(tensor, expected.saved[key]), key


FITTING = {
    "a double without axes": torch.tensor(0.5, dtype=torch.float64),
    "whole numbers": torch.tensor([2]),
    "bools": torch.tensor([True]),
}
ALIKE: dict[str, dict[str, Any]] = {
    "all": {},
    "slice": {"tokens": slice(1, 3)},
    "list": {"tokens": [0, 3, 2]},
    "int": {"tokens": 2},
}


@pytest.mark.parametrize("value", FITTING.values(), ids=FITTING)
@pytest.mark.parametrize("chosen", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_promoted_without_loss_fits_every_selection(
    shared: lk.HookedTransformer, value: Tensor, chosen: dict[str, Any], kind: str
) -> None:
    """Where torch's own arithmetic would give the activation's dtype, an edit does, whatever part it is of."""
    found = shared.run_with_hooks(TOKENS, hooks=[KINDS[kind]("hook_embed", value, **chosen)])
    as_float = shared.run_with_hooks(TOKENS, hooks=[KINDS[kind]("hook_embed", value.float(), **chosen)])
    same(found.logits, as_float.logits)


@pytest.mark.parametrize("chosen", ALIKE.values(), ids=ALIKE)
def test_a_comparison_is_a_value(shared: lk.HookedTransformer, chosen: dict[str, Any]) -> None:
    saved = shared.run_with_hooks(
        TOKENS,
        hooks=[lk.Set("blocks.0.hook_mlp_out", lk.Act("blocks.0.hook_attn_out", **chosen) > 0, **chosen),
               lk.Save("blocks.0.hook_mlp_out", **chosen), lk.Save("blocks.0.hook_attn_out", **chosen)],
    ).saved  # fmt: skip
    assert torch.equal(saved["blocks.0.hook_mlp_out"], (saved["blocks.0.hook_attn_out"] > 0).float())


@pytest.mark.parametrize("chosen", ALIKE.values(), ids=ALIKE)
@torch.no_grad()
def test_a_statistic_takes_the_models_dtype(shared: lk.HookedTransformer, chosen: dict[str, Any]) -> None:
    """Scales are float32 where the model is not: a value in the model's dtype goes in without loss."""
    model = deepcopy(shared).to(torch.bfloat16)
    one = torch.tensor([1.5], dtype=torch.bfloat16)
    found = model.run_with_hooks(TOKENS, hooks=[lk.Set("blocks.0.ln1.hook_scale", one, **chosen)])
    as_float = model.run_with_hooks(TOKENS, hooks=[lk.Set("blocks.0.ln1.hook_scale", 1.5, **chosen)])
    assert torch.equal(found.logits, as_float.logits)


@pytest.mark.parametrize("chosen", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_whole_number_is_the_float_that_it_is(
    shared: lk.HookedTransformer, kind: str, chosen: dict[str, Any]
) -> None:
    whole, as_float = (
        shared.run_with_hooks(TOKENS, hooks=[KINDS[kind]("hook_logits", number, **chosen)]).logits
        for number in (10**30, 1e30)
    )
    assert torch.equal(whole, as_float)


# -- Stop


class Calls(TorchDispatchMode):
    """Counts what torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counted[name] = self.counted.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(n for name, n in self.counted.items() if name in ("mm", "addmm", "bmm", "linear"))


def test_nothing_is_computed_after_a_stop(shared: lk.HookedTransformer) -> None:
    def fail(act: Tensor, hook: lk.HookPoint) -> None:
        raise AssertionError(f"{hook.name} runs after the stop")

    reached: list[str] = []
    after = [
        name
        for name in shared.hook_points
        if name.startswith(("blocks.2", "ln_final", "hook_logits")) and not excluded(name)
    ]
    hooks = [
        lk.Save("blocks.1.hook_resid_post", tokens=-1),
        ("blocks.1.hook_resid_post", lambda act, hook: reached.append(hook.name)),
        lk.Stop("blocks.1.hook_resid_post"),
    ]
    with shared.hooks([(after, fail)]):
        result = shared.run_with_hooks(TOKENS, hooks=hooks)
    _, cache = shared.run_with_cache(TOKENS, "blocks.1.hook_resid_post")
    same(result.saved["blocks.1.hook_resid_post"], cache["resid_post", 1][:, -1])
    assert reached == ["blocks.1.hook_resid_post"]
    with pytest.raises(NotSavedError, match="there are no logits") as told:
        _ = result.logits
    assert "Stop" in told.value.got
    with torch.no_grad(), Calls() as whole:
        shared(TOKENS)
    with torch.no_grad(), Calls() as at_the_start:
        shared.run_with_hooks(TOKENS, hooks=[lk.Stop("hook_embed")])
    with torch.no_grad(), Calls() as in_the_middle:
        shared.run_with_hooks(TOKENS, hooks=[lk.Stop("blocks.1.hook_resid_pre")])
    assert at_the_start.products == 0
    assert 0 < in_the_middle.products <= whole.products / 3


def test_a_stop_at_any_point_leaves_what_is_before_it(shared: lk.HookedTransformer) -> None:
    """The points come in the order of `hook_points`."""
    names = [name for name in shared.hook_points if not name.endswith(BY_HEAD)]
    whole = shared.run_with_hooks(TOKENS, hooks=[lk.Save(names)]).saved
    for index, name in enumerate(names):
        before = names[max(index - 3, 0) : index + 1]
        saved = shared.run_with_hooks(TOKENS, hooks=[lk.Save(before), lk.Stop(name)]).saved
        for key in before:
            same(saved[key], whole[key])


def test_points_come_in_the_order_in_which_they_run(shared: lk.HookedTransformer) -> None:
    """On which depends what an op may use, and what a stop leaves; the inputs of each head as well."""
    _, cache = shared.run_with_cache(TOKENS, "*")
    assert list(cache) == list(shared.hook_points)


def test_a_stop_among_the_inputs_by_head_and_their_norm(shared: lk.HookedTransformer) -> None:
    """Whichever of the two comes first, what is saved before the stop is there."""
    for first, second in [("hook_q_input", "ln1.hook_normalized"), ("ln1.hook_normalized", "hook_q_input")]:
        one, two = f"blocks.0.{first}", f"blocks.0.{second}"
        try:
            saved = shared.run_with_hooks(TOKENS, hooks=[lk.Save(one), lk.Stop(two)]).saved
        except lk.errors.WithoutEffectError:
            continue  # `one` comes later, and that was said
        assert saved[one].shape[:2] == (3, LENGTH)


def test_a_stop_within_an_outer_scope(shared: lk.HookedTransformer) -> None:
    with shared.hooks([("hook_embed", lambda act, hook: act * 2)]):
        result = shared.run_with_hooks(TOKENS, hooks=[lk.Save("hook_embed"), lk.Stop("hook_embed")])
        same(result.saved["hook_embed"], shared.embed.W_E[TOKENS] * 2)
        assert not nothing_attached(shared)


# -- what is left behind


def boom(act: Tensor, hook: lk.HookPoint) -> None:
    raise ZeroDivisionError


def interrupt(act: Tensor, hook: lk.HookPoint) -> None:
    raise KeyboardInterrupt


ENDINGS: dict[str, tuple[list[Any], type[BaseException] | None]] = {
    "success": ([], None),
    "stop": ([lk.Stop("blocks.1.hook_resid_post")], None),
    "error": ([("blocks.1.hook_resid_post", boom)], ZeroDivisionError),
    "interrupt": ([("blocks.1.hook_resid_post", interrupt)], KeyboardInterrupt),
    "refused": ([lk.Set("hook_embed", 0.0, heads=0)], lk.errors.AxisError),
    "another shape": ([("hook_embed", lambda act, hook: act[:1])], lk.errors.ReplacementError),
    "an expression that fails": (
        [lk.Set("hook_embed", lk.Act("hook_embed") @ torch.ones(3, 2))],
        lk.errors.ExpressionError,
    ),
}


@pytest.mark.parametrize(("ending", "error"), ENDINGS.values(), ids=ENDINGS)
def test_hooks_leave_with_the_pass(
    shared: lk.HookedTransformer, ending: list[Any], error: type[BaseException] | None
) -> None:
    hooks = [
        lk.Scale("hook_embed", 2.0),
        lk.Set("blocks.0.hook_mlp_out", lk.Act("hook_embed")),
        lk.Save("blocks.0.*_out"),
    ]
    plan = lk.Plan([*hooks, *ending])
    if error is None:
        shared.run_with_hooks(TOKENS, hooks=plan)
    else:
        with pytest.raises(error):
            shared.run_with_hooks(TOKENS, hooks=plan)
    assert nothing_attached(shared)
    again = shared.run_with_hooks(TOKENS, hooks=hooks)
    assert torch.equal(again.saved["blocks.0.hook_mlp_out"], shared.embed.W_E[TOKENS] * 2)
    assert nothing_attached(shared)


def test_threads_do_not_see_each_others_ops(shared: lk.HookedTransformer) -> None:
    """Two threads with ops of their own, and a plan that both use."""
    point = "blocks.1.hook_resid_post"
    plan = lk.Plan(
        [
            lk.Scale("blocks.0.hook_mlp_out", lk.Act("blocks.0.hook_mlp_out", dims=slice(0, 1))),
            lk.Save(point, tokens=-1),
        ]
    )
    hooks: list[list[Any]] = [
        [lk.Set("blocks.*.hook_mlp_out", 0.0), lk.Save(point, tokens=-1)],
        [
            lk.Add("hook_embed", lk.Act("hook_embed", tokens=0)[:, None]),
            lk.Save(point, tokens=-1),
            lk.Stop("blocks.2.hook_attn_out"),
        ],
    ]
    wanted = [shared.run_with_hooks(TOKENS, hooks=own).saved[point] for own in hooks]
    by_plan = shared.run_with_hooks(TOKENS, hooks=plan).saved[point]
    start, wrong = Barrier(3, timeout=60), []

    def run(own: list[Any], expected: Tensor) -> None:
        start.wait()
        for n in range(15):
            with torch.no_grad():
                ours = shared.run_with_hooks(TOKENS, hooks=own).saved[point]
                both = shared.run_with_hooks(TOKENS[:, : 3 + n % 5], hooks=plan).saved[point]
            if not (
                torch.allclose(ours, expected, atol=1e-5) and (n % 5 != 4 or torch.allclose(both, by_plan, atol=1e-5))
            ):
                wrong.append(n)

    threads = [Thread(target=run, args=pair) for pair in zip(hooks, wanted, strict=True)]
    for thread in threads:
        thread.start()
    start.wait()
    plain = shared(TOKENS)
    while any(thread.is_alive() for thread in threads):
        assert torch.allclose(shared(TOKENS), plain, atol=1e-5)
    for thread in threads:
        thread.join()
    assert not wrong


# -- the other verbs


@settings(max_examples=20, phases=PHASES)
@given(data=st.data())
@torch.no_grad()
def test_a_cache_holds_what_ops_made_of_activations(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    tokens, mask = padded(data.draw)
    script = scripts(data.draw, shared, Plain(mask))
    assume(script.ops)
    names = [name for name in shared.hook_points if not name.endswith(BY_HEAD)]
    edits = [op for op in script.ops if not isinstance(op, lk.Save)]  # which a cache refuses
    logits, cache = shared.run_with_cache(tokens, names, hooks=edits, mask=mask)
    expected, by_functions = shared.run_with_cache(tokens, names, hooks=script.functions, mask=mask)
    same(logits[mask], expected[mask])
    for name in names:
        same(Plain(mask).read(cache[name], shared.hook_points[name].axes, {}),
             Plain(mask).read(by_functions[name], shared.hook_points[name].axes, {}))  # fmt: skip


@settings(max_examples=20, phases=PHASES)
@given(data=st.data())
@torch.no_grad()
def test_the_first_step_of_a_generation_is_a_forward_pass(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    """What ops do and save does not depend on how many positions get logits."""
    draw = data.draw
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    prompts = [ids(1, length, seed=draw(st.integers(0, 99)))[0].tolist() for length in lengths]
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    script = scripts(draw, shared, Plain(mask), often=("hook_logits", "ln_final.hook_normalized"))
    whole = shared.run_with_hooks(prompts, hooks=script.ops)
    found = shared.generate(prompts, max_new_tokens=1, hooks=script.ops, return_logits=True)
    same(torch.cat(found.logits), whole.logits[:, -1])
    assert set(found.saved) == set(whole.saved)
    for key, [tensor] in found.saved.items():
        same(tensor, whole.saved[key])


def test_part_of_the_model(shared: lk.HookedTransformer) -> None:
    """Ops on the layers that run; those of others are unknown there."""
    stream = shared(TOKENS, stop_at_layer=1)
    hooks = [lk.Scale("blocks.1.hook_mlp_out", 2.0, tokens=-1), lk.Save("blocks.-1.hook_resid_post")]
    part = shared.run_with_hooks(stream, hooks=hooks, start_at_layer=1)
    whole = shared.run_with_hooks(TOKENS, hooks=hooks)
    same(part.logits, whole.logits)
    same(part.saved["blocks.2.hook_resid_post"], whole.saved["blocks.2.hook_resid_post"])
    before = shared.run_with_hooks(TOKENS, hooks=[lk.Save("blocks.0.hook_resid_post")], stop_at_layer=1)
    same(before.logits, stream)
    same(before.saved["blocks.0.hook_resid_post"], stream)


def test_functions_are_told_where_they_are(shared: lk.HookedTransformer) -> None:
    told: list[Any] = []

    def tell(act: Tensor, hook: lk.HookPoint) -> None:
        told.append((hook.name, hook.step, hook.prompts, hook.positions.tolist(), hook.mask.tolist()))

    shared.run_with_hooks([[5, 6, 7], [8]], hooks=[("hook_embed", tell)])
    mask = [[True, True, True], [False, False, True]]
    assert told == [("hook_embed", 0, [0, 1], [[0, 1, 2], [0, 0, 0]], mask)]


def test_ops_and_outer_scopes(shared: lk.HookedTransformer) -> None:
    """What was attached first runs first."""
    with shared.hooks([("hook_embed", lambda act, hook: act + 1)]):
        saved = shared.run_with_hooks(TOKENS, hooks=[lk.Scale("hook_embed", 2.0), lk.Save("hook_embed")]).saved
    same(saved["hook_embed"], (shared.embed.W_E[TOKENS] + 1) * 2)


def test_ops_are_of_their_own_pass(shared: lk.HookedTransformer) -> None:
    """A function may run the model itself, on anything: that pass has only the ops that it is given."""
    other = ids(1, 2, seed=5)
    plain = shared(other)
    asked, found = [], []

    def ask(act: Tensor, hook: lk.HookPoint) -> None:
        asked.append(hook.name)
        if len(asked) == 1:
            found.append(shared(other))
            found.append(shared.run_with_hooks(other, hooks=[lk.Save("hook_embed", tokens=-1)]).saved["hook_embed"])

    act = lk.Act("hook_embed", tokens=-1)
    hooks = [
        lk.Scale("hook_embed", 2.0), lk.Save("hook_embed"), lk.Save(act * 2, name="twice"),
        ("blocks.0.hook_mlp_out", ask), lk.Set("blocks.1.hook_mlp_out", act, tokens=0),
        lk.Save("blocks.1.hook_mlp_out", tokens=0),
    ]  # fmt: skip
    saved = shared.run_with_hooks(TOKENS, hooks=hooks).saved
    assert asked == ["blocks.0.hook_mlp_out"]
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], shared.embed.W_E[other[:, -1]])
    embedded = shared.embed.W_E[TOKENS] * 2
    assert torch.equal(saved["hook_embed"], embedded)
    assert torch.equal(saved["twice"], embedded[:, -1] * 2)
    assert torch.equal(saved["blocks.1.hook_mlp_out"], embedded[:, -1])
