"""What a PEFT adapter's adapter_config.json says, read closed: each attribute is used, known to change nothing, or
refused.

The rules by which names fit modules are PEFT's own.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from lenskit.checkpoints.source import AdapterSource
from lenskit.errors import ConfigError, TensorShapeError, UnsupportedConfigError

MERGE = "merge it with PEFT (merge_and_unload), save that model with save_pretrained, and load it"

# What changes nothing once an adapter is trained: how it was initialised and trained, what it is called. A weight's
# own table says which way it lies on disk (fan_in_fan_out); tied tensors are saved twice (ensure_weight_tying).
HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config fan_in_fan_out inference_mode
    loftq_config lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size revision
    runtime_config task_type velora_config
    """.split()  # noqa: SIM905
)
REFUSED = {  # unless they are absent, false or empty
    "use_dora": "DoRA scales every row of the sum anew",
    "target_parameters": "what is adapted are parameters, as experts' are, and no products",
    "trainable_token_indices": "rows of the embedding are replaced",
    "alora_invocation_tokens": "an activated LoRA begins at a token",
    "layer_replication": "layers are repeated",
    "lora_bias": "the adapter has biases",
    "use_qalora": "QALoRA pools what it reads",
    "arrow_config": "a router mixes several adapters",
    "use_bdlora": "the adapter's matrices are block-diagonal",
    "kasa_config": "the weight's smallest singular values are cut off",
    "monteclora_config": "the adapter is sampled",
    "megatron_config": "the base is Megatron's",
}
# With the others, the base's weights are changed before training (pissa, olora, corda, loftq, lora_ga), or it is a
# method of its own (mica).
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

N = TypeVar("N", int, float)
Names = str | Collection[str]  # a regular expression for the whole path, or ends of paths


@dataclass(frozen=True)
class LoraConfig:
    """LoRA, as far as it matters once it is trained. Names are those of PEFT's class, which says what each means."""

    r: int
    lora_alpha: float
    target_modules: Names
    exclude_modules: Names
    modules_to_save: Sequence[str]
    layers_to_transform: Sequence[int]
    layers_pattern: Sequence[str]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    @classmethod
    def read(cls, source: AdapterSource) -> Self:
        """The config of an adapter's folder.

        Raises:
            UnsupportedConfigError: another method than LoRA, or a part of it that lenskit does not compute.
            ConfigError: values that make no sense.
        """
        config, where = source.config, str(source.config_file)
        _refuse(config, where)
        layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
        try:
            found = cls(
                r=int(config["r"]),
                lora_alpha=float(config["lora_alpha"]),
                target_modules=_names(config["target_modules"]),
                exclude_modules=_names(config.get("exclude_modules") or ()),
                modules_to_save=list(config.get("modules_to_save") or ()),
                layers_to_transform=[layers] if isinstance(layers, int) else [int(layer) for layer in layers or ()],
                layers_pattern=[pattern] if isinstance(pattern, str) else list(pattern or ()),
                rank_pattern={re.compile(key).pattern: int(r) for key, r in (config.get("rank_pattern") or {}).items()},
                alpha_pattern={
                    re.compile(key).pattern: float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()
                },
                use_rslora=bool(config.get("use_rslora")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise ConfigError(
                f"{where} describes no adapter",
                got=f"{type(error).__name__}: {error}",
                expected="what PEFT's save_pretrained writes: r, lora_alpha, target_modules and the others",
                fix="correct the attribute that the message names, or fetch the file again",
            ) from error
        return found

    def targets(self, module: str) -> bool:
        """Whether a module of that path has a low-rank product beside it."""
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        if _fits(self.exclude_modules, module) or not _fits(self.target_modules, module):
            return False
        if not self.layers_to_transform or isinstance(self.target_modules, str):
            return True
        patterns = [rf"(?:^|.*?\.){name}" for name in self.layers_pattern] or [r".*?\.[^.]*"]
        layer = next((m for m in (re.match(rf"{pattern}\.(\d+)\.", module) for pattern in patterns) if m), None)
        return layer is not None and int(layer[1]) in self.layers_to_transform

    def saves(self, tensor: str) -> bool:
        """Whether a tensor belongs to a module that was trained whole, or to a part of one."""
        parts = tensor.split(".")[:-1]
        paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(path.endswith(name) for path in paths for name in self.modules_to_save)

    def rank(self, module: str) -> int:
        """Of the module's product."""
        return _of(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What the module's product is multiplied by (with use_rslora: Kalajdzievski 2023, arXiv 2312.03732)."""
        rank = self.rank(module)
        return _of(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def check_rank(self, module: str, a: Sequence[int], b: Sequence[int], *, where: str) -> None:
        """See that the factors, of these shapes, are of the rank that the config says.

        Raises:
            TensorShapeError: they are not.
        """
        rank = self.rank(module)
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank > 0:
            raise TensorShapeError(
                f"{where}: the product beside {module} is not of the rank that its config says",
                got=f"lora_A {tuple(a)} and lora_B {tuple(b)}",
                expected=f"({rank}, d_in) and (d_out, {rank}): r, or what rank_pattern says instead",
                fix="check that adapter_config.json belongs to these weights",
            )


def _refuse(config: Mapping[str, Any], where: str) -> None:
    def refusal(name: str, why: str) -> UnsupportedConfigError:
        return UnsupportedConfigError(
            f"{where}: the adapter has {name}, which lenskit does not compute",
            got=f"{name}={repr(config.get(name))[:80]}",
            expected=why,
            fix=MERGE,
        )

    if config.get("peft_type") != "LORA":
        raise refusal("peft_type", "peft_type='LORA': PEFT's other methods are not covered")
    for name, why in REFUSED.items():
        if config.get(name):
            raise refusal(name, f"a LoRA without it: {why}")
    if config.get("bias") not in (None, "none"):
        raise refusal("bias", "bias='none': the base's own biases were trained")
    if config.get("init_lora_weights") not in INITIALISATIONS:
        known = ", ".join(map(repr, INITIALISATIONS))
        raise refusal("init_lora_weights", f"one of {known}: others change the base's weights first")
    used = {*LoraConfig.__dataclass_fields__, "bias", "init_lora_weights"}
    for name in sorted(config.keys() - HARMLESS - REFUSED.keys() - used):
        if config[name]:
            raise refusal(name, "only attributes that lenskit reads, or knows to change nothing")


def _names(value: Any) -> Names:
    if isinstance(value, str):
        return re.compile(value).pattern
    if not all(isinstance(name, str) for name in value):
        raise TypeError(f"names of modules have to be text: {value}")
    return list(value)


def _fits(names: Names, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _of(pattern: Mapping[str, N], module: str, otherwise: N) -> N:
    """The value of the first key that fits the module."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
