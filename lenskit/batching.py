"""Batching: several runs as the rows of one batch, each as if it were alone.

Runs that know nothing of each other (those of a server's users) share the forward passes: their rows stand under each
other, padded on the left to the longest. At a hook point each run's actions get its own rows, without the others'
padding, so a plan that was compiled for its run alone is carried out as it is, and what it saves has the shapes that it
has alone. Each run chooses its own tokens. A run that fails, stops or is dropped leaves the others as they are.
Generations may come later (`join`): they process their prompts first, and then go on as rows of the batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import get_ident
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.generation import Course, Generation, Generator, Step
from lenskit.hooks import Attachment, HookFunction, HookPoint, Kind, attach, detach
from lenskit.inputs import Batch
from lenskit.interventions.actions import Stopped, snapshot
from lenskit.interventions.execution import Execution
from lenskit.interventions.forward import Result
from lenskit.interventions.ops import Edit
from lenskit.interventions.pass_run import passes
from lenskit.interventions.program import Program
from lenskit.models.base import Decoder
from lenskit.modules.attention import SelfAttention
from lenskit.modules.kv_cache import KVCache


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward pass that is ready to run: everything is checked.

    batch: left-padded.
    """

    batch: Batch
    program: Program


Work = Forward | Generator


def can_share(work: Work) -> bool:
    """Whether a run may share its passes: it has one, without gradients and without Python functions, it starts with
    its prompt, padded on the left, and nothing that it does can make a pass fail for all.
    """
    program, batch = work.program, work.batch
    if batch.token_types is not None or len(program.passes) != 1 or program.gradients:
        return False
    if isinstance(work, Generator) and (work.past is not None or work.streamer is not None or _may_look_back(work)):
        return False
    padding = batch.mask is None or bool(batch.mask[:, -1].all() and (batch.mask.int().diff(dim=1) >= 0).all())
    return padding and not next(passes(Execution(program, generating=False))).runs_python


def _may_look_back(work: Generator) -> bool:
    """Whether it edits scores or patterns of a model with windows: to attend to keys that are gone is an error."""
    edits = (place[1] for op in work.program.ops if isinstance(op.op, Edit) for place in op.places)
    if not any("key_pos" in point.axes for point in edits):
        return False
    return any(isinstance(part, SelfAttention) and part.window is not None for part in work.model.modules())


class Member:
    """One of the runs.

    rows: which of the batch are its own.
    output: what came of it, once it is over; None if it failed or was dropped.
    error: what it failed with.
    """

    def __init__(self, work: Work, n_layers: int) -> None:
        self.work, self._n_layers = work, n_layers
        self.rows = slice(0, 0)
        self.execution = Execution(work.program, generating=isinstance(work, Generator))
        [self.run] = passes(self.execution)
        self.course = Course(work, self.run, work.batch) if isinstance(work, Generator) else None
        self.steps: list[Step] = []
        self.stopped = False
        self.over = False
        self.output: Result | Generation | None = None
        self.error: Exception | None = None

    @property
    def n_rows(self) -> int:
        return len(self.work.batch.tokens)

    @property
    def width(self) -> int:
        """Columns of its prompts."""
        return self.work.batch.tokens.shape[1]

    @property
    def index(self) -> int:
        """Of its next step."""
        return len(self.steps)

    @property
    def n_left(self) -> int:
        """Steps that it may yet take."""
        return self.work.program.n_steps - self.index

    @cached_property
    def points(self) -> set[HookPoint]:
        """What its plan is about."""
        ops = self.work.program.ops
        return {place[1] for op in ops for place in (*op.places, *(source.place for source in op.sources))}

    def drop(self) -> None:
        """Leave the batch: nothing comes of the run."""
        self.over = True

    def fail(self, error: Exception) -> None:
        """Leave the batch with an error."""
        self.error, self.over = error, True

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A `with` block in which whatever goes wrong is this run's affair."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def take(self, logits: Float[Tensor, "row pos d_vocab"] | None) -> None:
        """What its rows of a pass have come to."""
        self.run.end()
        logits = None if self.stopped or logits is None else logits[self.rows]
        if self.course is None:
            self.run.finished([1] * self.n_rows)
            own = None if logits is None else snapshot(logits[:, -self.width :])
            self.output = Result(
                self.work.batch.tokens, self.work.batch.mask, self.execution.saved(self._n_layers), own
            )
            self.over = True
            return
        self.steps.append(self.course.take(None if logits is None else logits[:, -1]))
        if self.course.over:
            assert isinstance(self.work, Generator)
            self.output = self.work.result(self.execution, {self.run.number: self.steps})
            self.over = True


class SharedRun:
    """Runs on their way through the model together. `step` takes all of them one step on, until `over`.

    Args:
        works: of one kind; `can_share` holds for each.
    """

    def __init__(self, model: Decoder, works: Sequence[Work]) -> None:
        self.model = model
        self.members = [Member(work, model.cfg.n_layers) for work in works]
        self.index = 0  # of the next step of the batch
        self.generating = isinstance(works[0], Generator)
        self._width = max(member.width for member in self.members)
        self._cache = KVCache(self._width + max(work.program.n_steps for work in works) - 1)
        self._in_batch = self.members  # those whose rows are in it, over or not
        self._number()

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return all(member.over for member in self.members)

    @property
    def n_rows(self) -> int:
        """Of what goes on."""
        return sum(member.n_rows for member in self._going())

    @property
    def n_columns(self) -> int:
        """Of keys, once the longest is over."""
        return _n_columns(self._going())

    @property
    def open(self) -> bool:
        """Whether others may join: all generate, and none computes an activation that is there only when asked for, as
        some of these exclude each other.
        """
        return self.generating and not any(point.on_demand for member in self._going() for point in member.points)

    @torch.inference_mode()
    def join(self, others: "SharedRun") -> None:
        """Take in the generations of another batch, which is of no use afterwards. Members that are over are forgotten.

        Args:
            others: of the same model. Both are open, have taken a step, and are not over.
        """
        parts = [(run._cache, run._rows_that_go_on()) for run in (self, others)]
        going = [*self._going(), *others._going()]
        self._cache = KVCache.joined(parts, _n_columns(going))
        self.members = self._in_batch = going
        self._number()

    @torch.inference_mode()  # no Python function will see an activation, so tensors without autograd do no harm
    def step(self) -> None:
        """One forward pass of all that go on. Whatever is wrong with one of them is its `error`.

        Raises:
            Exception: what is wrong with the pass itself, and thus with nobody in particular; nothing is attached then.
        """
        if self.index:
            self._close_up()
        going = self._going()
        attached = self._attachments(going)
        tokens, mask, _ = self._inputs()
        depths = [member.run.n_logits for member in going]
        n_logits = None if not self.generating or None in depths else max(n for n in depths if n is not None)
        cache = self._cache if self.generating else None
        try:
            attach(attached)
            logits: Tensor | None = self.model.decode(tokens, mask, cache=cache, step=self.index, n_logits=n_logits)
        except Stopped:
            logits = None
        finally:
            detach(attached)
        for member in going:
            if not member.over:
                with member.guarded():
                    member.take(logits)
        self.index += 1

    def _number(self) -> None:
        first = 0
        for member in self._in_batch:
            member.rows = slice(first, first + member.n_rows)
            first += member.n_rows

    def _close_up(self) -> None:
        """Let the rows of those that are over go, once they are half of the batch."""
        if 2 * self.n_rows <= sum(member.n_rows for member in self._in_batch):
            self._cache = KVCache.joined([(self._cache, self._rows_that_go_on())], self.n_columns)
            self._in_batch = self._going()
            self._number()

    def _going(self) -> list[Member]:
        return [member for member in self._in_batch if not member.over]

    def _rows_that_go_on(self) -> list[int]:
        return [row for member in self._going() for row in range(member.rows.start, member.rows.stop)]

    def _inputs(self) -> Batch:
        """What the next pass processes, of all rows that are in the batch."""
        if self.index:
            return Batch(torch.cat([_next_of(member) for member in self._in_batch]), None)
        batches = [member.work.batch for member in self._in_batch]
        if len(batches) == 1:
            return batches[0]
        n_rows = sum(len(batch.tokens) for batch in batches)
        tokens = batches[0].tokens.new_zeros(n_rows, self._width)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for member in self._in_batch:
            own = member.work.batch
            tokens[member.rows, -member.width :] = own.tokens
            mask[member.rows, -member.width :] = True if own.mask is None else own.mask
        return Batch(tokens, None if bool(mask.all()) else mask)

    # -- hooks

    def _attachments(self, going: Sequence[Member]) -> list[tuple[HookPoint, Attachment]]:
        """What each has live in this step, point by point."""
        begun: dict[HookPoint, list[_Entry]] = {}
        for member in going:
            with member.guarded():
                for point, attachment in member.run.begin(member.index):
                    begun.setdefault(point, []).append(_Entry(member, attachment.function, attachment.kind == "plan"))
        thread = get_ident()
        attached = []
        for point, entries in begun.items():
            kind: Kind = "plan" if any(entry.edits for entry in entries) else "read"
            attached.append((point, Attachment(self._shared(point, entries), kind, thread)))
        return attached

    def _shared(self, point: HookPoint, entries: Sequence["_Entry"]) -> HookFunction:
        axes = [(axis, name == "key_pos") for axis, name in enumerate(point.axes) if name.endswith("pos")]

        def run(x: Tensor, hook: HookPoint) -> Tensor:
            out = x
            for member, function, edits in entries:
                if member.over or member.stopped:
                    continue
                part = self._part(x, member, axes)
                try:
                    new = function(part, hook)
                except Stopped:
                    member.stopped = True
                    continue
                except Exception as error:
                    member.fail(error)
                    continue
                if edits and new is not part and new is not None:
                    if part is x:
                        out = new
                        continue
                    out = x.clone() if out is x else out
                    self._part(out, member, axes).copy_(new)
            if all(member.stopped or member.over for member in self._in_batch):
                raise Stopped
            return out

        return run

    def _part(self, x: Tensor, member: Member, axes: Iterable[tuple[int, bool]]) -> Tensor:
        """A member's rows of an activation, without the others' padding."""
        if len(self._in_batch) == 1:
            return x
        part = x[member.rows]
        for axis, keys in axes:
            width = member.width + member.index if keys else member.width if self.index == 0 else 1
            if width < part.shape[axis]:
                part = part.narrow(axis, part.shape[axis] - width, width)
        return part


class _Entry(NamedTuple):
    """A member's actions at a point."""

    member: Member
    function: HookFunction
    edits: bool


def _n_columns(members: Sequence[Member]) -> int:
    return max(member.width + member.index for member in members) + max(member.n_left for member in members)


def _next_of(member: Member) -> Tensor:
    """[row 1] the ids that a member's next step processes; anything for one that is over."""
    course = member.course
    if course is not None and course.index and course.tokens.shape[1] == 1:
        return course.tokens
    return member.work.batch.tokens[:, -1:]
