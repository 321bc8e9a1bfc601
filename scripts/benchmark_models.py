"""The contenders: the same weights in lenskit, Hugging Face and TransformerLens, and what each is asked to do."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from benchmark_report import EAGER, LENSKIT, SDPA, TL, Bar, Row
from benchmark_sizes import GPT2, SMALL, SMALL_LLAMA, Size
from benchmark_timing import Comparison, interleave
from torch import Tensor

import lenskit as lk

try:
    import transformer_lens
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights
except ModuleNotFoundError:
    transformer_lens: ModuleType | None = None  # type: ignore[no-redef]

ABSENT = set() if transformer_lens else {TL}
BARE = "torch calls"  # a function that only makes lenskit's torch calls: what no library around them can go below
TOLERANCE = 1e-5  # of logits, relative to the largest

Operation = Callable[[Tensor], Any]


@dataclass(frozen=True)
class SpeedCase:
    """A size and an input. bars: by operation. weight: its share of the time that is left for such cases."""

    name: str
    size: Size
    batch: int
    pos: int
    operations: tuple[str, ...]
    bars: dict[str, Bar]
    weight: float
    quick: bool = True

    @property
    def section(self) -> str:
        return f"Speed, {self.size}, {self.batch}×{self.pos} tokens"


COMPARISONS = (
    Comparison("unhooked forward", "forward", "HF sdpa", SDPA, "forward"),
    Comparison("unhooked forward, HF's default call", "forward", "HF sdpa, KV cache", SDPA, "forward_default"),
    Comparison("unhooked forward", "forward", "bare torch calls", BARE, "forward", barred=False),
    Comparison("run_with_cache of everything", "cache_all", "TransformerLens", TL, "cache_all"),
    Comparison("run_with_cache of resid_post", "cache_resid", "own unhooked forward", None, "forward"),
    Comparison("an edit in every layer", "edit", "own unhooked forward", None, "forward"),
)
EVERYTHING = ("forward", "forward_default", "cache_all", "cache_resid", "edit")
CORE = ("forward", "cache_all", "cache_resid")  # where a call takes seconds

SMALL_BARS = {"forward": Bar(0.30), "cache_all": Bar(0.40), "cache_resid": Bar(1.10)}
LARGE_BARS = {"forward": Bar(1.0, noise=0.05), "cache_all": Bar(0.40), "cache_resid": Bar(1.10)}

SPEED_CASES = (
    SpeedCase("speed-small", SMALL, 1, 16, EVERYTHING, SMALL_BARS, weight=1.2),
    SpeedCase("speed-small-llama", SMALL_LLAMA, 1, 16, EVERYTHING, {"cache_resid": Bar(1.10)}, weight=1),
    SpeedCase("speed-gpt2-1x128", GPT2, 1, 128, EVERYTHING, LARGE_BARS, weight=2),
    SpeedCase("speed-gpt2-8x128", GPT2, 8, 128, CORE, LARGE_BARS, weight=3.5, quick=False),
    SpeedCase("speed-gpt2-1x1024", GPT2, 1, 1024, CORE, LARGE_BARS, weight=4.3, quick=False),
)


def speed(case: SpeedCase, seconds: float) -> list[Row]:
    """Every operation of every contender, interleaved."""
    tokens = torch.randint(case.size.d_vocab, (case.batch, case.pos), generator=torch.Generator().manual_seed(1))
    found = contenders(case.size)
    with torch.no_grad():
        check_agreement(found, tokens[:1, :128])
        calls = {
            (name, operation): _bind(operations[operation], tokens)
            for operation in case.operations
            for name, operations in found.items()
            if operation in operations
        }
        samples = interleave(calls, seconds=seconds)
    return [
        comparison.row(samples, section=case.section, bar=case.bars.get(comparison.operation))
        for comparison in COMPARISONS
        if {comparison.operation, comparison.base_operation} <= set(case.operations)
        and comparison.base in (None, *found, *ABSENT)
    ]


def _bind(operation: Operation, tokens: Tensor) -> Callable[[], object]:
    return lambda: operation(tokens)


@lru_cache(maxsize=1)  # cases of one size follow each other
def models(size: Size) -> dict[str, Any]:
    """By name, each contender's model with the weights of one Hugging Face checkpoint; bare calls get that itself."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = transformers.AutoModelForCausalLM.from_config(size.hf_config())
        made.save_pretrained(folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        found = {
            LENSKIT: lk.HookedTransformer.from_pretrained(folder),
            SDPA: load(folder, attn_implementation="sdpa").eval(),
            EAGER: load(folder, attn_implementation="eager").eval(),
        }
    if size.family == "gpt2":
        found[BARE] = made
    if transformer_lens:
        found[TL] = to_transformer_lens(made, size)
    return found


def contenders(size: Size) -> dict[str, dict[str, Operation]]:
    """By name, what each can be asked for."""
    of = {LENSKIT: of_lenskit, SDPA: of_hf, EAGER: of_hf_eager, BARE: of_torch, TL: of_transformer_lens}
    return {name: of[name](model) for name, model in models(size).items()}


def check_agreement(found: dict[str, dict[str, Operation]], tokens: Tensor) -> None:
    """All compute the same logits, edits included, or there is nothing to compare."""
    for operation, reference in (("forward", SDPA), ("edit", LENSKIT)):
        expected = _logits(found[reference][operation](tokens))
        for name, operations in found.items():
            if operation in operations:
                error = (_logits(operations[operation](tokens)) - expected).abs().max() / expected.abs().max()
                if not error < TOLERANCE:
                    raise SystemExit(f"{operation}: {name} is {error:.1e} of the largest logit off {reference}")


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def halve(activation: Tensor, hook: object) -> Tensor:
    return activation * 0.5


def of_lenskit(model: lk.HookedTransformer) -> dict[str, Operation]:
    stream = "blocks.*.hook_resid_post"
    return {
        "forward": model,
        "cache_all": model.run_with_cache,
        "cache_resid": lambda tokens: model.run_with_cache(tokens, names=stream),
        "edit": lambda tokens: model.run_with_hooks(tokens, hooks=[(stream, halve)]),
    }


class BareWeights:
    """GPT-2's weights as plain tensors, for functions that do nothing but torch's calls.

    layers: each one's norms, matrices and biases, in the order of the calls.
    """

    def __init__(self, hf_model: torch.nn.Module) -> None:
        weights = {name.removeprefix("transformer."): tensor for name, tensor in hf_model.state_dict().items()}
        config = hf_model.config
        self.n_heads, self.d_model, self.eps = config.n_head, config.n_embd, config.layer_norm_epsilon
        ends = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        layers = [
            [weights[f"h.{layer}.{end}.{kind}"] for end in ends for kind in ("weight", "bias")]
            for layer in range(config.n_layer)
        ]
        self.layers = [[t.T if t.dim() == 2 else t for t in tensors] for tensors in layers]
        self.embed, self.pos_embed, self.unembed = (weights[f"{n}.weight"] for n in ("wte", "wpe", "lm_head"))
        self.final = weights["ln_f.weight"], weights["ln_f.bias"]


def of_torch(hf_model: torch.nn.Module) -> dict[str, Operation]:
    """GPT-2 as nothing but torch calls on plain tensors: no modules, no hook points, no checks."""
    weights = BareWeights(hf_model)
    n_heads, d_model, eps, layers = weights.n_heads, weights.d_model, weights.eps, weights.layers

    def forward(tokens: Tensor) -> Tensor:
        batch, pos = tokens.shape
        resid = F.embedding(tokens, weights.embed) + F.embedding(torch.arange(pos), weights.pos_embed)
        for g1, b1, w_qkv, b_qkv, w_o, b_o, g2, b2, w_in, b_in, w_out, b_out in layers:
            qkv = F.linear(torch.layer_norm(resid, (d_model,), g1, b1, eps), w_qkv, b_qkv)
            q, k, v = qkv.view(batch, pos, 3, n_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            resid = resid + F.linear(z, w_o, b_o)
            pre = F.linear(torch.layer_norm(resid, (d_model,), g2, b2, eps), w_in, b_in)
            resid = resid + F.linear(F.gelu(pre, approximate="tanh"), w_out, b_out)
        return F.linear(torch.layer_norm(resid, (d_model,), *weights.final, eps), weights.unembed)

    return {"forward": forward}


def of_hf(model: torch.nn.Module) -> dict[str, Operation]:
    """Told not to fill a KV cache, as the others do not; "forward_default" is the plain call, which does."""
    return {"forward": lambda tokens: model(tokens, use_cache=False), "forward_default": model}


def of_hf_eager(model: torch.nn.Module) -> dict[str, Operation]:
    """Also its nearest to a cache of everything: the stream and the patterns."""
    everything = {"use_cache": False, "output_hidden_states": True, "output_attentions": True}
    return {**of_hf(model), "cache_all": lambda tokens: model(tokens, **everything)}


def to_transformer_lens(hf_model: torch.nn.Module, size: Size) -> Any:
    """Its model with these weights."""
    config = transformer_lens.HookedTransformerConfig(**size.transformer_lens_config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = transformer_lens.HookedTransformer(config)
    convert = {"gpt2": convert_gpt2_weights, "llama": convert_llama_weights}[size.family]
    model.load_state_dict(convert(hf_model, model.cfg), strict=False)  # what is missing are masks and zeros
    return model.eval()


def is_stream(name: str) -> bool:
    """Whether a hook point is the residual stream after a block."""
    return name.endswith("hook_resid_post")


def of_transformer_lens(model: Any) -> dict[str, Operation]:
    return {
        "forward": model,
        "cache_all": model.run_with_cache,
        "cache_resid": lambda tokens: model.run_with_cache(tokens, names_filter=is_stream),
        "edit": lambda tokens: model.run_with_hooks(tokens, fwd_hooks=[(is_stream, halve)]),
    }
