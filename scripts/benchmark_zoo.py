"""Every family at GPT-2 small's size against Hugging Face: one forward pass, the same weights."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
import transformers
from benchmark_models import TOLERANCE
from benchmark_report import LENSKIT, SDPA, Bar, Row
from benchmark_timing import Comparison, interleave
from torch import Tensor

import lenskit as lk
from lenskit.models.registry import MODULES, family

LOOP = "HF's loop over experts"
POS = 128  # tokens
SECTION = f"The zoo, 12 layers, width 768, 1×{POS} tokens"

SIZE = {
    "d_model": 768, "n_layers": 12, "n_heads": 12, "n_key_value_heads": 12, "d_head": 64, "d_mlp": 3072,
    "d_vocab": 50257, "n_ctx": 1024,
}  # fmt: skip
# As many experts as the family's published models have; each so wide that all of a layer's are four MLPs.
EXPERTS = {"mixtral": 8, "gpt_oss": 32, "qwen2_moe": 60, "olmoe": 64, "qwen3_moe": 128, "deepseek_v3": 256}

# What a family's own sizes are, in Hugging Face's words, where its defaults are those of a larger model.
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "first_k_dense_replace": 1,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 6]]},
    "gemma2": {"query_pre_attn_scalar": 64},
    "gemma3_text": {"query_pre_attn_scalar": 64},
    "opt": {"word_embed_proj_dim": 768},
    "phi3": {"pad_token_id": 0},
    "qwen2_moe": {"shared_expert_intermediate_size": 768},
}  # fmt: skip

ZOO_CASES = tuple(f"zoo-{model_type}" for model_type in MODULES)


def zoo(case: str, seconds: float) -> list[Row]:
    """A family's row; two for a mixture of experts: Hugging Face's way of its own choice, and its loop."""
    model_type = case.removeprefix("zoo-")
    tokens = torch.randint(SIZE["d_vocab"], (1, POS), generator=torch.Generator().manual_seed(1))
    ours, theirs, looping = contenders(model_type)
    calls = {(LENSKIT, "forward"): partial(ours, tokens), (SDPA, "forward"): _hf(theirs, tokens)}
    if looping is not None:
        calls[LOOP, "forward"] = _hf(looping, tokens)
    with torch.no_grad():
        _check_agreement({name: call() for (name, _), call in calls.items()})
        samples = interleave(calls, seconds=seconds)
    comparisons = [(Comparison(model_type, "forward", "HF sdpa", SDPA, "forward"), Bar(1.0, noise=0.05))]
    if looping is not None:
        comparisons.append((Comparison(model_type, "forward", LOOP, LOOP, "forward"), Bar(0.8)))
    return [comparison.row(samples, section=SECTION, bar=bar) for comparison, bar in comparisons]


def contenders(model_type: str) -> tuple[lk.HookedTransformer, Any, Any]:
    """lenskit's model, Hugging Face's, and for a mixture of experts its model that loops over them."""
    config = transformers.AutoConfig.for_model(model_type, **attributes(model_type))
    kind = getattr(transformers, family(model_type, where="the benchmark").hf_class)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        kind(config).save_pretrained(folder)
        ours = lk.HookedTransformer.from_pretrained(folder)
        options = {"attn_implementation": "sdpa" if kind._supports_sdpa else "eager"}
        theirs = kind.from_pretrained(folder, **options).eval()
        if model_type not in EXPERTS:
            return ours, theirs, None
        return ours, theirs, kind.from_pretrained(folder, **options, experts_implementation="eager").eval()


def attributes(model_type: str) -> dict[str, Any]:
    """Of Hugging Face's config: the size, in the family's own words."""
    names, sizes = family(model_type, where="the benchmark").config.hf_names, dict(SIZE)
    if model_type in EXPERTS:
        width = 4 * SIZE["d_mlp"] // EXPERTS[model_type]
        sizes |= {"n_experts": EXPERTS[model_type], "d_expert" if "d_expert" in names else "d_mlp": width}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {**tokens, **{names[ours]: size for ours, size in sizes.items() if ours in names}, **OWN.get(model_type, {})}


def _hf(model: Any, tokens: Tensor) -> Any:
    cached = {} if model.config.model_type == "bert" else {"use_cache": False}
    return lambda: model(tokens, **cached).logits


def _check_agreement(logits: dict[str, Tensor]) -> None:
    expected = logits[SDPA]
    for name, found in logits.items():
        error = (found - expected).abs().max() / expected.abs().max()
        if not error < TOLERANCE:
            raise SystemExit(f"{name} is {error:.1e} of the largest logit off {SDPA}")
