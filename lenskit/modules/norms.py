"""Normalisations. Fused unless somebody asked for the scale or the normalised activation.

Statistics are float32 in half precision too: `hook_scale` is float32, `hook_normalized` has the dtype of
the stream. `hook_normalized * gains (+ bias)` is what the next sublayer reads, `hook_out`.

Every norm is one of the stream, unless it is told about heads: those of queries and keys take and give
[batch head pos d_head], and users see [batch pos head d_head].
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lenskit.hooks import HookPoint, Watch
from lenskit.modules.module import Module, at_least_float32, empty


class Norm(Module):
    """Divides each vector by a scale of its own, then applies learned gains.

    Args:
        width: of the vectors.
        eps: added to the mean square (or variance) before the root, in the activation's squared units.
        n_heads: of a norm of heads, each of which is normalised on its own; None for one of the stream.
        axis: the name of the last axis; d_model, or d_head with heads.
    """

    neutral: ClassVar[float] = 1.0  # the weight that changes nothing
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, width: int, eps: float, *, n_heads: int | None = None, axis: str = "d_model") -> None:
        super().__init__()
        self.eps = eps
        self.shape = (width,)
        self.weight = empty(width)

        def point(last: str, size: int, *, statistic: bool = False, on_demand: bool = False) -> HookPoint:
            by_head = n_heads is not None
            point = HookPoint(
                f"batch pos head {last}" if by_head else f"batch pos {last}",
                swapped=("pos", "head") if by_head else None,
                statistic=statistic,
                on_demand=on_demand,
            )
            point.sizes.update({last: size}, **({} if n_heads is None else {"head": n_heads}))
            return point

        axis = axis if n_heads is None else "d_head"
        self.hook_scale = point("1", 1, statistic=True)
        self.hook_normalized = point(axis, width)
        self.hook_out = point(axis, width, on_demand=True)
        self.watch = Watch(self.hook_scale, self.hook_normalized, self.hook_out)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        if not self.watch.used:
            return self.fused(x)
        if self.hook_scale.attachments is None and self.hook_normalized.attachments is None:
            return self.hook_out(self.fused(x))
        centred = self.centre(x.to(at_least_float32(x.dtype)))
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_out(self.gain(self.hook_normalized((centred / scale).to(x.dtype))))

    @abstractmethod
    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The whole norm in one kernel, hooks off; any leading axes."""

    @abstractmethod
    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What is divided by the scale."""

    @abstractmethod
    def gain(self, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The learned affine map."""

    @property
    @abstractmethod
    def gains(self) -> Float[Tensor, "*heads d_model"]:
        """What the normalised activation is multiplied by; a bias, if there is one, is added to that."""

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class LayerNorm(Norm):
    """Ba et al. 2016, arXiv 1607.06450.

    Args:
        weight, bias: whether it has learned gains, a learned bias.
    """

    def __init__(
        self, width: int, eps: float, *, weight: bool = True, bias: bool = True, n_heads: int | None = None
    ) -> None:
        super().__init__(width, eps, n_heads=n_heads)
        if not weight:
            self.register_parameter("weight", None)
        self.register_parameter("bias", empty(width) if bias else None)

    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        parameters = self._parameters
        return torch.layer_norm(x, self.shape, parameters["weight"], parameters["bias"], self.eps)

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return x - x.mean(-1, keepdim=True)

    def gain(self, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        if self.bias is None:
            return normalized if self.weight is None else normalized * self.weight
        return torch.addcmul(self.bias, normalized, self.gains)

    @property
    def gains(self) -> Float[Tensor, "*heads d_model"]:
        return torch.ones(self.shape) if self.weight is None else self.weight


class LayerNormByHead(LayerNorm):
    """A layer norm of every head with gains of its own, `weight` [head d_head], and no bias."""

    def __init__(self, d_head: int, eps: float, *, n_heads: int) -> None:
        super().__init__(d_head, eps, bias=False, n_heads=n_heads)
        self.weight = empty(n_heads, d_head)

    def fused(self, x: Float[Tensor, "*batch head pos d_head"]) -> Float[Tensor, "*batch head pos d_head"]:
        return self.gain(torch.layer_norm(x, self.shape, None, None, self.eps))

    def gain(self, normalized: Float[Tensor, "*batch head pos d_head"]) -> Float[Tensor, "*batch head pos d_head"]:
        return normalized * self.gains[:, None]


class RMSNorm(Norm):
    """Zhang and Sennrich 2019, arXiv 1910.07467: no centring, no bias."""

    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return torch.rms_norm(x, self.shape, self._parameters["weight"], self.eps)

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return x

    def gain(self, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return normalized * self.gains

    @property
    def gains(self) -> Float[Tensor, " d_model"]:
        assert self.weight is not None
        return self.weight


class OffsetRMSNorm(RMSNorm):
    """An RMSNorm that stores what its gains have over one: it multiplies by 1 + weight, in float32 at least."""

    neutral: ClassVar[float] = 0.0

    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        exact = at_least_float32(x.dtype)
        return torch.rms_norm(x.to(exact), self.shape, weight.to(exact) + 1.0, self.eps).to(x.dtype)

    def gain(self, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return (normalized.to(self.gains.dtype) * self.gains).to(normalized.dtype)

    @property
    def gains(self) -> Float[Tensor, " d_model"]:
        assert self.weight is not None
        return self.weight.to(at_least_float32(self.weight.dtype)) + 1.0


class RMSNormOverHeads(RMSNorm):
    """An RMSNorm of all heads at once, as one vector of n_heads * d_head: `hook_scale` is [batch pos 1], and
    `hook_normalized` [batch pos d_heads]. Takes and gives [batch head pos d_head].
    """

    def __init__(self, d_head: int, eps: float, *, n_heads: int) -> None:
        super().__init__(n_heads * d_head, eps, axis="d_heads")

    def forward(self, x: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch head pos d_head"]:
        flat = super().forward(x.transpose(1, 2).flatten(2))
        return flat.unflatten(2, (x.shape[1], -1)).transpose(1, 2)
