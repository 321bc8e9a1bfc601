"""A model's weights stacked over its layers, in the shapes that interpretability writes down."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lenskit.errors import LenskitError

if TYPE_CHECKING:
    from lenskit.models.base import Decoder


class Stacked:
    """`model.W_Q` [layer head d_model d_head] and its kind: the blocks' weights, copied into one tensor.

    To write weights, use the block's own view: `model.blocks[0].attn.W_Q`.
    """

    def __init__(self, part: str) -> None:
        self.part = part

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: "Decoder", owner: type) -> Tensor:
        try:
            return torch.stack([getattr(block.get_submodule(self.part), self.name) for block in model.blocks])
        except AttributeError as error:
            # An AttributeError would send torch's __getattr__ looking, and lose this message.
            raise LenskitError(
                f"this model has no {self.name}",
                got=f"{type(model.blocks[0]).__name__}: {error}",
                expected=f"blocks whose {self.part} has {self.name}",
                fix="print(model.blocks[0]) shows what there is",
            ) from error


class WeightAccess:
    """Stacked over layers: W_Q [layer head d_model d_head], W_O [layer head d_head d_model], W_in
    [layer d_model d_mlp], W_out [layer d_mlp d_model], biases likewise; keys and values: key-value heads.
    """

    W_Q, W_K, W_V, W_O = Stacked("attn"), Stacked("attn"), Stacked("attn"), Stacked("attn")
    b_Q, b_K, b_V, b_O = Stacked("attn"), Stacked("attn"), Stacked("attn"), Stacked("attn")
    W_in, W_gate, W_out = Stacked("mlp"), Stacked("mlp"), Stacked("mlp")
    b_in, b_gate, b_out = Stacked("mlp"), Stacked("mlp"), Stacked("mlp")
