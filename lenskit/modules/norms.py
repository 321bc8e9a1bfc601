"""Normalisations. Fused unless somebody asked for the scale or the normalised activation.

Statistics are float32 in half precision too: `hook_scale` is float32, `hook_normalized` has the dtype of
the stream. `hook_normalized * weight (+ bias)` is what the next sublayer reads, `hook_out`.
"""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.hooks import HookPoint
from lenskit.modules.module import Module, at_least_float32, empty


class Norm(Module):
    """Divides each vector of the stream by a scale of its own, then applies learned gains.

    eps: added to the mean square (or variance) before the root, in the activation's squared units.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (d_model,)
        self.weight = empty(d_model)
        self.hook_scale = HookPoint("batch pos 1", statistic=True)
        self.hook_normalized = HookPoint("batch pos d_model", d_model=d_model)
        self.hook_out = HookPoint("batch pos d_model", on_demand=True, d_model=d_model)

    @property
    def unused(self) -> bool:
        """Whether nobody looks at any of its points."""
        return all(p.attachments is None for p in (self.hook_scale, self.hook_normalized, self.hook_out))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
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

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class LayerNorm(Norm):
    """Ba et al. 2016, arXiv 1607.06450."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__(d_model, eps)
        self.bias = empty(d_model)

    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        parameters = self._parameters
        return torch.layer_norm(x, self.shape, parameters["weight"], parameters["bias"], self.eps)

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return x - x.mean(-1, keepdim=True)

    def gain(self, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return torch.addcmul(self.bias, normalized, self.weight)


class RMSNorm(Norm):
    """Zhang and Sennrich 2019, arXiv 1910.07467: no centring, no bias."""

    def fused(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return torch.rms_norm(x, self.shape, self._parameters["weight"], self.eps)

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return x

    def gain(self, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return normalized * self.weight
