"""The closed list: the functions that an expression may hold, by name, and why others are refused.

A name in this list is what a plan's file says, so it never changes its meaning. One function may be written in several
ways (`torch.softmax(x, -1)`, `x.softmax(-1)`, `F.softmax(x, -1)`); they all have one name.
"""

import difflib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from lenskit.errors import ExpressionError
from lenskit.modules.module import Symbol

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip

Run = Callable[..., Any]
Style = Literal["method", "torch", "F", "lk", "sign", "property"]


@dataclass(frozen=True, slots=True)
class Function:
    """One of the list.

    run: computes it.
    style: how one writes it.
    pointwise: whether its result has the shape that its tensors broadcast to.
    """

    name: str
    run: Run
    style: Style
    pointwise: bool = False


def _words(text: str) -> list[str]:
    return text.split()


# What torch has as a function and as a method. The method is run: it takes more, as in x.permute(0, 2, 1).
_BOTH = _words(
    "abs all amax amin any argmax argmin argsort bmm ceil clamp clone cos count_nonzero cumprod cumsum detach diagonal "
    "dot exp expm1 flatten flip floor gather index_select isfinite isinf isnan log log10 log1p log2 log_softmax "
    "logical_and logical_not logical_or logical_xor logsumexp masked_fill max maximum mean median min minimum movedim "
    "nan_to_num norm outer permute prod reciprocal relu repeat_interleave reshape roll round rsqrt sigmoid sign sin "
    "softmax sort sqrt square squeeze std sum take_along_dim tanh topk transpose tril triu trunc unflatten unsqueeze "
    "var"
)
_CASTS = _words("bfloat16 bool double float half int long")
_METHODS = [*_CASTS, *_words("contiguous expand repeat to view")]
_OF_TORCH: dict[str, Run] = {
    "cat": torch.cat, "cosine_similarity": torch.cosine_similarity, "einsum": torch.einsum,
    "full_like": torch.full_like, "ones_like": torch.ones_like, "stack": torch.stack, "where": torch.where,
    "zeros_like": torch.zeros_like,
}  # fmt: skip
_OF_F: dict[str, Run] = {
    "cross_entropy": F.cross_entropy, "gelu": F.gelu, "kl_div": F.kl_div, "layer_norm": F.layer_norm,
    "linear": F.linear, "logsigmoid": F.logsigmoid, "mse_loss": F.mse_loss, "normalize": F.normalize,
    "one_hot": F.one_hot, "pad": F.pad, "rms_norm": F.rms_norm, "silu": F.silu, "softplus": F.softplus,
}  # fmt: skip

# Operators: the sign, how tightly it binds, what computes it. Python's operators take a number on either side;
# torch's functions take keywords.
SIGNS: dict[str, tuple[str, int, Run, Run]] = {
    "eq": ("==", 1, operator.eq, torch.eq), "ne": ("!=", 1, operator.ne, torch.ne),
    "lt": ("<", 1, operator.lt, torch.lt), "le": ("<=", 1, operator.le, torch.le),
    "gt": (">", 1, operator.gt, torch.gt), "ge": (">=", 1, operator.ge, torch.ge),
    "bitwise_or": ("|", 2, operator.or_, torch.bitwise_or),
    "bitwise_xor": ("^", 3, operator.xor, torch.bitwise_xor),
    "bitwise_and": ("&", 4, operator.and_, torch.bitwise_and),
    "add": ("+", 5, operator.add, torch.add), "sub": ("-", 5, operator.sub, torch.sub),
    "mul": ("*", 6, operator.mul, torch.mul), "div": ("/", 6, operator.truediv, torch.div),
    "floor_divide": ("//", 6, operator.floordiv, torch.floor_divide),
    "remainder": ("%", 6, operator.mod, torch.remainder), "matmul": ("@", 6, operator.matmul, torch.matmul),
    "neg": ("-", 7, operator.neg, torch.neg), "bitwise_not": ("~", 7, operator.invert, torch.bitwise_not),
    "pow": ("**", 8, operator.pow, torch.pow),
}  # fmt: skip


# Functions of each entry: the result has the shape that the tensors broadcast to.
_POINTWISE = frozenset(SIGNS) - {"matmul"} | {
    *_CASTS, *_words(
        "abs ceil clamp clone contiguous cos detach exp expm1 floor full_like gelu isfinite isinf isnan log log10 "
        "log1p log2 logical_and logical_not logical_or logical_xor logsigmoid masked_fill maximum minimum "
        "nan_to_num ones_like reciprocal relu round rsqrt sigmoid sign silu sin softplus sqrt square tanh to trunc "
        "where zeros_like"
    ),
}  # fmt: skip


def _operation(sign: Run, function: Run) -> Run:
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if kwargs else sign(*args)

    return run


# -- random numbers: of a generator of their own, drawn on the CPU, so that they are the same on every machine


def _rand(*shape: int, seed: int, device: torch.device, draw: Callable[..., Tensor] = torch.rand) -> Tensor:
    if device.type == "meta":
        return torch.empty(shape, dtype=torch.float32, device=device)
    return draw(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)).to(device)


def _randn(*shape: int, seed: int, device: torch.device) -> Tensor:
    return _rand(*shape, seed=seed, device=device, draw=torch.randn)


def _rand_like(x: Tensor, *, seed: int, draw: Callable[..., Tensor] = torch.rand) -> Tensor:
    if not x.dtype.is_floating_point:
        raise TypeError(f"random numbers are floating point, and this is {x.dtype}")
    return _rand(*x.shape, seed=seed, device=x.device, draw=draw).to(x.dtype)


def _randn_like(x: Tensor, *, seed: int) -> Tensor:
    return _rand_like(x, seed=seed, draw=torch.randn)


def _setitem(x: Tensor, index: Any, value: Any) -> Tensor:
    """`x` as it is after `x[index] = value`; x itself stays as it was."""
    new = x.clone()
    new[index] = value
    return new


RANDOM = {"rand": _rand, "randn": _randn}  # these are told the device
_RANDOM_LIKE = {"rand_like": _rand_like, "randn_like": _randn_like}


# -- the list


def _list() -> dict[str, Function]:
    entries: list[tuple[str, Style, Run]] = [(name, "method", getattr(Tensor, name)) for name in _BOTH + _METHODS]
    entries += [(name, "torch", function) for name, function in _OF_TORCH.items()]
    entries += [(name, "F", function) for name, function in _OF_F.items()]
    entries += [(name, "lk", function) for name, function in (RANDOM | _RANDOM_LIKE).items()]
    entries += [(name, "sign", _operation(by_sign, function)) for name, (_, _, by_sign, function) in SIGNS.items()]
    entries += [("T", "property", lambda x: x.T), ("mT", "property", lambda x: x.mT)]
    entries += [("getitem", "sign", operator.getitem), ("setitem", "lk", _setitem)]
    return {name: Function(name, run, style, name in _POINTWISE) for name, style, run in sorted(entries)}


def _callables() -> dict[Any, str]:
    """What torch hands to `__torch_function__`, with the name that it has in the list."""
    found: dict[Any, str] = {function: name for name, function in (_OF_TORCH | _OF_F).items()}
    for name in [*_BOTH, *SIGNS]:
        found |= {getattr(torch, name): name, getattr(Tensor, name): name}
    found |= {getattr(Tensor, name): name for name in [*_METHODS, "where"]}
    found |= {Tensor.__floordiv__: "floor_divide", Tensor.__pow__: "pow", Tensor.__getitem__: "getitem"}
    found |= {Tensor.__and__: "bitwise_and", Tensor.__or__: "bitwise_or", Tensor.__xor__: "bitwise_xor"}
    return found | {F.relu: "relu", F.softmax: "softmax", F.log_softmax: "log_softmax"}


FUNCTIONS = _list()
BY_CALLABLE = _callables()
METHODS = frozenset([*_BOTH, *_METHODS, *SIGNS, "where"])  # which an expression has as methods, as a tensor does

_PAIRS = {"sort": 0, "topk": 0, "max": 1, "median": 1, "min": 1}  # 1: where a dimension is given


def gives_pair(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the function returns values and indices."""
    if name not in _PAIRS:
        return False
    return not _PAIRS[name] or "dim" in kwargs or (len(args) > 1 and type(args[1]) is int)


# -- calls, as they come from torch and from files

# What torch's Python functions pass along, and what it says where nobody said anything.
_UNSAID: dict[str, Any] = {"out": None, "inplace": False, "size_average": None, "reduce": None, "_stacklevel": 3}
_REFUSED = {
    "out": "a tensor of its own: an expression is a value, which nothing is written into",
    "inplace": "a tensor of its own: an expression is a value, which nothing is written into",
    "device": "the device of the activations that an expression is computed from",
    "generator": "a seed: random numbers come from lk.rand and lk.randn",
    "layout": "a dense tensor", "memory_format": "a dense tensor", "pin_memory": "a dense tensor",
    "requires_grad": "a value, whose gradient is that of the activations",
}  # fmt: skip


def normalise(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of torch's function as those of the list's: without what nobody said, the first one by position."""
    kwargs = {
        key: value for key, value in kwargs.items() if not (key in _UNSAID and (value is _UNSAID[key] or key[0] == "_"))
    }
    if name == "where" and len(args) <= 3:
        names = ("input", "condition", "other") if func is Tensor.where else ("condition", "input", "other")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return tuple(given.pop(key) for key in ("condition", "input", "other") if key in given), given
    if "input" in kwargs and not args:
        return (kwargs.pop("input"),), kwargs
    return args, kwargs


def check(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse what the list's functions could do in torch and cannot do in an expression.

    Raises:
        ExpressionError: keywords for devices or memory, a cast to anything but a dtype, a `where` without values,
            random numbers without a seed.
    """
    if kwargs:
        for key, expected in _REFUSED.items():
            if key in kwargs:
                raise _bad_call(name, f"{key}=", expected, f"call it without {key}=")
    rule = _RULES.get(name)
    if rule is not None:
        rule(name, args, kwargs)
    if name in SIGNS and not kwargs:
        _check_operation(name, args)


def _check_to(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    given = [*args[1:], *kwargs.values()]
    if not (len(given) == 1 and isinstance(given[0], torch.dtype) and set(kwargs) <= {"dtype"}):
        fix = "leave devices out: an expression is computed where its activations are"
        raise _bad_call(name, _said(given), "one dtype, as in act.to(torch.float32)", fix)


def _check_cast(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if len(args) != 1 or kwargs:
        raise _bad_call(name, _said([*args[1:], *kwargs]), "no arguments", f"write act.{name}()")


def _check_where(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if len(args) != 3 or kwargs:
        fix = "give both values; how many indices there are would depend on the activations"
        raise _bad_call(name, f"{len(args)} arguments", "a condition and two values", fix)


def _check_getitem(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if len(args) != 2 or kwargs or not isinstance(args[0], Tensor | Symbol):
        raise _bad_call(name, _said([*args, *kwargs]), "an expression or a tensor, and an index", "write act[index]")
    for part in args[1] if isinstance(args[1], tuple) else (args[1],):
        # Lists of other things mean one thing or another from one version of torch to the next.
        if isinstance(part, list) and not (all(type(e) is int for e in part) or all(type(e) is bool for e in part)):
            raise _bad_call("an index", _said([part]), "lists of ints, or of bools", "write act[torch.tensor(list)]")


def _check_setitem(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if len(args) != 3 or kwargs or not isinstance(args[2], Tensor | Symbol | int | float):
        raise _bad_call(name, _said([*args, *kwargs]), "a tensor, an index, and a value", "write x[index] = value")
    _check_getitem("an index", args[:2], {})


def _check_operation(name: str, args: tuple[Any, ...]) -> None:
    # Python's operators would do other things to strings and lists: "%s" % act, [0] * act.
    if len(args) != (1 if name in ("neg", "bitwise_not") else 2) or not all(
        isinstance(arg, Tensor | Symbol | int | float) for arg in args
    ):
        sign = SIGNS[name][0]
        raise _bad_call(sign, _said(args), "expressions, tensors and numbers on its sides", f"write act {sign} 2")


def _check_random(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    seed = kwargs.get("seed")
    if set(kwargs) != {"seed"} or type(seed) is not int or not 0 <= seed < 2**63:
        got = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no seed"
        raise _bad_call(name, got, "seed=, an int from 0 on, and nothing else by name", f"write {_EXAMPLES[name]}")
    if name in RANDOM:
        if not all(type(size) is int and size >= 0 for size in args):
            raise _bad_call(name, _said(args), "a shape: ints from 0 on", f"write {_EXAMPLES[name]}")
    elif len(args) != 1:
        raise _bad_call(name, f"{len(args)} arguments", "one: whose shape and dtype", f"write {_EXAMPLES[name]}")


_EXAMPLES = {
    "rand": "lk.rand(4, 128, seed=0)", "randn": "lk.randn(4, 128, seed=0)",
    "rand_like": "lk.rand_like(act, seed=0)", "randn_like": "lk.randn_like(act, seed=0)",
}  # fmt: skip
_RULES: dict[str, Callable[[str, tuple[Any, ...], Mapping[str, Any]], None]] = {
    **dict.fromkeys([*_CASTS, "T", "mT", "clone", "contiguous", "detach"], _check_cast),
    **dict.fromkeys(_EXAMPLES, _check_random),
    "to": _check_to,
    "where": _check_where,
    "getitem": _check_getitem,
    "setitem": _check_setitem,
}


def _said(values: Any) -> str:
    return ", ".join(map(repr, values))[:200] or "nothing"


def _bad_call(name: str, got: str, expected: str, fix: str) -> ExpressionError:
    return ExpressionError(f"{name} cannot be part of an expression like that", got=got, expected=expected, fix=fix)


# -- refusals

_NO_VALUE = (
    "a function whose result is a tensor: there is no value before the model runs",
    "save the expression with lk.Save and look at the result",
)
_NO_SHAPE = (
    "functions that need no sizes: a shape depends on the model and its input",
    "use -1, flatten, unflatten or einsum",
)
_NO_DEVICE = (
    "the device of the activations, where an expression is computed",
    "leave it out; dtypes change with act.to(torch.float32)",
)
_NO_WRITING = (
    "a new value: nothing is written into an expression, nor an expression into a tensor",
    "build the value with torch.where, or write a Set with selectors",
)
_NO_SEED = (
    "random numbers that are the same in every run",
    "use lk.rand, lk.randn, lk.rand_like or lk.randn_like with a seed",
)
_REASONS = {
    **dict.fromkeys(_words("allclose backward equal grad is_nonzero item numpy tolist"), _NO_VALUE),
    **dict.fromkeys(_words("device dim dtype is_floating_point ndim numel shape size stride"), _NO_SHAPE),
    **dict.fromkeys(_words("cpu cuda get_device is_cuda xpu"), _NO_DEVICE),
    **dict.fromkeys(
        _words("alpha_dropout bernoulli dropout gumbel_softmax multinomial normal poisson rand rand_like randint_like "
        "randn randn_like rrelu"), _NO_SEED,
    ),
    "__setitem__": _NO_WRITING,
}  # fmt: skip


def spelled(func: Any) -> str:
    """A torch function's name, as a user writes it."""
    name = resolve_name(func) or str(getattr(func, "__name__", func))
    return name.replace("torch.functional.", "torch.").replace("torch._C._nn.", "torch.nn.functional.")


def refusal(written: str) -> ExpressionError:
    """The error for a function that is not in the list.

    Args:
        written: as the user writes it: "torch.linalg.svd", or ".svd" for a method.
    """
    name = written.rpartition(".")[2]
    in_place = name.endswith("_") and not name.endswith("__")
    expected, fix = _REASONS.get(name, ("", ""))
    if in_place:
        expected = "a function that returns a new value: an expression has no memory to write to"
        fix = f"use {name.rstrip('_')}, or write a Set with selectors"
    elif not expected:
        near = difflib.get_close_matches(name, FUNCTIONS, n=3, cutoff=0.6)
        expected = f"one of {len(FUNCTIONS)} functions, such as {', '.join(near or ['softmax', 'where', 'einsum'])}"
        fix = 'compute it in a Python function: hooks=[("blocks.0.hook_mlp_out", lambda act, hook: ...)]'
    return ExpressionError(f"{written} cannot be part of an expression", got=written, expected=expected, fix=fix)
