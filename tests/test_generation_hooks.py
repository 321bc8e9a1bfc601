"""Hooks while generating: which step sees what, what is computed for whom, and that nothing stays behind."""

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from folders import in_a_process
from parity_table import error, ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lenskit as lk
from lenskit.analysis import mean_loss
from lenskit.errors import ReplacementError, SelectorError, StepError, ValueFitError

CLOSE = 1e-5
EIFFEL = "The Eiffel Tower is in the city of"
# Of 11, 6 and 10 tokens; demo-gpt2 ends them after 3, 9 and 4 steps.
PROMPTS = [EIFFEL, "Hagia Sophia", "Madison Square Garden is located in the city of New"]


def nothing_attached(model: lk.HookedTransformer) -> bool:
    return all(point.attachments is None for point in model.hook_points.values())


@pytest.fixture(autouse=True)
def leaves_nothing_attached(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to the shared models, no hook outlives it."""
    yield
    for name in {"shared", "demo_gpt2", "demo_llama"} & set(request.fixturenames):
        assert nothing_attached(request.getfixturevalue(name))


def free(model: lk.HookedTransformer, prompts: Any, hooks: Any = (), **options: Any) -> lk.Generation:
    """A generation that nothing ends."""
    return model.generate(prompts, hooks=hooks, eos_token_id=[], **{"max_new_tokens": 5, **options})


# -- what a step is


def test_the_first_step_is_the_prompts_and_each_later_one_a_tokens(demo_gpt2: lk.HookedTransformer) -> None:
    d = demo_gpt2.cfg.d_model
    found = free(demo_gpt2, EIFFEL, [lk.Save("hook_embed"), lk.Save("blocks.-1.hook_resid_post")], max_new_tokens=3)
    for kept in found.saved.values():
        assert [tuple(step.shape) for step in kept] == [(1, 11, d), (1, 1, d), (1, 1, d)]
    # Step k processes new token k, which step k - 1 chose; the last token is not processed any more.
    processed = torch.cat(found.saved["hook_embed"], 1)
    assert torch.equal(processed, demo_gpt2.embed(found.tokens[0][None, :-1]))


def test_what_steps_save_is_what_one_pass_over_everything_saves(shared: lk.HookedTransformer) -> None:
    names = [
        "blocks.*.hook_resid_post",
        "blocks.*.attn.hook_k",
        "blocks.*.ln2.hook_scale",
        "*.hook_result",
        "hook_logits",
    ]
    found = free(shared, [[5, 6, 7]], [lk.Save(names)])
    _, cache = shared.run_with_cache(found.tokens[0][None, :-1], names)
    assert list(found.saved) == list(cache)
    for name, kept in found.saved.items():
        torch.testing.assert_close(torch.cat(kept, 1), cache[name], rtol=1e-4, atol=1e-5)


def test_patterns_have_a_row_for_each_query_and_a_column_for_each_key(shared: lk.HookedTransformer) -> None:
    found = free(shared, [[5, 6, 7], [8]], [lk.Save("blocks.1.attn.hook_pattern")])
    _, whole = shared.run_with_cache([row[:-1].tolist() for row in found.tokens], "blocks.1.attn.hook_pattern")
    pattern = whole["pattern", 1]
    for step, kept in enumerate(found.saved["blocks.1.attn.hook_pattern"]):
        queries = slice(0, 3) if step == 0 else slice(step + 2, step + 3)
        assert kept.shape == (2, shared.cfg.n_heads, queries.stop - queries.start, 3 + step)
        torch.testing.assert_close(kept[0], pattern[0, :, queries, : 3 + step], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kept[1, :, -1], pattern[1, :, queries.stop - 1, : 3 + step], rtol=1e-4, atol=1e-6)
        assert not kept[1, ..., :2].any(), "padding: no query of its own, and no key that is looked at"


def test_an_edit_at_one_step_is_not_there_at_others(shared: lk.HookedTransformer) -> None:
    plain = free(shared, [[5, 6, 7]], return_logits=True)
    for step in range(5):
        edited = free(
            shared, [[5, 6, 7]], [lk.Add("blocks.1.hook_resid_pre", 3.0, steps=step, dims=[0, 5])], return_logits=True
        )
        assert plain.logits is not None
        assert edited.logits is not None
        assert torch.equal(edited.logits[0][:step], plain.logits[0][:step])
        assert error(edited.logits[0][step], plain.logits[0][step]) > 1e-3


def test_an_edit_at_every_step_is_an_edit_of_every_token(shared: lk.HookedTransformer) -> None:
    edits: list[Any] = [
        lk.Scale("blocks.0.attn.hook_z", 0.3, heads=1),
        lk.Set("blocks.2.hook_mlp_out", 0.1, dims=[0, 3]),
    ]
    found = free(shared, [[5, 6, 7]], edits, return_logits=True)
    whole = shared.run_with_hooks(found.tokens[0][None, :-1], edits).logits
    assert found.logits is not None
    assert error(found.logits[0], whole[0, 2:]) < CLOSE


def test_ops_functions_plans_and_plans_from_files_are_one(shared: lk.HookedTransformer, tmp_path: Any) -> None:
    def as_function(act: Tensor, hook: lk.HookPoint) -> None:
        if hook.step in (1, 3):
            act[:, -1, 1] *= 0.25

    ops = [lk.Scale("blocks.0.attn.hook_z", 0.25, heads=1, tokens=-1, steps=[1, 3]), lk.Save("hook_embed")]
    plan = lk.Plan(ops)
    read = lk.Plan.load(plan.save(tmp_path / "plan.json"))
    prompts = [[5, 6, 7], [8, 9]]
    forms: list[Any] = [ops, plan, read, [("blocks.0.attn.hook_z", as_function), lk.Save("hook_embed")]]
    found = [free(shared, prompts, form, return_logits=True) for form in [*forms, plan]]
    for other in found[1:]:
        assert [row.tolist() for row in other.tokens] == [row.tolist() for row in found[0].tokens]
        assert other.logits is not None
        assert found[0].logits is not None
        assert all(error(*pair) < CLOSE for pair in zip(other.logits, found[0].logits, strict=True))
        assert all(
            torch.equal(*pair) for pair in zip(other.saved["hook_embed"], found[0].saved["hook_embed"], strict=True)
        )


def test_a_stop_ends_the_generation_with_its_step(demo_gpt2: lk.HookedTransformer) -> None:
    hooks = [lk.Save("blocks.0.hook_resid_post", tokens=-1), lk.Stop("blocks.1.hook_resid_pre", steps=2)]
    found = free(demo_gpt2, PROMPTS[:2], hooks, return_logits=True, max_new_tokens=6)
    assert [len(new) for new in found.new_tokens] == [2, 2]
    assert found.steps_run == [3, 3]
    assert found.finished == [True, True]
    assert len(found.saved["blocks.0.hook_resid_post"]) == 3
    at_once = free(demo_gpt2, PROMPTS[:2], [lk.Stop("blocks.1.hook_resid_pre")], return_logits=True)
    assert at_once.texts == PROMPTS[:2]
    assert at_once.new_texts == ["", ""]
    assert at_once.logits is not None
    assert at_once.logprobs is not None
    assert [tuple(row.shape) for row in at_once.logits] == [(0, demo_gpt2.cfg.d_vocab)] * 2
    assert [tuple(row.shape) for row in at_once.logprobs] == [(0,)] * 2
    assert at_once.logits[0].dtype == demo_gpt2.embed.weight.dtype


def test_steps_that_the_generation_does_not_have(demo_gpt2: lk.HookedTransformer) -> None:
    for steps in (5, [0, 9], slice(5, None)):
        with pytest.raises(StepError) as told:
            free(demo_gpt2, EIFFEL, [lk.Save("hook_embed"), lk.Set("hook_embed", 0.0, steps=steps)])
        assert str(told.value).startswith("hooks[1] Set('hook_embed', 0.0, steps=")
        assert "steps from 0 to 4: max_new_tokens=5" in told.value.expected
    with pytest.raises(SelectorError, match=r"no tokens=3[\s\S]*say steps=0"):
        free(demo_gpt2, EIFFEL, [lk.Save("hook_embed", tokens=3)])


# -- what functions are told


def test_functions_are_told_step_prompts_positions_and_mask(demo_gpt2: lk.HookedTransformer) -> None:
    told: list[tuple[int, list[int], list[list[int]], Any]] = []

    def look(act: Tensor, hook: lk.HookPoint) -> None:
        mask = None if hook.mask is None else hook.mask.tolist()
        told.append((hook.step, hook.prompts, hook.positions.tolist(), mask))
        assert act.shape[:2] == (2, hook.positions.shape[1])

    prompts = PROMPTS[:2]
    free(demo_gpt2, prompts, [("blocks.2.hook_resid_mid", look)], max_new_tokens=3)
    lengths = [len(demo_gpt2.to_str_tokens(text)) for text in prompts]
    pads = lengths[0] - lengths[1]
    assert pads > 0
    own = [True] * max(lengths), [False] * pads + [True] * lengths[1]
    positions = [list(range(lengths[0])), [0] * pads + list(range(lengths[1]))]
    assert told[0] == (0, [0, 1], positions, list(own))
    assert told[1][:3] == (1, [0, 1], [[lengths[0]], [lengths[1]]])
    assert told[2][:3] == (2, [0, 1], [[lengths[0] + 1], [lengths[1] + 1]])
    assert told[1][3] in (None, [[True], [True]])


def test_a_functions_edit_by_step_is_the_ops(shared: lk.HookedTransformer) -> None:
    found = [
        free(shared, [[5, 6], [7, 8]], hooks, return_logits=True)
        for hooks in (
            [("blocks.1.hook_mlp_out", lambda act, hook: act * (0.5 if hook.step == 2 else 1.0))],
            [lk.Scale("blocks.1.hook_mlp_out", 0.5, steps=2)],
        )
    ]
    assert found[0].logits is not None
    assert found[1].logits is not None
    assert all(error(*pair) < CLOSE for pair in zip(found[0].logits, found[1].logits, strict=True))


def test_hooks_around_a_generation_run_at_every_step(shared: lk.HookedTransformer) -> None:
    seen: list[int] = []
    plain = free(shared, [[5, 6]])
    with shared.hooks([("blocks.1.hook_mlp_out", lambda act, hook: seen.append(hook.step) or act * 0)]):
        around = free(shared, [[5, 6]], [lk.Save("blocks.1.hook_mlp_out")])
    assert seen == [0, 1, 2, 3, 4]
    assert not any(step.any() for step in around.saved["blocks.1.hook_mlp_out"])
    assert free(shared, [[5, 6]]).tokens[0].tolist() == plain.tokens[0].tolist()


@pytest.mark.parametrize("kind", ["hooks around it", "hooks between two steps", "a torch module's hook"])
def test_what_a_function_keeps_is_its_own_whoever_attached_it(shared: lk.HookedTransformer, kind: str) -> None:
    """It may be written to and differentiated by, also where the generation's own hooks are data only."""
    kept: list[Tensor] = []

    def keep(act: Tensor, hook: lk.HookPoint) -> None:
        kept.append(act)

    steps = shared.generate_steps([[5, 6]], max_new_tokens=3, eos_token_id=[], hooks=[lk.Scale("hook_embed", 1.1)])
    if kind == "hooks between two steps":
        next(steps)
    if kind == "a torch module's hook":
        handle = shared.blocks[0].mlp.register_forward_hook(lambda _, __, out: kept.append(out))
        list(steps)
        handle.remove()
    else:
        with shared.hooks([("blocks.0.hook_mlp_out", keep)]):
            list(steps)
    for act in kept:
        (act * torch.ones(1, requires_grad=True)).sum().backward()
        act.mul_(2)
    assert len(kept) == (2 if kind == "hooks between two steps" else 3)


# -- one step after another


def test_steps_are_the_generation(demo_gpt2: lk.HookedTransformer) -> None:
    hooks = [
        lk.Save("blocks.-1.hook_resid_post", tokens=-1),
        lk.Save("hook_embed", steps=[1, 3]),
        lk.Save("blocks.*.hook_mlp_out", steps=2, name="two"),
        lk.Scale("blocks.1.hook_mlp_out", 0.9, steps=slice(1, None)),
        lk.Save(lk.Act("hook_embed", tokens=-1).sum(-1), name="sum"),
    ]
    options: dict[str, Any] = {"max_new_tokens": 12, "hooks": hooks, "return_logits": True}
    whole = demo_gpt2.generate(PROMPTS, **options)
    steps = list(demo_gpt2.generate_steps(PROMPTS, **options))
    assert [step.index for step in steps] == list(range(9))
    assert [step.prompts for step in steps] == [(0, 1, 2)] * 9
    assert whole.logits is not None
    for row in range(3):
        assert [step.running[row] for step in steps] == [k < whole.steps_run[row] for k in range(9)]
        own = [step for step in steps if step.running[row]]
        assert [int(step.tokens[row]) for step in own] == whole.new_tokens[row].tolist()
        assert "".join(step.texts[row] for step in steps) == whole.new_texts[row]
        assert torch.equal(torch.stack([step.logits[row] for step in own]), whole.logits[row])
        assert [step.ended[row] for step in own] == [False] * (len(own) - 1) + [True]
    for name in ("blocks.3.hook_resid_post", "sum"):
        assert all(torch.equal(a, b.saved[name]) for a, b in zip(whole.saved[name], steps, strict=True))
    assert [index for index, step in enumerate(steps) if "hook_embed" in step.saved] == [1, 3]
    assert [index for index, step in enumerate(steps) if "two" in step.saved] == [2]
    assert torch.equal(steps[2].saved["two"]["blocks.0.hook_mlp_out"], whole.saved["two"]["blocks.0.hook_mlp_out"])


def test_between_steps_the_model_is_as_if_nothing_had_been_there(shared: lk.HookedTransformer) -> None:
    tokens = ids(2, 6)
    plain, others = shared(tokens), free(shared, [[3, 4]], [lk.Save("hook_embed")])
    hooks: list[Any] = [lk.Set("blocks.*.attn.hook_pattern", 0.1), ("blocks.1.hook_mlp_out", lambda act, _: act * 0)]
    whole = free(shared, tokens, hooks)
    steps = shared.generate_steps(tokens, max_new_tokens=5, eos_token_id=[], hooks=hooks)
    made = []
    for step in steps:
        made.append(step.tokens)
        assert nothing_attached(shared)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert torch.equal(shared(tokens), plain)
        assert torch.equal(shared.run_with_hooks(tokens, hooks).logits, shared.run_with_hooks(tokens, hooks).logits)
        assert free(shared, [[3, 4]], [lk.Save("hook_embed")]).tokens[0].tolist() == others.tokens[0].tolist()
    assert torch.equal(torch.stack(made, 1), torch.stack(whole.new_tokens))


def test_two_generations_step_in_turn(shared: lk.HookedTransformer) -> None:
    hooks = [[lk.Scale("blocks.0.hook_mlp_out", factor)] for factor in (0.2, 3.0)]
    alone = [free(shared, [[5, 6]], each).new_tokens[0].tolist() for each in hooks]
    runs = [shared.generate_steps([[5, 6]], max_new_tokens=5, eos_token_id=[], hooks=each) for each in hooks]
    turns = [[int(step.tokens[0]) for step in pair] for pair in zip(*runs, strict=True)]
    assert [list(row) for row in zip(*turns, strict=True)] == alone
    assert alone[0] != alone[1], "the hooks matter"


def test_what_a_step_gives_is_the_users_to_change(shared: lk.HookedTransformer) -> None:
    """And to differentiate by."""
    weight = torch.ones(shared.cfg.d_vocab, requires_grad=True)
    plain = free(shared, [[5, 6]])
    made = []
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": [], "return_logits": True}
    for step in shared.generate_steps(
        [[5, 6]], hooks=[lk.Save("hook_embed"), lk.Save("hook_logits", tokens=-1)], **options
    ):
        made.append(int(step.tokens[0]))
        for tensor in (step.logits, step.saved["hook_logits"]):
            (tensor * weight).sum().backward()
            tensor.mul_(2)
        step.saved["hook_embed"].zero_()
        step.tokens.fill_(0)
    assert made == plain.new_tokens[0].tolist()


def test_what_a_generation_gives_is_the_users_to_change(shared: lk.HookedTransformer) -> None:
    weight = torch.ones(shared.cfg.d_vocab, requires_grad=True)
    found = free(shared, [[5, 6]], [lk.Save("hook_logits")], return_logits=True)
    assert found.logits is not None
    assert found.logprobs is not None
    for tensor in (*found.logits, *found.saved["hook_logits"]):
        (tensor * weight).sum().backward()
        tensor.mul_(2)
    found.logprobs[0].mul_(2)
    found.new_tokens[0].add_(1)


def test_an_iterator_may_be_closed_or_left(shared: lk.HookedTransformer) -> None:
    plain = shared(ids(1, 4))
    hooks: list[Any] = [("*.hook_z", lambda act, _: act * 0), lk.Save("blocks.*.attn.hook_pattern")]
    steps = shared.generate_steps([[5, 6]], max_new_tokens=30, hooks=hooks)
    next(steps)
    steps.close()
    assert list(steps) == []
    for _ in shared.generate_steps([[5, 6]], max_new_tokens=30, hooks=hooks):
        break
    never_begun = shared.generate_steps([[5, 6]], max_new_tokens=30, hooks=hooks)
    del never_begun
    gc.collect()
    assert nothing_attached(shared)
    assert torch.equal(shared(ids(1, 4)), plain)


def test_an_exception_may_be_thrown_into_it(shared: lk.HookedTransformer) -> None:
    steps = shared.generate_steps([[5, 6]], max_new_tokens=30, hooks=[lk.Scale("*.hook_z", 0.5)])
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())
    assert nothing_attached(shared)
    assert list(steps) == []


def test_each_step_may_be_taken_in_another_thread(shared: lk.HookedTransformer) -> None:
    """As servers take them, which give every `next` to a thread of a pool."""
    hooks = [lk.Scale("blocks.0.hook_mlp_out", 3.0), lk.Save("blocks.0.hook_mlp_out", tokens=-1)]
    whole = free(shared, [[5, 6]], hooks, max_new_tokens=6)
    steps = shared.generate_steps([[5, 6]], max_new_tokens=6, eos_token_id=[], hooks=hooks)
    made = []
    pools = [ThreadPoolExecutor(1) for _ in range(3)]
    for index in range(6):
        made.append(pools[index % 3].submit(next, steps).result())
    assert [int(step.tokens[0]) for step in made] == whole.new_tokens[0].tolist()
    for kept, step in zip(whole.saved["blocks.0.hook_mlp_out"], made, strict=True):
        assert torch.equal(kept, step.saved["blocks.0.hook_mlp_out"])


def test_threads_generate_side_by_side(shared: lk.HookedTransformer) -> None:
    """On one model, each with hooks of its own."""

    def run(factor: float) -> list[int]:
        return (
            free(shared, [[5, 6]], [lk.Scale("blocks.*.hook_mlp_out", factor)], max_new_tokens=12)
            .new_tokens[0]
            .tolist()
        )

    factors = [0.0, 0.5, 1.5, 3.0]
    alone = [run(factor) for factor in factors]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, factors * 4)) == alone * 4
    assert len({*map(tuple, alone)}) > 1


# -- interrupted


class Failing:
    """A function that raises at a step."""

    def __init__(self, failure: type[BaseException], step: int) -> None:
        self.failure, self.step = failure, step

    def __call__(self, act: Tensor, hook: lk.HookPoint) -> None:
        if hook.step == self.step:
            raise self.failure


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_an_interrupt_leaves_nothing_and_says_where_it_was(
    demo_gpt2: lk.HookedTransformer, failure: type[BaseException]
) -> None:
    plain = demo_gpt2(EIFFEL)
    hooks: list[Any] = [
        lk.Save("*.hook_resid_post"), lk.Scale("*.hook_z", 0.99), ("blocks.1.hook_mlp_out", Failing(failure, 3)),
        lk.Save("blocks.2.attn.hook_pattern"),
    ]  # fmt: skip
    with pytest.raises(failure) as told:
        demo_gpt2.generate(PROMPTS, max_new_tokens=12, hooks=hooks)
    notes = "\n".join(told.value.__notes__)
    assert "'blocks.1.hook_mlp_out'" in notes
    assert "step 3 of at most 12" in notes
    assert "prompts 0, 1, 2" in notes
    assert nothing_attached(demo_gpt2)
    assert torch.equal(demo_gpt2(EIFFEL), plain)
    assert torch.is_grad_enabled()
    steps = demo_gpt2.generate_steps(PROMPTS, max_new_tokens=12, hooks=hooks)
    assert [next(steps).index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(failure) as told:
        next(steps)
    assert "step 3 of at most 12" in "\n".join(told.value.__notes__)
    assert nothing_attached(demo_gpt2)


def test_an_interrupt_anywhere_says_step_and_prompts(
    demo_gpt2: lk.HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes while torch multiplies, mostly."""
    unembed = demo_gpt2.unembed
    calls = []

    def interrupted(*given: Tensor) -> Tensor:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return type(unembed).forward(unembed, *given)

    monkeypatch.setattr(unembed, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt) as told:
        free(demo_gpt2, EIFFEL, [lk.Scale("*.hook_z", 0.5)])
    assert told.value.__notes__ == ["at step 2 of at most 5, prompts 0"]


def test_an_error_in_a_processor_or_a_criterion_says_the_step_too(shared: lk.HookedTransformer) -> None:
    def fail(input_ids: Tensor, scores: Any) -> Tensor:
        if input_ids.shape[1] >= 4:
            raise ZeroDivisionError
        return scores if isinstance(scores, Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)

    for name, step in [("logits_processor", 2), ("stopping_criteria", 1)]:
        with pytest.raises(ZeroDivisionError) as told:
            free(shared, [[5, 6]], **{name: [fail]})
        assert told.value.__notes__ == [f"at step {step} of at most 5, prompts 0"]


def test_a_replacement_that_does_not_fit_says_where(shared: lk.HookedTransformer) -> None:
    def short(act: Tensor, hook: lk.HookPoint) -> Tensor:
        return act[:, :1]  # which fits at every later step

    with pytest.raises(ReplacementError) as told:
        free(shared, [[5, 6]], [("blocks.1.hook_mlp_out", short)])
    assert "step 0 of at most 5" in "\n".join(told.value.__notes__)
    assert "'blocks.1.hook_mlp_out'" in str(told.value)
    assert nothing_attached(shared)


def test_many_prompts_are_not_all_listed(shared: lk.HookedTransformer) -> None:
    with pytest.raises(ZeroDivisionError) as told:
        free(shared, ids(40, 3), [("blocks.1.hook_mlp_out", Failing(ZeroDivisionError, 1))])
    assert told.value.__notes__[-1] == "at step 1 of at most 5, prompts 0, 1, 2, 3, 4, 5, 6, 7, ..."


# -- nobody pays for what nobody asked for


class Counted(TorchDispatchMode):
    """Which operations ran, with the shapes of what they made and whether that is new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, tuple[int, ...], int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.ran.append((str(op), tuple(tensor.shape), tensor.untyped_storage().data_ptr()))
        return made

    def taken(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Those since the last call."""
        ran, self.ran = self.ran, []
        return ran


def by_step(model: lk.HookedTransformer, hooks: Any, prompts: Any = ((1, 2, 3, 4, 5, 6, 7),)) -> list[list[Any]]:
    """What ran in each of six steps."""
    steps, ran = model.generate_steps([list(p) for p in prompts], max_new_tokens=6, eos_token_id=[], hooks=hooks), []
    with Counted() as counted:
        for _ in steps:
            ran.append(counted.taken())
    return ran


def softmaxes(ran: list[list[Any]]) -> list[int]:
    return [sum("softmax" in name for name, _, _ in step) for step in ran]


@pytest.mark.parametrize("at", ["hook_pattern", "hook_attn_scores"])
def test_patterns_exist_at_the_steps_that_ask_only(shared: lk.HookedTransformer, at: str) -> None:
    assert softmaxes(by_step(shared, [lk.Scale("*.hook_z", 0.5), lk.Save("*.hook_resid_post")])) == [0] * 6
    assert softmaxes(by_step(shared, [lk.Save(f"blocks.1.attn.{at}", steps=2)])) == [0, 0, 1, 0, 0, 0]
    assert softmaxes(by_step(shared, [lk.Scale(f"blocks.*.attn.{at}", 0.9, steps=slice(4, None))])) == [
        0,
        0,
        0,
        0,
        3,
        3,
    ]
    reads = lk.Set(
        "blocks.1.hook_attn_out", lk.Act(f"blocks.1.attn.{at}", steps=0)[:, 0, -1, :1].unsqueeze(-1), steps=3
    )
    assert softmaxes(by_step(shared, [reads])) == [1, 0, 0, 0, 0, 0]


def test_heads_are_told_apart_at_the_steps_that_ask_only(shared: lk.HookedTransformer) -> None:
    heads = shared.cfg.n_heads
    ran = by_step(shared, [lk.Save("blocks.1.attn.hook_result", steps=[1, 3])])
    width = shared.cfg.d_model
    assert [any(shape == (1, 1, heads, width) for _, shape, _ in step) for step in ran] == [
        False,
        True,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("name", ["demo_gpt2", "demo_llama"])
def test_a_decoding_step_copies_no_weight(name: str, request: pytest.FixtureRequest) -> None:
    """What it makes is a few rows; the smallest matrix of weights has 8,192 numbers."""
    model = request.getfixturevalue(name)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    steps = model.generate_steps(
        EIFFEL, max_new_tokens=6, eos_token_id=[], hooks=[lk.Scale("blocks.*.hook_mlp_out", 0.5), lk.Save("*.hook_z")]
    )
    next(steps)
    with Counted() as counted:
        for _ in steps:
            pass
    smallest = min(p.numel() for p in model.parameters() if p.dim() == 2)
    sizes = [torch.Size(shape).numel() for _, shape, data in counted.ran if data not in held]
    assert max(sizes) < smallest
    assert max(sizes) >= model.cfg.d_vocab, "the logits were seen"


@contextmanager
def unembedded(model: lk.HookedTransformer) -> Iterator[list[int]]:
    """How many positions each call of the unembedding gets."""
    seen: list[int] = []
    handle = model.unembed.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


LOGIT_READERS: list[tuple[str, Callable[[], Any], int]] = [
    ("nobody", list, 1),
    ("the last", lambda: [lk.Save("hook_logits", tokens=-1)], 1),
    ("the last three", lambda: [lk.Save("hook_logits", tokens=slice(-3, None), steps=0)], 3),
    ("the second from the end", lambda: [lk.Add("hook_logits", 1.0, tokens=-2, steps=0)], 2),
    ("an expression", lambda: [lk.Save(lk.Act("hook_logits", tokens=[-1, -2], steps=0).sum(), name="sum")], 2),
    ("the first", lambda: [lk.Save("hook_logits", tokens=0, steps=0)], 7),
    ("all", lambda: [lk.Save("hook_logits")], 7),
    ("a function", lambda: [("hook_logits", lambda act, hook: None)], 7),
    ("later steps only", lambda: [lk.Save("hook_logits", steps=slice(1, None))], 1),
    ("the final norm", lambda: [lk.Save("ln_final.hook_normalized")], 1),
]


@pytest.mark.parametrize(
    ("hooks", "columns"), [row[1:] for row in LOGIT_READERS], ids=[row[0] for row in LOGIT_READERS]
)
def test_only_positions_that_somebody_reads_are_unembedded(
    shared: lk.HookedTransformer, hooks: Callable[[], Any], columns: int
) -> None:
    tokens = ids(2, 7)
    with unembedded(shared) as seen:
        found = free(shared, tokens, hooks(), max_new_tokens=3)
    assert seen == [columns, 1, 1]
    plain, cache = shared.run_with_cache(tokens, ["hook_logits", "ln_final.hook_normalized"])
    for op in hooks():
        if isinstance(op, lk.Save) and "hook_logits" in found.saved and op.selectors.steps in (0, None):
            kept = found.saved["hook_logits"]
            kept = kept[0] if isinstance(kept, list) else kept
            chosen = slice(None) if op.selectors.tokens is None else op.selectors.tokens
            assert error(kept, plain[:, chosen]) < CLOSE
        if "ln_final.hook_normalized" in found.saved:
            assert error(found.saved["ln_final.hook_normalized"][0], cache["ln_final.hook_normalized"]) < CLOSE


def test_logits_hooked_around_a_generation_are_whole(shared: lk.HookedTransformer) -> None:
    seen: list[Any] = []
    with unembedded(shared) as columns, shared.hooks([("hook_logits", lambda act, _: seen.append(act.shape[1]))]):
        free(shared, ids(2, 7), max_new_tokens=2)
    assert columns == seen == [7, 1]


def test_padded_rows_are_unembedded_as_far_as_somebody_reads(shared: lk.HookedTransformer) -> None:
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    with unembedded(shared) as columns:
        found = free(shared, prompts, [lk.Save("hook_logits", tokens=0, steps=0)], max_new_tokens=1)
    assert columns == [5]
    for row, prompt in enumerate(prompts):
        assert error(found.saved["hook_logits"][row], shared([prompt])[0, 0]) < CLOSE
    with unembedded(shared) as columns:
        free(shared, prompts, [lk.Save("hook_logits", tokens=0, steps=0, prompts=1)], max_new_tokens=1)
    assert columns == [2]


def test_a_prefill_unembeds_nothing_that_nobody_reads(shared: lk.HookedTransformer) -> None:
    with unembedded(shared) as columns:
        shared.prefill([[1, 2, 3]])
    assert sum(columns) <= 1


# -- what is held in memory


def test_a_save_holds_its_own_numbers_and_nothing_else(demo_llama: lk.HookedTransformer) -> None:
    """No view of a large activation, and nothing else of the 200 steps."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    free(demo_llama, EIFFEL, max_new_tokens=2)  # tables and so on are there
    before = tensors()
    found = free(
        demo_llama, EIFFEL, [lk.Save("blocks.1.hook_mlp_out", tokens=-1, dims=slice(0, 64))], max_new_tokens=200
    )
    kept = found.saved["blocks.1.hook_mlp_out"]
    assert [tuple(step.shape) for step in kept] == [(1, 64)] * 200
    assert {step.untyped_storage().nbytes() for step in kept} == {64 * 4}
    assert len({step.untyped_storage().data_ptr() for step in kept}) == 200
    assert tensors() - before <= 200 + 4, "the saves, and the two lists of tokens"


GENERATIONS = """
import gc, tracemalloc, psutil, torch, lenskit as lk

model = lk.HookedTransformer.from_pretrained("demo-gpt2")
plan = lk.Plan([lk.Save("blocks.*.hook_resid_post"), lk.Scale("blocks.1.attn.hook_pattern", 0.9, steps=slice(2, None))])
double = ("blocks.0.hook_mlp_out", lambda act, hook: act * 2)

def run(times):
    for index in range(times):
        prompt = torch.arange(2 * (5 + index % 25)).reshape(2, -1)
        options = {"max_new_tokens": 12, "eos_token_id": [], "return_logits": True}
        model.generate(prompt, hooks=plan, **options)
        model.generate(prompt, hooks=[lk.Save("hook_embed"), double], **options)
        next(model.generate_steps(prompt, hooks=plan, **options))
    gc.collect()

def held():
    return tracemalloc.get_traced_memory()[0], psutil.Process().memory_info().rss

run(25)
tracemalloc.start()
run(5)
before = held()
run(50)
print(*(now - then for now, then in zip(held(), before)))
"""


@pytest.mark.slow
def test_generations_leave_nothing_behind() -> None:
    """Also where one plan meets prompts of ever other lengths, which it compiles anew."""
    objects, resident = map(int, in_a_process(GENERATIONS).split())
    assert objects < 300_000
    assert resident < 20 * 2**20


# -- single facts


def test_a_head_without_values_raises_the_loss(demo_gpt2: lk.HookedTransformer) -> None:
    text = "Madison Square Garden is located in the city of New York City."
    runs = [demo_gpt2.run_with_hooks(text, hooks) for hooks in ([], [lk.Set("blocks.0.attn.hook_v", 0.0, heads=7)])]
    whole, without = [float(mean_loss(run.logits.detach(), run.tokens)) for run in runs]
    assert without > whole + 0.01


def test_noise_shows_in_a_save_after_it_and_in_none_before(demo_gpt2: lk.HookedTransformer) -> None:
    last, d = "blocks.-1.hook_resid_post", demo_gpt2.cfg.d_model
    noise = lk.randn(d, seed=0) * 0.1
    hooks = [lk.Save(last, name="before"), lk.Add(last, noise), lk.Save(last, name="after")]
    clean = free(demo_gpt2, EIFFEL, [lk.Save(last)])
    found = free(demo_gpt2, EIFFEL, hooks)
    drawn = torch.randn(d, generator=torch.Generator().manual_seed(0)) * 0.1
    for step, (before, after) in enumerate(zip(found.saved["before"], found.saved["after"], strict=True)):
        if step == 0:
            assert torch.equal(before, clean.saved["blocks.3.hook_resid_post"][0])
        torch.testing.assert_close(after - before, drawn.expand_as(before), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["demo_gpt2", "demo_llama"])
def test_the_first_token_is_each_rows_own_under_padding(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    found = free(
        model, PROMPTS, [lk.Save("hook_embed", tokens=0, steps=0), lk.Save("hook_embed", tokens=-1, name="last")]
    )
    first = torch.stack([model.to_tokens(text).tokens[0, 0] for text in PROMPTS])
    last = torch.stack([model.to_tokens(text).tokens[0, -1] for text in PROMPTS])
    assert torch.equal(found.saved["hook_embed"], model.embed(first[None])[0])
    assert torch.equal(found.saved["last"][0], model.embed(last[None])[0])


# -- from prompt to prompt

GARDEN, BLANKS = "Madison Square Garden is located in the city of New", "_ _ _ _ _ _ _ _ _ _"


def test_a_prompts_embeddings_give_another_its_continuation(demo_gpt2: lk.HookedTransformer) -> None:
    given = lk.Set("hook_embed", lk.Act("hook_embed", prompts=0), prompts=1, steps=0)
    found = demo_gpt2.generate([GARDEN, BLANKS], max_new_tokens=3, hooks=[given], return_logits=True)
    assert found.new_texts == [" York City."] * 2
    assert found.texts[1] == BLANKS + " York City."
    assert found.logits is not None
    assert error(found.logits[1], found.logits[0]) < CLOSE
    assert demo_gpt2.generate(BLANKS, max_new_tokens=3).new_texts != [" York City."]
    # From the second step on both rows have the same tokens anyway, so the prompt's step may be left out.
    every = lk.Set("hook_embed", lk.Act("hook_embed", prompts=0), prompts=1)
    assert (
        demo_gpt2.generate([GARDEN, BLANKS], max_new_tokens=4, hooks=[every]).new_texts
        == [" York City.<|endoftext|>"] * 2
    )


def test_prompts_of_other_lengths_are_an_error_before_anything_runs(demo_gpt2: lk.HookedTransformer) -> None:
    given = lk.Set("hook_embed", lk.Act("hook_embed", prompts=0), prompts=1, steps=0)
    seen: list[Any] = []
    with demo_gpt2.hooks([("hook_embed", lambda act, _: seen.append(act))]), pytest.raises(ValueFitError) as told:
        demo_gpt2.generate([GARDEN, "_ _ _"], max_new_tokens=3, hooks=[given])
    assert not seen
    assert "prompt 0 has 10 tokens, prompt 1 has 3 tokens" in told.value.got
    assert str(told.value).startswith("hooks[0] Set('hook_embed', Act('hook_embed', prompts=0), prompts=1, steps=0)")


def test_a_later_layer_into_an_earlier_one_takes_two_passes(demo_gpt2: lk.HookedTransformer) -> None:
    """Patchscope-like: what prompt 0 has at layer 3 goes into layer 1 of prompt 1; the same as by hand."""
    late = lk.Act("blocks.3.hook_resid_post", prompts=0, tokens=-1, steps=0)
    given = lk.Set("blocks.1.hook_resid_pre", late, prompts=1, tokens=-1, steps=0)
    kept = [lk.Save("blocks.2.hook_resid_post", tokens=-1, steps=0)]
    found = free(demo_gpt2, [GARDEN, "Hagia Sophia"], [given, *kept], return_logits=True)
    _, cache = demo_gpt2.run_with_cache(GARDEN, "blocks.3.hook_resid_post")
    by_hand = lk.Set("blocks.1.hook_resid_pre", cache["resid_post", 3][0, -1], tokens=-1, steps=0)
    alone = free(demo_gpt2, "Hagia Sophia", [by_hand, *kept], return_logits=True)
    assert found.new_tokens[1].tolist() == alone.new_tokens[0].tolist()
    assert found.logits is not None
    assert alone.logits is not None
    assert error(found.logits[1], alone.logits[0]) < CLOSE
    assert error(found.saved["blocks.2.hook_resid_post"][1], alone.saved["blocks.2.hook_resid_post"][0]) < CLOSE
    plain = free(demo_gpt2, [GARDEN, "Hagia Sophia"])
    assert found.new_tokens[0].tolist() == plain.new_tokens[0].tolist()
    steps = list(demo_gpt2.generate_steps([GARDEN, "Hagia Sophia"], max_new_tokens=3, eos_token_id=[], hooks=[given]))
    assert [(step.index, step.prompts) for step in steps] == [(k, (row,)) for row in (0, 1) for k in range(3)]


def test_a_later_step_of_one_prompt_into_an_earlier_one_of_another(demo_gpt2: lk.HookedTransformer) -> None:
    late = lk.Act("blocks.2.hook_resid_post", prompts=0, tokens=-1, steps=4)
    hooks = [lk.Set("blocks.2.hook_resid_post", late, prompts=1, tokens=-1, steps=0)]
    found = free(demo_gpt2, [GARDEN, "Hagia Sophia"], hooks)
    kept = free(demo_gpt2, GARDEN, [lk.Save("blocks.2.hook_resid_post", tokens=-1, steps=4)]).saved
    by_hand = lk.Set("blocks.2.hook_resid_post", kept["blocks.2.hook_resid_post"][0], tokens=-1, steps=0)
    assert found.new_tokens[1].tolist() == free(demo_gpt2, "Hagia Sophia", [by_hand]).new_tokens[0].tolist()


def test_a_prompt_that_has_ended_has_nothing_to_give(demo_gpt2: lk.HookedTransformer) -> None:
    hooks = [
        lk.Add(
            "blocks.2.hook_resid_post",
            lk.Act("blocks.2.hook_resid_post", prompts=0, tokens=-1) * 0,
            prompts=1,
            tokens=-1,
        )
    ]
    with pytest.raises(StepError, match="needs what prompt 0 does not compute") as told:
        demo_gpt2.generate([EIFFEL, "Hagia Sophia"], max_new_tokens=12, hooks=hooks)
    assert "at step 3: prompt 0 ended before" in told.value.got
    assert nothing_attached(demo_gpt2)
    assert free(demo_gpt2, [EIFFEL, "Hagia Sophia"], hooks).steps_run == [5, 5]
    # The other way round, the one that gives is the one that goes on.
    swapped = demo_gpt2.generate(["Hagia Sophia", EIFFEL], max_new_tokens=12, hooks=hooks)
    assert swapped.steps_run == [9, 3]


def test_what_a_thread_needs_is_no_others(shared: lk.HookedTransformer) -> None:
    """A generation elsewhere that asks for patterns does not make this one compute them."""
    inside, done = threading.Event(), threading.Event()

    def wait(act: Tensor, hook: lk.HookPoint) -> None:
        inside.set()
        assert done.wait(30)

    hooks: list[Any] = [lk.Save("blocks.0.attn.hook_pattern"), ("blocks.1.hook_mlp_out", wait)]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(free, shared, [[5, 6]], hooks, max_new_tokens=1)
        assert inside.wait(30)
        here = free(shared, [[5, 6]], [lk.Save("hook_embed")])
        done.set()
        assert list(other.result().saved) == ["blocks.0.attn.hook_pattern"]
    assert list(here.saved) == ["hook_embed"]
