"""`KVCache`: the keys and values of the tokens that a model has processed, so that a new token needs only its own.

What is unusual here: buffers are made after the first keys and values that come, so that a cache needs no config;
nothing counts until a pass is over, so that one that failed can be run again; and where gradients are recorded,
keys are concatenated instead of written to a buffer, because what a graph holds must not be written over.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenskit.errors import InputError


def first_seen(n_past: int, window: int | None) -> int:
    """The first of `n_past` columns that the next query sees, if it sees itself and `window - 1` before it."""
    return 0 if window is None or n_past < window else n_past - window + 1


class Layer:
    """Keys and values of one attention layer; slot 0 holds column `origin`, and column `end` has no slot.

    Args:
        k, v: [batch kv_head slot d_head]: buffers of the cache's own, or what may be part of an autograd graph.
        origin: the column in the first slot.
        window: keys that a query sees, itself included; None for all.
        writable: whether k and v are buffers; if not, there is no room.
    """

    def __init__(self, k: Tensor, v: Tensor, *, origin: int, window: int | None, writable: bool) -> None:
        self.k, self.v, self.origin, self.window, self.writable = k, v, origin, window, writable
        self.inference = k.is_inference()  # made in inference mode, a buffer can be written in no other
        self.n_slots = k.shape[2]
        self.end = origin + self.n_slots if writable else origin
        # What as_strided needs, looked up once: a step asks for four views a layer.
        self._sizes = (*k.shape[:2], k.shape[3], v.shape[3])
        self._k_strides, self._v_strides = k.stride(), v.stride()

    @classmethod
    def room(
        cls, k: Tensor, v: Tensor, n_slots: int, *, origin: int, window: int | None, rows: int | None = None
    ) -> "Layer":
        """New buffers for keys and values like these, with as many rows unless told otherwise."""
        k, v = (x.new_empty(x.shape[0] if rows is None else rows, x.shape[1], n_slots, x.shape[3]) for x in (k, v))
        return cls(k, v, origin=origin, window=window, writable=True)

    def get(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of the columns from `first` to before `end`."""
        start, n = first - self.origin, end - first
        if not self.writable:
            return self.k.narrow(2, start, n), self.v.narrow(2, start, n)
        rows, heads, d_k, d_v = self._sizes  # in buffers the same as narrow, in half its time
        return (
            self.k.as_strided((rows, heads, n, d_k), self._k_strides, start * d_k),
            self.v.as_strided((rows, heads, n, d_v), self._v_strides, start * d_v),
        )

    @property
    def open(self) -> bool:
        """Whether there are buffers that can be written now: their mode is this one, and no graph will hold them."""
        in_mode = torch.is_inference_mode_enabled() or not self.inference
        return self.writable and in_mode and not torch.is_grad_enabled()

    def put(self, first: int, k: Tensor, v: Tensor) -> None:
        """Write columns, from `first` on."""
        k_slots, v_slots = self.get(first, first + k.shape[2])
        k_slots.copy_(k)
        v_slots.copy_(v)

    def moved(self, first: int, end: int, n_slots: int) -> "Layer | None":
        """The same buffers with the columns from `first` to before `end` at their front.

        None if n_slots from there on would not fit, or a column would be written over before it is read: unless
        each move frees half the buffer, there could be one a step.
        """
        if not self.open or n_slots > self.n_slots or first - self.origin < end - first:
            return None
        front = Layer(self.k, self.v, origin=first, window=self.window, writable=True)
        front.put(first, *self.get(first, end))
        return front

    def copy(self, rows: Int[Tensor, " row"], end: int, capacity: int) -> "Layer":
        """These rows, as far as a query at column `end` sees them, with room for columns up to `capacity`.

        It is part of the graph if there is one.
        """
        first = first_seen(end, self.window)
        k, v = self.get(first, end)
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            k, v = k.index_select(0, rows), v.index_select(0, rows)
            return Layer(k, v, origin=first, window=self.window, writable=False)
        return Layer.joined([(self, rows, 0)], end, capacity)

    @classmethod
    def joined(cls, parts: Sequence[tuple["Layer", Int[Tensor, " row"], int]], end: int, capacity: int) -> "Layer":
        """Rows of several layers under each other, as far as a query at column `end` sees them.

        Args:
            parts: a layer, its rows, and by how many columns they move to the right; what moves out on the left is
                padding.
        """
        like = parts[0][0]
        first = first_seen(end, like.window)
        room = capacity - first if like.window is None else min(capacity - first, 2 * like.window)
        n_rows = sum(len(rows) for _, rows, _ in parts)
        whole = cls.room(like.k, like.v, max(room, end - first), origin=first, window=like.window, rows=n_rows)
        n_before = 0
        for layer, rows, shift in parts:
            start = max(first, layer.origin + shift)
            for source, target in zip(layer.get(start - shift, end - shift), whole.get(first, end), strict=True):
                own = target[n_before : n_before + len(rows)]
                own[:, :, : start - first] = 0  # a query does not see it, but multiplies it by zero
                torch.index_select(source, 0, rows, out=own[:, :, start - first :])
            n_before += len(rows)
        return whole

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class KVCache:
    """Keys (rotated, where a model rotates them) and values of the tokens processed so far, layer by layer.

    Give one to `Decoder.decode` with a prompt, then with the tokens that follow it. A layer with a sliding window
    keeps the keys that its next query sees, in a buffer of at most twice the window. If a pass fails, the cache is
    what it was before.

    Args:
        capacity: tokens a row for which there is room from the start, padding included. Beyond it, buffers double.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0  # columns processed: tokens a row, padding included
        self.pads: Int[Tensor, "batch 1"] | None = None  # columns that are no tokens of a row; None: nowhere any
        self._own: Bool[Tensor, "batch slot"] | None = None  # from `length` on, True
        self._layers: dict[str, Layer] = {}
        self._after: dict[str, Layer] = {}  # what replaces a layer's buffers if the pass under way succeeds

    @property
    def mask(self) -> Bool[Tensor, "batch length"] | None:
        """True for a row's own tokens, False for padding; None where nothing is padded."""
        return self.own(self.length)

    @property
    def n_rows(self) -> int | None:
        """Rows of the batch; None while the cache is empty."""
        return next(iter(self._layers.values())).k.shape[0] if self.length else None

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes, room for more tokens included."""
        layers = [*self._layers.values(), *self._after.values()]
        masks = [tensor.nbytes for tensor in (self.pads, self._own) if tensor is not None]
        return sum(layer.nbytes for layer in layers) + sum(masks)

    def extend(
        self,
        name: str,
        k: Float[Tensor, "batch kv_head pos d_head"],
        v: Float[Tensor, "batch kv_head pos d_value"],
        window: int | None = None,
    ) -> tuple[Float[Tensor, "batch kv_head key_pos d_head"], Float[Tensor, "batch kv_head key_pos d_value"]]:
        """A layer's keys and values with those of a pass behind them: all that the pass's queries may see, in order.

        They count once `advance` is called; until then, another call takes their place.

        Args:
            name: which layer.
            window: keys that a query of this layer sees, itself included; None for all before it.

        Raises:
            InputError: the cache holds tokens, but not this layer's, or too few for this window.
        """
        past, end = self.length, self.length + k.shape[2]
        first, layer = first_seen(past, window), self._layers.get(name)
        if self._after:
            self._after.pop(name, None)  # of a pass that failed
        if layer is None or not past or first < layer.origin or end > layer.end or not layer.open:
            return self._make_room(name, k, v, first, window)
        layer.put(past, k, v)
        return layer.get(first, end)

    def advance(self, n_tokens: int, mask: Bool[Tensor, "batch pos"] | None = None) -> None:
        """The pass is over: what every layer was extended by counts.

        Args:
            n_tokens: tokens a row that it processed.
            mask: which of them are a row's own; None for all.
        """
        pads, own, length = self.pads, self._own, self.length + n_tokens
        if mask is not None:
            with torch.inference_mode(False):  # they outlive the caller's mode, and may meet gradients
                added = (~mask).sum(1, keepdim=True)
                pads = added if pads is None else pads + added
                own = self._own_with_room(mask, length)
                own[:, self.length : length] = mask
        self._layers = {**self._layers, **self._after} if self._after else self._layers
        self._after = {}
        self.pads, self._own, self.length = pads, own, length

    def own(self, n: int) -> Bool[Tensor, "batch n"] | None:
        """Which of the first n columns are a row's own tokens, those to come counting as such; None for all."""
        if self._own is None:
            return None
        if n > self._own.shape[1]:
            self._own = self._own_with_room(self._own, n)
        return self._own.narrow(1, 0, n)

    def branch(self, rows: Sequence[int], capacity: int) -> "KVCache":
        """An independent copy of these rows, each as often as it is named.

        Args:
            rows: numbers of rows, from 0.
            capacity: tokens a row for which the copy has room, those that it holds included.

        Raises:
            InputError: there is no such row.
        """
        branch = KVCache(capacity)
        if not self.length:
            return branch
        n_rows = self.n_rows or 0
        if not rows or min(rows) < 0 or max(rows) >= n_rows:
            raise InputError(
                "a cache cannot be branched into rows that it does not have",
                got=f"rows {list(rows)}",
                expected=f"numbers from 0 to {n_rows - 1}",
                fix="name rows of the batch that the cache was filled with",
            )
        at: dict[torch.device, Tensor] = {}
        for name, layer in self._layers.items():
            device = layer.k.device
            if device not in at:
                at[device] = torch.tensor(rows, device=device)
            branch._layers[name] = layer.copy(at[device], self.length, capacity)
        if self.pads is not None and self._own is not None:
            with torch.inference_mode(False):
                branch.pads, branch._own = self.pads[list(rows)], self._own[list(rows)]
        branch.length = self.length
        return branch

    @classmethod
    def joined(cls, parts: Sequence[tuple["KVCache", Sequence[int]]], capacity: int) -> "KVCache":
        """An independent copy of rows of several caches, those of one after those of another.

        It is as long as the longest row: shorter ones get padding on the left, and what all have there is let go.

        Args:
            parts: caches that hold tokens, of the same model and without gradients, and the numbers of their rows.
            capacity: tokens a row for which there is room, those that are held included.
        """
        owns = [cache._own_of(rows) for cache, rows in parts]
        whole = cls(capacity)
        whole.length = end = max(own.shape[1] for own in owns)
        for name, like in parts[0][0]._layers.items():
            at = [torch.tensor(rows, device=like.k.device) for _, rows in parts]
            layers = [
                (cache._layers[name], rows, end - cache.length) for (cache, _), rows in zip(parts, at, strict=True)
            ]
            whole._layers[name] = Layer.joined(layers, end, capacity)
        with torch.inference_mode(False):
            padded = [torch.nn.functional.pad(own, (end - own.shape[1], 0)) for own in owns]
            joined = torch.nn.functional.pad(torch.cat(padded), (0, max(capacity, end) - end), value=True)
            if not joined.all():
                whole._own = joined.to(next(iter(whole._layers.values())).k.device)
                whole.pads = (~whole._own).sum(1, keepdim=True)
        return whole

    def _own_of(self, rows: Sequence[int]) -> Bool[Tensor, "row _"]:
        """Which columns are these rows' own tokens, from the first on that is one of some row's."""
        if self.mask is None:
            return torch.ones(len(rows), self.length, dtype=torch.bool)
        own = self.mask[list(rows)].cpu()
        return own[:, int(own.any(0).int().argmax()) :]

    def _make_room(self, name: str, k: Tensor, v: Tensor, first: int, window: int | None) -> tuple[Tensor, Tensor]:
        """`extend` where there is no room, or none may be used; columns before `first` are let go."""
        past, end = self.length, self.length + k.shape[2]
        layer = self._past(name, first)
        if torch.is_grad_enabled():
            return self._record(name, layer, k, v, first, window)
        if window is not None and end - first > 2 * window:
            return self._keep_last(name, layer, k, v, first, window)
        roomier = None if layer is None else layer.moved(first, past, end - first)
        if roomier is None:
            doubled = 2 * layer.n_slots if layer is not None and layer.open else 0
            n_slots = max(end - first, self.capacity - first, doubled)
            n_slots = n_slots if window is None else min(n_slots, 2 * window)
            roomier = Layer.room(k, v, n_slots, origin=first, window=window)
            if layer is not None:
                roomier.put(first, *layer.get(first, past))
        self._layers[name] = roomier  # first: if a write is interrupted, the past is where it says
        roomier.put(past, k, v)
        return (k, v) if layer is None else roomier.get(first, end)

    def _past(self, name: str, first: int) -> Layer | None:
        """A layer's columns from `first` on; None before the first pass is over, whatever one that failed has left."""
        if not self.length:
            return None
        layer = self._layers.get(name)
        if layer is None or first < layer.origin:
            there = ", ".join(self._layers) if layer is None else f"those from column {layer.origin} on"
            raise InputError(
                f"the cache lacks keys that layer {name!r} needs",
                got=f"a cache of {self.length} columns with {there}",
                expected="a cache that this model, as it is, has filled from the first token on",
                fix="start with a new KVCache()",
            )
        return layer

    def _record(
        self, name: str, layer: Layer | None, k: Tensor, v: Tensor, first: int, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """`extend` where a graph may hold what is returned, and the cache may hold a graph."""
        if layer is None:
            kept = k.clone(), v.clone()  # the activations themselves are their users' to change
        else:
            k, v = kept = _joined(layer.get(first, self.length), k, v)
        self._layers[name] = Layer(*kept, origin=first, window=window, writable=False)
        return k, v

    def _keep_last(
        self, name: str, layer: Layer | None, k: Tensor, v: Tensor, first: int, window: int
    ) -> tuple[Tensor, Tensor]:
        """`extend` by more than a window's buffer holds: what the next pass will see goes to a buffer of its own."""
        end = self.length + k.shape[2]
        if layer is not None:
            k, v = _joined(layer.get(first, self.length), k, v)
        kept = first_seen(end, window)
        after = Layer.room(k, v, 2 * window, origin=kept, window=window)
        after.put(kept, *(x.narrow(2, x.shape[2] - (end - kept), end - kept) for x in (k, v)))
        self._after[name] = after
        return k, v

    def _own_with_room(self, like: Bool[Tensor, "batch _"], n: int) -> Bool[Tensor, "batch slot"]:
        """Which columns are a row's own tokens, in at least n slots; True from `length` on."""
        there = self._own
        if there is not None and n <= there.shape[1]:
            return there
        n_slots = max(n, self.capacity if there is None else 2 * there.shape[1])
        with torch.inference_mode(False):
            own = like.new_ones(like.shape[0], n_slots)
            if there is not None:
                own[:, : self.length] = there[:, : self.length]
        return own


def _joined(past: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
