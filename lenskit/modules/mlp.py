"""Multilayer perceptrons and their activation functions."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lenskit.errors import UnsupportedConfigError
from lenskit.hooks import HookPoint
from lenskit.modules.linear import Linear, bias_view
from lenskit.modules.module import Module

Activation = Callable[[Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


_GELU_TANH = partial(F.gelu, approximate="tanh")

# Hendrycks and Gimpel 2016, arXiv 1606.08415 (gelu and its approximations); Ramachandran et al. 2017,
# arXiv 1710.05941 (silu); So et al. 2021, arXiv 2109.08668 (squared relu).
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_fast": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": torch.relu,
    "relu2": _squared_relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Activation:
    """The function behind a config's activation name.

    Raises:
        UnsupportedConfigError: no such name.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedConfigError(
            f"unknown activation function {name!r}",
            got=repr(name),
            expected=f"one of {', '.join(ACTIVATIONS)}",
            fix="correct act_fn in the config, or add the function to lenskit/modules/mlp.py",
        )
    return ACTIVATIONS[name]


class FeedForward(Module):
    """The part that every MLP shares: into d_mlp, an activation function, back to d_model.

    Weights as views: W_in [d_model, d_mlp], b_in [d_mlp], W_out [d_mlp, d_model], b_out [d_model].

    reads: products of the input, by name.
    hidden: makes the hidden layer [... d_mlp] of what they give, each element of its own.

    Args:
        n_in: rows of `w_in` for each number of the hidden layer: a subclass may have more than one product in it.
    """

    reads: ClassVar[tuple[str, ...]] = ("w_in",)
    hidden: Callable[..., Tensor]

    def __init__(self, d_model: int, d_mlp: int, *, act_fn: str, bias: bool, n_in: int = 1) -> None:
        super().__init__()
        self.act = activation(act_fn)
        self.w_in = Linear(d_model, n_in * d_mlp, bias=bias)
        self.w_out = Linear(d_mlp, d_model, bias=bias)
        self.hook_pre = HookPoint("batch pos d_mlp", d_mlp=d_mlp)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.w_out(self.hidden(self.w_in(x)))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.w_in.matrix.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        return bias_view(self.w_in.bias, self.w_in.weight.shape[0], like=self.w_in.weight)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.w_out.matrix.T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return bias_view(self.w_out.bias, self.w_out.weight.shape[0], like=self.w_out.weight)


class MLP(FeedForward):
    """W_out act(W_in x): `hook_pre` before the activation function, `hook_post` after it."""

    def __init__(self, d_model: int, d_mlp: int, *, act_fn: str, bias: bool) -> None:
        super().__init__(d_model, d_mlp, act_fn=act_fn, bias=bias)
        self.hook_post = HookPoint("batch pos d_mlp", d_mlp=d_mlp)
        self.in_order("w_out")

    def hidden(self, pre: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
        return self.hook_post(self.act(self.hook_pre(pre)))


class GatedMLP(FeedForward):
    """W_out (act(W_gate x) * W_in x), Shazeer 2020, arXiv 2002.05202.

    `hook_pre` is the gate before the activation function, `hook_pre_linear` what it multiplies, `hook_post`
    the product. W_gate [d_model, d_mlp] and b_gate [d_mlp] are views like the others.
    """

    reads = ("w_gate", "w_in")

    def __init__(self, d_model: int, d_mlp: int, *, act_fn: str, bias: bool) -> None:
        super().__init__(d_model, d_mlp, act_fn=act_fn, bias=bias)
        self.w_gate = Linear(d_model, d_mlp, bias=bias)
        self.hook_pre_linear = HookPoint("batch pos d_mlp", d_mlp=d_mlp)
        self.hook_post = HookPoint("batch pos d_mlp", d_mlp=d_mlp)
        self.in_order("w_gate", "hook_pre", "w_in", "hook_pre_linear", "hook_post", "w_out")

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        # As `hidden` does, whose caller would hold both products until the result is there: a third more memory.
        gate = self.act(self.hook_pre(self.w_gate(x)))
        return self.w_out(self.hook_post(gate * self.hook_pre_linear(self.w_in(x))))

    def hidden(
        self, gate: Float[Tensor, "*batch d_mlp"], linear: Float[Tensor, "*batch d_mlp"]
    ) -> Float[Tensor, "*batch d_mlp"]:
        return self.hook_post(self.act(self.hook_pre(gate)) * self.hook_pre_linear(linear))

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.w_gate.matrix.T

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"]:
        return bias_view(self.w_gate.bias, self.w_gate.weight.shape[0], like=self.w_gate.weight)


class ClampedGatedMLP(FeedForward):
    """W_out (gate * sigmoid(alpha * gate) * (linear + 1)), where gate is at most `limit` and linear within `limit` of
    zero: a SwiGLU whose outliers are cut off (OpenAI 2025, arXiv 2508.10925).

    `hook_pre` is the gate and `hook_pre_linear` the linear part, both before they are cut off; `hook_post` is the
    product. The rows of `w_in` take turns, gate and linear; W_gate, W_in and their biases are views of every second.

    Args:
        alpha: how steep the sigmoid is.
        limit: in the units of the activation.
    """

    def __init__(self, d_model: int, d_mlp: int, *, bias: bool, alpha: float, limit: float) -> None:
        super().__init__(d_model, d_mlp, act_fn="sigmoid", bias=bias, n_in=2)
        self.alpha, self.limit = alpha, limit
        self.hook_pre_linear = HookPoint("batch pos d_mlp", d_mlp=d_mlp)
        self.hook_post = HookPoint("batch pos d_mlp", d_mlp=d_mlp)

    def hidden(self, both: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_mlp"]:
        gate = self.hook_pre(both[..., ::2]).clamp(max=self.limit)
        linear = self.hook_pre_linear(both[..., 1::2]).clamp(-self.limit, self.limit)
        return self.hook_post(gate * self.act(self.alpha * gate) * (linear + 1))

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.w_in.matrix[::2].T

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"]:
        return self._bias_pairs()[:, 0]

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.w_in.matrix[1::2].T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        return self._bias_pairs()[:, 1]

    def _bias_pairs(self) -> Float[Tensor, "d_mlp 2"]:
        return bias_view(self.w_in.bias, self.w_in.weight.shape[0] // 2, 2, like=self.w_in.weight)
