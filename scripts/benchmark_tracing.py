"""What it costs to write interventions as a trace instead of calling the model."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import torch
from benchmark_models import models
from benchmark_report import LENSKIT, Bar, Row
from benchmark_sizes import GPT2, SMALL, Size
from benchmark_timing import Comparison, interleave

import lenskit as lk


def tracing(seconds: float) -> list[Row]:
    """A block with one save against one unhooked pass, where Python is most of it, and at GPT-2's real size."""
    return [*_traced(SMALL, 16, seconds * 0.4, Bar(0.6)), *_traced(GPT2, 128, seconds * 0.6, None)]


def _traced(size: Size, pos: int, seconds: float, added: Bar | None) -> list[Row]:
    model: lk.HookedTransformer = models(size)[LENSKIT]
    tokens = torch.randint(size.d_vocab, (1, pos), generator=torch.Generator().manual_seed(1))

    def trace() -> torch.Tensor:
        with model.trace(tokens):
            kept = model.blocks[size.n_layers // 2].output.save()
        return kept.value  # type: ignore[no-any-return]

    with torch.no_grad():
        samples = interleave({(LENSKIT, "forward"): lambda: model(tokens), (LENSKIT, "trace"): trace}, seconds=seconds)
    section = f"A trace with one save, {size}, 1×{pos} tokens"
    comparison = Comparison("with model.trace(tokens): ...", "trace", "own unhooked forward", LENSKIT, "forward")
    ratio = comparison.row(samples, section=section, bar=None if added else Bar(1.15))
    if added is None:
        return [ratio]
    pairs = zip(samples[LENSKIT, "trace"], samples[LENSKIT, "forward"], strict=True)
    more = median(traced - plain for traced, plain in pairs) / 1000
    absolute = replace(
        ratio, measurement="CPU time that it adds", unit="a millisecond", values={LENSKIT: more}, bar=added, spread=None
    )
    return [ratio, absolute]
