"""How positions become angles: `RopeConfig`, and one pure function for each rope type.

Rope types differ in the frequencies of the pairs, and some in an amplitude that multiplies cos and sin.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.errors import UnsupportedConfigError


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions become angles. A rope type reads the fields that its function below has as arguments, and
    needs those without a default there; None leaves the default.

    Args:
        rope_type: a key of `ROPE_TYPES`.
        theta: the base: unscaled, pair i of a d-wide rotation turns theta ** (-2i / d) radians a token.
        partial_rotary_factor: share of d_head that is rotated, in (0, 1].
        factor: how many times longer the context is made.
        original_max_position_embeddings: the context before that, in tokens.
        attention_factor: amplitude of cos and sin; None for what the type's paper advises.
        beta_fast, beta_slow: turns over the original context from which on a pair keeps its frequency, and up
            to which it is slowed by the whole factor.
        mscale, mscale_all_dim: weights of log(factor) in the advised amplitude, used if both are given.
        truncate: whether the betas' pairs are rounded to whole numbers.
        short_factor, long_factor: a divisor for every frequency, within and beyond the original context.
        low_freq_factor, high_freq_factor: turns over the original context, as beta_slow and beta_fast.

    Raises:
        UnsupportedConfigError: an unknown type, a field that it needs and lacks, or has and does not read.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        _check_keys(self.to_hf())

    @classmethod
    def from_hf(cls, rope_parameters: Mapping[str, Any], *, n_ctx: int) -> "RopeConfig":
        """Reads transformers' `rope_parameters` (as of version 5: with `rope_theta` among them).

        Args:
            rope_parameters: "type" may stand for "rope_type"; a value of None counts as absent.
            n_ctx: `max_position_embeddings`, in tokens. Where "yarn" or "longrope" has no factor, it is the
                ratio of this to the original context.

        Raises:
            UnsupportedConfigError: an unknown type, a key that the type does not read, or one missing.
        """
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in rope_parameters.items()
            if value is not None
        }
        rope_type = values.setdefault("rope_type", values.pop("type", "default"))
        if rope_type in ("yarn", "longrope") and "original_max_position_embeddings" in values:
            values.setdefault("factor", n_ctx / values["original_max_position_embeddings"])
        _check_keys(values)
        return cls(theta=values.pop("rope_theta"), **values)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary that `from_hf` reads back; what is None, or a whole rotation, is left out."""
        whole = self.partial_rotary_factor == 1.0
        partial = {} if whole else {"partial_rotary_factor": self.partial_rotary_factor}
        scaling = {key: list(v) if isinstance(v, tuple) else v for key, v in self.scaling().items()}
        return {"rope_type": self.rope_type, "rope_theta": self.theta, **partial, **scaling}

    def scaling(self) -> dict[str, Any]:
        """The arguments of the rope type's function: fields that are set, and are not common to all types."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.default is None}
        return {name: value for name, value in values.items() if value is not None}


class Setting(NamedTuple):
    """What the frequencies of any rope type may depend on; lengths are in tokens."""

    theta: float
    d_head: int
    d: int  # the rotated part of d_head; odd, it is rounded up to whole pairs
    n_ctx: int
    seq_len: int
    device: torch.device


# The rope types: frequencies in radians a token (float32), and the amplitude. The order of operations is that
# of transformers, so that they agree to the last bit.

Spectrum = tuple[Float[Tensor, " pair"], float]


def _periods(setting: Setting, *, d: int | None = None, base: Tensor | None = None) -> Float[Tensor, " pair"]:
    """Tokens a radian: base ** (2i / d) for every pair i; d and the base are the setting's unless given."""
    d = setting.d if d is None else d
    exponents = torch.arange(0, d, 2, dtype=torch.float32, device=setting.device) / d
    return torch.pow(setting.theta if base is None else base, exponents)


def unscaled(setting: Setting) -> Spectrum:
    """RoPE itself (Su et al., arXiv 2104.09864): f_i = theta ** (-2i / d)."""
    return 1.0 / _periods(setting), 1.0


def linear(setting: Setting, factor: float) -> Spectrum:
    """Position interpolation (kaiokendev, 2023; Chen et al., arXiv 2306.15595): every pair is slowed."""
    return 1.0 / _periods(setting) / factor, 1.0


def proportional(setting: Setting, factor: float = 1.0) -> Spectrum:
    """p-RoPE (Barbero et al., arXiv 2410.06205): of the whole head's pairs the fastest turn."""
    frequencies = 1.0 / _periods(setting, d=setting.d_head)
    turning = setting.d // 2
    return torch.cat((frequencies[:turning], 0.0 * frequencies[turning:])) / factor, 1.0


def dynamic_ntk(setting: Setting, factor: float) -> Spectrum:
    """Dynamic NTK-aware scaling (bloc97 and emozilla, 2023; told in arXiv 2309.00071).

    Beyond n_ctx the base grows with the length: the slowest pair is interpolated, the fastest stays as it is.
    """
    if setting.seq_len <= setting.n_ctx:
        return unscaled(setting)
    seq_len = torch.full((), setting.seq_len, dtype=torch.float32, device=setting.device)
    stretch = factor * seq_len / setting.n_ctx - (factor - 1)
    return 1.0 / _periods(setting, base=setting.theta * stretch ** (setting.d / (setting.d - 2))), 1.0


def yarn(
    setting: Setting,
    factor: float,
    original_max_position_embeddings: int,
    attention_factor: float | None = None,
    beta_fast: float = 32,
    beta_slow: float = 1,
    mscale: float = 0,
    mscale_all_dim: float = 0,
    truncate: bool = True,
) -> Spectrum:
    """YaRN (Peng et al., arXiv 2309.00071): pairs that turn often within the original context stay as they
    are, those that hardly turn are slowed by the factor, and between the two there is a linear ramp.
    """

    def pair_with(turns: float) -> float:
        tokens_a_radian = original_max_position_embeddings / (turns * 2 * math.pi)
        return setting.d * math.log(tokens_a_radian) / (2 * math.log(setting.theta))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, setting.d - 1)
    periods = _periods(setting)
    pairs = torch.arange(len(periods), dtype=torch.float32, device=setting.device)
    kept = 1 - ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    frequencies = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
    if attention_factor is None:  # the paper's, or the ratio of two like it (arXiv 2405.04434)
        weights = (mscale, mscale_all_dim) if mscale and mscale_all_dim else (1.0, 0.0)
        attention_factor = advised_amplitude(factor, weights[0]) / advised_amplitude(factor, weights[1])
    return frequencies, attention_factor


def advised_amplitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's advice: longer contexts need larger scores."""
    return 0.1 * weight * math.log(max(factor, 1.0)) + 1.0


def longrope(
    setting: Setting,
    factor: float,
    original_max_position_embeddings: int,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    attention_factor: float | None = None,
) -> Spectrum:
    """LongRoPE (Ding et al., arXiv 2402.13753): searched divisors, one a pair: a set for sequences within the
    original context, and a set for longer ones.
    """
    periods = _periods(setting)
    if not len(short_factor) == len(long_factor) == len(periods):
        raise UnsupportedConfigError(
            f"rope parameters that do not fit a head of {setting.d_head} dimensions",
            got=f"{len(short_factor)} numbers in short_factor, {len(long_factor)} in long_factor",
            expected=f"{len(periods)} in each, one for every pair of dimensions",
            fix="check these, partial_rotary_factor and the width of a head in the config",
        )
    divisors = long_factor if setting.seq_len > original_max_position_embeddings else short_factor
    frequencies = 1.0 / (torch.tensor(divisors, dtype=torch.float32, device=setting.device) * periods)
    if attention_factor is None:
        growth = math.log(max(factor, 1.0)) / math.log(original_max_position_embeddings)
        attention_factor = math.sqrt(1 + growth)
    return frequencies, attention_factor


def smoothed(
    setting: Setting,
    factor: float,
    original_max_position_embeddings: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> Spectrum:
    """The "llama3" type (reference code of the 3.1 models, 2024): YaRN with a ramp that is linear in the
    turns over the original context, from low_freq_factor to high_freq_factor.
    """
    frequencies = 1.0 / _periods(setting)
    wavelengths = 2 * math.pi / frequencies  # in tokens
    turns = original_max_position_embeddings / wavelengths
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    ramp = (1 - kept) * frequencies / factor + kept * frequencies
    longest, shortest = (original_max_position_embeddings / n for n in (low_freq_factor, high_freq_factor))
    slowed = torch.where(wavelengths > longest, frequencies / factor, ramp)
    return torch.where(wavelengths < shortest, frequencies, slowed), 1.0


ROPE_TYPES: Mapping[str, Callable[..., Spectrum]] = {
    "default": unscaled,
    "linear": linear,
    "proportional": proportional,
    "dynamic": dynamic_ntk,
    "yarn": yarn,
    "longrope": longrope,
    "llama3": smoothed,
}


def _check_keys(values: Mapping[str, Any]) -> None:
    """Refuses a dictionary that `RopeConfig.from_hf` cannot read whole."""
    if values["rope_type"] not in ROPE_TYPES:
        raise UnsupportedConfigError(
            f"rope type {values['rope_type']!r} is not supported",
            got=f"rope_type={values['rope_type']!r}",
            expected=f"one of {', '.join(ROPE_TYPES)}",
            fix="check rope_parameters in the config; positions of another kind need a module of their own",
        )
    _, *arguments = signature(ROPE_TYPES[values["rope_type"]]).parameters.values()
    needed = ["rope_type", "rope_theta", *(a.name for a in arguments if a.default is a.empty)]
    optional = ["partial_rotary_factor", *(a.name for a in arguments if a.default is not a.empty)]
    missing = ", ".join(key for key in needed if key not in values)
    unknown = ", ".join(key for key in values if key not in (*needed, *optional))
    if missing:
        wrong, fix = f"lack {missing}", f"add {missing} to rope_parameters in the config"
    elif unknown:
        wrong = f"have {unknown}, which the type does not read"
        fix = f"remove {unknown} if the model was trained without; if not, its positions are not supported"
    else:
        return
    raise UnsupportedConfigError(
        f"rope parameters of type {values['rope_type']!r} {wrong}",
        got=", ".join(f"{key}={value!r}" for key, value in values.items()),
        expected=f"{', '.join(needed)}; and at most {', '.join(optional)}",
        fix=fix,
    )
