"""Attention through latents (DeepSeek-AI 2024, arXiv 2405.04434): keys and values of all heads come from one narrow
vector a token, and a part of the key that carries the position is shared by all heads.

What is unusual here: the cache holds what it always holds, each head's keys and values, and not the latent. So an edit
of `hook_k` or `hook_v` stays with its tokens; it is as large as without latents.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lenskit.errors import HookConflictError, LenskitError
from lenskit.hooks import HookPoint
from lenskit.modules.attention import Attention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Linear, bias_view
from lenskit.modules.module import Identity, Module
from lenskit.modules.norms import RMSNorm
from lenskit.modules.qkv import QKV, HeadInputs


class Latent(Module):
    """A narrow vector and its norm: `hook_latent` [batch pos d_latent] is before the norm, whose points are its own."""

    def __init__(self, d_latent: int, eps: float) -> None:
        super().__init__()
        self.hook_latent = HookPoint("batch pos d_latent", d_latent=d_latent)
        self.norm = RMSNorm(d_latent, eps, axis="d_latent")

    def forward(self, latent: Float[Tensor, "batch pos d_latent"]) -> Float[Tensor, "batch pos d_latent"]:
        normalized: Tensor = self.norm(self.hook_latent(latent))
        return normalized

    def unhooked(self, latent: Float[Tensor, "*batch d_latent"]) -> Float[Tensor, "*batch d_latent"]:
        """The same without its points, which have no axis of heads."""
        return self.norm.fused(latent)


class NoLatent(Identity):
    """Stands where a projection reads the stream itself."""

    def unhooked(self, x: Tensor) -> Tensor:
        """What it is given."""
        return x


class LatentQKV(QKV):
    """Keys and values from a latent, queries from one of their own or from the stream.

    A head's query and key are two parts, one after the other: one for what the token is, and one that is rotated. The
    rotated part of the key comes from the stream, and is the same for all heads.

    Points: `q_latent.hook_latent`, `kv_latent.hook_latent`, their norms', and `hook_k_shared` [batch pos d_rotary].
    Weights as views: from the stream W_DQ [d_model d_latent], W_DKV [d_model d_latent], W_KR [d_model d_rotary]; from
    latents W_UQ [head d_latent d_head], W_UK [head d_latent d_plain], W_UV [head d_latent d_value].

    Args:
        d_plain, d_rotary: widths of the two parts.
        d_q_latent: None for queries from the stream.
        eps: of the latents' norms.
        bias: whether the projections from the stream to latents, and to the shared key, have one.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        d_plain: int,
        d_rotary: int,
        d_value: int,
        d_q_latent: int | None,
        d_kv_latent: int,
        eps: float,
        bias: bool,
    ) -> None:
        d_head = d_plain + d_rotary
        super().__init__(d_model, n_heads=n_heads, n_key_value_heads=n_heads, d_head=d_head, d_value=d_value)
        self.d_plain = d_plain
        self.down_sizes = [d_kv_latent, d_rotary]
        self.q_down: Linear | Identity = Identity() if d_q_latent is None else Linear(d_model, d_q_latent, bias=bias)
        self.q_latent: Latent | NoLatent = NoLatent() if d_q_latent is None else Latent(d_q_latent, eps)
        self.q = Linear(d_model if d_q_latent is None else d_q_latent, n_heads * d_head, bias=False)
        self.kv_down = Linear(d_model, d_kv_latent + d_rotary, bias=bias)
        self.kv_latent = Latent(d_kv_latent, eps)
        self.kv = Linear(d_kv_latent, n_heads * (d_plain + d_value), bias=False)
        self.hook_k_shared = HookPoint("batch pos d_rotary", d_rotary=d_rotary)
        self._points = [point for point in self.modules() if isinstance(point, HookPoint)]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        batch, pos, _ = x.shape
        shape = (batch, pos, self.n_heads, -1)
        latent, shared = self.kv_down(x).split_with_sizes(self.down_sizes, -1)
        q = self.q(self.q_latent(self.q_down(x))).view(shape).transpose(1, 2)
        kv = self.kv(self.kv_latent(latent)).view(shape).transpose(1, 2)
        plain, v = kv.split_with_sizes([self.d_plain, self.d_value], -1)
        shared = self.hook_k_shared(shared)[:, None].expand(-1, self.n_heads, -1, -1)
        return q, torch.cat((plain, shared), -1), v

    def by_head(self, inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
        if any(point.attachments is not None for point in self._points):
            self._show(inputs.x)
        latent, shared = self.kv_down(inputs.k).split_with_sizes(self.down_sizes, -1)
        of_v, _ = self.kv_down(inputs.v).split_with_sizes(self.down_sizes, -1)
        q, plain, v = (
            torch.einsum("bphr,hrd->bhpd", part.unhooked(read), up)
            for part, read, up in (
                (self.q_latent, self.q_down(inputs.q), self.W_UQ),
                (self.kv_latent, latent, self.W_UK),
                (self.kv_latent, of_v, self.W_UV),
            )
        )
        return q, torch.cat((plain, shared.transpose(1, 2)), -1), v

    def _show(self, x: Float[Tensor, "batch pos d_model"]) -> None:
        """Run the points for those who read them: heads that read inputs of their own have latents of their own."""
        for point in self._points:
            if not point.only_read:
                raise HookConflictError(
                    f"a hook on {point.name!r} would be without effect",
                    got=f"hooks on {point.name!r} and on this block's per-head inputs at once",
                    expected="one or the other: each of those inputs has a latent of its own",
                    fix="edit hook_q_input, hook_k_input or hook_v_input instead of the latent",
                )
        self(x)

    @property
    def W_DQ(self) -> Float[Tensor, "d_model d_latent"]:
        if isinstance(self.q_down, Linear):
            return self.q_down.matrix.T
        raise LenskitError(
            "this model has no W_DQ",
            got="queries that come from the stream itself",
            expected="a model with a latent for its queries",
            fix="use W_UQ, which is from the stream here: [head d_model d_head]",
        )

    @property
    def W_DKV(self) -> Float[Tensor, "d_model d_latent"]:
        return self.kv_down.matrix[: self.down_sizes[0]].T

    @property
    def W_KR(self) -> Float[Tensor, "d_model d_rotary"]:
        return self.kv_down.matrix[self.down_sizes[0] :].T

    @property
    def W_UQ(self) -> Float[Tensor, "head d_latent d_head"]:
        return self.q.matrix.unflatten(0, (self.n_heads, -1)).mT

    @property
    def W_UK(self) -> Float[Tensor, "head d_latent d_plain"]:
        return self.kv.matrix.unflatten(0, (self.n_heads, -1))[:, : self.d_plain].mT

    @property
    def W_UV(self) -> Float[Tensor, "head d_latent d_value"]:
        return self.kv.matrix.unflatten(0, (self.n_heads, -1))[:, self.d_plain :].mT

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        raise LenskitError(
            "queries, keys and values of this attention are no products of the stream with one matrix",
            got="W_Q, W_K or W_V, where a norm is between two matrices",
            expected="attn.qkv.W_UQ, W_UK or W_UV, from latents to heads; W_DQ, W_DKV and W_KR, from the stream",
            fix="take the two matrices on either side of the norm",
        )

    def biases(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            bias_view(None, self.n_heads, width, like=self.q.weight)
            for width in (self.d_head, self.d_head, self.d_value)
        )
        return q, k, v


class UnevenAttention(Attention):
    """Attention whose values are of another width than its queries and keys."""

    def fused(
        self,
        q: Float[Tensor, "batch head query_pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_value"],
        run: ForwardPass,
    ) -> Float[Tensor, "batch head query_pos d_value"]:
        """Attention in one kernel: those for many queries need one width, so the narrower get zeros."""
        if run.n_tokens == 1:
            return super().fused(q, k, v, run)
        width = max(q.shape[3], v.shape[3])
        q, k, padded = (F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
        return super().fused(q, k, padded, run)[..., : v.shape[3]]
