"""Rotary position embeddings (RoPE, arXiv 2104.09864): the module that turns queries and keys.

Pair i of a query or key at position p is turned by the angle p * f_i, so that a score depends only on how far
apart its two tokens are. `rope_types.py` says how the frequencies f are chosen.

What is unusual here: the module holds no tensor. A buffer of frequencies would follow the model to bfloat16, and
would be garbage after a construction on the meta device. They are computed from the config, in float32 whatever
the model's dtype, and kept in a cache whose key is everything that they depend on.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenskit.errors import UnsupportedConfigError
from lenskit.modules.module import Module
from lenskit.modules.rope_types import ROPE_TYPES, RopeConfig, Setting


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
        self.by_length = rope.rope_type in ("dynamic", "longrope")
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
        cached = type(positions) is Tensor and not torch.compiler.is_compiling()
        return (_cached if cached else _signed)(self._key, length, device)


class RotaryTail(Rotary):
    """Turns the last d_head dimensions of queries and keys that are wider; those before them stay as is."""

    def forward(
        self,
        x: Float[Tensor, "batch head pos d_wide"],
        cos: Float[Tensor, "rows 1 pos d_rotary"],
        sin: Float[Tensor, "rows 1 pos d_rotary"],
    ) -> Float[Tensor, "batch head pos d_wide"]:
        return torch.cat((x[..., : -self.d_head], super().forward(x[..., -self.d_head :], cos, sin)), -1)


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
