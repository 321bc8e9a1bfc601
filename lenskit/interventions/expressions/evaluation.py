"""What is asked of an expression: what it reads, its shape before anything runs, its value while the model runs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lenskit.errors import ExpressionError
from lenskit.hooks import hooks_off
from lenskit.interventions.expressions import shapes
from lenskit.interventions.expressions.closed_list import FUNCTIONS, RANDOM
from lenskit.interventions.expressions.nodes import Applied, Call, Expression, Leaf, ModuleCall, order
from lenskit.interventions.expressions.text import shapes_text

Values = Callable[[Leaf], Tensor]


class UnknownShape(Exception):
    """The shape of what a Python function returns, before it has run."""


def leaves(expression: Expression) -> list[Leaf]:
    """The activations and gradients that it is computed from, each once, in order."""
    return [node for node in order(expression) if isinstance(node, Leaf)]


def is_python(expression: Expression) -> bool:
    """Whether it calls a Python function."""
    return any(isinstance(node, Applied) for node in order(expression))


def modules(expression: Expression) -> list[nn.Module | str]:
    """The modules that it applies, or their names, in order."""
    return [node.module for node in order(expression) if isinstance(node, ModuleCall)]


def bind(expression: Expression, lookup: Callable[[str], nn.Module]) -> Expression:
    """The expression with modules in the place of their names; what holds no name stays the node that it is.

    Args:
        lookup: the module of a name, such as `model.get_submodule`.

    Raises:
        ExpressionError: there is no such module (an AttributeError or KeyError of `lookup`), or it takes more than one
            tensor.
    """
    return _rebuilt(expression, lambda leaf: leaf, lookup)


def rewritten(expression: Expression, replace: Callable[[Leaf], Expression]) -> Expression:
    """The expression with others in the place of its leaves; what holds none that changes stays the node that it is."""
    return _rebuilt(expression, replace, None)


def _rebuilt(
    expression: Expression, replace: Callable[[Leaf], Expression], lookup: Callable[[str], nn.Module] | None
) -> Expression:
    made: dict[Expression, Expression] = {}
    for node in order(expression):
        changed = any(made[given] is not given for given in node.inputs)
        named = lookup is not None and isinstance(node, ModuleCall) and isinstance(node.module, str)
        if isinstance(node, Leaf):
            made[node] = replace(node)
        elif isinstance(node, ModuleCall) and (changed or named):
            module = _looked_up(str(node.module), lookup) if named and lookup else node.module
            made[node] = ModuleCall(module, made[node.argument])
        elif isinstance(node, Call) and changed:
            made[node] = Call(node.function, *_filled(node, made, None))
        elif isinstance(node, Applied) and changed:
            made[node] = Applied(node.function, _filled(node, made, None)[0])
        else:
            made[node] = node
    return made[expression]


def _looked_up(name: str, lookup: Callable[[str], nn.Module]) -> nn.Module:
    try:
        return lookup(name)
    except (AttributeError, KeyError) as error:
        raise ExpressionError(
            f"the model has no module {name!r}",
            got=repr(name),
            expected="the path of one of its modules, such as 'ln_final' or 'blocks.0.mlp'",
            fix="run the plan on the model that it was written for, or correct the name",
        ) from error


def evaluate(
    expression: Expression, leaf: Values, *, like: Tensor | None, applied: dict[Expression, Any] | None = None
) -> Any:
    """The value, each node computed once: a tensor, or whatever a Python function returned.

    Args:
        leaf: the value of an activation.
        like: on whose device everything is computed; None for that of the first activation.
        applied: what Python functions returned before, which are not called again; it is added to.

    Raises:
        ExpressionError: a function failed (the cause is chained), a module is only a name, or the value is no tensor.
    """
    values: dict[Expression, Any] = {node: leaf(node) for node in leaves(expression)}
    device = next((value.device for value in values.values()), torch.device("cpu")) if like is None else like.device
    values = {node: value if value.device == device else value.to(device) for node, value in values.items()}
    known = {} if applied is None else applied

    def result(node: Expression, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(node, Applied):
            return _result(node, args, kwargs)  # type: ignore[arg-type]
        if node not in known:
            known[node] = node.function(*args)
        return known[node]

    return _computed(expression, values, device, result)


def shape_of(expression: Expression, leaf: Values) -> Tensor:
    """A meta tensor of the value's shape and dtype; nothing is computed.

    Args:
        leaf: a meta tensor of an activation's shape and dtype.

    Raises:
        ExpressionError: a function would fail (the cause is chained), or the shape depends on values.
        UnknownShape: a Python function has its say.
    """
    values: dict[Expression, Any] = {node: leaf(node) for node in leaves(expression)}
    with torch.no_grad():
        return _computed(expression, values, None, _shape)


def shape_of_node(node: Expression, inputs: Mapping[Expression, Any]) -> Any:
    """`shape_of`, for a node whose inputs' meta tensors are known: one, or two where it gives values and indices."""
    with torch.no_grad():
        return _node_value(node, inputs, None, _shape)


def _computed(
    expression: Expression,
    values: dict[Expression, Any],
    device: torch.device | None,
    compute: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
) -> Any:
    """All nodes in order; `values` has those of the activations, and loses each when its last user has been computed.

    device: for constants and random numbers; None for shapes only.
    """
    nodes = order(expression)
    last_use = {given: node for node in nodes for given in node.inputs}
    for node in nodes:
        if isinstance(node, Leaf):
            continue
        values[node] = _node_value(node, values, device, compute)
        for given in node.inputs:
            if last_use[given] is node:
                values.pop(given, None)
    if not isinstance(values[expression], Tensor) and not isinstance(expression, Applied):
        raise _no_tensor(expression, values[expression])
    return values[expression]


def _node_value(
    node: Expression,
    values: Mapping[Expression, Any],
    device: torch.device | None,
    compute: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
) -> Any:
    args, kwargs = _filled(node, values, device)
    if isinstance(node, Call) and node.function in RANDOM:
        kwargs["device"] = shapes.META if device is None else device
    try:
        value = compute(node, args, kwargs)
    except (ExpressionError, UnknownShape, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(node, Applied):  # the user's own
            error.add_note(f"in {node}")
            raise
        raise _failed(node, args, kwargs, error, shapes_only=device is None) from error
    may_be_more = isinstance(node, Applied) or (isinstance(node, Call) and node.pair)
    if not isinstance(value, Tensor) and not may_be_more:
        raise _no_tensor(node, value)
    return value


def _result(node: Call | ModuleCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(node, Call):
        return FUNCTIONS[node.function].run(*args, **kwargs)
    with hooks_off():
        return _module(node)(*args)


def _shape(node: Call | ModuleCall | Applied, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(node, Applied):
        raise UnknownShape
    if isinstance(node, Call):
        return shapes.applied(FUNCTIONS[node.function], args, kwargs)
    return shapes.through(_module(node), *args)


def _module(node: ModuleCall) -> nn.Module:
    if isinstance(node.module, str):
        raise ExpressionError(
            f"{node} is of no model yet",
            got=f"a module's name, {node.module!r}",
            expected="the module",
            fix="bind(expression, model.get_submodule) looks names up",
        )
    return node.module


def _filled(
    node: Expression, values: Mapping[Expression, Any], device: torch.device | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments with values in the place of expressions, and constants on the device, if there is one."""
    if isinstance(node, ModuleCall):
        return (values[node.argument],), {}
    assert isinstance(node, Call | Applied)
    args = tuple([_fill(arg, values, device) for arg in node.args])
    if isinstance(node, Applied):
        return args, {}
    return args, {key: _fill(value, values, device) for key, value in node.kwargs.items()}


def _fill(value: Any, values: Mapping[Expression, Any], device: torch.device | None) -> Any:
    if isinstance(value, Expression):
        return values[value]
    if isinstance(value, Tensor):
        return value if device is None or value.device == device else value.to(device)
    if type(value) is tuple or type(value) is list:
        return type(value)([_fill(entry, values, device) for entry in value])
    return value


def _failed(
    node: Expression, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception, *, shapes_only: bool
) -> ExpressionError:
    given = shapes_text([*args, *kwargs.values()])
    if shapes_only and isinstance(error, NotImplementedError):
        return ExpressionError(
            f"the shape of {node} depends on values",
            got=f"arguments {given}: {_first_line(error)}",
            expected="a shape that follows from the shapes of the arguments: it is checked before the model runs",
            fix="use torch.where, or compute it in a Python function: hooks=[(name, lambda act, hook: ...)]",
        )
    return ExpressionError(
        f"{node} cannot be computed",
        got=f"arguments {given}: {_first_line(error)}",
        expected="shapes, dtypes and options that go together",
        fix="select, index, reshape or cast the activations so that they do",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _no_tensor(node: Expression, value: object) -> ExpressionError:
    return ExpressionError(
        f"{node} is no tensor",
        got=f"a {type(value).__name__}",
        expected="one tensor",
        fix="take one of the two: [0], [1], .values or .indices"
        if isinstance(node, Call) and node.pair
        else "use functions and modules that return one tensor",
    )
