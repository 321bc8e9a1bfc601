"""Refusing quantised checkpoints by the name of their method, with what to do instead.

Hook points are on products of plain weights, so a quantised model would have to be dequantised first. Transformers,
with the method's own library, does that once and for all.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lenskit.errors import UnknownTensorError, UnsupportedConfigError

CONFIGS = ("quantization_config", "compression_config")  # attributes of config.json; the second is older
_LOAD = "AutoModelForCausalLM.from_pretrained(..., quantization_config={}(dequantize=True)) of transformers"
_CALL = "AutoModelForCausalLM.from_pretrained(...).dequantize() of transformers"
DEQUANTISE = {  # by quant_method; transformers cannot undo the others (gptq, awq, torchao, hqq, ...)
    "bitsandbytes": _CALL,
    "higgs": _CALL,
    "compressed-tensors": _LOAD.format("CompressedTensorsConfig"),
    "fp8": _LOAD.format("FineGrainedFP8Config"),
    "mxfp4": _LOAD.format("Mxfp4Config"),
    "mxfp8": _LOAD.format("FineGrainedFP8Config"),
}
PLAIN = "plain weights, in float16, bfloat16 or float32: lenskit computes with what is not quantised"
ENDINGS = {  # of tensors' names, where the config says nothing
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "fp8",
    ".weight_packed": "compressed-tensors",
    "_proj_blocks": "mxfp4",
}


def refuse_config(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse a Hugging Face config that describes quantised weights.

    Raises:
        UnsupportedConfigError: it does; the message names the method.
    """
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    found = [(name, part[name]) for part in parts for name in CONFIGS if part.get(name)]
    if found:
        name, said = found[0]
        method = _method(said if isinstance(said, dict) else {})
        raise UnsupportedConfigError(
            f"{where}: the weights are quantised, with {method}{_bits(said)}",
            got=f"{name}={str(said)[:100]}",
            expected=PLAIN,
            fix=_fix(method, config.get("_name_or_path")),
        )


def refuse_names(names: Iterable[str], *, where: str) -> None:
    """Refuse tensors whose names say that they are quantised, where the config does not.

    Raises:
        UnknownTensorError: there are such; the message names the method.
    """
    for name in names:
        for ending, method in ENDINGS.items():
            if name.endswith(ending):
                raise UnknownTensorError(
                    f"{where}: the weights are quantised, with {method}",
                    got=f"a tensor {name}",
                    expected=PLAIN,
                    fix=_fix(method, None),
                )


def _method(said: Mapping[str, Any]) -> str:
    """Its name; before there was one, bitsandbytes was the only method."""
    in_bits = said.get("load_in_4bit") or said.get("load_in_8bit")
    return str(said.get("quant_method") or ("bitsandbytes" if in_bits else "an unnamed method"))


def _bits(said: Any) -> str:
    if not isinstance(said, dict):
        return ""
    bits = said.get("bits") or (4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else None)
    return f" in {bits} bits" if bits else ""


def _fix(method: str, base: object) -> str:
    name = f", {base}" if isinstance(base, str) and base else ""
    if method in DEQUANTISE:
        return f"{DEQUANTISE[method]}, then save_pretrained; or load the checkpoint that it was made from{name}"
    return f"load the checkpoint that it was made from{name}: transformers cannot undo {method}"
