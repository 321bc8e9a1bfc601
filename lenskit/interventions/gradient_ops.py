"""Ops on gradients: `Backward` computes those of a loss, `SetGrad` replaces one on its way back.

An activation whose gradient is wanted is named by a `Read`; `lk.Grad(name)` in expressions that come after the
`Backward` stands for its gradient.
"""

from collections.abc import Sequence
from typing import final

from lenskit.interventions.expressions import Expression, Grad
from lenskit.interventions.ops import Op, Value, check_name, checked_value, value_text
from lenskit.interventions.selectors import Selectors


@final
class Backward(Op):
    """Compute the gradients of a loss, once the forward pass is over: those that later ops ask for with `lk.Grad`.

    The model's weights get no gradient from it.

    Args:
        loss: an expression of one number.
        name: what `lk.Grad(..., of=name)` calls it.

    Raises:
        PlanError: no expression, or no name.
    """

    __slots__ = ("name",)

    at: Expression
    name: str

    def __init__(self, loss: Expression, *, name: str = "loss") -> None:
        where = f"Backward({loss})"
        if not isinstance(loss, Expression):
            checked_value(where, None, 'Backward(lk.Act("hook_logits")[0, -1, 5])')
        check_name(where, name)
        self._set(at=loss, name=name, selectors=Selectors())

    @property
    def expressions(self) -> Sequence[Expression]:
        return (self.at,)

    def with_expressions(self, expressions: Sequence[Expression]) -> Op:
        return Backward(*expressions, name=self.name)

    def __repr__(self) -> str:
        return f"Backward({self.at}, name={self.name!r})"


@final
class SetGrad(Op):
    """Put a value in the place of a gradient: what lies before the activation gets this one's.

    Args:
        grad: `lk.Grad(name)`.
        value: a number, a tensor that broadcasts to what the `Read` selects, or an expression of activations and of
            gradients of points at or behind this one.

    Raises:
        PlanError: no Grad, or a value that is none of these.
    """

    __slots__ = ("value",)

    at: Grad
    value: Value

    def __init__(self, grad: Grad, value: Value) -> None:
        where = f"SetGrad({grad}, {value_text(value)})"
        value = checked_value(where, value, 'SetGrad(lk.Grad("x"), 0.0)')
        if not isinstance(grad, Grad):
            checked_value(where, None, 'SetGrad(lk.Grad("x"), 0.0)')
        self._set(at=grad, value=value, selectors=Selectors())

    @property
    def expressions(self) -> Sequence[Expression]:
        return (self.at, self.value) if isinstance(self.value, Expression) else (self.at,)

    def with_expressions(self, expressions: Sequence[Expression]) -> Op:
        return SetGrad(self.at, expressions[1] if len(expressions) > 1 else self.value)

    def __repr__(self) -> str:
        return f"SetGrad({self.at}, {value_text(self.value)})"
