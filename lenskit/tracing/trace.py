"""`Trace`: the `with` block. It writes down what is done in it as ops; at its end they become a plan, which runs."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, final

from torch import Tensor, nn

from lenskit.errors import NotSavedError, TraceError, ValueFitError
from lenskit.generation import Generation
from lenskit.hooks import HookPoint
from lenskit.inputs import Batch, Input, joined
from lenskit.interventions.compiler import Compiler
from lenskit.interventions.expressions import Act, Applied, Expression, leaves
from lenskit.interventions.forward import Past, Result, geometry_of
from lenskit.interventions.gradient_ops import Backward
from lenskit.interventions.ops import Edit, Stop
from lenskit.interventions.plan import Plan
from lenskit.interventions.saved import Saved
from lenskit.models.base import Decoder
from lenskit.recording import RECORDER, End, Recorder, plainly
from lenskit.tracing import steps
from lenskit.tracing.blocks import Block
from lenskit.tracing.cells import Activation, Cell, Computed, Source
from lenskit.tracing.ledger import Ledger, misused
from lenskit.tracing.outcome import Handle, Outcome, blamed
from lenskit.tracing.places import place_of
from lenskit.tracing.proxy import Proxy
from lenskit.tracing.scope import Prompts


@final
class Trace:
    """A block in which interventions are written down as if they happened: what `model.trace` gives.

    After the block, proxies that were saved have a `.value`, and the trace has `tokens`, `texts`, `saved`, and
    `output`, which is what `run_with_hooks` or `generate` returned. `plan` is the recorded plan.

    Args:
        model: whose modules are read and written.
        read: what makes a batch of an invoke's prompt.
        run: what runs the plan on the whole batch.
        text: what makes text of a row of ids.
        n_steps: of a generation; None for a forward pass.
        prompt: of the only invoke; None if they are opened with `invoke`.
        past: what the prompts continue.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        read: Callable[[Input], Batch],
        run: Callable[[Batch, Plan], Result | Generation | Handle],
        text: Callable[[Tensor], str],
        n_steps: int | None = None,
        prompt: Input | None = None,
        past: Past | None = None,
    ) -> None:
        self.model = model
        self.ledger = Ledger(n_steps)
        self._read, self._run, self._text, self._prompt, self._past = read, run, text, prompt, past
        self._outer: Recorder | None = None
        self._batches: list[Batch] = []
        self._sources: dict[Any, Source] = {}
        self._loss: str | None = None  # of the open backward block
        self._plan: Plan | None = None
        self._outcome: Outcome | None = None

    # -- the block

    @plainly
    def __enter__(self) -> Self:
        if self.ledger.state_of_block != "new":
            raise misused("a trace is one block", "a second with", "model.trace(...) for each", "make a new trace")
        if self._prompt is not None:
            self._begin(self._prompt, alone=True)
        self._outer = RECORDER.get()
        RECORDER.set(self)
        self.ledger.state_of_block = "open"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        RECORDER.set(self._outer)
        self.ledger.state_of_block = "failed"
        if error is None:
            self._finish()
            self.ledger.state_of_block = "over"

    @plainly
    def _finish(self) -> None:
        if not self._batches:
            raise misused(
                "the trace has no prompt",
                "a block without an invoke",
                "a prompt",
                'write model.trace("text"), or with run.invoke("text"): in the block',
            )
        ops, records = self.ledger.lowered(alone=len(self._batches) == 1)
        self._plan = Plan(ops)
        with blamed(records):
            self._outcome = Outcome(self._run(joined(self._batches), self._plan), records)

    def _begin(self, prompt: Input, *, alone: bool) -> None:
        """Take up a prompt: its rows come behind those that are there."""
        if self.model.device.type == "meta":
            got, fix = (
                "a model on the meta device",
                "load its weights, or connect to a server: lk.connect(url).model(name)",
            )
            raise misused("the model has no weights", got, "one that can run", fix)
        batch = joined([self._read(prompt)])
        first = sum(len(there.tokens) for there in self._batches)
        rows, width = batch.tokens.shape
        lengths = [width] * rows if batch.mask is None else batch.mask.sum(1).tolist()
        self._batches.append(batch)
        self.ledger.prompts = Prompts(tuple(range(first, first + rows)), tuple(lengths), alone)
        self.ledger.compiler = Compiler(
            self.model.hook_points,
            self.model.embed.weight.dtype,
            geometry_of(joined(self._batches), self._past),
            self.ledger.n_steps,
        )

    def invoke(self, prompt: Input | None = None) -> Block:
        """A `with` block about one more prompt of the batch: what is read and written in it is that prompt's.

        Args:
            prompt: what `generate` takes: text, ids, several of them, a tokenizer's encoding.

        Raises:
            TraceError: no prompt; within another invoke, or in a trace that has its prompt.
        """
        ledger, outer = self.ledger, self.ledger.steps

        def begin() -> None:
            ledger.check_open()
            if ledger.prompts is not None:
                got = "a prompt given to trace" if self._prompt is not None else "an invoke within another"
                raise misused("this trace has a prompt already", got, "one way to say it", "give it to one of the two")
            if prompt is None:
                raise misused("an invoke has no prompt", "invoke()", "a prompt", 'write with run.invoke("text"):')
            self._begin(prompt, alone=False)
            if not outer.series:
                ledger.steps = ledger.at(0)

        def end() -> None:
            ledger.prompts, ledger.steps = None, outer

        return Block(begin, end)

    # -- steps

    @plainly
    def next(self) -> None:
        """Go on to the next step of the generation: what follows happens there. Past the last step, nothing can."""
        steps.advance(self.ledger)

    @plainly
    def all(self) -> Block:
        """A `with` block about every step; what is saved in it is a list, one tensor a step that ran."""
        return steps.every(self.ledger)

    @property
    def iter(self) -> steps.StepBlocks:
        """`with run.iter[2:5]:` is a block about these steps; an int, a slice or a list. What is saved in it is a list;
        at one step (an int), a tensor. A slice may be longer than the generation.
        """
        return steps.StepBlocks(self.ledger)

    @plainly
    def stop(self) -> None:
        """Compute nothing after the last activation that was saved or written so far; a generation ends with its step.

        Raises:
            TraceError: nothing was.
        """
        self.ledger.check_open()
        ops = [record.op for record in self.ledger.records]
        acts = [leaf for op in ops for expression in op.expressions for leaf in leaves(expression)]
        names = [act.at for act in acts if isinstance(act, Act)] + [op.at for op in ops if isinstance(op, Edit)]
        if not names or self.ledger.steps.series:
            got = "a block about several steps" if names else "nothing that was saved or written before"
            raise misused("stop() ends the pass after something", got, "one step, and a value", "save, then stop")
        last = max(names, key=lambda name: self.model.hook_points[name].place)
        self.ledger.record(Stop(last, steps=self.ledger.steps.selector))

    # -- values

    @plainly
    def apply(self, function: Callable[..., Any], *args: Any) -> Proxy:
        """A Python function of values, called with tensors when they are there; what it returns is saved.

        Local only: a plan with one is no data.

        Args:
            args: proxies, tensors, plain data; at least one proxy.

        Raises:
            TraceError: there is no proxy among them.
        """
        self.ledger.check_open()
        node = Applied(function, tuple(self.given(arg) for arg in args))
        if not node.inputs:
            raise misused("apply is about no proxy", str(node), "a proxy among the arguments", "call it in Python")
        self.ledger.learn(node)
        return Proxy(self, Computed(self.ledger, node), self.ledger.save(node, None))

    def backward(self, loss: Proxy) -> Block:
        """A `with` block about the gradients of a loss: in it activations have a `.grad`, to save and to set.

        Args:
            loss: one number.

        Raises:
            TraceError: in a generation, or within another backward block.
            ValueFitError: the loss is more than a number.
        """
        ledger = self.ledger

        def begin() -> None:
            ledger.check_open()
            if ledger.n_steps is not None or self._loss is not None:
                got = "a generation" if self._loss is None else "a backward block within another"
                fix = "generate first, then trace the text; one loss after another"
                raise misused("gradients are of one forward pass", got, "a trace without max_new_tokens", fix)
            node = self.given(loss)
            meta = ledger.metas(node)[0] if isinstance(node, Expression) else None
            if meta is None or meta.numel() != 1 or not meta.is_floating_point():
                raise ValueFitError(
                    "a loss is one number",
                    got=f"a {type(loss).__name__}" if meta is None else ledger.shapes_text(node),
                    expected="a proxy of one floating-point number",
                    fix="take one entry, a sum or a mean: loss.sum()",
                )
            n = sum(isinstance(record.op, Backward) for record in ledger.records)
            self._loss = "loss" if n == 0 else f"loss#{n + 1}"
            ledger.record(Backward(node, name=self._loss))

        def end() -> None:
            self._loss = None

        return Block(begin, end)

    # -- afterwards

    @property
    def plan(self) -> Plan:
        """What was recorded: to be saved, compared, sent, or run again, on other prompts or another model."""
        return self._plan or Plan(self.ledger.lowered(alone=len(self._batches) == 1)[0])

    @property
    @plainly
    def output(self) -> Result | Generation:
        """What the run gave: the `Result` of a forward pass, the `Generation` of a generating one. Where a job on a
        server runs it, this waits for it; so do the three below, and `.value`.

        Raises:
            TraceError: the block has not ended.
        """
        if self._outcome is None:
            raise misused(
                "the trace has no result",
                "a block that has not ended, or has failed",
                "a block that has ended",
                "read it after the block",
            )
        return self._outcome.get()

    @property
    def job(self) -> Any:
        """The handle of the job that runs it on a server, where the model was connected with `blocking=False`."""
        return None if self._outcome is None else self._outcome.job

    @property
    def saved(self) -> Saved:
        """What was saved, by key."""
        return self.output.saved

    @property
    def tokens(self) -> list[Tensor]:
        """Ids [pos] of each prompt's own tokens, those that were generated included."""
        output = self.output
        if isinstance(output, Generation):
            return output.tokens
        return [row if output.mask is None else row[output.mask[i]] for i, row in enumerate(output.tokens)]

    @property
    def texts(self) -> list[str]:
        """Each prompt as text, with what was generated."""
        return [self._text(row) for row in self.tokens]

    def __repr__(self) -> str:
        rows = sum(len(batch.tokens) for batch in self._batches)
        return f"Trace({rows} prompts, {len(self.ledger.records)} ops, {self.ledger.state_of_block})"

    # -- for modules and proxies

    def read(self, module: nn.Module, end: End) -> Any:
        """A proxy of a module's output or input; the ids themselves, where those are its input."""
        point = place_of(self.model, module, end)
        prompts = self._here(module, end)
        if point is None:
            return self._batches[-1].tokens
        return Proxy(self, Activation(self._source(point, prompts), {}))

    def write(self, module: nn.Module, end: End, value: Any) -> None:
        """Put a value in the place of a module's output or input."""
        point = place_of(self.model, module, end)
        prompts = self._here(module, end)
        if point is None:
            raise misused("ids cannot be set", f"{value!r}"[:200], "embeddings", "set model.hook_embed.output instead")
        if isinstance(value, Proxy) and value.cell == Activation(self._source(point, prompts), {}):
            return  # x.output += v has written it
        source = Source(self.ledger, point, prompts, self.ledger.steps, self.ledger.state(point.name))
        Activation(source, {}).write(self.given(value))
        self._source(point, prompts).replaced = True
        self._sources[point.name, prompts, repr(self.ledger.steps)] = source

    def _source(self, point: HookPoint, prompts: Prompts) -> Source:
        """The activation as it is now: the same for all who read it, so that all see what is written into it."""
        at = self.ledger.steps
        key = (point.name, prompts, repr(at))
        if key not in self._sources:
            self._sources[key] = Source(self.ledger, point, prompts, at, self.ledger.state(point.name))
        return self._sources[key]

    def _here(self, module: nn.Module, end: End) -> Prompts:
        if self.ledger.prompts is None:
            raise misused(
                f"{getattr(module, 'name', '') or 'model'}.{end} is of no prompt",
                "a place outside of the invokes",
                "a prompt whose activation is meant",
                'write with run.invoke("text"): and read it in there',
            )
        return self.ledger.prompts

    def given(self, value: Any) -> Any:
        """A value with expressions in the place of proxies.

        Raises:
            TraceError: a proxy of another trace.
        """
        if isinstance(value, Proxy):
            self.ledger.check_open()
            if value.trace is not self:
                expected, fix = "proxies of this trace, and tensors", "save it there, and use its .value"
                raise misused("a proxy of another trace", repr(value), expected, fix)
            return value.cell.node
        if isinstance(value, list | tuple):
            return type(value)([self.given(entry) for entry in value])
        return value

    def gradient(self, cell: Cell) -> Cell:
        """The gradient of a cell in the open backward block."""
        self.ledger.check_open()
        if self._loss is None:
            raise misused(
                ".grad is of no loss",
                "a place outside of backward blocks",
                "a loss whose gradient is meant",
                "write with run.backward(loss): and read it in there",
            )
        return cell.gradient(self._loss)

    def value(self, key: str | None, proxy: Proxy) -> Any:
        """What was saved as a proxy's value."""
        if key is None or self._outcome is None:
            ended = self.ledger.state_of_block == "over"
            raise NotSavedError(
                f"{proxy!r} has no value",
                got="a proxy that was not saved" if ended else "a trace that has not ended, or has failed",
                expected="a proxy that was saved, after the block",
                fix="write .save() in the block: x = model.blocks[0].output.save()"
                if ended
                else "read .value after the block; within it, work with the proxy itself",
            )
        return self.saved[key]

    def held(self, key: str | None) -> Tensor | None:
        """The tensor that was saved under a key, once it is there."""
        there = None if self._outcome is None else self._outcome.there
        value = None if key is None or there is None else there.saved[key]
        return value if isinstance(value, Tensor) else None

    def describe(self, cell: Cell, key: str | None) -> str:
        """A proxy as text."""
        there = None if self._outcome is None else self._outcome.there
        if key is not None and there is not None:
            return f"<{key}: {there.saved[key]!r}>"
        try:
            node = cell.node
        except TraceError:  # a part that nobody had a use for in the block
            return "<a proxy of a trace that has ended>"
        return f"<{node}: {self.ledger.shapes_text(node)}>"
