"""Plans as data: JSON and safetensors, both ways. Nothing is pickled, nothing that is read is executed.

A tensor is named by the SHA-256 of its dtype, shape and bytes, so equal tensors are stored once, a JSON file alone says
whether two plans are the same, and a tensor that was changed is noticed.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lenskit.errors import PlanError, PlanFormatError
from lenskit.interventions.expressions import Call, Expression, is_python, order
from lenskit.interventions.expressions.as_json import nodes_from_json, nodes_to_json
from lenskit.interventions.gradient_ops import Backward, SetGrad
from lenskit.interventions.ops import Add, Edit, Numbered, Op, Read, Save, Scale, Set, Stop
from lenskit.interventions.selectors import Selectors
from lenskit.interventions.sites import Site

FORMAT = "lenskit-plan"
VERSION = 1
OPS: dict[str, type[Op]] = {
    "save": Save, "set": Set, "add": Add, "scale": Scale, "stop": Stop, "read": Read, "backward": Backward,
    "set_grad": SetGrad,
}  # fmt: skip
ARGUMENTS: dict[type[Op], list[str]] = {  # what an op is made of, by position
    Save: ["at"], Stop: ["at"], Read: ["value"], Backward: ["value"], SetGrad: ["grad", "value"],
    Set: ["at", "value"], Add: ["at", "value"], Scale: ["at", "value"],
}  # fmt: skip
NAMES = {kind: name for name, kind in OPS.items()}


def to_json(ops: Sequence[Op], model: nn.Module | None) -> dict[str, Any]:
    """See `Plan.to_json`."""
    expressions = [expression for op in ops for expression in op.expressions]
    try:
        nodes, roots = nodes_to_json(expressions, tensor_name, _module_names(model))
    except PlanFormatError:
        for index, op in enumerate(ops):
            if any(is_python(expression) for expression in op.expressions):
                fix = "write it with torch's functions, or run it locally"
                raise _not_data(Numbered(index, op), "a Python function", fix) from None
        raise
    left = iter(roots)
    written = [_op_to_json(Numbered(index, op), left) for index, op in enumerate(ops)]
    return {"format": FORMAT, "version": VERSION, "ops": written, "nodes": nodes}


def tensors(ops: Sequence[Op]) -> dict[str, Tensor]:
    """See `Plan.tensors`."""
    found: dict[str, Tensor] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found[tensor_name(value)] = _plain(value).clone()
        elif isinstance(value, list | tuple):
            for entry in value:
                look(entry)
        elif isinstance(value, dict):
            look(list(value.values()))

    for op in ops:
        if isinstance(op, Edit | SetGrad):
            look(op.value)
        for expression in op.expressions:
            for node in order(expression):
                if isinstance(node, Call):
                    look([node.args, node.kwargs])
    return found


def from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Op]:
    """See `Plan.from_json`."""
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise _no_plan("the data", _shown(data), f'an object with "format": {FORMAT!r}')
    if data.get("version") != VERSION or isinstance(data["version"], bool):
        raise _no_plan(
            "the data", f"version {data.get('version')!r}", f"version {VERSION}: update lenskit for later ones"
        )
    _only(data, {"format", "version", "ops", "nodes"}, "the plan")
    if not isinstance(data.get("ops"), list) or not isinstance(data.get("nodes"), list):
        raise _no_plan("the plan", "no list of ops and of nodes", '"ops": [...], "nodes": [...]')
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor_name(tensor) != name:
            raise _no_plan(f"tensor {name!r}", "a tensor whose contents are others than its name says", "the one saved")
    expressions = nodes_from_json(data["nodes"], tensors, "the plan")
    return [_op_from_json(entry, f"op {i}", expressions, tensors) for i, entry in enumerate(data["ops"])]


def save(ops: Sequence[Op], path: Path, model: nn.Module | None) -> Path:
    """See `Plan.save`."""
    text = json.dumps(to_json(ops, model), indent=1, allow_nan=False) + "\n"
    held = tensors(ops)
    if held:
        save_file(held, tensors_file(path))
        # As the folder lets others; safetensors' own would be readable for its owner alone.
        tensors_file(path).chmod(path.absolute().parent.stat().st_mode & 0o666)
    elif tensors_file(path).exists():  # an earlier plan's, which this one would not match
        tensors_file(path).unlink()
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path) -> list[Op]:
    """See `Plan.load`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        beside = tensors_file(path)
        held = load_file(beside) if beside.exists() else {}
    except (ValueError, RecursionError, SafetensorError) as error:
        raise PlanFormatError(
            f"{path} is no plan",
            got=f"{type(error).__name__}: {error}",
            expected="what Plan.save writes: JSON, and a .safetensors file of the same name where there are tensors",
            fix="save the plan again",
        ) from error
    return from_json(data, held)


def digest(ops: Sequence[Op], model: nn.Module | None) -> str:
    """See `Plan.digest`."""
    text = json.dumps(to_json(ops, model), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    """The numbers as they are hashed and written."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype == torch.complex128:
        raise PlanFormatError(
            "a tensor cannot be written",
            got=f"{tensor.layout} {tensor.dtype} on {tensor.device}",
            expected="a dense tensor that holds values, of a dtype that safetensors has",
            fix="convert it: value.to_dense(), value.to(torch.complex64), a tensor that is not on the meta device",
        )
    return tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()


def tensor_name(tensor: Tensor) -> str:
    """What a tensor is called in a plan: the hash of its dtype, shape and bytes (little-endian)."""
    plain = _plain(tensor)
    head = f"{str(plain.dtype).removeprefix('torch.')} {list(plain.shape)} "
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return "sha256:" + hashlib.sha256(head.encode() + data).hexdigest()


def _module_names(model: nn.Module | None) -> Callable[[nn.Module], str]:
    names = {} if model is None else {module: name for name, module in model.named_modules()}

    def name(module: nn.Module) -> str:
        if module not in names:
            raise PlanFormatError(
                f"an expression applies a {type(module).__name__} whose name is not known",
                got="no model that it is a part of",
                expected="the model whose module it is",
                fix="pass it: plan.save(path, model)",
            )
        return names[module]

    return name


# -- ops


def _op_to_json(numbered: Numbered, roots: Any) -> dict[str, Any]:
    op = numbered.op
    kind = NAMES.get(type(op))
    if kind is None:
        raise _not_data(numbered, "a Python function", "write it as an expression of lk.Act, or run it locally")
    written: dict[str, Any] = {"op": kind}
    if isinstance(op, SetGrad):
        written["grad"] = {"node": next(roots)}
    elif isinstance(op.at, Expression):
        written["value"] = {"node": next(roots)}
    else:
        written["at"] = _site_to_json(op.at, numbered)
    if isinstance(op, Edit | SetGrad):
        written["value"] = {"node": next(roots)} if isinstance(op.value, Expression) else _value_to_json(op.value)
    if isinstance(op, Save | Read | Backward) and op.name is not None:
        written["name"] = op.name
    selectors = op.selectors.to_json()
    return {**written, **({"selectors": selectors} if selectors else {})}


def _site_to_json(site: Site, numbered: Numbered) -> Any:
    if isinstance(site, str):
        return site
    if callable(site):
        raise _not_data(numbered, "a predicate on names", "write names or a glob instead")
    return [_site_to_json(entry, numbered) for entry in site]


def _value_to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": tensor_name(value)}
    return value if isinstance(value, int) or math.isfinite(value) else {"float": str(float(value))}


def _op_from_json(data: Any, where: str, expressions: Sequence[Expression], tensors: Mapping[str, Tensor]) -> Op:
    if not isinstance(data, Mapping) or not isinstance(data.get("op"), str) or data["op"] not in OPS:
        raise _no_plan(where, _shown(data), f'an object with "op": one of {", ".join(OPS)}')
    kind = OPS[data["op"]]
    given = ["value"] if kind is Save and "at" not in data else ARGUMENTS[kind]
    named = {"name"} if kind in (Save, Read, Backward) else set()
    selected = set() if kind in (Backward, SetGrad) else {"selectors"}
    _only(data, {"op", *given, *named, *selected}, where)
    missing = [key for key in given if key not in data] + [key for key in named if key not in data and kind is not Save]
    if missing:
        raise _no_plan(where, f"{', '.join(data)}", f"{' and '.join(missing)}: the op has no meaning without")
    if not issubclass(kind, Edit | SetGrad) and not isinstance(data.get("value", {}), Mapping):
        raise _no_plan(where, _shown(data["value"]), "a value that is one of the plan's nodes")
    selectors = data.get("selectors", {})
    Selectors.from_json(selectors, where)
    keywords = {name: _selector(value) for name, value in selectors.items()}
    if named and "name" in data:
        keywords["name"] = data["name"]
    arguments = [
        _site_from_json(data[key], where) if key == "at" else _value_from_json(data[key], where, expressions, tensors)
        for key in given
    ]
    try:
        return kind(*arguments, **keywords)
    except TypeError as error:
        raise _no_plan(where, str(error), "an op's own arguments") from error
    except PlanError as error:
        raise PlanFormatError(
            f"{where}: {error.what}", got=error.got, expected=error.expected, fix=error.fix
        ) from error


def _selector(value: Any) -> Any:
    return slice(*value["slice"]) if isinstance(value, Mapping) else value


def _site_from_json(data: Any, where: str, depth: int = 0) -> Site:
    if isinstance(data, str):
        return data
    if isinstance(data, list) and depth < 8:
        return [_site_from_json(entry, where, depth + 1) for entry in data]
    raise _no_plan(where, _shown(data), "a hook point's name, a glob, or a list of these")


def _value_from_json(data: Any, where: str, expressions: Sequence[Expression], tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(data, int | float) and not isinstance(data, bool) and (isinstance(data, int) or math.isfinite(data)):
        return data
    if isinstance(data, Mapping) and len(data) == 1:
        [(tag, content)] = data.items()
        if tag == "node" and type(content) is int and 0 <= content < len(expressions):
            return expressions[content]
        if tag == "tensor" and isinstance(content, str) and content in tensors:
            return tensors[content]
        if tag == "float" and content in ("nan", "inf", "-inf"):
            return float(content)
    raise _no_plan(where, _shown(data), "a number, a tensor of the plan, or one of its nodes")


# -- errors


def _only(data: Mapping[str, Any], keys: set[str], where: str) -> None:
    unknown = sorted(str(key) for key in set(data) - keys)
    if unknown:
        raise _no_plan(where, f"the keys {', '.join(unknown)}", f"only {', '.join(sorted(keys))}")


def _no_plan(where: str, got: str, expected: str) -> PlanFormatError:
    return PlanFormatError(f"{where}: this is no plan", got=got, expected=expected, fix="write plans with Plan.save")


def _not_data(numbered: Numbered, got: str, fix: str) -> PlanFormatError:
    return PlanFormatError(
        f"{numbered} cannot be written as data", got=got, expected="ops, sites and expressions, which are data", fix=fix
    )


def tensors_file(path: Path) -> Path:
    """The file of a plan's tensors. Names that differ in their ending only have one each."""
    return path.with_suffix(".safetensors") if path.suffix == ".json" else path.with_name(path.name + ".safetensors")


def _shown(data: Any) -> str:
    """What came, shortly: deeply nested data has no repr."""
    return f"a {type(data).__name__} of {len(data)}" if isinstance(data, list | dict) else repr(data)[:200]
