"""Prompts that use what other prompts compute later: in which passes they go, and that it equals doing it by hand."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity_table import ids
from torch import Tensor

import lenskit as lk
from lenskit.errors import DependencyError, StepError
from lenskit.interventions import passes
from lenskit.interventions.passes import Need

PHASES = set(Phase) - {Phase.explain}
A, B, C = [5, 6, 7], [8, 9, 10, 11, 12], [13, 14]
LATE, EARLY = "blocks.2.hook_resid_post", "blocks.0.hook_resid_post"


@pytest.fixture(autouse=True)
def leaves_nothing_attached(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to the shared models, no hook outlives it."""
    yield
    if "shared" in request.fixturenames:
        points = request.getfixturevalue("shared").hook_points.values()
        assert all(point.attachments is None for point in points)


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max().clamp(min=1e-3)))


def put(value: Tensor, token: int = -1) -> Any:
    """A function that writes one token of one prompt."""

    def write(act: Tensor, hook: lk.HookPoint) -> None:
        act[0, token] = value

    return write


def watched(*ops: Any) -> tuple[list[Any], list[list[int]]]:
    """The ops, and a list that fills with the prompts of each pass."""
    seen: list[list[int]] = []
    return [("hook_embed", lambda act, hook: seen.append(hook.prompts)), *ops], seen


def patch(source: str, row: int, point: str, into: int, **selectors: Any) -> lk.Set:
    return lk.Set(point, lk.Act(source, prompts=row, tokens=-1), prompts=into, tokens=-1, **selectors)


# -- later into earlier


@pytest.mark.parametrize(("source", "target"), [(A, [11, 12, 13]), (A, B), (B, A), (A, [9])], ids=str)
@pytest.mark.parametrize("first", ["source", "target"])
def test_a_later_activation_goes_into_an_earlier_layer(
    shared: lk.HookedTransformer, source: list[int], target: list[int], first: str
) -> None:
    """As a patchscope does; whichever prompt is listed first, and however long the two are."""
    a, b = (0, 1) if first == "source" else (1, 0)
    prompts = [source, target] if first == "source" else [target, source]
    hooks, seen = watched(
        patch(LATE, a, "blocks.1.hook_resid_pre", b), lk.Save(LATE), lk.Save("hook_logits", tokens=-1)
    )
    result = shared.run_with_hooks(prompts, hooks=hooks)
    assert seen == [[a], [b]]
    logits, cache = shared.run_with_cache(source)
    patched, after = shared.run_with_cache(target, hooks=[("blocks.1.hook_resid_pre", put(cache[LATE][0, -1]))])
    assert result.logits.shape == (2, max(len(source), len(target)), shared.cfg.d_vocab)
    for row, alone, own in ((a, logits, cache), (b, patched, after)):
        n = len(prompts[row])
        same(result.logits[row, -n:], alone[0])
        same(result.saved[LATE][row, -n:], own[LATE][0])
        same(result.saved["hook_logits"][row], alone[0, -1])
        assert not result.saved[LATE][row, :-n].any()
        assert result.tokens[row, -n:].tolist() == prompts[row]


def test_a_patchscope(demo_gpt2: lk.HookedTransformer) -> None:
    prompts = ["The Eiffel Tower is in the city of", "x x x x"]
    last = f"blocks.{demo_gpt2.cfg.n_layers - 1}.hook_resid_post"
    result = demo_gpt2.run_with_hooks(prompts, hooks=[patch(last, 0, "blocks.1.hook_resid_pre", 1)])
    _, cache = demo_gpt2.run_with_cache(prompts[0], last)
    by_hand = demo_gpt2.run_with_hooks(prompts[1], hooks=[("blocks.1.hook_resid_pre", put(cache[last][0, -1]))])
    n = by_hand.logits.shape[1]
    same(result.logits[1, -n:], by_hand.logits[0])


def test_an_earlier_activation_takes_one_pass(shared: lk.HookedTransformer) -> None:
    """The same point counts as earlier: what it is before the edit."""
    for source, point in [(EARLY, LATE), (LATE, LATE), ("hook_embed", "hook_logits")]:
        act = lk.Act(source, prompts=0, tokens=-1)
        hooks, seen = watched(lk.Set(point, act.mean(), prompts=1, tokens=-1))
        shared.run_with_hooks([A, B], hooks=hooks)
        assert seen == [[0, 1]]
    exchange = [patch(EARLY, 0, EARLY, 1), patch("blocks.1.hook_resid_post", 1, "blocks.1.hook_resid_post", 0)]
    hooks, seen = watched(*exchange)
    shared.run_with_hooks([A, B], hooks=hooks)
    assert seen == [[0, 1]]


def test_chains_take_as_many_passes_as_they_are_long(shared: lk.HookedTransformer) -> None:
    """Prompts that have nothing to do with it stay in the first one, and so do those that only follow."""
    prompts = [C, A, B, [20, 21], A]
    hooks, seen = watched(
        patch(LATE, 2, EARLY, 0),
        patch(LATE, 0, "blocks.1.hook_mlp_out", 3),
        patch(EARLY, 1, "blocks.1.hook_attn_out", 2),
        patch(EARLY, 0, LATE, 4),
        lk.Save(LATE),
    )
    result = shared.run_with_hooks(prompts, hooks=hooks)
    assert seen == [[1, 2], [0, 4], [3]]

    def alone(row: int, *hooks: Any) -> lk.ActivationCache:
        return shared.run_with_cache(prompts[row], hooks=list(hooks))[1]

    one = alone(1)
    two = alone(2, ("blocks.1.hook_attn_out", put(one[EARLY][0, -1])))
    zero = alone(0, (EARLY, put(two[LATE][0, -1])))
    three = alone(3, ("blocks.1.hook_mlp_out", put(zero[LATE][0, -1])))
    four = alone(4, (LATE, put(zero[EARLY][0, -1])))
    for row, cache in enumerate([zero, one, two, three, four]):
        n = len(prompts[row])
        same(result.saved[LATE][row, -n:], cache[LATE][0])
        same(result.logits[row, -n:], cache["hook_logits"][0])


@dataclass(frozen=True)
class Patch:
    """Token -1 of one prompt at one point, into token -1 of another at another."""

    source: str
    row: int
    point: str
    into: int


@st.composite
def patches(draw: st.DrawFn, points: list[str], rows: int) -> Patch:
    row, into = draw(st.permutations(range(rows)))[:2]
    return Patch(draw(st.sampled_from(points)), row, draw(st.sampled_from(points)), into)


def fewest(n_rows: int, needs: list[tuple[list[int], list[int], bool]]) -> list[int] | None:
    """By trying: each row's pass, as early as possible, if there is a way."""
    pairs = {(*pair, strict) for users, sources, strict in needs for pair in product(users, sources)}
    fitting = [
        levels for levels in product(range(n_rows), repeat=n_rows)
        if all(levels[user] >= levels[source] + strict for user, source, strict in pairs)
    ]  # fmt: skip
    return None if not fitting else [min(column) for column in zip(*fitting, strict=True)]


@settings(max_examples=25, phases=PHASES)
@given(data=st.data())
@torch.no_grad()
def test_random_patches_between_prompts(shared: lk.HookedTransformer, data: st.DataObject) -> None:
    """Against prompts alone, each run again and again with what the others had the last time, until nothing changes."""
    points = ["hook_embed", EARLY, "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.2.hook_attn_out", LATE]
    rows = data.draw(st.integers(2, 3))
    prompts = [ids(1, data.draw(st.integers(1, 4)), seed=row)[0].tolist() for row in range(rows)]
    made = data.draw(st.lists(patches(points, rows), min_size=1, max_size=4))
    place = {name: index for index, name in enumerate(shared.hook_points)}
    order = fewest(rows, [([p.into], [p.row], place[p.source] > place[p.point]) for p in made])
    hooks, seen = watched(*(patch(p.source, p.row, p.point, p.into) for p in made), lk.Save(points))
    if order is None:
        with pytest.raises(DependencyError, match="need each other's future"):
            shared.run_with_hooks(prompts, hooks=hooks)
        assert not seen
        return
    result = shared.run_with_hooks(prompts, hooks=hooks)
    assert seen == [[row for row in range(rows) if order[row] == n] for n in range(max(order) + 1)]
    values = [torch.zeros(shared.cfg.d_model) for _ in made]
    for _ in range(len(made) + 1):
        read = list(values)
        alone = [
            shared.run_with_hooks(prompts[row], hooks=by_hand(made, row, values, read, points)) for row in range(rows)
        ]
        values = read
    for row, expected in enumerate(alone):
        n = len(prompts[row])
        same(result.logits[row, -n:], expected.logits[0])
        for name in points:
            same(result.saved[name][row, -n:], expected.saved[name][0])


def by_hand(made: list[Patch], row: int, values: list[Tensor], read: list[Tensor], points: list[str]) -> list[Any]:
    """One prompt's part of the patches: what it reads for the others, and what it is given."""
    hooks: list[Any] = []
    for index, found in enumerate(made):
        if found.row == row:

            def keep(act: Tensor, hook: lk.HookPoint, index: int = index) -> None:
                read[index] = act[0, -1].clone()

            hooks.append((found.source, keep))
        if found.into == row:
            hooks.append((found.point, put(values[index])))
    return [*hooks, lk.Save(points)]


# -- what is put together again


def test_saves_of_rows_of_several_passes(shared: lk.HookedTransformer) -> None:
    """In the rows' own order, left-padded, whatever is selected; and expressions of rows of several passes."""
    prompts = [A, B, C]
    move = patch(LATE, 2, EARLY, 0)
    seen = "blocks.1.hook_resid_post"
    pattern = "blocks.1.attn.hook_pattern"
    saves = {
        "all": lk.Save(seen, name="all"),
        "turned": lk.Save(seen, prompts=[2, 0], name="turned"),
        "one": lk.Save(seen, prompts=0, name="one"),
        "twice": lk.Save(seen, prompts=[0, 2, 0], tokens=-1, name="twice"),
        "from the second": lk.Save(seen, tokens=slice(1, None), name="from the second"),
        "last": lk.Save(seen, tokens=-1, dims=[3, 0], name="last"),
        "pattern": lk.Save(pattern, name="pattern"),
        "keys": lk.Save(pattern, tokens=-1, heads=0, dims=[0, -1], name="keys"),
        "difference": lk.Save(
            lk.Act(seen, prompts=0, tokens=-1) - lk.Act(seen, prompts=2, tokens=-1), name="difference"
        ),
        "products": lk.Save(lk.Act(seen, tokens=-1) @ lk.Act("hook_embed", tokens=0).T, name="products"),
        "of one pass": lk.Save(lk.Act(seen, prompts=[1, 2], tokens=-1).mean(0), name="of one pass"),
    }
    result = shared.run_with_hooks(prompts, hooks=[move, *saves.values()])
    _, cache = shared.run_with_cache(C, LATE)
    rows = [
        shared.run_with_hooks(A, hooks=[(EARLY, put(cache[LATE][0, -1])), lk.Save([seen, pattern, "hook_embed"])]).saved
    ]
    rows += [shared.run_with_hooks(prompt, hooks=[lk.Save([seen, pattern, "hook_embed"])]).saved for prompt in (B, C)]
    ends = torch.stack([row[seen][0, -1] for row in rows])
    assert result.mask.sum(1).tolist() == [3, 5, 2]

    def padded(parts: list[Tensor], *dims: int) -> Tensor:
        sizes = [
            max(part.shape[dim] for part in parts) if dim in dims else parts[0].shape[dim]
            for dim in range(parts[0].dim())
        ]
        whole = torch.zeros(len(parts), *sizes)
        for index, part in enumerate(parts):
            whole[(index, *(slice(size - n, None) for size, n in zip(sizes, part.shape, strict=True)))] = part
        return whole

    acts, patterns = [row[seen][0] for row in rows], [row[pattern][0] for row in rows]
    expected = {
        "all": padded(acts, 0),
        "turned": padded([acts[2], acts[0]], 0),
        "one": acts[0],
        "twice": ends[[0, 2, 0]],
        "from the second": padded([act[1:] for act in acts], 0),
        "last": ends[:, [3, 0]],
        "pattern": padded(patterns, 1, 2),
        "keys": torch.stack([one[0, -1, [0, -1]] for one in patterns]),
        "difference": ends[0] - ends[2],
        "products": ends @ torch.stack([row["hook_embed"][0, 0] for row in rows]).T,
        "of one pass": ends[1:].mean(0),
    }
    assert set(result.saved) == set(expected)
    for key in expected:
        same(result.saved[key], expected[key])


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_that_was_given(shared: lk.HookedTransformer, side: str) -> None:
    before = {"left": [5, 3, 6], "right": [0, 0, 0], "both": [1, 0, 2]}[side]
    tokens, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.bool)
    for row, prompt in enumerate([A, B, C]):
        where = slice(before[row], before[row] + len(prompt))
        tokens[row, where], mask[row, where] = torch.tensor(prompt), True
    ops = [
        patch(LATE, 1, EARLY, 0),
        lk.Set("blocks.0.hook_mlp_out", lk.Act(LATE, prompts=0, tokens=0), prompts=2, tokens=0),
    ]
    pattern = "blocks.1.attn.hook_pattern"
    hooks = [
        *ops,
        lk.Save("hook_logits", tokens=-1),
        lk.Save([LATE, pattern]),
        lk.Save(LATE, tokens=slice(1, None), name="rest"),
    ]
    found = shared.run_with_hooks(tokens, hooks=hooks, mask=mask)
    plain = shared.run_with_hooks([A, B, C], hooks=hooks)
    same(found.logits[found.mask], plain.logits[plain.mask])
    for key in ("hook_logits", "rest"):
        same(found.saved[key], plain.saved[key])
    same(found.saved[LATE][found.mask], plain.saved[LATE][plain.mask])
    assert not found.saved[LATE][~found.mask].any()
    for row in range(3):
        one, other = found.mask[row], plain.mask[row]
        same(found.saved[pattern][row][:, one][:, :, one], plain.saved[pattern][row][:, other][:, :, other])
    value = torch.randn(3, 8, shared.cfg.d_model, generator=torch.Generator().manual_seed(0))
    found = shared.run_with_hooks(tokens, hooks=[ops[0], lk.Add("hook_embed", value)], mask=mask)
    lengths = [len(A), len(B), len(C)]
    own = [torch.nn.functional.pad(value[row][mask[row]], (0, 0, 5 - n, 0)) for row, n in enumerate(lengths)]
    plain = shared.run_with_hooks([A, B, C], hooks=[ops[0], lk.Add("hook_embed", torch.stack(own))])
    same(found.logits[found.mask], plain.logits[plain.mask])


def test_values_for_rows_of_several_passes(shared: lk.HookedTransformer) -> None:
    """Tensors and expressions for all rows: each pass takes its own part of them."""
    move = patch(LATE, 1, EARLY, 0)
    tensor = torch.randn(3, 5, shared.cfg.d_model, generator=torch.Generator().manual_seed(0))
    point = "blocks.0.hook_mlp_out"
    hooks = [
        move,
        lk.Set(point, tensor),
        lk.Save(point),
        lk.Scale("blocks.1.hook_mlp_out", tensor[:, :1, :1]),
        lk.Save(LATE),
    ]
    result = shared.run_with_hooks([A, B, C], hooks=hooks)
    alone = {}
    for row, prompt in ((1, B), (2, C), (0, A)):
        n = len(prompt)
        same(result.saved[point][row, -n:], tensor[row, -n:])
        first = [(EARLY, put(alone[1][LATE][0, -1]))] if row == 0 else []
        own = [lk.Set(point, tensor[row, -n:]), lk.Scale("blocks.1.hook_mlp_out", tensor[row, 0, 0]), lk.Save(LATE)]
        alone[row] = shared.run_with_hooks(prompt, hooks=[*first, *own]).saved
        same(result.saved[LATE][row, -n:], alone[row][LATE][0])


def test_what_each_row_makes_of_its_own_does_not_bind_rows_together(shared: lk.HookedTransformer) -> None:
    """An expression over all prompts at once, beside one that puts them into two passes.

    If it is refused, by the error that says why.
    """
    hooks = [patch(LATE, 0, EARLY, 1), lk.Set("blocks.1.hook_mlp_out", lk.Act("blocks.0.hook_mlp_out") * 2)]
    by_row = [patch(LATE, 0, EARLY, 1), *(
        lk.Set("blocks.1.hook_mlp_out", lk.Act("blocks.0.hook_mlp_out", prompts=row) * 2, prompts=row) for row in (0, 1)
    )]  # fmt: skip
    expected = shared.run_with_hooks([A, B], hooks=by_row)
    try:
        found = shared.run_with_hooks([A, B], hooks=hooks)
    except DependencyError as refused:
        fix = refused.fix
    else:
        fix = "prompts="
        same(found.logits[found.mask], expected.logits[expected.mask])
    assert "prompts=" in fix


def test_functions_see_the_rows_of_their_pass(shared: lk.HookedTransformer) -> None:
    seen: list[Any] = []

    def look(act: Tensor, hook: lk.HookPoint) -> None:
        seen.append((hook.prompts, tuple(act.shape[:2]), hook.step, None if hook.mask is None else hook.mask.tolist()))

    shared.run_with_hooks([A, B, C], hooks=[patch(LATE, 1, EARLY, 0), ("hook_embed", look)])
    mask = [[True] * 5, [False] * 3 + [True] * 2]
    assert seen == [([1, 2], (2, 5), 0, mask), ([0], (1, 3), 0, None)]


def test_part_of_the_model_and_stops(shared: lk.HookedTransformer) -> None:
    """Every pass ends where the one pass would."""
    move, save = patch("blocks.1.hook_resid_post", 0, EARLY, 1), lk.Save("blocks.1.hook_resid_post")
    whole = shared.run_with_hooks([A, B], hooks=[move, save])
    stopped = shared.run_with_hooks([A, B], hooks=[move, save, lk.Stop("blocks.1.hook_resid_post")])
    part = shared.run_with_hooks([A, B], hooks=[move, save], stop_at_layer=2)
    for result in (stopped, part):
        same(result.saved["blocks.1.hook_resid_post"], whole.saved["blocks.1.hook_resid_post"])
    mask = part.mask
    same(part.logits[mask], whole.saved["blocks.1.hook_resid_post"][mask])


def test_after_a_past(shared: lk.HookedTransformer) -> None:
    """Shared by all rows, or one for each; the passes take their rows of it."""
    ops = [patch(LATE, 0, EARLY, 1), lk.Save(LATE, tokens=-1), lk.Save("blocks.1.attn.hook_pattern", tokens=-1, dims=0)]
    whole = shared.run_with_hooks([[1, 2, *A], [1, 2, *B]], hooks=ops)
    found = shared.run_with_hooks([A, B], hooks=ops, past=shared.prefill([1, 2]))
    for key in whole.saved:
        same(found.saved[key], whole.saved[key])
    whole = shared.run_with_hooks([[1, *A], [2, 3, 4, *B]], hooks=ops)
    found = shared.run_with_hooks([A, B], hooks=ops, past=shared.prefill([[1], [2, 3, 4]]))
    for key in whole.saved:
        same(found.saved[key], whole.saved[key])


def test_gradients_flow_from_pass_to_pass(shared: lk.HookedTransformer) -> None:
    one, two = (torch.zeros(shared.cfg.d_model, requires_grad=True) for _ in range(2))
    steer = lk.Add("hook_embed", one, prompts=0)
    shared.run_with_hooks([A, B], hooks=[patch(LATE, 0, EARLY, 1), steer]).logits[1, -1].square().sum().backward()
    late = shared.run_with_hooks(A, hooks=[lk.Add("hook_embed", two), lk.Save(LATE, prompts=0, tokens=-1)]).saved[LATE]
    shared.run_with_hooks(B, hooks=[lk.Set(EARLY, late, tokens=-1)]).logits[0, -1].square().sum().backward()
    shared.zero_grad()
    assert one.grad.any()
    same(one.grad, two.grad)


def test_an_error_in_a_later_pass_says_whose(shared: lk.HookedTransformer) -> None:
    def fail(act: Tensor, hook: lk.HookPoint) -> None:
        if hook.prompts == [1]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as told:
        shared.run_with_hooks([A, B], hooks=[patch(LATE, 0, EARLY, 1), ("blocks.1.hook_mlp_out", fail)])
    notes = " ".join(told.value.__notes__)
    assert "blocks.1.hook_mlp_out" in notes
    assert "prompts 1" in notes


# -- generation


def test_across_steps(shared: lk.HookedTransformer) -> None:
    """B at step 0 uses what A computes at step 4, and C at every step what B computes at the prefill."""
    prompts = [B, A, C]
    late = lk.Act(LATE, prompts=1, tokens=-1, steps=4)
    ops = [
        lk.Set(EARLY, late, prompts=0, tokens=-1, steps=0),
        lk.Add("hook_embed", lk.Act(LATE, prompts=0, tokens=0, steps=0) * 0.5, prompts=2, tokens=-1),
        lk.Save("blocks.1.hook_resid_post"),
        lk.Save("blocks.1.hook_resid_post", prompts=[2, 0], tokens=-1, steps=3, name="some"),
        lk.Save(late * 2, name="late"),
        lk.Save(lk.Act(LATE, tokens=-1).norm(dim=-1), name="norms"),
    ]
    hooks, seen = watched(*ops)
    found = shared.generate(prompts, max_new_tokens=6, hooks=hooks, return_logits=True)
    assert seen == [[1]] * 6 + [[0]] * 6 + [[2]] * 6
    options: dict[str, Any] = {"max_new_tokens": 6, "return_logits": True}
    saves = [
        lk.Save("blocks.1.hook_resid_post"),
        lk.Save(LATE, tokens=-1, name="ends"),
        lk.Save(LATE, tokens=0, steps=0, name="start"),
    ]
    one = shared.generate(A, hooks=saves, **options)
    into_two = lk.Set(EARLY, one.saved["ends"][4][0], tokens=-1, steps=0)
    two = shared.generate(B, hooks=[into_two, *saves], **options)
    into_three = lk.Add("hook_embed", two.saved["start"][0] * 0.5, tokens=-1)
    three = shared.generate(C, hooks=[into_three, *saves], **options)
    assert found.steps_run == [6, 6, 6]
    alone = [two, one, three]
    for row, expected in enumerate(alone):
        assert found.tokens[row].tolist() == expected.tokens[0].tolist()
        assert found.new_tokens[row].tolist() == expected.new_tokens[0].tolist()
        same(found.logits[row], expected.logits[0])
        same(found.logprobs[row], expected.logprobs[0])
        for step in range(6):
            ours, theirs = (
                found.saved["blocks.1.hook_resid_post"][step][row],
                expected.saved["blocks.1.hook_resid_post"][step][0],
            )
            same(ours[len(ours) - len(theirs) :], theirs)
            assert not ours[: len(ours) - len(theirs)].any()
            same(found.saved["norms"][step][row], expected.saved["ends"][step][0].norm())
    same(found.saved["some"], torch.stack([alone[row].saved["blocks.1.hook_resid_post"][3][0, -1] for row in (2, 0)]))
    same(found.saved["late"], one.saved["ends"][4][0] * 2)


def test_later_steps_within_one_pass(shared: lk.HookedTransformer) -> None:
    """A later step may use an earlier one's activation, of any layer, of itself and of others, in one pass."""
    act = lk.Act(LATE, prompts=0, tokens=-1, steps=0)
    hooks, seen = watched(
        lk.Set(EARLY, act, prompts=1, tokens=-1, steps=slice(1, None)),
        lk.Add("hook_embed", act, prompts=0, tokens=-1, steps=2),
    )
    found = shared.generate([A, B], max_new_tokens=4, hooks=hooks)
    assert seen == [[0, 1]] * 4
    _, cache = shared.run_with_cache(A, LATE)
    value = cache[LATE][0, -1].detach()
    alone = shared.generate(A, max_new_tokens=4, hooks=[lk.Add("hook_embed", value, tokens=-1, steps=2)])
    assert found.new_tokens[0].tolist() == alone.new_tokens[0].tolist()
    alone = shared.generate(B, max_new_tokens=4, hooks=[lk.Set(EARLY, value, tokens=-1, steps=slice(1, None))])
    assert found.new_tokens[1].tolist() == alone.new_tokens[0].tolist()


def test_step_by_step(shared: lk.HookedTransformer) -> None:
    """`generate_steps` yields a pass after the other, each with its prompts."""
    ops = [patch(LATE, 1, EARLY, 0, steps=0), lk.Save("hook_embed", tokens=-1)]
    whole = shared.generate([A, B], max_new_tokens=3, hooks=ops)
    steps = list(shared.generate_steps([A, B], max_new_tokens=3, hooks=ops))
    assert [(step.index, step.prompts) for step in steps] == [(n, (row,)) for row in (1, 0) for n in range(3)]
    for step in steps:
        [row] = step.prompts
        assert int(step.tokens[0]) == int(whole.new_tokens[row][step.index])


def test_a_prompt_that_ends_before_the_step_that_another_needs(shared: lk.HookedTransformer) -> None:
    free = shared.generate([A], max_new_tokens=3)
    op = lk.Set(EARLY, lk.Act(LATE, prompts=0, tokens=-1, steps=4), prompts=1, tokens=-1, steps=0)
    with pytest.raises(StepError) as told:
        shared.generate([A, B], max_new_tokens=6, hooks=[op], eos_token_id=int(free.new_tokens[0][0]))
    assert told.value.what.startswith(f"hooks[0] {op!r}")
    assert "prompt 0" in told.value.what


def test_each_pass_has_the_steps_of_its_rows(shared: lk.HookedTransformer) -> None:
    """A row that ends early ends its own steps; saves read as zeros there."""
    free = shared.generate([A], max_new_tokens=5)
    eos = int(free.new_tokens[0][2])
    n = 1 + free.new_tokens[0].tolist().index(eos)
    ops = [patch(LATE, 0, EARLY, 1, steps=0), lk.Save("hook_embed", tokens=-1)]
    found = shared.generate([A, B], max_new_tokens=5, hooks=ops, eos_token_id=eos)
    assert found.steps_run[0] == n
    for step, saved in enumerate(found.saved["hook_embed"]):
        for row in range(2):
            assert bool(saved[row].any()) == (step < found.steps_run[row])
    assert len(found.saved["hook_embed"]) == max(found.steps_run)


# -- the order itself


@st.composite
def needs(draw: st.DrawFn, n_rows: int) -> Need:
    """Mostly none that is refused on its own."""
    everyone = list(range(n_rows))
    some = st.just(everyone) | st.lists(st.integers(0, n_rows - 1), min_size=1, max_size=n_rows, unique=True)
    users, sources, strict = draw(some), draw(some), draw(st.booleans())
    if strict and draw(st.integers(0, 9)):
        users = [row for row in users if row not in sources] or users
    index = draw(st.integers(0, 99))
    return Need(users, sources, strict, op=f"hooks[{index}]", use=f"use {index}", source=f"source {index}")


@settings(max_examples=400, phases=PHASES)
@given(data=st.data(), n_rows=st.integers(1, 4))
def test_rows_go_as_early_as_their_needs_allow(data: st.DataObject, n_rows: int) -> None:
    """Every row once, in its own order, after what it needs; in as few passes as there can be; or an error."""
    found = data.draw(st.lists(needs(n_rows), max_size=5))
    expected = fewest(n_rows, [(list(need.users), list(need.sources), need.strict) for need in found])
    if expected is None:
        with pytest.raises(DependencyError) as told:
            passes.order(n_rows, found)
        assert told.value.what.startswith("hooks[")
        return
    rows = passes.order(n_rows, found)
    assert rows == [[row for row in range(n_rows) if expected[row] == level] for level in range(max(expected) + 1)]


def test_what_binds_rows_together_beside_what_parts_them() -> None:
    """An op that uses all rows for all, and one that needs two passes."""
    apart = Need([1], [0], True, op="hooks[0]", use="use 0", source="source 0")
    together = Need([0, 1], [0, 1], False, op="hooks[1]", use="use 1", source="source 1")
    for both in ([apart, together], [together, apart]):
        with pytest.raises(DependencyError) as told:
            passes.order(2, both)
        assert told.value.what == "hooks[0]: prompts 0, 1 need each other's future"
        assert told.value.got == "source 0 is used at use 0, and source 1 at use 1"
        assert "prompts=" in told.value.fix


def test_long_chains() -> None:
    chain = [Need([row], [row + 1], True, op="hooks[0]", use="", source="") for row in range(60)]
    assert passes.order(61, chain) == [[row] for row in range(60, -1, -1)]
    assert passes.order(61, chain[::-1]) == passes.order(61, chain)
    with pytest.raises(DependencyError):
        passes.order(61, [*chain, Need([60], [0], False, op="hooks[1]", use="", source="")])


def test_a_circle_of_three(shared: lk.HookedTransformer) -> None:
    ops = [patch(LATE, 1, EARLY, 0), patch(LATE, 2, EARLY, 1), patch(LATE, 0, EARLY, 2)]
    with pytest.raises(DependencyError, match="prompts 0, 1, 2 need each other's future") as told:
        shared.run_with_hooks([A, B, C], hooks=ops)
    assert LATE in told.value.got
    assert EARLY in told.value.got
