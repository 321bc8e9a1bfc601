"""One edit at a time, layer by layer: the runs that ablation and patching compare."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.extras import load
from lenskit.hooks import HookPoint
from lenskit.inputs import Batch
from lenskit.transformer import HookedTransformer

Edit = Callable[[Tensor, HookPoint], object]  # changes an activation in place
Score = Callable[[Tensor], Tensor | float]  # of the logits [batch pos d_vocab] of one run


@torch.no_grad()
def score_edits(
    model: HookedTransformer,
    batch: Batch,
    point: str,
    edits: Sequence[Sequence[Edit]],
    score: Score,
    *,
    max_rows: int,
) -> Float[Tensor, "layer edit *score"]:
    """The score of a run for each layer and edit; no run has more than one edit.

    Nothing before an edited layer changes, so nothing before it runs again; several edits of a layer share one
    forward pass.

    Args:
        point: the hook point that is edited, by its name within the block, e.g. "attn.hook_z".
        edits: by layer, as many in each; each gets the activation of its own run.
        score: its value's axes come last in the result; a number has none.
        max_rows: so many rows go through the model at once, but at least one edit's.

    Raises:
        UnknownHookPointError: a block has no such point.
    """
    layers = range(model.cfg.n_layers)
    points = model.hook_names([f"blocks.{layer}.{point}" for layer in layers])
    entering = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    _, cache = model.run_with_cache(batch, entering)
    total = sum(len(some) for some in edits)
    # The delay, because nobody needs a bar for what takes less than a second.
    with load("tqdm.auto").tqdm(total=total, desc=point, unit="run", disable=None, leave=False, delay=1) as bar:
        scores = []
        for layer in layers:
            for logits in _runs(model, cache["resid_pre", layer], batch.mask, points[layer], edits[layer], max_rows):
                scores.append(torch.as_tensor(score(logits)).clone())  # a view would keep all logits alive
                bar.update()
    return torch.stack(scores).unflatten(0, (len(layers), -1))


def head_counts(model: HookedTransformer, point: str) -> list[int]:
    """How many heads each layer's point has: key-value heads on keys and values.

    Raises:
        UnknownHookPointError: a block has no such point.
        AxisError: the point has no axis `head`.
    """
    names = model.hook_names([f"blocks.{layer}.{point}" for layer in range(model.cfg.n_layers)])
    hooks = [model.hook_points[name] for name in names]
    return [hook.shape(batch=0, pos=0, query_pos=0, key_pos=0)[hook.axis("head")] for hook in hooks]


def _runs(
    model: HookedTransformer, resid: Tensor, mask: Tensor | None, point: str, edits: Sequence[Edit], max_rows: int
) -> Iterator[Tensor]:
    """Logits [batch pos d_vocab] of each edit's run, from the stream that enters the layer."""
    rows = len(resid)
    at_once = max(1, max_rows // rows)
    for start in range(0, len(edits), at_once):
        some = edits[start : start + at_once]
        logits = model.run_with_hooks(
            resid.repeat(len(some), 1, 1),
            [(point, _each_on_its_rows(some, rows))],
            mask=None if mask is None else mask.to(resid.device).repeat(len(some), 1),
            start_at_layer=model.hook_points[point].layer,
        ).logits
        yield from logits.split(rows)


def _each_on_its_rows(edits: Sequence[Edit], rows: int) -> Callable[[Tensor, HookPoint], None]:
    def apply(activation: Tensor, hook: HookPoint) -> None:
        for edit, own in zip(edits, activation.split(rows), strict=True):
            edit(own, hook)

    return apply
