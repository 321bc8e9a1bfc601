"""The ledger: what a trace has written down, and what is known of its values before they are there.

An op is checked when it is written down, against the prompts that there are so far, by the same compiler that checks
plans: what is wrong raises on the line that wrote it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lenskit.errors import LenskitError, TraceError, ValueFitError
from lenskit.hooks import HookPoint
from lenskit.interventions.compiler import Compiler
from lenskit.interventions.expressions import Act, Expression, Grad, UnknownShape, leaves, shape_of_node
from lenskit.interventions.gradient_ops import Backward, SetGrad
from lenskit.interventions.ops import Edit, Op, Save
from lenskit.interventions.program import selected
from lenskit.interventions.selection import broadcasts
from lenskit.tracing.lowering import Record, Taken, lowered, new_name
from lenskit.tracing.scope import Prompts, Steps


class Known(NamedTuple):
    """What is known of an expression before it has a value.

    metas: meta tensors of its shape and dtype, one for each class of its steps; None where a function has its say.
    """

    metas: tuple[Any, ...] | None
    steps: Steps
    prompts: Prompts


@final
class Ledger:
    """Args:
    n_steps: of the generation; None for a forward pass.
    """

    def __init__(self, n_steps: int | None) -> None:
        self.n_steps = n_steps
        self.state_of_block = "new"  # then "open", then "over"; "failed" where it raised
        self.compiler: Compiler | None = None  # for the prompts that there are so far
        self.prompts: Prompts | None = None  # of the open invoke
        self.steps = self.at(0)
        self.records: list[Record] = []
        self.names: dict[Act, str] = {}
        self._edits: dict[str, list[int]] = {}
        self._known: dict[Expression, Known] = {}
        self._taken: dict[Act, Taken] = {}
        self._grads: dict[Grad, int] = {}
        self._keys: dict[str, None] = {}

    def at(self, step: int) -> Steps:
        """One step, as ops name it."""
        return Steps(None if self.n_steps is None else step, False, (step,))

    def check_open(self) -> None:
        """See that the block is under way.

        Raises:
            TraceError: it is not.
        """
        if self.state_of_block != "open":
            raise misused(
                "the trace has not begun" if self.state_of_block == "new" else "the trace is over",
                "a proxy or trace that is used outside of its block",
                "the with block",
                "use .value of what was saved, which is a tensor",
            )

    def lowered(self, *, alone: bool) -> tuple[list[Op], list[Record]]:
        """The ops of the plan, and for each the record that it comes from."""
        return lowered(self.records, self._taken, self._edits, dict(self.names), alone=alone)

    def record(self, op: Op) -> None:
        """Write an op down.

        Raises:
            PlanError, HookError: it cannot be carried out.
        """
        self.check_open()
        if isinstance(op, SetGrad):
            self._check_gradient(op)
        elif isinstance(op, Save) and isinstance(op.at, Act):
            pass  # it was checked when it was taken
        elif not isinstance(op, Backward) and not any(isinstance(x, Grad) for e in op.expressions for x in leaves(e)):
            self._check(op)
        self._check_gradients_are_new(op)
        self.records.append(Record.of(op))
        if isinstance(op, Edit | SetGrad):
            key = op.at if isinstance(op.at, str) else f"{op.at.of} {op.at.name}"
            self._edits.setdefault(key, []).append(len(self.records))

    def _check(self, op: Op) -> None:
        assert self.compiler is not None
        try:
            self.compiler.compile([op])
        except LenskitError as error:
            what = error.what.removeprefix("hooks[0] ")  # it is not yet known which one it will be
            raise type(error)(what, got=error.got, expected=error.expected, fix=error.fix) from None

    def state(self, key: str) -> int:
        """How many ops there are up to the last edit of a hook point, or of a gradient."""
        return self._edits[key][-1] if key in self._edits else 0

    def learn(self, node: Any) -> Any:
        """Find out an expression's shape, and at which steps it is computed; returns it.

        Raises:
            ExpressionError: it cannot be computed.
            TraceError: it is of several series of steps.
        """
        self.check_open()
        known = [self._known[given] for given in node.inputs]
        series = {repr(each.steps): each.steps for each in known if each.steps.series}
        if len(series) > 1:
            raise misused(
                "values of different steps",
                f"{node}",
                "values of the same all() or iter block, and of single steps",
                "compute it in the block in which both are read",
            )
        latest = max(known, key=lambda each: each.steps.classes, default=None)
        steps = next(iter(series.values())) if series else latest.steps if latest else self.steps
        prompts = known[0].prompts if known else self.prompts or Prompts((0,), (1,), True)
        self._known[node] = Known(self._propagated(node, known, steps), steps, prompts)
        return node

    def _propagated(self, node: Expression, known: Sequence[Known], steps: Steps) -> tuple[Any, ...] | None:
        metas: list[Any] = []
        for number in range(len(steps.classes) if steps.series else 1):
            inputs: dict[Expression, Any] = {}
            for given, each in zip(node.inputs, known, strict=True):
                if each.metas is None:
                    return None
                inputs[given] = each.metas[number if each.steps.series else 0]
            try:
                metas.append(shape_of_node(node, inputs))
            except UnknownShape:
                return None
        return tuple(metas)

    def learn_act(self, act: Act, point: HookPoint, prompts: Prompts, steps: Steps, state: int) -> None:
        """Take note of an activation, and of the shape of what is selected."""
        self.check_open()
        compiler = self.compiler
        assert compiler is not None
        [resolved] = compiler.compile([Save(act, name="shape")]).ops
        [of] = resolved.sources
        shapes = [
            selected(compiler.selections, compiler.geometry, point, act.selectors, step, of.rows).shape
            for step in steps.classes
        ]
        dtype = compiler.dtype_of(point)
        metas = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        self._known[act] = Known(metas, steps, prompts)
        self._taken[act] = Taken(state, steps.selector)

    def learn_grad(self, grad: Grad) -> None:
        """Take note of a gradient: it has the shape of its activation."""
        act = next(act for act, name in self.names.items() if name == grad.name)
        self._known[grad] = self._known[act]
        self._grads[grad] = self.state(f"{grad.of} {grad.name}")

    def name_of(self, act: Act) -> str:
        """The name under which an activation is read, for its gradient."""
        if act not in self.names:
            self.names[act] = new_name(act.at, self.names.values())
        return self.names[act]

    def save(self, node: Expression, name: str | None) -> str:
        """Write down that a value is kept; returns its key.

        Raises:
            TraceError: the name is taken.
        """
        self.check_open()
        wanted = name if name is not None else (node.at if isinstance(node, Act) else f"value{len(self._keys)}")
        key = wanted if name is not None else next(key for key in _numbered(wanted) if key not in self._keys)
        if key in self._keys:
            raise misused(f"two saves named {key!r}", repr(key), "a name of its own for each", "choose another name")
        steps = self._known[node].steps
        self.record(Save(node, steps=steps.selector if steps.series else None, name=key))
        self._keys[key] = None
        return key

    def check_steps(self, value: Any, steps: Steps) -> None:
        """See that a value that differs from step to step is used at just these steps."""
        found = self._known[value].steps if isinstance(value, Expression) else None
        if found is not None and found.series and found != steps:
            raise misused(
                "a value of several steps",
                f"{value}, which is another one at each step of its block",
                "to be used in the all() or iter block in which it was read",
                "set it in that block",
            )

    def shape(self, node: Expression) -> torch.Size:
        """The one shape that an expression has."""
        shapes = {tuple(meta.shape) for meta in self.metas(node)}
        if len(shapes) > 1:
            raise misused(
                "the shape differs from step to step",
                " or ".join(map(str, sorted(shapes, reverse=True))),
                "one shape",
                "take the shape of one step, or select tokens: x.t[-1]",
            )
        return torch.Size(shapes.pop())

    def dtype(self, node: Expression) -> torch.dtype:
        """An expression's dtype."""
        return self.metas(node)[0].dtype

    def prompts_of(self, node: Expression) -> Prompts:
        """Whose value it is."""
        return self._known[node].prompts

    def metas(self, node: Expression) -> tuple[Any, ...]:
        metas = self._known[node].metas
        if metas is None or not all(isinstance(meta, Tensor) for meta in metas):
            raise misused(
                "the shape is not known",
                f"{node}, which a Python function returns" if metas is None else f"{node}, which is two tensors",
                "a value whose shape follows from the model's",
                "compute it in the function" if metas is None else "take one of the two: [0], [1]",
            )
        return metas

    def shapes_text(self, node: Expression) -> str:
        """Its dtype and shape, for people."""
        metas = self._known[node].metas
        shapes = [
            f"{str(m.dtype).removeprefix('torch.')} {list(m.shape)}" for m in metas or () if isinstance(m, Tensor)
        ]
        return " or ".join(dict.fromkeys(shapes)) or "shape not known yet"

    def _check_gradient(self, op: SetGrad) -> None:
        target = self.metas(op.at)[0].shape
        value = self.metas(op.value)[0] if isinstance(op.value, Expression) else op.value
        if isinstance(value, Tensor) and not broadcasts(value.shape, target):
            raise ValueFitError(
                "the new gradient does not fit",
                got=f"a value of shape {tuple(value.shape)}",
                expected=f"one that broadcasts to {tuple(target)}",
                fix="index, reshape or expand it",
            )

    def _check_gradients_are_new(self, op: Op) -> None:
        for expression in op.expressions:
            for leaf in leaves(expression):
                if isinstance(leaf, Grad) and self._grads[leaf] != self.state(f"{leaf.of} {leaf.name}"):
                    raise misused(
                        "this gradient was set after it was read",
                        str(leaf),
                        "a gradient as it is now",
                        "read .grad again, or use it before it is set",
                    )


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}#{number}"
        number += 1


def misused(what: str, got: str, expected: str, fix: str) -> TraceError:
    """The error for a trace that is used where or how nothing can be recorded."""
    return TraceError(what, got=got, expected=expected, fix=fix)
