"""`ForwardPass`: what all blocks share while one batch goes through them."""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenskit.modules.kv_cache import KVCache, first_seen
from lenskit.modules.module import look_at_classes


class HasTables(Protocol):
    """A rotary embedding, or what stands in its place."""

    by_length: bool  # whether the angles depend on how long the sequence is

    def tables(self, positions: Int[Tensor, "rows pos"], seq_len: int, dtype: torch.dtype) -> tuple[Tensor, ...]: ...


class ForwardPass:
    """Which tokens are processed, at which positions, and what each may attend to.

    Everything derived (masks, rotary tables) is computed once and shared by the layers that ask for it.

    Args:
        n_tokens: tokens a row in this pass, padding included.
        device: where the model's stream is.
        mask: [batch pos], True for a row's own tokens, False for padding; None where there is no padding. Of the
            tokens of this pass.
        token_types: [batch pos], each token's type, in models that have such; None where all are 0.
        cache: keys and values of the tokens before these; attention adds to it.
        step: which pass of a generation this is; 0 for a prompt's.
        prompts: the rows' numbers in the batch that the user gave; None where they are its rows.
        n_logits: how many columns, from the end, get logits; None for all.
    """

    def __init__(
        self,
        n_tokens: int,
        device: torch.device,
        mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        token_types: Int[Tensor, "batch pos"] | None = None,
        cache: KVCache | None = None,
        step: int = 0,
        prompts: Sequence[int] | None = None,
        n_logits: int | None = None,
    ) -> None:
        look_at_classes()
        self.n_tokens, self.mask, self.cache, self.token_types = n_tokens, mask, cache, token_types
        self.step, self.prompts, self.n_logits = step, prompts, n_logits
        self.n_past = 0 if cache is None else cache.length  # columns before this pass
        self.n_keys = self.n_past + n_tokens
        self.padded = mask is not None or (cache is not None and cache.pads is not None)
        self.positions: Int[Tensor, "rows pos"] = self._positions(device)
        self._visible: dict[int | None, Tensor] = {}
        self._hidden: dict[int | None, Tensor] = {}
        self._biases: dict[tuple[torch.dtype, int | None], Tensor] = {}
        self._elsewhere: dict[torch.device, ForwardPass] = {}
        self._tables: dict[tuple[int, torch.dtype], tuple[Tensor, ...]] = {}
        self._computed: dict[Hashable, Tensor] = {}

    def _positions(self, device: torch.device) -> Int[Tensor, "rows pos"]:
        """Each row counts its own tokens from 0 on; padding has the number of the token before it."""
        pads = None if self.cache is None or self.cache.pads is None else self.cache.pads.to(device)
        if self.mask is not None:
            past = self.n_past if pads is None else self.n_past - pads
            return (self.mask.cumsum(1) + past - 1).clamp(min=0)
        if self.n_tokens == 1 and self.n_past:  # where a generation spends its time: one small tensor
            return torch.full((1, 1), self.n_past, device=device) if pads is None else self.n_past - pads
        positions = torch.arange(self.n_past, self.n_keys, device=device).unsqueeze(0)
        return positions if pads is None else positions - pads

    def to(self, device: torch.device | int | str, **_: object) -> "ForwardPass":
        """The same pass for layers on another device: what accelerate calls between devices."""
        device = torch.device(device)
        if device == self.positions.device:
            return self
        moved = self._elsewhere.get(device)
        if moved is None:
            moved = self._elsewhere[device] = ForwardPass(
                self.n_tokens,
                device,
                None if self.mask is None else self.mask.to(device),
                cache=self.cache,
                step=self.step,
                prompts=self.prompts,
                n_logits=self.n_logits,
            )
        return moved

    def rotary_tables(self, rotary: HasTables, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The rotary part's cos and sin at this pass's positions, each [rows 1 pos d_rotary].

        Where they depend on a row's length, its past counts. Keys in a cache stay as they were turned.
        """
        key = (id(rotary), dtype)
        if key not in self._tables:
            if rotary.by_length and self.padded:
                self._tables[key] = self._tables_by_row(rotary, dtype)
            else:
                self._tables[key] = rotary.tables(self.positions, self.n_keys, dtype)
        return self._tables[key]

    def _tables_by_row(self, rotary: HasTables, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """A row's angles follow its own length, as if it were alone; Hugging Face goes by the longest row's."""
        lengths = (self.positions[:, -1] + 1).tolist()
        rows = [rotary.tables(p[None], n, dtype) for p, n in zip(self.positions, lengths, strict=True)]
        return tuple(torch.cat(tables) for tables in zip(*rows, strict=True))

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, computed when the first layer asks under this key."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def key_positions(self, window: int | None = None) -> Int[Tensor, "rows key_pos"]:
        """Where in its row each key is that `KVCache.extend` returns; padding has the number of the token before it."""
        first, own = first_seen(self.n_past, window) if self.cache is not None else 0, self._own_keys()
        if own is None:
            return torch.arange(first, self.n_keys, device=self.positions.device).unsqueeze(0)
        return (own.cumsum(1) - 1).clamp(min=0)[:, first:]

    def visible(self, window: int | None = None) -> Bool[Tensor, "rows 1 query_pos key_pos"]:
        """True where a query may attend to a key: not ahead of it, within the window, and no padding.

        Keys are those that `KVCache.extend` returns, or this pass's where there is no cache. A padding query
        attends to itself: nothing reads it, and a softmax over nothing would be nan.

        Args:
            window: how many keys a query sees, itself included (padding between a row's tokens counts as well);
                None for all before it.
        """
        if window not in self._visible:
            first, device = first_seen(self.n_past, window), self.positions.device
            keys = torch.arange(first, self.n_keys, device=device)
            queries = torch.arange(self.n_past, self.n_keys, device=device).unsqueeze(1)
            seen = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
            own = self._own_keys()
            if own is None:
                self._visible[window] = seen[None, None]
            else:
                self._visible[window] = (seen & own[:, None, None, first:]) | (keys == queries)
        return self._visible[window]

    def hidden(self, window: int | None = None) -> Bool[Tensor, "rows 1 query_pos key_pos"] | None:
        """The opposite of `visible`; None where nothing is hidden: all that one token's query gets is its past."""
        if self.n_tokens == 1 and not self.padded:
            return None
        if window not in self._hidden:
            self._hidden[window] = ~self.visible(window)
        return self._hidden[window]

    def attention_bias(
        self, dtype: torch.dtype, window: int | None = None
    ) -> Float[Tensor, "rows 1 query_pos key_pos"] | None:
        """What fused attention adds to the scores: 0 or -inf.

        None where nothing is hidden (`n_tokens` is 1), or plain causality says it all (`n_tokens` is more).
        """
        if not self.padded and (
            self.n_tokens == 1 or (not self.n_past and (window is None or self.n_tokens <= window))
        ):
            return None
        key = (dtype, window)
        if key not in self._biases:
            visible = self.visible(window)
            zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self._biases[key] = zeros.masked_fill(~visible, float("-inf"))
        return self._biases[key]

    def padding(self) -> Bool[Tensor, "batch 1 1 key_pos"] | None:
        """True for keys that are padding: what is hidden where queries see both ways; None where nothing is padded.

        A padding query sees what the others do: nothing reads it.
        """
        return None if self.mask is None else ~self.mask[:, None, None, :]

    def padding_bias(self, dtype: torch.dtype) -> Float[Tensor, "batch 1 1 key_pos"] | None:
        """The same for fused attention, which adds it to the scores: 0 or -inf."""
        hidden = self.padding()
        if hidden is None:
            return None
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return self.once(("padding", dtype), lambda: zeros.masked_fill(hidden, float("-inf")))

    def _own_keys(self) -> Bool[Tensor, "batch n_keys"] | None:
        """Which columns, past ones and this pass's, are a row's own tokens; None for all."""
        device = self.positions.device
        past = None if self.cache is None else self.cache.own(self.n_keys)  # those of this pass among them
        if past is not None:
            past = past.to(device)
        if self.mask is None:
            return past
        if not self.n_past:
            return self.mask
        if past is None:
            past = self.mask.new_ones(self.mask.shape[0], self.n_past)
        return torch.cat((past[:, : self.n_past], self.mask), 1)
