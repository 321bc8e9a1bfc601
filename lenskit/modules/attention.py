"""Causal self-attention, put together from parts: a query-key-value projection, rotary embeddings or none."""

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lenskit.hooks import HookPoint
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Linear, bias_view
from lenskit.modules.module import Identity, Module, at_least_float32
from lenskit.modules.rotary import Rotary


class Unrotated(Identity):
    """Stands where a rotary embedding would, in models whose positions enter elsewhere."""

    by_length = False

    def tables(self, *_: object) -> tuple[()]:
        """No angles."""
        return ()


class HeadInputs(NamedTuple):
    """What each head's projections read, where somebody asked for one copy of the stream a head."""

    q: Float[Tensor, "batch pos head d_model"]
    k: Float[Tensor, "batch pos kv_head d_model"]
    v: Float[Tensor, "batch pos kv_head d_model"]


class QKV(Module):
    """The projections to queries, keys and values; how their weights lie in memory is the subclass's affair."""

    def __init__(self, d_model: int, *, n_heads: int, n_key_value_heads: int, d_head: int) -> None:
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.n_key_value_heads, self.d_head = n_key_value_heads, d_head

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
            for x, weight, bias in zip(inputs, self.weights(), self.biases(), strict=True)
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
        q, k, v = (part.weight.unflatten(0, (-1, self.d_head)).mT for part in (self.q, self.k, self.v))
        return q, k, v

    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            bias_view(part.bias, part.weight.shape[0] // self.d_head, self.d_head, like=part.weight)
            for part in (self.q, self.k, self.v)
        )
        return q, k, v


class FusedQKV(QKV):
    """One matrix, whose rows are all queries, then all keys, then all values; as many of each."""

    def __init__(self, d_model: int, *, n_heads: int, d_head: int, bias: bool) -> None:
        super().__init__(d_model, n_heads=n_heads, n_key_value_heads=n_heads, d_head=d_head)
        self.joined = Linear(d_model, 3 * n_heads * d_head, bias=bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        batch, pos, _ = x.shape
        heads = self.joined(x).view(batch, pos, 3, self.n_heads, self.d_head)
        q, k, v = heads.transpose(1, 3).unbind(2)
        return q, k, v

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.joined.weight.unflatten(0, (3, self.n_heads, self.d_head)).mT.unbind(0)
        return q, k, v

    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = (3, self.n_heads, self.d_head)
        q, k, v = bias_view(self.joined.bias, *shape, like=self.joined.weight).unbind(0)
        return q, k, v


class Attention(Module):
    """softmax(scale q k^T) v for every head (Vaswani et al. 2017, arXiv 1706.03762), causal.

    Runs torch's fused kernel, which never builds a [query, key] matrix, unless somebody asked for this layer's
    scores or pattern. `hook_attn_scores` is after the scale and the mask (-inf where a query may not look).

    Args:
        scale: what q k^T is multiplied by.
        rotary: applied to queries and keys; None where positions enter elsewhere.
        window: how many keys a query sees, itself included, counted back from it; None for all before it
            (Beltagy et al. 2020, arXiv 2004.05150).
    """

    def __init__(
        self, qkv: QKV, *, scale: float, bias: bool, rotary: Rotary | None = None, window: int | None = None
    ) -> None:
        super().__init__()
        d_model, n_heads, n_key_value_heads, d_head = qkv.d_model, qkv.n_heads, qkv.n_key_value_heads, qkv.d_head
        self.scale, self.window = scale, window
        self.group = n_heads // n_key_value_heads  # query heads that read one key-value head

        def heads(n: int) -> HookPoint:
            return HookPoint("batch pos head d_head", swapped=("pos", "head"), head=n, d_head=d_head)

        self.qkv = qkv
        self.hook_q, self.hook_k = heads(n_heads), heads(n_key_value_heads)
        self.hook_v = heads(n_key_value_heads)
        self.rotary: Rotary | Unrotated = rotary or Unrotated()
        self.hook_rot_q: HookPoint | Identity = heads(n_heads) if rotary else Identity()
        self.hook_rot_k: HookPoint | Identity = heads(n_key_value_heads) if rotary else Identity()
        self.hook_attn_scores = HookPoint("batch head query_pos key_pos", head=n_heads)
        self.hook_pattern = HookPoint("batch head query_pos key_pos", head=n_heads)
        self.hook_z = HookPoint("batch pos head d_head", head=n_heads, d_head=d_head)
        self.hook_result = HookPoint("batch pos head d_model", on_demand=True, head=n_heads, d_model=d_model)
        self.o = Linear(n_heads * d_head, d_model, bias=bias)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"] | HeadInputs, run: ForwardPass
    ) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = self.qkv.by_head(x) if isinstance(x, HeadInputs) else self.qkv(x)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        angles = run.rotary_tables(self.rotary, q.dtype)
        q, k = self.hook_rot_q(self.rotary(q, *angles)), self.hook_rot_k(self.rotary(k, *angles))
        if run.cache is not None:
            k, v = run.cache.extend(self.hook_k.name, k, v, self.window)
        if self.hook_attn_scores.attachments is None and self.hook_pattern.attachments is None:
            z = self.fused(q, k, v, run)
        else:
            z = self.explicit(q, k, v, run)
        return self.project(self.hook_z(z.transpose(1, 2)))

    def fused(
        self,
        q: Float[Tensor, "batch head query_pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_head"],
        run: ForwardPass,
    ) -> Float[Tensor, "batch head query_pos d_head"]:
        """Attention in one kernel."""
        bias = run.attention_bias(q.dtype, self.window)
        if run.n_tokens > 1:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=bias is None, scale=self.scale, enable_gqa=self.group > 1
            )
        if self.group == 1:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        z = F.scaled_dot_product_attention(self._by_group(q), k, v, attn_mask=bias, scale=self.scale)
        return z.reshape(q.shape)

    def explicit(
        self,
        q: Float[Tensor, "batch head query_pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_head"],
        run: ForwardPass,
    ) -> Float[Tensor, "batch head query_pos d_head"]:
        """Attention written out, with its two hook points; the softmax in float32 at least."""
        scores = (self._by_group(q * self.scale) @ k.mT).view(*q.shape[:3], -1)
        hidden = run.hidden(self.window)
        scores = self.hook_attn_scores(scores if hidden is None else scores.masked_fill(hidden, float("-inf")))
        pattern = self.hook_pattern(scores.softmax(-1, dtype=at_least_float32(q.dtype)).to(q.dtype))
        return (self._by_group(pattern) @ v).view(q.shape)

    def _by_group(self, x: Float[Tensor, "batch head query_pos n"]) -> Float[Tensor, "batch kv_head group_query n"]:
        """A group's heads as so many more queries of its key-value head, which so is never repeated."""
        return x if self.group == 1 else x.reshape(x.shape[0], x.shape[1] // self.group, -1, x.shape[3])

    def project(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        """Back to the stream; head by head only where somebody asked for `hook_result`."""
        if self.hook_result.attachments is None:
            return self.o(z.flatten(2))
        return self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O)).sum(2) + self.b_O

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self.qkv.weights()[0]

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self.qkv.weights()[1]

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self.qkv.weights()[2]

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self.o.weight.unflatten(1, (self.qkv.n_heads, self.qkv.d_head)).permute(1, 2, 0)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        return self.qkv.biases()[0]

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        return self.qkv.biases()[1]

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        return self.qkv.biases()[2]

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return bias_view(self.o.bias, self.o.weight.shape[0], like=self.o.weight)
