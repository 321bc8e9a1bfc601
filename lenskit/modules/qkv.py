"""The projections to queries, keys and values, in the layouts in which their weights lie on disk."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lenskit.modules.linear import Linear, bias_view
from lenskit.modules.module import Module


class HeadInputs(NamedTuple):
    """What each head's projections read, where somebody asked for one copy of the stream a head.

    x: what all of them would read of the stream if nobody edited a copy.
    """

    q: Float[Tensor, "batch pos head d_model"]
    k: Float[Tensor, "batch pos kv_head d_model"]
    v: Float[Tensor, "batch pos kv_head d_model"]
    x: Float[Tensor, "batch pos d_model"]


class QKV(Module):
    """The projections to queries, keys and values; how their weights lie in memory is the subclass's affair.

    Args:
        d_value: width of a value; None for that of a query and key, d_head.
    """

    def __init__(
        self, d_model: int, *, n_heads: int, n_key_value_heads: int, d_head: int, d_value: int | None = None
    ) -> None:
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.n_key_value_heads, self.d_head = n_key_value_heads, d_head
        self.d_value = d_head if d_value is None else d_value

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch head pos d_head], keys and values [batch kv_head pos d_head]."""

    @abstractmethod
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_Q, W_K, W_V: [head d_model d_head] views of the stored weights."""

    @abstractmethod
    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        """b_Q, b_K, b_V: [head d_head] views of the stored biases."""

    def by_head(self, inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The same projections where every head reads an input of its own; the same layout as `forward`."""
        q, k, v = (
            torch.einsum("bphm,hmd->bhpd", x, weight) + bias[:, None]
            for x, weight, bias in zip(inputs[:3], self.weights(), self.biases(), strict=True)
        )
        return q, k, v


class SeparateQKV(QKV):
    """Three matrices. Keys and values may have fewer heads (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, d_model: int, *, n_heads: int, n_key_value_heads: int, d_head: int, bias: bool) -> None:
        super().__init__(d_model, n_heads=n_heads, n_key_value_heads=n_key_value_heads, d_head=d_head)
        self.q = Linear(d_model, n_heads * d_head, bias=bias)
        self.k = Linear(d_model, n_key_value_heads * d_head, bias=bias)
        self.v = Linear(d_model, n_key_value_heads * d_head, bias=bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        batch, pos, _ = x.shape
        shape = (batch, pos, -1, self.d_head)
        return (
            self.q(x).view(shape).transpose(1, 2),
            self.k(x).view(shape).transpose(1, 2),
            self.v(x).view(shape).transpose(1, 2),
        )

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.matrix.unflatten(0, (-1, self.d_head)).mT for part in (self.q, self.k, self.v))
        return q, k, v

    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            bias_view(part.bias, part.weight.shape[0] // self.d_head, self.d_head, like=part.weight)
            for part in (self.q, self.k, self.v)
        )
        return q, k, v


class FusedQKV(QKV):
    """One matrix, whose rows are all queries, then all keys, then all values."""

    def __init__(
        self, d_model: int, *, n_heads: int, d_head: int, bias: bool, n_key_value_heads: int | None = None
    ) -> None:
        super().__init__(d_model, n_heads=n_heads, n_key_value_heads=n_key_value_heads or n_heads, d_head=d_head)
        self.counts = [self.n_heads, self.n_key_value_heads, self.n_key_value_heads]
        self.joined = Linear(d_model, sum(self.counts) * d_head, bias=bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        batch, pos, _ = x.shape
        heads = self.joined(x).view(batch, pos, -1, self.d_head).transpose(1, 2)
        q, k, v = heads.split_with_sizes(self.counts, 1)
        return q, k, v

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.joined.matrix.unflatten(0, (-1, self.d_head)).mT.split(self.counts)
        return q, k, v

    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = (sum(self.counts), self.d_head)
        q, k, v = bias_view(self.joined.bias, *shape, like=self.joined.weight).split(self.counts)
        return q, k, v


class GroupedQKV(QKV):
    """One matrix, whose rows go group by group: the queries of a key-value head, then its key, then its value.

    With as many key-value heads as query heads that is [head, (q, k, v), d_head]; with one, all queries, the key,
    the value. Query heads are numbered group by group.
    """

    def __init__(self, d_model: int, *, n_heads: int, n_key_value_heads: int, d_head: int, bias: bool) -> None:
        super().__init__(d_model, n_heads=n_heads, n_key_value_heads=n_key_value_heads, d_head=d_head)
        self.group = n_heads // n_key_value_heads
        self.joined = Linear(d_model, n_key_value_heads * (self.group + 2) * d_head, bias=bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        batch, pos, _ = x.shape
        heads = self.joined(x).view(batch, pos, self.n_key_value_heads, self.group + 2, self.d_head)
        q, k, v = heads.split_with_sizes([self.group, 1, 1], 3)
        shape = (batch, pos, -1, self.d_head)  # queries of several a group are copied here, others are views
        return q.reshape(shape).transpose(1, 2), k.squeeze(3).transpose(1, 2), v.squeeze(3).transpose(1, 2)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._by_part(self.joined.matrix.unflatten(0, (self.n_key_value_heads, -1, self.d_head)).mT)

    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.n_key_value_heads, self.group + 2, self.d_head)
        return self._by_part(bias_view(self.joined.bias, *shape, like=self.joined.weight))

    def _by_part(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of [kv_head, q_per_group + 2, ...]; queries of several a group are a copy, as no strides describe them."""
        q, k, v = x.split([self.group, 1, 1], 1)
        return q.flatten(0, 1), k.squeeze(1), v.squeeze(1)
