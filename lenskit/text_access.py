"""Text: what a model with a tokenizer makes of it, and of ids."""

from typing import TYPE_CHECKING

from torch import Tensor

from lenskit.errors import InputError
from lenskit.inputs import Batch, Input, to_batch
from lenskit.models.base import Decoder
from lenskit.modules.linear import TokenTypes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextAccess(Decoder):
    """A decoder that may have a tokenizer.

    source: where the model comes from, for messages.
    """

    tokenizer: "PreTrainedTokenizerBase | None"
    source: str

    def to_tokens(self, text: Input, *, special_tokens: bool = True) -> Batch:
        """Ids [batch pos], mask and token types, as every verb sees them; unequal rows are padded on the left.

        Args:
            special_tokens: whether the tokenizer adds those that it is configured to add.
        """
        types = self.token_type_embed
        return to_batch(
            text,
            d_vocab=self.cfg.d_vocab,
            tokenizer=self.tokenizer,
            device=self.device,
            special_tokens=special_tokens,
            n_token_types=len(types.weight) if isinstance(types, TokenTypes) else 0,
        )

    def to_str_tokens(self, text: Input) -> list[str]:
        """One prompt's tokens, each as the text that it stands for."""
        batch = self.to_tokens(text)
        if len(batch.tokens) != 1:
            raise InputError(
                "to_str_tokens takes one prompt",
                got=f"{len(batch.tokens)} prompts",
                expected="one",
                fix="call it for each prompt",
            )
        return [self.to_string(token) for token in batch.tokens[0]]

    def to_string(self, tokens: Tensor | list[int] | int) -> str:
        """The text of one row of ids, special tokens included."""
        if self.tokenizer is None:
            raise InputError(
                "the model has no tokenizer",
                got=f"tokenizer=None on a model from {self.source}",
                expected="a Hugging Face tokenizer",
                fix="set model.tokenizer",
            )
        return str(self.tokenizer.decode(tokens))
