"""Gradients of a pass: which are asked for, checked before it runs; and the way back through it, once it has run.

An activation whose gradient matters becomes, at its `Read`, a node of autograd's of its own, so that everything that
comes of it afterwards counts, and nothing that was computed of it before. On the way back each node's ops run in
list order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lenskit.errors import DependencyError, ExpressionError, StepError, ValueFitError, WithoutEffectError
from lenskit.interventions.actions import Action, snapshot
from lenskit.interventions.expressions import Expression, Grad, Leaf
from lenskit.interventions.gradient_ops import Backward, SetGrad
from lenskit.interventions.ops import Save
from lenskit.interventions.parts import Part
from lenskit.interventions.program import Gradients, Resolved, Source
from lenskit.interventions.selection import broadcasts

Saves = dict[tuple[str, ...], dict[int, list[tuple[Part | None, Tensor]]]]
Evaluate = Callable[[Resolved, Expression, Tensor | None, Callable[[Leaf], Tensor | None]], Any]

# -- before the pass


def collected(ops: Sequence[Resolved]) -> list[Gradients]:
    """Each `Backward` with the ops that are about its gradients.

    Raises:
        ExpressionError: gradients of no loss, or of two.
        WithoutEffectError: a loss whose gradients nobody asks for.
    """
    found: dict[str, tuple[Resolved, list[Resolved]]] = {}
    for op in ops:
        if isinstance(op.op, Backward):
            if op.op.name in found:
                raise _bad(op, f"a second loss named {op.op.name!r}", "a name of its own", "write Backward(..., name=)")
            found[op.op.name] = (op, [])
        losses = {grad.of for grad in op.grads}
        if not losses:
            continue
        if len(losses) > 1:
            raise _bad(op, f"gradients of {len(losses)} losses", "those of one", "save them one by one")
        [of] = losses
        if of not in found or not isinstance(op.op, Save | SetGrad):
            known = ", ".join(map(repr, found)) or "there is none"
            raise _bad(
                op,
                f"the loss {of!r}" if of not in found else "a gradient, which is there when the pass is over",
                f"a Save or a SetGrad behind a Backward with that name ({known})",
                'write lk.Backward(loss, name="loss"), then lk.Save(lk.Grad("x"), name="gradient")',
            )
        found[of][1].append(op)
    for loss, users in found.values():
        if not users:
            raise WithoutEffectError(
                f"{loss.numbered} computes gradients for nobody",
                got="no lk.Grad of it in any op that comes later",
                expected="a Save or a SetGrad of one of its gradients",
                fix='add lk.Save(lk.Grad("x"), name="gradient"), or leave the Backward out',
            )
    return [Gradients(loss, users, _sources(users)) for loss, users in found.values()]


def _sources(ops: Iterable[Resolved]) -> list[Source]:
    return list({source: None for op in ops for source in op.grads.values()})


def check_gradients(gradients: Sequence[Gradients], *, n_passes: int, generating: bool) -> None:
    """See that there is one pass to go back through, and that no gradient is used before it is computed.

    Raises:
        StepError, DependencyError: it is not so.
    """
    loss = gradients[0].loss
    if generating or n_passes > 1:
        got = "a generation" if generating else f"{n_passes} passes, because prompts use what others compute later"
        raise StepError(
            f"{loss.numbered}: gradients are those of one forward pass",
            got=got,
            expected="run_with_hooks, or trace without max_new_tokens, in one pass",
            fix="generate first, then run the whole text once for its gradients",
        )
    for found in gradients:
        for op in found.ops:
            if not isinstance(op.op, SetGrad):
                continue
            target = op.grads[op.op.at]
            early = [source for source in op.grads.values() if source.place[0] < target.place[0]]
            if early:
                raise DependencyError(
                    f"{op.numbered} needs a gradient that is computed after it",
                    got=f"the gradient of {early[0].place[1].name!r}, which comes earlier in the forward pass",
                    expected=f"gradients of {target.place[1].name!r} or of what lies behind it: they are there first",
                    fix="set the gradient of an earlier point",
                )


def fits(op: Resolved, shapes: Sequence[Tensor | None]) -> None:
    """See that a loss is one number, and that a new gradient has the place's shape.

    Args:
        shapes: of the op's expressions.

    Raises:
        ValueFitError: it is not so.
    """
    first = shapes[0]
    if isinstance(op.op, Backward) and first is not None and (first.numel() != 1 or not first.is_floating_point()):
        raise ValueFitError(
            f"{op.numbered}: a loss is one number",
            got=f"{str(first.dtype).removeprefix('torch.')} {tuple(first.shape)}",
            expected="one floating-point number",
            fix="take one entry, a sum or a mean: loss.sum()",
        )
    if isinstance(op.op, SetGrad) and first is not None:
        value = shapes[1] if len(shapes) > 1 else op.op.value
        if isinstance(value, Tensor) and not broadcasts(value.shape, first.shape):
            raise ValueFitError(
                f"{op.numbered}: the value does not fit",
                got=f"a value of shape {tuple(value.shape)}",
                expected=f"one that broadcasts to {tuple(first.shape)}",
                fix="index, reshape or expand it",
            )


def _bad(op: Resolved, got: str, expected: str, fix: str) -> ExpressionError:
    return ExpressionError(f"{op.numbered} is about no gradient", got=got, expected=expected, fix=fix)


# -- the pass, and the way back


class Tape:
    """What one pass keeps for the way back: the activations whose gradients matter."""

    def __init__(self, gradients: Sequence[Gradients]) -> None:
        self.gradients = gradients
        self.sources = {source for found in gradients for source in found.sources}
        self.tensors: dict[Source, tuple[Part, Tensor]] = {}

    def tracking(self, source: Source, part: Part) -> Action:
        """The action by which an activation becomes a node of its own."""

        def track(x: Tensor) -> Tensor:
            own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            self.tensors[source] = (part, own)
            return own

        return track

    def run(self, evaluate: Evaluate, saves: Saves) -> None:
        """Each loss's way back, in the list's order.

        Args:
            evaluate: an op's expression, given the values of its gradients.
            saves: where saved gradients go.

        Raises:
            WithoutEffectError: a loss does not depend on an activation whose gradient is asked for.
        """
        for number, found in enumerate(self.gradients):
            last = number == len(self.gradients) - 1
            way = _WayBack(found, self.tensors, evaluate)
            way.go(retain_graph=not last)
            for op in found.ops:
                if isinstance(op.op, Save):
                    value = way.value(op, op.op.expressions[0], None)
                    saves.setdefault(tuple(op.keys[0]), {})[0] = [(None, snapshot(value.detach()))]


class _WayBack:
    """One backward pass: what its ops see of each gradient, as it is at their place in the list."""

    def __init__(self, gradients: Gradients, tensors: dict[Source, tuple[Part, Tensor]], evaluate: Evaluate) -> None:
        self.gradients, self.tensors, self.evaluate = gradients, tensors, evaluate
        self.seen: dict[tuple[Resolved, Grad], Tensor] = {}

    def go(self, *, retain_graph: bool) -> None:
        op = self.gradients.loss
        loss = self.evaluate(op, op.op.expressions[0], None, lambda _: None)
        sources = [source for source in self.gradients.sources if source in self.tensors]
        tensors = [self.tensors[source][1] for source in sources]
        handles = [tensor.register_hook(self._at(source)) for source, tensor in zip(sources, tensors, strict=True)]
        try:
            if loss.requires_grad and tensors:
                torch.autograd.grad(loss.reshape(()), tensors, retain_graph=retain_graph, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for user in self.gradients.ops:
            for grad, source in user.grads.items():
                if (user, grad) not in self.seen:
                    raise WithoutEffectError(
                        f"{user.numbered}: the loss does not depend on it",
                        got=f"{op.op!r}, and the gradient of {source.act}",
                        expected="an activation that the loss is computed from",
                        fix="choose a point that comes before the loss, and one that no Set replaces as a whole",
                    )

    def value(self, op: Resolved, expression: Expression, like: Tensor | None) -> Any:
        def gradient(leaf: Leaf) -> Tensor | None:
            return self.seen[op, leaf] if isinstance(leaf, Grad) else None

        return self.evaluate(op, expression, like, gradient)

    def _at(self, source: Source) -> Callable[[Tensor], Tensor]:
        """What happens to the gradient of one activation."""
        selection = self.tensors[source][0].selection

        def change(grad: Tensor) -> Tensor:
            for user in self.gradients.ops:
                for leaf, of in user.grads.items():
                    if of is source:
                        self.seen[user, leaf] = selection.read(grad).clone()
                if isinstance(user.op, SetGrad) and user.grads[user.op.at] is source:
                    new: Any = user.op.value
                    if isinstance(new, Expression):
                        new = self.value(user, new, grad)
                    elif isinstance(new, Tensor):
                        new = new.to(grad.device)
                    grad = selection.edit(grad, lambda _, new=new: new)  # type: ignore[misc]
            return grad

        return change
