"""`ForwardPass`: what all blocks share while one batch goes through them."""

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
        mask: [batch pos], True for a row's own tokens, False for padding; None where there is no padding.
    """

    def __init__(self, n_tokens: int, device: torch.device, mask: Bool[Tensor, "batch pos"] | None = None) -> None:
        self.n_tokens = n_tokens
        self.mask = mask
        self.positions: Int[Tensor, "rows pos"]
        if mask is None:
            self.positions = torch.arange(n_tokens, device=device).unsqueeze(0)
        else:
            self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self._visible: Bool[Tensor, "rows 1 query_pos key_pos"] | None = None
        self._biases: dict[torch.dtype, Tensor] = {}
        self._elsewhere: dict[torch.device, ForwardPass] = {}
        self._tables: dict[tuple[int, torch.dtype], tuple[Tensor, ...]] = {}

    def to(self, device: torch.device | int | str, **_: object) -> "ForwardPass":
        """The same pass for layers on another device: what accelerate calls between devices."""
        if torch.device(device) == self.positions.device:
            return self
        moved = self._elsewhere.get(torch.device(device))
        if moved is None:
            mask = None if self.mask is None else self.mask.to(device)
            moved = self._elsewhere[torch.device(device)] = ForwardPass(self.n_tokens, torch.device(device), mask)
        return moved

    def rotary_tables(self, rotary: HasTables, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The rotary part's cos and sin at this pass's positions, each [rows 1 pos d_rotary]."""
        key = (id(rotary), dtype)
        if key not in self._tables:
            if rotary.by_length and self.mask is not None:
                self._tables[key] = self._tables_by_row(rotary, self.mask, dtype)
            else:
                self._tables[key] = rotary.tables(self.positions, self.n_tokens, dtype)
        return self._tables[key]

    def _tables_by_row(self, rotary: HasTables, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """A row's angles follow its own length, as if it were alone; Hugging Face goes by the longest row's."""
        lengths = mask.sum(1).tolist()
        rows = [rotary.tables(p[None], n, dtype) for p, n in zip(self.positions, lengths, strict=True)]
        return tuple(torch.cat(tables) for tables in zip(*rows, strict=True))

    def visible(self) -> Bool[Tensor, "rows 1 query_pos key_pos"]:
        """True where a query may attend to a key: not ahead of it, and no padding.

        A padding query attends to itself: nothing reads it, and a softmax over nothing would be nan.
        """
        if self._visible is None:
            square = torch.ones(self.n_tokens, self.n_tokens, dtype=torch.bool, device=self.positions.device)
            causal = square.tril()[None, None]
            if self.mask is not None:
                causal = (causal & self.mask[:, None, None, :]) | torch.eye(
                    self.n_tokens, dtype=torch.bool, device=self.positions.device
                )
            self._visible = causal
        return self._visible

    def attention_bias(self, dtype: torch.dtype) -> Float[Tensor, "rows 1 query_pos key_pos"] | None:
        """What fused attention adds to the scores: 0 or -inf; None where plain causality says it all."""
        if self.mask is None:
            return None
        if dtype not in self._biases:
            visible = self.visible()
            zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self._biases[dtype] = zeros.masked_fill(~visible, float("-inf"))
        return self._biases[dtype]
