"""Rotary position embeddings: the module, and one pure function for each way to choose the frequencies.

Pair i of a query or key at position p is turned by the angle p * f_i, so that a score depends only on how far
apart its two tokens are (RoPE, arXiv 2104.09864). Rope types differ in the frequencies f, and some have an
amplitude that multiplies cos and sin.

What is unusual here: the module holds no tensor. A buffer of frequencies would follow the model to bfloat16,
and be garbage after a construction on the meta device. They are computed from the config, in float32 whatever
the model's dtype, and kept in a cache whose key is everything that they depend on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit.errors import UnsupportedConfigError
from lenskit.modules.module import Module


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


class Rotary(Module):
    """Turns pairs of a query's or key's dimensions by angles that grow with the position.

    Pairs are (i, i + d_rotary / 2), or (2i, 2i + 1) if `interleaved`. Dimensions from d_rotary on stay as is.

    Args:
        rope: how positions become angles.
        d_head: width of a query or key.
        n_ctx: the model's context, in tokens; the "dynamic" type scales beyond it.
        interleaved: whether the two of a pair are neighbours.

    Raises:
        UnsupportedConfigError: the config does not fit d_head.
    """

    def __init__(self, rope: RopeConfig, *, d_head: int, n_ctx: int, interleaved: bool = False) -> None:
        super().__init__()
        self.rope, self.d_head, self.n_ctx, self.interleaved = rope, d_head, n_ctx, interleaved
        sizes = (rope.theta, d_head, int(d_head * rope.partial_rotary_factor), n_ctx)
        setting = Setting(*sizes, seq_len=0, device=torch.device("cpu"))
        frequencies, self.amplitude = ROPE_TYPES[rope.rope_type](setting, **rope.scaling())
        self.d_rotary = 2 * len(frequencies)
        if not 0 < self.d_rotary <= d_head:
            raise UnsupportedConfigError(
                f"rope parameters that do not fit a head of {d_head} dimensions",
                got=f"{self.d_rotary} (partial_rotary_factor={rope.partial_rotary_factor})",
                expected=f"2 to {d_head} rotated dimensions",
                fix="check partial_rotary_factor and the width of a head in the config",
            )
        # Plain tuples: they are hashed fast, and torch.compile takes them for the constants that they are.
        self._key: Key = (rope.rope_type, tuple(rope.scaling().items()), sizes, interleaved)

    def tables(
        self, positions: Int[Tensor, "rows pos"], seq_len: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "rows 1 pos d_rotary"], Float[Tensor, "rows 1 pos d_rotary"]]:
        """cos and sin for `forward`, the same in all layers: computed in float32, then cast.

        sin carries the sign of its term, minus for the first of each pair.

        Args:
            positions: of the tokens.
            seq_len: the largest position of the batch, plus one: what "dynamic" and "longrope" go by, and not
                by what came before.
            dtype: of the activations that `forward` gets.
        """
        # The first of each pair has a negative frequency: cos is even and sin odd, so only sin gets the sign.
        angles = positions[:, None, :, None] * self._frequencies(positions, seq_len)
        cos, sin = angles.cos(), angles.sin()
        if self.amplitude != 1.0:
            cos, sin = cos * self.amplitude, sin * self.amplitude
        return cos.to(dtype), sin.to(dtype)

    def forward(
        self,
        x: Float[Tensor, "batch head pos d_head"],
        cos: Float[Tensor, "rows 1 pos d_rotary"],
        sin: Float[Tensor, "rows 1 pos d_rotary"],
    ) -> Float[Tensor, "batch head pos d_head"]:
        """x, turned. cos and sin are those of `tables`, with a row for each of the batch, or one for all."""
        rotary = x if self.d_rotary == self.d_head else x[..., : self.d_rotary]
        if self.interleaved:
            partners = rotary.unflatten(-1, (-1, 2)).roll(1, -1).flatten(-2)
        else:
            partners = rotary.roll(self.d_rotary // 2, -1)
        turned = torch.addcmul(rotary * cos, partners, sin)
        return turned if rotary is x else torch.cat((turned, x[..., self.d_rotary :]), -1)

    def extra_repr(self) -> str:
        pairs = "neighbours" if self.interleaved else "halves"
        return f"{self.rope.rope_type}, {self.d_rotary} of {self.d_head} dimensions, pairs of {pairs}"

    def _frequencies(self, positions: Tensor, seq_len: int) -> Tensor:
        rope, device = self.rope, positions.device
        if rope.rope_type == "dynamic" and seq_len > self.n_ctx:  # for this one length: not worth keeping
            return _signed(self._key, seq_len, device)
        # Otherwise length matters to one type only, and then only whether it exceeds the original context.
        original = rope.original_max_position_embeddings or 0
        length = original + 1 if rope.rope_type == "longrope" and seq_len > original else 0
        # A fake tensor must not get into the cache, nor meet a real one that comes out of it.
        frequencies = _constant if type(positions) is Tensor else _signed
        return frequencies(self._key, length, device)


class Setting(NamedTuple):
    """What the frequencies of any rope type may depend on; lengths are in tokens."""

    theta: float
    d_head: int
    d: int  # the rotated part of d_head; odd, it is rounded up to whole pairs
    n_ctx: int
    seq_len: int
    device: torch.device


# What identifies the frequencies of a module: rope type, its arguments, (theta, d_head, d, n_ctx), interleaved.
Key = tuple[str, tuple[tuple[str, Any], ...], tuple[float, int, int, int], bool]


def _signed(key: Key, seq_len: int, device: torch.device) -> Float[Tensor, " d_rotary"]:
    """The frequency of each rotated dimension, negative for the first of a pair."""
    rope_type, scaling, sizes, interleaved = key
    frequencies, _ = ROPE_TYPES[rope_type](Setting(*sizes, seq_len, device), **dict(scaling))
    return torch.stack((-frequencies, frequencies), dim=-1 if interleaved else 0).flatten()


@lru_cache(maxsize=128)
def _cached(key: Key, seq_len: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the tensor outlives the caller's mode
        return _signed(key, seq_len, torch.device("cpu")).to(device)  # the same numbers on every device


def _constant(key: Key, seq_len: int, device: torch.device) -> Tensor:
    return _cached(key, seq_len, device)


# A compiled model does not trace the cache: it holds the tensor that came out of it.
torch.compiler.assume_constant_result(_constant)


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
        above, below = (0.1 * weight * math.log(max(factor, 1.0)) + 1.0 for weight in weights)
        attention_factor = above / below
    return frequencies, attention_factor


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
