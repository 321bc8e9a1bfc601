"""A program carried out on one forward pass; more than one, where prompts need each other's later activations."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lenskit.errors import InputError, NotSavedError
from lenskit.hooks import Attachment, HookPoint
from lenskit.inputs import Batch
from lenskit.interventions.actions import Stopped
from lenskit.interventions.execution import Execution
from lenskit.interventions.geometry import Geometry, Tokens, tokens_of
from lenskit.interventions.ops import Save, Stop
from lenskit.interventions.pass_run import PassRun, passes
from lenskit.interventions.program import Program
from lenskit.interventions.saved import Saved
from lenskit.interventions.scope import attached
from lenskit.models.base import Decoder
from lenskit.modules.kv_cache import KVCache


@dataclass(frozen=True, eq=False)
class Past:
    """Tokens that a model has processed, with their keys and values: what later calls may start from (`past=`), as
    often as they like. One row is shared by all their prompts; several rows are those of as many prompts.

    tokens: [batch pos] ids. mask: [batch pos], True for a row's own; None where nothing is padded.
    cache: keys and values; later calls copy what they need of it.
    saved: what hooks saved while the tokens were processed.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None
    cache: KVCache
    saved: Saved = field(default_factory=Saved)

    def __len__(self) -> int:
        """Rows."""
        return len(self.tokens)

    def __repr__(self) -> str:
        rows, pos = self.tokens.shape
        return f"Past({rows} x {pos} tokens, {self.cache.nbytes / 2**20:.1f} MiB)"

    def rows_for(self, batch: Batch) -> list[int]:
        """Which of its rows each prompt of a batch continues.

        Raises:
            InputError: it has neither one row nor as many as there are prompts.
        """
        n = len(batch.tokens)
        if len(self) not in (1, n):
            raise InputError(
                "the past does not fit the prompts",
                got=f"a past of {len(self)} rows, and {n} prompts",
                expected="one row, which all prompts share, or one for each",
                fix="prefill one prompt, or as many as you continue",
            )
        return [0] * n if len(self) == 1 else list(range(n))

    def repeated(self, copies: int) -> "Past":
        """Each row so many times, next to each other; one row is shared anyway."""
        if copies == 1 or len(self) == 1:
            return self
        rows = [row for row in range(len(self)) for _ in range(copies)]
        mask = None if self.mask is None else self.mask[rows]
        return Past(self.tokens[rows], mask, self.cache.branch(rows, self.cache.length), self.saved)

    def branch(self, batch: Batch, rows: Sequence[int], room: int = 0) -> KVCache:
        """A copy of the keys and values that some rows of a batch continue, with room for more tokens."""
        held = self.rows_for(batch)
        return self.cache.branch([held[row] for row in rows], self.cache.length + max(room, batch.tokens.shape[1]))


@dataclass(frozen=True, eq=False)
class Result:
    """What `run_with_hooks` returns.

    tokens: [batch pos], left-padded where prompts differ in length.
    mask: [batch pos], True for a row's own tokens; None where nothing is padded.
    saved: what `Save` ops kept, by hook point or name.
    """

    tokens: Tensor
    mask: Tensor | None
    saved: Saved
    output: Tensor | None = field(repr=False)

    @property
    def logits(self) -> Tensor:
        """[batch pos d_vocab] (or the stream [batch pos d_model], if stopped at a layer).

        Raises:
            NotSavedError: a `Stop` ended the pass before, or a server was asked to leave them out.
        """
        if self.output is None:
            raise NotSavedError(
                "there are no logits",
                got="a pass that a Stop ended before them, or a model connected with logits=False",
                expected="a pass that reaches the unembedding",
                fix="leave the Stop or logits=False out, or look at `saved` only",
            )
        return self.output


def geometry_of(batch: Batch, past: Past | None) -> Geometry:
    """The rows and tokens of a batch, and of what it continues."""
    rows, width = batch.tokens.shape[:2]
    prompt = tokens_of(width, batch.mask)
    if past is None:
        return Geometry(range(rows), prompt)
    held = tokens_of(past.tokens.shape[1], past.mask)
    own = None if held.own is None else tuple(held.own[row] for row in past.rows_for(batch))
    return Geometry(range(rows), prompt, Tokens(held.width, own))


def rows_of(batch: Batch, run: PassRun) -> Batch:
    """The rows of one pass, without the padding that they do not need."""
    if not run.execution.multiple:
        return batch
    rows = list(run.geometry.rows)
    own = batch.each(lambda part: part[rows, run.trimmed :])
    return own if run.geometry.prompt.own is not None else own._replace(mask=None)


def forward(
    model: Decoder,
    batch: Batch,
    program: Program,
    *,
    past: Past | None = None,
    behind: Sequence[tuple[HookPoint, Attachment]] = (),
    start_at_layer: int | None = None,
    stop_at_layer: int | None = None,
) -> Result:
    """One pass of the batch, or as many as the program takes.

    Args:
        past: what the batch continues.
        behind: attached behind the program's own.
        start_at_layer, stop_at_layer: as `Decoder.decode`'s.
    """
    execution = Execution(program, generating=False)
    found: list[tuple[PassRun, Tensor]] = []
    for run in passes(execution):
        rows = run.geometry.rows
        cache = None if past is None else past.branch(batch, rows)
        grad = torch.enable_grad() if program.gradients else nullcontext()
        try:
            with grad, run.at(0), attached(behind):
                output = model.decode(
                    *rows_of(batch, run),
                    start_at_layer=start_at_layer,
                    stop_at_layer=stop_at_layer,
                    cache=cache,
                    prompts=rows,
                )
                found.append((run, output))
        except Stopped:
            pass
        run.finished([1] * len(rows))
    return Result(batch.tokens, batch.mask, execution.saved(model.cfg.n_layers), _joined(found, batch))


def prefill(model: Decoder, batch: Batch, program: Program, past: Past | None) -> Past:
    """The batch processed, after a past if there is one; nothing is unembedded that no hook reads.

    Raises:
        InputError: hooks that take more than one pass, or end it.
    """
    execution = Execution(program, generating=False)
    check_one_pass(program, "a prefill is one forward pass")
    [run] = passes(execution)
    rows = run.geometry.rows
    cache = KVCache(batch.tokens.shape[1]) if past is None else past.branch(batch, rows, batch.tokens.shape[1])
    try:
        with torch.no_grad(), run.at(0):
            model.decode(*batch, cache=cache, prompts=rows, n_logits=run.n_logits)
    except Stopped:
        raise _several("a prefill is one whole forward pass", "hooks with a Stop") from None
    run.finished([1] * len(rows))
    tokens = batch.tokens.clone() if past is None else torch.cat((past.tokens[past.rows_for(batch)], batch.tokens), 1)
    return Past(tokens, cache.mask, cache, execution.saved(model.cfg.n_layers))


def check_for_cache(program: Program) -> None:
    """See that a cache holds all that a program gives: it is of one pass, and has no place for what a `Save` keeps.

    Raises:
        InputError: it does not.
    """
    check_one_pass(program, "a cache is of one forward pass")
    for op in program.ops:
        if isinstance(op.op, Save):
            raise InputError(
                f"{op.numbered} would be lost",
                got="a Save beside a cache",
                expected="hooks that edit: the cache keeps what `names` says",
                fix="add the point to names=, or use run_with_hooks, whose result has `saved`",
            )


def check_one_pass(program: Program, what: str) -> None:
    """See that a program takes one pass, and all of it.

    Raises:
        InputError: prompts need each other's later activations, or there is a `Stop`.
    """
    if program.gradients:
        raise _several(what, "hooks with a Backward")
    if any(isinstance(op.op, Stop) for op in program.ops):
        raise _several(what, "hooks with a Stop")
    if len(program.passes) > 1:
        raise _several(what, f"hooks that take {len(program.passes)}, because prompts use what others compute later")


def _several(what: str, got: str) -> InputError:
    fix = "use run_with_hooks, and lk.Save for what you want to keep"
    return InputError(what, got=got, expected="hooks that leave it one, and whole", fix=fix)


def _joined(found: list[tuple[PassRun, Tensor]], batch: Batch) -> Tensor | None:
    """The passes' results as one batch, padded on the left."""
    if not found:
        return None
    if len(found) == 1 and not found[0][0].execution.multiple:
        return found[0][1]
    first = found[0][1]
    whole = first.new_zeros(*batch.tokens.shape, first.shape[-1])
    for run, part in found:
        whole[torch.tensor(run.geometry.rows, device=whole.device), run.trimmed :] = part
    return whole
