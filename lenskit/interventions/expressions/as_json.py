"""Expressions as plain data, and back: a flat list of nodes that refer to earlier ones; nothing in it is evaluated.

    {"act": {"at": "blocks.0.hook_mlp_out", "tokens": -1}}
    {"call": "mul", "args": [{"node": 0}, 0.5], "kwargs": {}}
    {"module": "ln_final", "argument": {"node": 1}}
    {"ref": "x"}
    {"grad": "x", "of": "loss"}

What JSON has no word for is an object with one key: {"node": 3}, {"tensor": name}, {"dtype": "float32"},
{"slice": [1, null, 2]}, {"ellipsis": true}, {"tuple": [...]}, {"float": "nan"} (or "inf", "-inf").
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lenskit.errors import ExpressionError, PlanError, PlanFormatError
from lenskit.interventions.expressions.activations import Act, Grad, Ref
from lenskit.interventions.expressions.arguments import DEEPEST
from lenskit.interventions.expressions.closed_list import DTYPES
from lenskit.interventions.expressions.nodes import Applied, Call, Expression, ModuleCall, order
from lenskit.interventions.selectors import Selectors

MOST_NODES = 100_000
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


# -- writing


def nodes_to_json(
    expressions: Sequence[Expression], tensor_name: Callable[[Tensor], str], module_name: Callable[[nn.Module], str]
) -> tuple[list[dict[str, Any]], list[int]]:
    """All nodes of the expressions, each once, and the index of each expression among them.

    Args:
        tensor_name: under which a constant is kept.
        module_name: the module's path in the model.

    Raises:
        ExpressionError: more nodes than a file may have.
    """
    nodes = order(*expressions)
    if len(nodes) > MOST_NODES:
        raise ExpressionError(
            "these expressions are too large for a file",
            got=f"{len(nodes)} nodes",
            expected=f"at most {MOST_NODES}",
            fix="compute the larger part in Python, and give the result as a tensor",
        )
    index = {node: number for number, node in enumerate(nodes)}

    def value(given: Any) -> Any:
        if isinstance(given, Expression):
            return {"node": index[given]}
        if isinstance(given, Tensor):
            return {"tensor": tensor_name(given)}
        return _tagged(given, value)

    def node(given: Expression) -> dict[str, Any]:
        if isinstance(given, Act):
            return {"act": {"at": given.at, **given.selectors.to_json()}}
        if isinstance(given, Call):
            kwargs = {key: value(held) for key, held in given.kwargs.items()}
            return {"call": given.function, "args": [value(held) for held in given.args], "kwargs": kwargs}
        if isinstance(given, Ref):
            return {"ref": given.name}
        if isinstance(given, Grad):
            return {"grad": given.name, "of": given.of}
        if isinstance(given, Applied):
            raise PlanFormatError(
                f"{given} cannot be written as data",
                got="a Python function",
                expected="functions of the closed list, which are data",
                fix="write it with torch's functions, or keep the plan in this process",
            )
        assert isinstance(given, ModuleCall)
        name = given.module if isinstance(given.module, str) else module_name(given.module)
        return {"module": name, "argument": value(given.argument)}

    return [node(given) for given in nodes], [index[expression] for expression in expressions]


def _tagged(given: Any, value: Callable[[Any], Any]) -> Any:
    if isinstance(given, list):
        return [value(entry) for entry in given]
    if isinstance(given, tuple):
        return {"tuple": [value(entry) for entry in given]}
    if isinstance(given, slice):
        return {"slice": [given.start, given.stop, given.step]}
    if isinstance(given, torch.dtype):
        return {"dtype": str(given).removeprefix("torch.")}
    if given is Ellipsis:
        return {"ellipsis": True}
    if isinstance(given, float) and not math.isfinite(given):
        return {"float": str(given)}
    return given


# -- reading


def nodes_from_json(nodes: Any, tensors: Mapping[str, Tensor], where: str) -> list[Expression]:
    """The inverse of `nodes_to_json`: all nodes, in order; modules are held by their names.

    Args:
        tensors: by name.
        where: what is read, for messages.

    Raises:
        PlanFormatError: the data is anything that `nodes_to_json` does not write.
    """
    if not isinstance(nodes, list) or len(nodes) > MOST_NODES:
        got = f"{len(nodes)} of them" if isinstance(nodes, list) else _shown(nodes)
        raise _no_plan(f"{where}: the nodes", got, f"a list of at most {MOST_NODES}")
    made: list[Expression] = []
    for number, data in enumerate(nodes):
        made.append(_node(data, _Reader(made, tensors, f"{where}: node {number}")))
    return made


class _Reader:
    """Reads the arguments of one node, given those before it."""

    def __init__(self, nodes: list[Expression], tensors: Mapping[str, Tensor], where: str) -> None:
        self.nodes, self.tensors, self.where = nodes, tensors, where

    def value(self, data: Any, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise self.refuse("a deeper nesting", f"lists at most {DEEPEST} deep")
        if data is None or type(data) in (bool, int, str):
            return data
        if type(data) is float and math.isfinite(data):
            return data
        if type(data) is list:
            return [self.value(entry, depth + 1) for entry in data]
        if type(data) is dict and len(data) == 1:
            (tag, content), *_ = data.items()
            return self.tagged(tag, content, depth)
        raise self.refuse(_shown(data), "plain data, or an object with one key")

    def tagged(self, tag: Any, content: Any, depth: int) -> Any:
        if tag == "node":
            if type(content) is int and 0 <= content < len(self.nodes):
                return self.nodes[content]
            raise self.refuse(f"node {_shown(content)}", "the number of an earlier node")
        if tag == "tuple" and type(content) is list:
            return tuple([self.value(entry, depth + 1) for entry in content])
        if tag == "slice" and type(content) is list and len(content) == 3:
            if all(part is None or type(part) is int for part in content):
                return slice(*content)
        elif tag == "ellipsis" and content is True:
            return Ellipsis
        elif type(content) is str:
            known: dict[str, Mapping[str, Any]] = {"tensor": self.tensors, "dtype": DTYPES, "float": _FLOATS}
            if tag in known and content in known[tag]:
                return known[tag][content]
        raise self.refuse(
            f"{_shown(tag)}: {_shown(content)}",
            "node (an earlier one), tensor (one of the plan's), dtype, slice, ellipsis, tuple or float",
        )

    def refuse(self, got: str, expected: str) -> PlanFormatError:
        return _no_plan(self.where, got, expected)


def _node(data: Any, reader: _Reader) -> Expression:
    keys = set(data) if type(data) is dict else set()
    try:
        if keys == {"act"}:
            return _act(data["act"], reader)
        if keys == {"call", "args", "kwargs"}:
            return _call(data["call"], data["args"], data["kwargs"], reader)
        if keys == {"module", "argument"} and type(data["module"]) is str:
            return ModuleCall(data["module"], reader.value(data["argument"]))
        if keys == {"ref"}:
            return Ref(data["ref"])
        if keys == {"grad", "of"}:
            return Grad(data["grad"], of=data["of"])
    except PlanFormatError:
        raise
    except PlanError as error:
        raise PlanFormatError(
            f"{reader.where}: {error.what}", got=error.got, expected=error.expected, fix=error.fix
        ) from error
    expected = "an object with the keys act; ref; grad, of; call, args, kwargs; or module, argument"
    raise reader.refuse(_shown(data), expected)


def _act(data: Any, reader: _Reader) -> Act:
    if type(data) is not dict or type(data.get("at")) is not str or not _is_shallow(data, 3):
        raise reader.refuse(_shown(data), "an act: the name of a hook point as `at`, and selectors")
    rest = {key: value for key, value in data.items() if key != "at"}
    selectors = Selectors.from_json(rest, reader.where)
    return Act(
        data["at"],
        prompts=selectors.prompts,
        tokens=selectors.tokens,
        heads=selectors.heads,
        dims=selectors.dims,
        steps=selectors.steps,  # type: ignore[arg-type]  # Act refuses what is no int
    )


def _call(function: Any, args: Any, kwargs: Any, reader: _Reader) -> Call:
    if type(function) is not str or type(args) is not list or type(kwargs) is not dict:
        raise reader.refuse(_shown([function, args, kwargs]), "a function's name, a list and an object")
    if not all(type(key) is str and key.isidentifier() for key in kwargs):
        raise reader.refuse(_shown(kwargs), "keywords that are names")
    return Call(
        function,
        tuple([reader.value(arg) for arg in args]),
        {key: reader.value(value) for key, value in kwargs.items()},
    )


def _is_shallow(data: Any, levels: int) -> bool:
    """Whether it is nested no deeper than that: what is cannot even be shown."""
    if type(data) not in (list, dict):
        return True
    return levels > 0 and all(
        _is_shallow(entry, levels - 1) for entry in (data.values() if type(data) is dict else data)
    )


def _shown(data: Any) -> str:
    """Some of the data, for a message: what is nested deeply has no repr."""
    if type(data) in (list, dict):
        return f"a {'list' if type(data) is list else 'dictionary'} of {len(data)}"
    return repr(data)[:100]


def _no_plan(what: str, got: str, expected: str) -> PlanFormatError:
    return PlanFormatError(f"{what}: this is no plan", got=got, expected=expected, fix="write plans with Plan.save")
