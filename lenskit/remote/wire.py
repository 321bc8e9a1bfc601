"""What goes over the wire, both ways: JSON alone, or JSON in the header of a safetensors file. Nothing is executed.

A job is plain data:

    model    the name under which the server has it
    verb     "forward" or "generate"
    tokens   [row pos] ids; shorter rows are padded, and `mask` [row pos] says which are their own (1)
    plan     what `Plan.to_json` gives; its tensors are those of the file
    options  of `generate`: max_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty,
             eos_token_id, stop_strings, seed, num_return_sequences
    logits   whether the result is to have them

A result is a file whose header says which tensors are what. Steps of one shape are one tensor [step ...]: many small
tensors take longer to write and to read than to compute.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lenskit import errors
from lenskit.errors import InputError, LenskitError, PlanFormatError, RemoteError
from lenskit.generation import Decode, Generation
from lenskit.interventions.forward import Result
from lenskit.interventions.saved import NeverRan, Saved

JSON = "application/json"
SAFETENSORS = "application/vnd.safetensors"
HEADER = "lenskit"  # the key of our JSON among a safetensors file's metadata
VERBS = ("forward", "generate")


# -- a file with JSON in its header


def pack(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Data and tensors as one safetensors file.

    Args:
        data: what JSON can be made of, without NaN.
    """
    own = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return save_tensors(own, metadata={HEADER: json.dumps(data, allow_nan=False, separators=(",", ":"))})


def unpack(body: bytes) -> tuple[Any, dict[str, Tensor]]:
    """The inverse of `pack`.

    Raises:
        PlanFormatError: it is something else, or damaged.
    """
    try:
        length = int.from_bytes(body[:8], "little")
        header = json.loads(body[8 : 8 + length])
        data = json.loads(header["__metadata__"][HEADER])
        return data, load_tensors(body)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, SafetensorError) as error:
        raise PlanFormatError(
            "the body is no file of lenskit's",
            got=f"{type(error).__name__}: {error}"[:300],
            expected=f"a safetensors file whose metadata has {HEADER!r}: JSON",
            fix="write it with lenskit.remote.wire.pack, or send plain JSON where there are no tensors",
        ) from error


# -- results


def result_to_wire(output: Result | Generation) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a run gave, as data and tensors, every tensor once."""
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> int:
        tensors[str(len(tensors))] = tensor
        return len(tensors) - 1

    saved = _saved_to_wire(output.saved, keep)
    if isinstance(output, Result):
        data = {
            "verb": "forward",
            "tokens": keep(output.tokens),
            "mask": None if output.mask is None else keep(output.mask),
            "logits": None if output.output is None else keep(output.output),
        }
    else:
        data = {
            "verb": "generate",
            "tokens": [keep(row) for row in output.tokens],
            "new_tokens": [keep(row) for row in output.new_tokens],
            "logits": None if output.logits is None else [keep(row) for row in output.logits],
            "logprobs": None if output.logprobs is None else [keep(row) for row in output.logprobs],
            "steps_run": output.steps_run,
            "finished": output.finished,
        }
    return {**data, "saved": saved, "n_layers": output.saved.n_layers}, tensors


def result_from_wire(data: Any, tensors: Mapping[str, Tensor], decode: Decode | None) -> Result | Generation:
    """The inverse of `result_to_wire`.

    Args:
        decode: makes text of ids, for `Generation.texts`.

    Raises:
        RemoteError: it is no result.
    """

    def get(number: Any) -> Any:
        if isinstance(number, list):
            return [get(entry) for entry in number]
        return None if number is None else tensors[str(number)]

    try:
        saved = _saved_from_wire(data["saved"], get, data["n_layers"])
        if data["verb"] == "forward":
            return Result(get(data["tokens"]), get(data["mask"]), saved, get(data["logits"]))
        return Generation(
            tokens=get(data["tokens"]),
            new_tokens=get(data["new_tokens"]),
            logits=get(data["logits"]),
            logprobs=get(data["logprobs"]),
            saved=saved,
            steps_run=data["steps_run"],
            finished=data["finished"],
            decode=decode,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(
            "the server's answer is no result",
            got=f"{type(error).__name__}: {error}",
            expected="what this version of lenskit reads",
            fix="see that client and server have the same version of lenskit",
        ) from error


def _saved_to_wire(saved: Saved, keep: Any) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for key in saved:
        value = saved.entry(key)
        if isinstance(value, NeverRan):
            written[key] = {"never_ran": value.step, "steps_run": value.steps_run}
        elif isinstance(value, Saved):
            written[key] = {"points": _saved_to_wire(value, keep)}
        elif isinstance(value, list):
            alike = [list(run) for _, run in groupby(value, key=lambda step: (step.shape, step.dtype))]
            written[key] = {"steps": [keep(torch.stack(run)) for run in alike]}
        else:
            written[key] = {"tensor": keep(value)}
    return written


def _saved_from_wire(written: Mapping[str, Any], get: Any, n_layers: int) -> Saved:
    values: dict[str, Any] = {}
    for key, value in written.items():
        if "never_ran" in value:
            values[key] = NeverRan(value["never_ran"], value["steps_run"])
        elif "points" in value:
            values[key] = _saved_from_wire(value["points"], get, n_layers)
        elif "steps" in value:  # each as a tensor of its own, which may be kept without the others
            values[key] = [step.clone() for number in value["steps"] for step in get(number).unbind()]
        else:
            values[key] = get(value["tensor"])
    return Saved(values, n_layers=n_layers)


# -- errors


def error_to_wire(error: BaseException) -> dict[str, str]:
    """An exception as plain data; only what lenskit raises on purpose tells more than its type."""
    if isinstance(error, LenskitError):
        parts = {"what": error.what, "got": error.got, "expected": error.expected, "fix": error.fix}
        return {"type": type(error).__name__, **parts}
    return {
        "type": "RemoteError",
        "what": "the server failed",
        "got": type(error).__name__,
        "expected": "a job that runs",
        "fix": "tell whoever runs the server; its log has more",
    }


def error_from_wire(data: Any) -> LenskitError:
    """The inverse: an exception of the class that was raised, where this version of lenskit has it."""
    if not isinstance(data, Mapping):
        data = {}
    kind = getattr(errors, str(data.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, LenskitError)):
        kind = RemoteError
    what = str(data.get("what", "the server gave an error that says nothing"))
    return kind(what, **{part: str(data.get(part, "nothing")) for part in ("got", "expected", "fix")})


# -- ids


def rows_from_wire(tokens: Any, mask: Any) -> tuple[Tensor, Tensor | None]:
    """Ids [row pos] and their mask as tensors.

    Raises:
        InputError: they are no such lists.
    """
    ids = _matrix(tokens, "tokens")
    if mask is None:
        return ids, None
    own = _matrix(mask, "mask")
    if own.shape != ids.shape or not bool(((own == 0) | (own == 1)).all()):
        raise _no_matrix("mask", f"a mask {tuple(own.shape)}", f"0 or 1 for each of the tokens {tuple(ids.shape)}")
    return ids, own.bool()


def _matrix(rows: Any, name: str) -> Tensor:
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise _no_matrix(name, f"a {type(rows).__name__}", "a list of rows")
    for row in rows:
        if not isinstance(row, Sequence) or isinstance(row, str) or not row or len(row) != len(rows[0]):
            raise _no_matrix(name, "rows that are no lists, are empty, or differ in length", "rows of one length")
        if any(type(entry) is not int or not -(2**31) <= entry < 2**31 for entry in row):
            raise _no_matrix(name, "an entry that is no whole number of 32 bits", "ids")
    return torch.tensor(rows, dtype=torch.int64)


def _no_matrix(name: str, got: str, expected: str) -> InputError:
    return InputError(f"{name} is no table", got=got, expected=expected, fix="pad shorter rows, and send a mask")
