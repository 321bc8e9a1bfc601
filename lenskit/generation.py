"""Generation: token ids in, token ids out, one step at a time, with hooks that come and go by step.

Step 0, the prefill, processes the prompts and yields the first new token of each; step k processes new token k alone,
over the keys and values that are kept of everything before it. The last new token is not processed any more. What is
unusual here: hooks are attached for the length of a step and no longer, so that a generation can be left between two
steps as if nothing had been there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenskit.choosing import Chooser
from lenskit.errors import GenerationError, InputError
from lenskit.extras import load
from lenskit.inputs import Batch
from lenskit.interventions.actions import Stopped
from lenskit.interventions.execution import Execution
from lenskit.interventions.forward import Past, rows_of
from lenskit.interventions.pass_run import PassRun, passes
from lenskit.interventions.program import Program
from lenskit.interventions.saved import Saved
from lenskit.models.base import Decoder
from lenskit.modules.kv_cache import KVCache
from lenskit.modules.linear import LearnedPositions
from lenskit.modules.module import at_least_float32

Decode = Callable[[Tensor], str]


@dataclass(frozen=True, eq=False)
class Step:
    """One step of `generate_steps`.

    index: the step's number. prompts: the rows that went through it.
    tokens: [row] the new token of each; None where a `Stop` ended the step. A row that had ended before gets one that
    means nothing: `running` says which rows it belongs to.
    running: [row], True for rows that had not ended before this step. logits: [row d_vocab] that chose the tokens.
    saved: what was saved in this step: tensors, by key.
    """

    index: int
    prompts: tuple[int, ...]
    tokens: Int[Tensor, " row"] | None
    running: list[bool]
    ended: list[bool]
    logits: Float[Tensor, "row d_vocab"] | None
    saved: Saved
    decode: Decode | None = field(default=None, repr=False)

    @property
    def texts(self) -> list[str]:
        """The new token of each row as text; empty where the row had ended."""
        if self.tokens is None:
            return [""] * len(self.running)
        return [_text(self.decode, t[None]) if on else "" for t, on in zip(self.tokens, self.running, strict=True)]


@dataclass(frozen=True, eq=False)
class Generation:
    """What `generate` returns; lists have one entry a prompt, the row's own tokens, without padding.

    tokens: ids [pos], the prompt (and the past) included. new_tokens: ids [new], the end-of-sequence token included.
    logits: [new d_vocab], by which each new token was chosen, before any logits processor; logprobs: [new] of the
    tokens chosen, in nats, under these logits. Both None unless `return_logits`.
    saved: what `Save` ops kept. steps_run: how many steps each row took part in.
    finished: whether the row ended by itself, before max_new_tokens cut it off.
    """

    tokens: list[Tensor]
    new_tokens: list[Tensor]
    logits: list[Tensor] | None
    logprobs: list[Tensor] | None
    saved: Saved
    steps_run: list[int]
    finished: list[bool]
    decode: Decode | None = field(default=None, repr=False)

    @property
    def texts(self) -> list[str]:
        """Each row as text, the prompt included. Raises InputError where the model has no tokenizer."""
        return [_text(self.decode, row) for row in self.tokens]

    @property
    def new_texts(self) -> list[str]:
        """What was generated, as text. Raises InputError where the model has no tokenizer."""
        return [_text(self.decode, row) for row in self.new_tokens]


def _text(decode: Decode | None, tokens: Tensor) -> str:
    if decode is None:
        raise InputError(
            "there is no text without a tokenizer",
            got="a model with tokenizer=None",
            expected="a Hugging Face tokenizer",
            fix="set model.tokenizer before generating, or read the ids in tokens and new_tokens",
        )
    return decode(tokens) if len(tokens) else ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Generator:
    """A generation that is ready to run: everything is checked.

    batch: left-padded. past: what it continues. streamer: Hugging Face's, told of every token.
    show: whether there is a progress bar; None for where somebody looks at a terminal.
    """

    model: Decoder
    batch: Batch
    program: Program
    chooser: Chooser
    past: Past | None = None
    streamer: Any = None
    show: bool | None = None
    return_logits: bool = False
    decode: Decode | None = None

    def run(self) -> Generation:
        """All steps."""
        execution = Execution(self.program, generating=True)
        steps: dict[int, list[Step]] = {}
        with self._bar() as bar:
            for number, step in self.each(execution):
                steps.setdefault(number, []).append(step)
                bar.update()
        return self.result(execution, steps)

    def steps(self) -> Iterator[Step]:
        """One step after another; what a step saved is in the step alone."""
        execution = Execution(self.program, generating=True)
        for _, step in self.each(execution):
            yield Step(**{**vars(step), "saved": execution.take(step.index, self.model.cfg.n_layers)})

    def _bar(self) -> Any:
        # The delay, because nobody needs a bar for what takes less than a second.
        disable = None if self.show is None else not self.show
        total = self.program.n_steps * len(self.program.passes)
        delay = 1 if self.show is None else 0
        return load("tqdm.auto").tqdm(total=total, unit="token", disable=disable, leave=False, delay=delay)

    def each(self, execution: Execution) -> Iterator[tuple[int, Step]]:
        """Run: the steps of all passes, each with its pass's number."""
        if self.streamer is not None:
            self.streamer.put(self.batch.tokens.cpu())
        for run in passes(execution):
            for step in self._pass_steps(run, rows_of(self.batch, run)):
                yield run.number, step
        if self.streamer is not None:
            self.streamer.end()

    def _pass_steps(self, run: PassRun, batch: Batch) -> Iterator[Step]:
        course, cache = Course(self, run, batch), self._cache(run.geometry.rows, batch.tokens)
        while not course.over:
            yield course.take(self._logits(run, course.index, course.tokens, course.mask, cache))

    def _logits(
        self, run: PassRun, index: int, tokens: Tensor, mask: Tensor | None, cache: KVCache
    ) -> Float[Tensor, "row d_vocab"] | None:
        """At the last position of each row; None if a `Stop` ended the step."""
        # Inference mode spares torch bookkeeping, a tenth of a small step; but no function of a user's should be handed
        # tensors that autograd refuses.
        mode = torch.inference_mode() if run.data_only else torch.no_grad()
        try:
            with mode, run.at(index):
                logits = self.model.decode(
                    tokens, mask, cache=cache, step=index, prompts=run.geometry.rows, n_logits=run.n_logits
                )
        except Stopped:
            return None
        return logits.select(1, logits.shape[1] - 1)

    def _cache(self, rows: tuple[int, ...], tokens: Tensor) -> KVCache:
        capacity = tokens.shape[1] + self.program.n_steps - 1
        if self.past is None:
            return KVCache(capacity)
        return self.past.branch(self.batch, rows, capacity)

    def past_of(self, rows: tuple[int, ...]) -> Batch | None:
        """The tokens that some rows continue."""
        if self.past is None:
            return None
        held = [self.past.rows_for(self.batch)[row] for row in rows]
        return Batch(self.past.tokens[held], None if self.past.mask is None else self.past.mask[held])

    def result(self, execution: Execution, steps: Mapping[int, Sequence[Step]]) -> Generation:
        """What comes of a run: of its steps, by their pass's number."""
        n = len(self.batch.tokens)
        before = self.past_of(tuple(range(n)))
        new: list[Tensor] = [self.batch.tokens[0, :0]] * n
        logits: list[Tensor] = [self.model.unembed.weight.new_empty(0, self.model.cfg.d_vocab)] * n
        finished = [False] * n
        for taken in steps.values():
            chosen = [step.tokens for step in taken if step.tokens is not None]
            table = torch.stack(chosen, 1) if chosen else self.batch.tokens[: len(taken[0].prompts), :0]
            scores = [step.logits for step in taken if step.logits is not None]
            for index, row in enumerate(taken[0].prompts):
                made = min(execution.steps_run[row], table.shape[1])
                new[row] = table[index, :made].clone()
                finished[row] = any(step.ended[index] and step.running[index] for step in taken)
                if self.return_logits:
                    logits[row] = torch.stack([step[index] for step in scores[:made]]) if made else logits[row]
        whole = [torch.cat([*_own(before, row), *_own(self.batch, row), new[row]]) for row in range(n)]
        return Generation(
            tokens=whole,
            new_tokens=new,
            logits=logits if self.return_logits else None,
            logprobs=[_logprobs(*pair) for pair in zip(logits, new, strict=True)] if self.return_logits else None,
            saved=execution.saved(self.model.cfg.n_layers),
            steps_run=execution.steps_run,
            finished=finished,
            decode=self.decode,
        )


class Course:
    """One pass of a generation between its forward passes: what the next one processes, and what its logits become.

    index: of the next step. tokens, mask: [row pos], what it processes. over: whether there is none.
    """

    def __init__(self, generator: Generator, run: PassRun, batch: Batch) -> None:
        rows = run.geometry.rows
        self.generator, self.run, self.rows = generator, run, rows
        self.index, self.over = 0, False
        self.tokens, self.mask = batch.tokens, batch.mask
        self._ids = _Ids(batch, generator.past_of(rows), run.program.n_steps)
        self._running, self._steps_run = [True] * len(rows), [0] * len(rows)

    def take(self, logits: Float[Tensor, "row d_vocab"] | None) -> Step:
        """The step whose forward pass gave these logits at each row's last position; None if a `Stop` ended it."""
        generator, run, running, index = self.generator, self.run, self._running, self.index
        self._steps_run = [n + on for n, on in zip(self._steps_run, running, strict=True)]
        run.finished(self._steps_run)
        if logits is None:
            self.over = True
            return Step(index, self.rows, None, running, [True] * len(running), None, _NOTHING, generator.decode)
        try:
            chosen, done = self._choose(logits)
        except BaseException as error:  # in a processor, criterion or streamer of the user's
            error.add_note(run.where())
            raise
        ended = [False] * len(running) if done is None else done.tolist()
        kept = logits.clone() if generator.return_logits else None
        self.index += 1
        self.over = self.index == run.program.n_steps
        if True in ended:
            self._running = [on and not end for on, end in zip(running, ended, strict=True)]
            self.over = self.over or not any(self._running)
            run.active = None if all(self._running) else self._running
        self.tokens, self.mask = chosen.unsqueeze(1), None
        return Step(index, self.rows, chosen.clone(), running, ended, kept, _NOTHING, generator.decode)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next token of each row, and which rows it ends."""
        chooser, streamer = self.generator.chooser, self.generator.streamer
        chosen = chooser.next_tokens(logits, *self._ids.so_far())
        self._ids.add(chosen)
        if streamer is not None:
            streamer.put(chosen.cpu())
        return chosen, chooser.ends(self._ids.so_far()[0], chosen, logits)


class _Ids:
    """All ids of a pass so far, those of the past included, in a buffer with room for the rest."""

    def __init__(self, batch: Batch, past: Batch | None, n_steps: int) -> None:
        parts = [batch] if past is None else [past, batch]
        rows = len(batch.tokens)
        self.length = sum(part.tokens.shape[1] for part in parts)
        self.ids = batch.tokens.new_zeros(rows, self.length + n_steps, dtype=torch.long)
        torch.cat([part.tokens for part in parts], 1, out=self.ids.narrow(1, 0, self.length))
        self.mask: Tensor | None = None
        if any(part.mask is not None for part in parts):
            self.mask = torch.ones_like(self.ids, dtype=torch.bool)
            masks = [torch.ones_like(p.tokens, dtype=torch.bool) if p.mask is None else p.mask for p in parts]
            self.mask[:, : self.length] = torch.cat(masks, 1)

    def so_far(self) -> tuple[Int[Tensor, "row seq"], Bool[Tensor, "row seq"] | None]:
        mask = None if self.mask is None else self.mask.narrow(1, 0, self.length)
        return self.ids.narrow(1, 0, self.length), mask

    def add(self, tokens: Int[Tensor, " row"]) -> None:
        self.ids.select(1, self.length).copy_(tokens)
        self.length += 1


_NOTHING = Saved()


def _own(batch: Batch | None, row: int) -> list[Tensor]:
    if batch is None:
        return []
    return [batch.tokens[row] if batch.mask is None else batch.tokens[row][batch.mask[row]]]


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    if not len(tokens):
        return torch.empty(0)
    return logits.to(at_least_float32(logits.dtype)).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def left_padded(batch: Batch) -> Batch:
    """The same rows with all padding on the left, where generation continues each row after its last token."""
    if batch.mask is None or bool(batch.mask[:, -1].all() and (batch.mask.int().diff(dim=1) >= 0).all()):
        return batch
    order = batch.mask.int().argsort(dim=1, stable=True)
    return batch.each(lambda part: part.gather(1, order))


def repeated(batch: Batch, copies: int) -> Batch:
    """Each row so many times, next to each other."""
    if copies == 1:
        return batch
    return batch.each(lambda part: part.repeat_interleave(copies, 0))


def checked_length(model: Decoder, batch: Batch, past: Past | None, n_steps: int | None) -> int:
    """How many steps the generation has at most.

    Raises:
        GenerationError: it was not said, or the model has no position for so many tokens.
    """
    if n_steps is None:
        raise GenerationError(
            "how many tokens to generate was not said",
            got="no max_new_tokens",
            expected="a number from 1 on",
            fix="pass max_new_tokens=20; a row ends earlier at an end-of-sequence token",
        )
    longest = _longest(batch.tokens, batch.mask) + (0 if past is None else _longest(past.tokens, past.mask))
    n_ctx = model.pos_embed.W_pos.shape[0] if isinstance(model.pos_embed, LearnedPositions) else None
    if n_ctx is not None and longest + n_steps - 1 > n_ctx:
        raise GenerationError(
            "the generation would be longer than the model's context",
            got=f"a prompt of {longest} tokens and max_new_tokens={n_steps}",
            expected=f"at most {n_ctx} positions (cfg.n_ctx): this model learned one vector a position",
            fix=f"ask for at most {n_ctx - longest + 1} new tokens"
            if longest <= n_ctx
            else "shorten the prompt: it alone is too long",
        )
    return n_steps


def _longest(tokens: Tensor, mask: Tensor | None) -> int:
    return tokens.shape[1] if mask is None else int(mask.sum(1).max())
