"""Generation, the cost of plans, and prompts that share a prefix.

Everybody continues the same prompt greedily, with nothing that ends a row, by the same checkpoint; the tokens must be
the same before anything is timed. One exception is made. With a cache, TransformerLens 3.9 gives new tokens wrong
learned positions (it adds the past's length to positions that count from the prompt's start), so its GPT-2 makes other
tokens than its own uncached `generate`. There, the uncached one must agree; the cached one, which does as much work
with a wrong position as with the right one, is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_models import ABSENT, BARE, BareWeights, is_stream, models
from benchmark_report import LENSKIT, SDPA, TL, Bar, Row
from benchmark_sizes import GPT2, LLAMA_110M, LONG, SMALL, Size
from benchmark_timing import Comparison, interleave
from torch import Tensor

import lenskit as lk
from lenskit.interventions.forward import geometry_of
from lenskit.interventions.ops import Op

STREAM = "blocks.*.hook_resid_post"
PROMPT = 16  # tokens

# Tokens of a prompt [1 pos] in, new tokens [new] out.
Continue = Callable[..., Tensor]
Comparisons = tuple[tuple[Comparison, Bar | None], ...]


@dataclass(frozen=True)
class GenerationCase:
    """A size, and how many tokens are generated. weight: its share of the time that is left for such cases."""

    name: str
    size: Size
    n_new: int
    comparisons: Comparisons
    weight: float
    quick: bool = True

    @property
    def section(self) -> str:
        return f"Generation, {self.size}, 1×{PROMPT} tokens and {self.n_new} new ones"


def _plain(hf: Bar, tl: Bar | None) -> Comparisons:
    return (
        (Comparison("generate", "generate", "HF's generate", SDPA, "generate"), hf),
        (Comparison("generate", "generate", "TransformerLens's generate", TL, "generate"), tl),
    )


SMALL_COMPARISONS: Comparisons = (
    *_plain(Bar(0.25), Bar(0.35)),
    (Comparison("generate", "generate", "bare torch calls", BARE, "generate"), None),
    (Comparison("with lk.Add in every layer", "add", "own unhooked generate", None, "generate"), Bar(1.25)),
    (Comparison("with lk.Add in every layer", "add", "bare torch calls, added too", BARE, "add"), None),
    (Comparison("with the same function in every layer", "function", "own unhooked generate", None, "generate"), None),
)

GENERATION_CASES = (
    GenerationCase("generation-small", SMALL, 32, SMALL_COMPARISONS, weight=1),
    GenerationCase("generation-gpt2", GPT2, 16, _plain(Bar(1.0, noise=0.05), None), weight=1, quick=False),
    GenerationCase(
        "generation-llama", LLAMA_110M, 16, _plain(Bar(1.0, noise=0.05), Bar(0.34)), weight=1.2, quick=False
    ),
)


def generation(case: GenerationCase, seconds: float) -> list[Row]:
    """Every contender's generations, interleaved."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(case.size.d_vocab, (1, PROMPT), generator=generator)
    vector = torch.randn(case.size.d_model, generator=generator)
    wanted = {comparison.operation for comparison, _ in case.comparisons}
    of = {LENSKIT: of_lenskit, SDPA: of_hf, BARE: of_torch, TL: of_transformer_lens}
    found = {name: of[name](model, case.n_new, vector) for name, model in models(case.size).items() if name in of}
    if not any(comparison.base == BARE for comparison, _ in case.comparisons):
        found.pop(BARE, None)
    calls = {
        (name, operation): partial(call, prompt)
        for operation in ("generate", "add", "function")
        for name, operations in found.items()
        if operation in wanted and (call := operations.get(operation))
    }
    checked = {
        key: partial(call, cached=False) if key[0] == TL and case.size.family == "gpt2" else call
        for key, call in calls.items()
    }
    with torch.no_grad():
        _check_agreement({key: call() for key, call in checked.items()}, case.n_new)
        samples = interleave(calls, seconds=seconds)
    return [
        comparison.row(samples, section=case.section, bar=bar)
        for comparison, bar in case.comparisons
        if comparison.base in (None, *found, *ABSENT)
    ]


def _check_agreement(made: dict[tuple[str, str], Tensor], n_new: int) -> None:
    """All make the same tokens, as many as they were told to, and the edit changes them."""
    plain, edited = made[LENSKIT, "generate"], made.get((LENSKIT, "add"))
    if edited is not None and torch.equal(plain, edited):
        raise SystemExit("the edit leaves every token as it was: a contender that skips it would not be noticed")
    for (name, operation), tokens in made.items():
        expected = plain if operation == "generate" else edited
        if tokens.shape != (n_new,) or not torch.equal(tokens, expected):
            raise SystemExit(f"{operation}: {name} makes {tokens.tolist()}, {LENSKIT} {expected.tolist()}")


def of_lenskit(model: lk.HookedTransformer, n_new: int, vector: Tensor) -> dict[str, Continue]:
    plan = lk.Plan([lk.Add(STREAM, vector)])
    function = [(STREAM, lambda activation, hook: activation + vector)]

    def generate(prompt: Tensor, hooks: Any = ()) -> Tensor:
        return model.generate(prompt, max_new_tokens=n_new, eos_token_id=[], hooks=hooks).new_tokens[0]

    return {"generate": generate, "add": partial(generate, hooks=plan), "function": partial(generate, hooks=function)}


def of_hf(model: Any, n_new: int, vector: Tensor) -> dict[str, Continue]:
    options = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(prompt: Tensor) -> Tensor:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, PROMPT:]

    return {"generate": generate}


def of_transformer_lens(model: Any, n_new: int, vector: Tensor) -> dict[str, Continue]:
    options = {"max_new_tokens": n_new, "do_sample": False, "stop_at_eos": False, "verbose": False}

    def generate(prompt: Tensor, *, cached: bool = True) -> Tensor:
        return model.generate(prompt, use_past_kv_cache=cached, **options)[0, PROMPT:]

    def hooked(prompt: Tensor, *, cached: bool = True) -> Tensor:
        with model.hooks(fwd_hooks=[(is_stream, lambda activation, hook: activation + vector)]):
            return generate(prompt, cached=cached)

    return {"generate": generate, "function": hooked}


def of_torch(hf_model: torch.nn.Module, n_new: int, vector: Tensor) -> dict[str, Continue]:
    """GPT-2's decoding as nothing but torch calls on plain tensors, over buffers of the length that they will need."""
    weights = BareWeights(hf_model)
    n_heads, d_model, eps = weights.n_heads, weights.d_model, weights.eps

    def step(tokens: Tensor, past: int, cache: list[tuple[Tensor, Tensor]], added: Tensor | None) -> Tensor:
        """The next token [1]."""
        batch, pos = tokens.shape
        end = past + pos
        resid = F.embedding(tokens, weights.embed) + F.embedding(torch.arange(past, end), weights.pos_embed)
        for tensors, (keys, values) in zip(weights.layers, cache, strict=True):
            g1, b1, w_qkv, b_qkv, w_o, b_o, g2, b2, w_in, b_in, w_out, b_out = tensors
            qkv = F.linear(torch.layer_norm(resid, (d_model,), g1, b1, eps), w_qkv, b_qkv)
            q, k, v = qkv.view(batch, pos, 3, n_heads, -1).transpose(1, 3).unbind(2)
            keys.narrow(2, past, pos).copy_(k)
            values.narrow(2, past, pos).copy_(v)
            k, v = keys.narrow(2, 0, end), values.narrow(2, 0, end)
            z = F.scaled_dot_product_attention(q, k, v, is_causal=pos > 1).transpose(1, 2).flatten(2)
            resid = resid + F.linear(z, w_o, b_o)
            pre = F.linear(torch.layer_norm(resid, (d_model,), g2, b2, eps), w_in, b_in)
            resid = resid + F.linear(F.gelu(pre, approximate="tanh"), w_out, b_out)
            if added is not None:
                resid = resid + added
        last = torch.layer_norm(resid.narrow(1, pos - 1, 1), (d_model,), *weights.final, eps)
        return F.linear(last, weights.unembed).select(1, 0).argmax(-1)

    @torch.inference_mode()
    def generate(prompt: Tensor, added: Tensor | None = None) -> Tensor:
        room = (1, n_heads, prompt.shape[1] + n_new - 1, d_model // n_heads)
        cache = [(torch.empty(room), torch.empty(room)) for _ in weights.layers]
        made = [step(prompt, 0, cache, added)]
        for index in range(n_new - 1):
            made.append(step(made[-1].unsqueeze(1), prompt.shape[1] + index, cache, added))
        return torch.cat(made)

    return {"generate": generate, "add": partial(generate, added=vector)}


# -- prompts that share a prefix

N_PREFIX, N_OWN, N_PROMPTS = 512, 8, 16


def shared_prefix(seconds: float) -> list[Row]:
    """The next token of prompts that begin alike: the beginning processed once, or with every prompt."""
    [size] = (size for size in LONG if size.family == "gpt2")
    model: lk.HookedTransformer = models(size)[LENSKIT]
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(size.d_vocab, (1, N_PREFIX), generator=generator)
    own = torch.randint(size.d_vocab, (N_PROMPTS, N_OWN), generator=generator)
    whole = torch.cat((prefix.expand(N_PROMPTS, -1), own), 1)
    options: dict[str, Any] = {"max_new_tokens": 1, "eos_token_id": []}

    def shared() -> Sequence[Tensor]:
        return model.generate(own, past=model.prefill(prefix), **options).new_tokens

    def separate() -> Sequence[Tensor]:
        return model.generate(whole, **options).new_tokens

    if not torch.equal(torch.cat(list(shared())), torch.cat(list(separate()))):
        raise SystemExit("prompts after a shared prefix do not go on as whole prompts do")
    samples = interleave({(LENSKIT, "shared"): shared, (LENSKIT, "separate"): separate}, seconds=seconds)
    comparison = Comparison("prefill once, then generate", "shared", "generate of whole prompts", LENSKIT, "separate")
    section = f"The next token of {N_PROMPTS} prompts that share {N_PREFIX} of {N_PREFIX + N_OWN} tokens, {size}"
    return [comparison.row(samples, section=section, bar=Bar(0.2))]


# -- plans


def hundred_ops(size: Size, tensors: Sequence[Tensor]) -> list[Op]:
    """What a plan can hold: every op, numbers, tensors and expressions, with selectors and without."""
    ops: list[Op] = []
    for layer, tensor in enumerate(tensors):
        block = f"blocks.{layer}"
        query = lk.Act(f"{block}.attn.hook_q", tokens=-1)
        ops += [
            lk.Save(f"{block}.hook_resid_pre", tokens=-1),
            lk.Save(f"{block}.hook_resid_post"),
            lk.Set(f"{block}.mlp.hook_post", 0.0, dims=[1, 5, 7]),
            lk.Set(f"{block}.attn.hook_k", query * 0.5, tokens=-1),
            lk.Add(f"{block}.hook_attn_out", tensor),
            lk.Add(f"{block}.hook_mlp_out", tensor, tokens=slice(4, None)),
            lk.Scale(f"{block}.attn.hook_z", 0.5, heads=1),
            lk.Scale(f"{block}.hook_resid_mid", 0.9),
        ]
    final = f"blocks.{size.n_layers - 1}.hook_resid_post"
    return [*ops, *(lk.Save(final, tokens=index, name=f"final {index}") for index in range(100 - len(ops)))]


def planning(seconds: float) -> list[Row]:
    """What a plan of 100 ops costs before it runs, the first time and again, against one unhooked pass."""
    model: lk.HookedTransformer = models(SMALL)[LENSKIT]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SMALL.d_vocab, (1, PROMPT), generator=generator)
    tensors = torch.randn(SMALL.n_layers, SMALL.d_model, generator=generator).unbind(0)
    batch = model.to_tokens(tokens)

    def compiled(plan: lk.Plan) -> object:
        return plan.compile(model, model.hook_points, geometry_of(batch, None), n_steps=None)

    kept = lk.Plan(hundred_ops(SMALL, tensors))
    with torch.no_grad():
        samples = interleave(
            {
                (LENSKIT, "forward"): lambda: model(tokens),
                (LENSKIT, "first"): lambda: compiled(lk.Plan(hundred_ops(SMALL, tensors))),
                (LENSKIT, "again"): lambda: compiled(kept),
                (LENSKIT, "run"): lambda: model.run_with_hooks(tokens, kept),
            },
            seconds=seconds,
        )
    unit = "own unhooked forward"
    rows: Comparisons = (
        (Comparison("ops written, checked and planned", "first", unit, LENSKIT, "forward"), Bar(5.0)),
        (Comparison("the same Plan again: finding its program", "again", unit, LENSKIT, "forward"), Bar(0.1)),
        (Comparison("a forward pass with all of them", "run", unit, LENSKIT, "forward"), None),
    )
    section = f"A plan of 100 ops, {SMALL}, 1×{PROMPT} tokens"
    return [comparison.row(samples, section=section, bar=bar) for comparison, bar in rows]
