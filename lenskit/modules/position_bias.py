"""Biases of the scores by position: what is added before the softmax, so that positions need not enter elsewhere."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.module import Module


class PositionBias(Module):
    """Added to the scores. Positions are each row's own, whatever its padding, the tokens in the cache among them."""

    @abstractmethod
    def mask(
        self, run: ForwardPass, dtype: torch.dtype, window: int | None
    ) -> Float[Tensor, "rows _ query_pos key_pos"] | None:
        """The bias and the causal mask in one, for the fused kernel, as `ForwardPass.attention_bias`."""

    @abstractmethod
    def forward(
        self, scores: Float[Tensor, "batch head query_pos key_pos"], run: ForwardPass, window: int | None
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        """Scores with the bias; the mask comes after."""


class NoPositionBias(PositionBias):
    """Stands where there is none."""

    def mask(
        self, run: ForwardPass, dtype: torch.dtype, window: int | None
    ) -> Float[Tensor, "rows _ query_pos key_pos"] | None:
        return run.attention_bias(dtype, window)

    def forward(
        self, scores: Float[Tensor, "batch head query_pos key_pos"], run: ForwardPass, window: int | None
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        return scores


class LinearBias(PositionBias):
    """slope * (key position - query position), a slope a head: ALiBi (Press et al. 2021, arXiv 2108.12409).

    Give the same one to all layers: a pass computes it once.

    Args:
        slopes: one a head; `alibi_slopes` has the paper's.
        rounded: a dtype to which slopes, and slope * key position, are rounded, where a model was trained so: the
            bias is then of the key's position alone (the softmax does not see the difference, but for rounding).
        multiplier: of the bias, after it was rounded: the scores' scale, where a model scales both.
    """

    def __init__(self, slopes: Sequence[float], *, rounded: torch.dtype | None = None, multiplier: float = 1.0) -> None:
        super().__init__()
        self.slopes, self.rounded, self.multiplier = tuple(slopes), rounded, multiplier

    def bias(self, run: ForwardPass, dtype: torch.dtype, window: int | None) -> Float[Tensor, "rows head _ key_pos"]:
        """What is added: [rows head query_pos key_pos], or [rows head 1 key_pos] where it is of keys alone."""

        def compute() -> Tensor:
            keys = run.key_positions(window)[:, None, None, :]
            slopes = torch.tensor(self.slopes, device=keys.device)[:, None, None]
            if self.rounded is None:
                return (slopes * (keys - run.positions[:, None, :, None]) * self.multiplier).to(dtype)
            return (slopes.to(self.rounded) * keys.to(self.rounded)).to(dtype) * self.multiplier

        return run.once((id(self), "bias", dtype, window), compute)

    def mask(
        self, run: ForwardPass, dtype: torch.dtype, window: int | None
    ) -> Float[Tensor, "rows _ query_pos key_pos"] | None:
        def compute() -> Tensor:
            bias, hidden = self.bias(run, dtype, window), run.hidden(window)
            return bias if hidden is None else bias.masked_fill(hidden, float("-inf"))

        return run.once((id(self), "mask", dtype, window), compute)

    def forward(
        self, scores: Float[Tensor, "batch head query_pos key_pos"], run: ForwardPass, window: int | None
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        return scores + self.bias(run, scores.dtype, window)


def alibi_slopes(n_heads: int, *, largest: float = 8.0) -> tuple[float, ...]:
    """The paper's slopes: for 2^n heads a geometric sequence down to 2^-largest; for other numbers, those of the next
    smaller power of two, then every second one of the next larger.
    """
    power = 2 ** (n_heads.bit_length() - 1)

    def sequence(n: int) -> list[float]:
        return [2.0 ** (-largest * i / n) for i in range(1, n + 1)]

    return tuple(sequence(power) + sequence(2 * power)[::2][: n_heads - power])
