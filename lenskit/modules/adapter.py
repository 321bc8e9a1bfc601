"""Low-rank adapters beside products (Hu et al. 2021, arXiv 2106.09685), where they are kept apart from the weights.

A product that has an adapter is of a class of its own, so that one without pays nothing for what it does not have.
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lenskit.errors import InputError, LenskitError
from lenskit.hooks import HookPoint
from lenskit.modules.linear import (
    CappedUnembed,
    Linear,
    NonlinearUnembed,
    ScaledUnembed,
    TransformedUnembed,
    Unembed,
    Unwritable,
)
from lenskit.modules.module import at_least_float32, empty
from lenskit.modules.moe import SigmoidGate


class AdaptedMatrix(Unwritable):
    """A weight with its adapter's product added, computed anew at each look."""

    @classmethod
    def refusal(cls, name: str) -> LenskitError:
        return LenskitError(
            "the weights of a product with an adapter cannot be written through this view",
            got=f"{name} on the sum of a weight and its adapter's product, which is computed when it is looked at",
            expected="reads only",
            fix="load with merge=True for one weight; or write to the module's own weight, lora_A or lora_B",
        )


class AdaptedLinear(Linear):
    """x @ weight.T + bias, and beside it an adapter's scale * x @ lora_A.T @ lora_B.T, which is `hook_adapter`.

    `matrix`, and with it `W_Q` and its kind, is what both amount to, weight + scale * lora_B @ lora_A; it can be read
    and not written. `lora_A` is [rank d_in], `lora_B` [d_out rank].
    """

    scale: float
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    hook_adapter: HookPoint

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        parameters: dict[str, Any] = self._parameters
        low = F.linear(F.linear(x, parameters["lora_A"]), parameters["lora_B"]) * self.scale
        return super().forward(x) + self.hook_adapter(low)

    @property
    def matrix(self) -> Float[Tensor, "d_out d_in"]:
        exact = at_least_float32(self.weight.dtype)
        product = self.lora_B.to(exact) @ self.lora_A.to(exact) * self.scale
        return (self.weight + product).to(self.weight.dtype).as_subclass(AdaptedMatrix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, adapter of rank {len(self.lora_A)}"


class AdaptedUnembed(Unembed, AdaptedLinear):
    """See `Unembed`; the adapter is a part of the product. So it is with the others."""


class AdaptedScaledUnembed(ScaledUnembed, AdaptedLinear):
    """See `ScaledUnembed`."""


class AdaptedCappedUnembed(CappedUnembed, AdaptedLinear):
    """See `CappedUnembed`."""


class AdaptedTransformedUnembed(TransformedUnembed, AdaptedLinear):
    """See `TransformedUnembed`."""


class AdaptedNonlinearUnembed(NonlinearUnembed, AdaptedLinear):
    """See `NonlinearUnembed`."""


class AdaptedGate(SigmoidGate, AdaptedLinear):  # type: ignore[misc]  # a gate takes two inputs
    """See `SigmoidGate`."""


ADAPTED: dict[type[nn.Module], type[AdaptedLinear]] = {
    Linear: AdaptedLinear,
    Unembed: AdaptedUnembed,
    ScaledUnembed: AdaptedScaledUnembed,
    CappedUnembed: AdaptedCappedUnembed,
    TransformedUnembed: AdaptedTransformedUnembed,
    NonlinearUnembed: AdaptedNonlinearUnembed,
    SigmoidGate: AdaptedGate,
}


def adapt(linear: Linear, *, rank: int, scale: float) -> None:
    """Give a product an adapter, whose weights are unset.

    It stays the same object: its parents, its name and its weights are left as they are.

    Raises:
        InputError: there is no adapted kind of it.
    """
    kind = ADAPTED.get(type(linear))
    if kind is None:
        raise InputError(
            "a product of this kind takes no adapter of its own",
            got=f"a {type(linear).__name__}",
            expected=f"one of {', '.join(kind.__name__ for kind in ADAPTED)}",
            fix="load with merge=True",
        )
    d_out, d_in = linear.weight.shape
    with linear.weight.device:
        factors = empty(rank, d_in), empty(d_out, rank)
    linear.__class__ = kind
    adapted: Any = linear
    adapted.scale = scale
    adapted.lora_A, adapted.lora_B = factors
    adapted.hook_adapter = HookPoint("batch pos d_out", d_out=d_out)
    points = [name for name, child in linear.named_children() if isinstance(child, HookPoint)]
    linear.in_order("hook_adapter", *(name for name in points if name != "hook_adapter"))
