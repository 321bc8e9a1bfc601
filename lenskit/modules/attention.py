"""Self-attention, put together from parts: a query-key-value projection, rotary embeddings or none.

`Attention` is the plain kind and the fastest; `BidirectionalAttention` is the same without causality.
`ExtendedAttention` takes the parts that fewer models have: norms of queries and keys, clipping, a soft cap, position
biases, sinks.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lenskit.errors import HookError
from lenskit.hooks import HookPoint, Watch
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Linear, SoftCap, bias_view
from lenskit.modules.module import Identity, Module, at_least_float32, empty, run_for_readers
from lenskit.modules.position_bias import NoPositionBias, PositionBias
from lenskit.modules.qkv import QKV, HeadInputs
from lenskit.modules.rotary import Rotary


class Unrotated(Identity):
    """Stands where a rotary embedding would, in models whose positions enter elsewhere."""

    by_length = False

    def tables(self, *_: object) -> tuple[()]:
        """No angles."""
        return ()


class SelfAttention(Module):
    """What every attention has: its parts, the path that shows scores and pattern, weights by head.

    `hook_attn_scores` is after the scale, and whatever else is done to scores, and the mask (-inf where a query may
    not look).

    Args:
        qkv: the projections; see `qkv.py` for the layouts.
        scale: what q k^T is multiplied by.
        bias: whether the output projection has one.
        rotary: applied to queries and keys; None where positions enter elsewhere, or in this layer not at all.
        window: how many keys a query sees, itself included, counted back from it; None for all before it
            (Beltagy et al. 2020, arXiv 2004.05150).
        between: a subclass's parts between the projections and the rotation: points are in the order of use.
        on_scores: its parts between the scores and the pattern.

    causal: whether a query sees no key that comes after it.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        qkv: QKV,
        *,
        scale: float,
        bias: bool,
        rotary: Rotary | None = None,
        window: int | None = None,
        between: Mapping[str, Module] | None = None,
        on_scores: Mapping[str, Module] | None = None,
    ) -> None:
        super().__init__()
        d_model, n_heads, n_key_value_heads = qkv.d_model, qkv.n_heads, qkv.n_key_value_heads
        self.scale, self.window = scale, window
        self.group = n_heads // n_key_value_heads  # query heads that read one key-value head

        def heads(n: int, d_head: int = qkv.d_head) -> HookPoint:
            return HookPoint("batch pos head d_head", swapped=("pos", "head"), head=n, d_head=d_head)

        self.qkv = qkv
        self.hook_q, self.hook_k = heads(n_heads), heads(n_key_value_heads)
        self.hook_v = heads(n_key_value_heads, qkv.d_value)
        for name, part in (between or {}).items():
            self.add_module(name, part)
        self.rotary: Rotary | Unrotated = rotary or Unrotated()
        self.hook_rot_q: HookPoint | Identity = heads(n_heads) if rotary else Identity()
        self.hook_rot_k: HookPoint | Identity = heads(n_key_value_heads) if rotary else Identity()
        self.hook_attn_scores = HookPoint("batch head query_pos key_pos", head=n_heads)
        for name, part in (on_scores or {}).items():
            self.add_module(name, part)
        self.hook_pattern = HookPoint("batch head query_pos key_pos", head=n_heads)
        self.watch = Watch(self.hook_attn_scores, self.hook_pattern)
        self.hook_z = HookPoint("batch pos head d_head", head=n_heads, d_head=qkv.d_value)
        self.hook_result = HookPoint("batch pos head d_model", on_demand=True, head=n_heads, d_model=d_model)
        self.o = Linear(n_heads * qkv.d_value, d_model, bias=bias)

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch pos d_model"] | HeadInputs, run: ForwardPass
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention writes to the stream (before a norm of its output, if there is one)."""

    def hidden(self, run: ForwardPass) -> Bool[Tensor, "rows 1 _ key_pos"] | None:
        """True for the keys that a query may not look at; None where it may look at all of them."""
        return run.hidden(self.window)

    def _by_group(self, x: Float[Tensor, "batch head query_pos n"]) -> Float[Tensor, "batch kv_head group_query n"]:
        """A group's heads as so many more queries of its key-value head, which so is never repeated."""
        return x if self.group == 1 else x.reshape(x.shape[0], x.shape[1] // self.group, -1, x.shape[3])

    def _of_all_keys(
        self, scores: Float[Tensor, "batch head query_pos _"], hidden: Tensor | None, run: ForwardPass
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        """Masked scores, also of keys that a window's cache has let go: hooks see what they see without a cache."""
        scores = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
        gone = run.n_keys - scores.shape[3]
        return F.pad(scores, (gone, 0), value=float("-inf")) if gone else scores

    def _mixed(
        self, pattern: Float[Tensor, "batch head query_pos key_pos"], v: Float[Tensor, "batch kv_head _ d_value"]
    ) -> Float[Tensor, "batch head query_pos d_value"]:
        """Values, summed as the pattern says.

        Raises:
            HookError: a hook has made it attend to a key that a window's cache has let go.
        """
        n_keys, gone = pattern.shape[3], pattern.shape[3] - v.shape[2]
        if gone:
            edited = not (self.hook_attn_scores.only_read and self.hook_pattern.only_read)
            if edited and bool(pattern[..., :gone].any()):
                raise HookError(
                    f"{self.hook_pattern.name} was made to attend to keys that are not there any more",
                    got=f"attention to some of the first {gone} of {n_keys} keys",
                    expected=f"attention to the last {self.window} keys: the window lets go of the others",
                    fix=f"edit dims=slice(-{self.window}, None) of scores and pattern from step 1 on",
                )
            pattern = pattern[..., gone:]
        return (self._by_group(pattern) @ v).view(*pattern.shape[:3], -1)

    def project(self, z: Float[Tensor, "batch pos head d_value"]) -> Float[Tensor, "batch pos d_model"]:
        """Back to the stream; head by head only where somebody asked for `hook_result`."""
        if self.hook_result.attachments is None:
            return self.o(z.flatten(2))
        run_for_readers(self.o, z.flatten(2), instead=repr(self.hook_result.name))
        return self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O)).sum(2) + self.b_O

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self.qkv.weights()[0]

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self.qkv.weights()[1]

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_value"]:
        return self.qkv.weights()[2]

    @property
    def W_O(self) -> Float[Tensor, "head d_value d_model"]:
        return self.o.matrix.unflatten(1, (self.qkv.n_heads, self.qkv.d_value)).permute(1, 2, 0)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        return self.qkv.biases()[0]

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        return self.qkv.biases()[1]

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_value"]:
        return self.qkv.biases()[2]

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return bias_view(self.o.bias, self.o.weight.shape[0], like=self.o.weight)


class Attention(SelfAttention):
    """softmax(scale q k^T) v for every head (Vaswani et al. 2017, arXiv 1706.03762), causal.

    Runs torch's fused kernel, which never builds a [query, key] matrix, unless somebody asked for this layer's
    scores or pattern.
    """

    def forward(
        self, x: Float[Tensor, "batch pos d_model"] | HeadInputs, run: ForwardPass
    ) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = self.qkv.by_head(x) if isinstance(x, HeadInputs) else self.qkv(x)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        angles = run.rotary_tables(self.rotary, q.dtype)
        q, k = self.hook_rot_q(self.rotary(q, *angles)), self.hook_rot_k(self.rotary(k, *angles))
        if run.cache is not None:
            k, v = run.cache.extend(self.hook_k.name, k, v, self.window)
        z = self.explicit(q, k, v, run) if self.watch.used else self.fused(q, k, v, run)
        return self.project(self.hook_z(z.transpose(1, 2)))

    def fused(
        self,
        q: Float[Tensor, "batch head query_pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_value"],
        run: ForwardPass,
    ) -> Float[Tensor, "batch head query_pos d_value"]:
        """Attention in one kernel."""
        bias = run.attention_bias(q.dtype, self.window)
        if run.n_tokens > 1:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=bias is None, scale=self.scale, enable_gqa=self.group > 1
            )
        if self.group == 1:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        z = F.scaled_dot_product_attention(self._by_group(q), k, v, attn_mask=bias, scale=self.scale)
        return z.reshape(*q.shape[:3], -1)

    def explicit(
        self,
        q: Float[Tensor, "batch head query_pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_value"],
        run: ForwardPass,
    ) -> Float[Tensor, "batch head query_pos d_value"]:
        """Attention written out, with its two hook points; the softmax in float32 at least."""
        scores = (self._by_group(q * self.scale) @ k.mT).view(*q.shape[:3], -1)
        hidden = self.hidden(run)
        scores = self.hook_attn_scores(self._of_all_keys(scores, hidden, run))
        pattern = self.hook_pattern(scores.softmax(-1, dtype=at_least_float32(q.dtype)).to(q.dtype))
        return self._mixed(pattern, v)


class BidirectionalAttention(Attention):
    """`Attention` in which a query sees all tokens of its row, those after it as well."""

    causal = False

    def fused(
        self,
        q: Float[Tensor, "batch head query_pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_head"],
        run: ForwardPass,
    ) -> Float[Tensor, "batch head query_pos d_head"]:
        """Attention in one kernel."""
        bias = run.padding_bias(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale, enable_gqa=self.group > 1)

    def hidden(self, run: ForwardPass) -> Bool[Tensor, "rows 1 _ key_pos"] | None:
        """True for padding."""
        return run.padding()


class Softmax(Module):
    """Scores to the pattern, in float32 at least."""

    def forward(
        self, scores: Float[Tensor, "batch head query_pos key_pos"], dtype: torch.dtype
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        return scores.softmax(-1, dtype=at_least_float32(dtype)).to(dtype)


class SinkSoftmax(Softmax):
    """A softmax with one more score a head, learned, that no value belongs to: a pattern's rows sum to less than one
    (Xiao et al. 2023, arXiv 2309.17453; Miller 2023, "Attention is off by one"). `sinks`: [head].

    `hook_sink_scores` [batch head query_pos 1] is that score, for every query: at -inf nothing goes to the sink.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.sinks = empty(n_heads)
        self.hook_sink_scores = HookPoint("batch head query_pos 1", head=n_heads)

    def forward(
        self, scores: Float[Tensor, "batch head query_pos key_pos"], dtype: torch.dtype
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        sinks = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        with_sinks = torch.cat((scores, self.hook_sink_scores(sinks)), -1)
        return with_sinks.softmax(-1, dtype=at_least_float32(dtype))[..., :-1].to(dtype)


class Clip(Module):
    """Limits every number to [-limit, limit]."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-self.limit, self.limit)


class ExtendedAttention(SelfAttention):
    """Attention with parts that most models do not have. What is not given costs nothing but an identity.

    Args:
        clip: limits queries, keys and values as they leave the projections, before `hook_q`, `hook_k`, `hook_v`.
        clip_values: the same for values alone.
        q_norm, k_norm: norms (see `norms.py`) between `hook_q`, `hook_k` and the rotation, with points of their own
            (`attn.q_norm.hook_scale`, ...).
        cap: a soft cap of the scores, `cap * tanh(scores / cap)`, before the mask. No fused kernel is exact then.
        position_bias: what is added to scores for positions (see `position_bias.py`); one for all layers.
        softmax: how scores become the pattern. With sinks there is no fused kernel.
    """

    q_norm: Module
    k_norm: Module
    softmax: Softmax

    def __init__(
        self,
        qkv: QKV,
        *,
        scale: float,
        bias: bool,
        rotary: Rotary | None = None,
        window: int | None = None,
        clip: float | None = None,
        clip_values: float | None = None,
        q_norm: Module | None = None,
        k_norm: Module | None = None,
        cap: float | None = None,
        position_bias: PositionBias | None = None,
        softmax: Softmax | None = None,
    ) -> None:
        norms = {"q_norm": q_norm or Identity(), "k_norm": k_norm or Identity()}
        softmaxes = {"softmax": softmax or Softmax()}
        super().__init__(qkv, scale=scale, bias=bias, rotary=rotary, window=window, between=norms, on_scores=softmaxes)
        clip_values = clip if clip_values is None else clip_values
        self.clip, self.clip_v = (Identity() if limit is None else Clip(limit) for limit in (clip, clip_values))
        self.cap = Identity() if cap is None else SoftCap(cap)
        self.position_bias = position_bias or NoPositionBias()
        self.fusible = cap is None and softmax is None

    def forward(
        self, x: Float[Tensor, "batch pos d_model"] | HeadInputs, run: ForwardPass
    ) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = self.qkv.by_head(x) if isinstance(x, HeadInputs) else self.qkv(x)
        q, k, v = self.hook_q(self.clip(q)), self.hook_k(self.clip(k)), self.hook_v(self.clip_v(v))
        q, k = self.q_norm(q), self.k_norm(k)
        angles = run.rotary_tables(self.rotary, q.dtype)
        q, k = self.hook_rot_q(self.rotary(q, *angles)), self.hook_rot_k(self.rotary(k, *angles))
        if run.cache is not None:
            k, v = run.cache.extend(self.hook_k.name, k, v, self.window)
        fused = self.fusible and not self.watch.used
        z = self.fused(q, k, v, run) if fused else self.explicit(q, k, v, run)
        return self.project(self.hook_z(z.transpose(1, 2)))

    def fused(
        self,
        q: Float[Tensor, "batch head query_pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_value"],
        run: ForwardPass,
    ) -> Float[Tensor, "batch head query_pos d_value"]:
        """Attention in one kernel."""
        bias = self.position_bias.mask(run, q.dtype, self.window)
        causal = bias is None and run.n_tokens > 1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, scale=self.scale, enable_gqa=self.group > 1
        )

    def explicit(
        self,
        q: Float[Tensor, "batch head query_pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_value"],
        run: ForwardPass,
    ) -> Float[Tensor, "batch head query_pos d_value"]:
        """Attention written out, with its two hook points."""
        scores = self.cap((self._by_group(q * self.scale) @ k.mT).view(*q.shape[:3], -1))
        scores, hidden = self.position_bias(scores, run, self.window), self.hidden(run)
        scores = self.hook_attn_scores(self._of_all_keys(scores, hidden, run))
        pattern = self.hook_pattern(self.softmax(scores, q.dtype))
        return self._mixed(pattern, v)
