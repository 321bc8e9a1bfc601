"""The shapes of the models that are measured, in each library's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers


@dataclass(frozen=True)
class Size:
    """A model's shape. GPT-2 has no use for `n_key_value_heads` and `d_mlp`: its own follow from the rest."""

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int
    n_ctx: int
    n_key_value_heads: int = 0
    d_mlp: int = 0

    def __str__(self) -> str:
        name = {"gpt2": "GPT-2", "llama": "LLaMA"}[self.family]
        return f"{name} shape, {self.n_layers} layers, width {self.d_model}"

    def hf_config(self) -> transformers.PretrainedConfig:
        if self.family == "gpt2":
            return transformers.GPT2Config(
                n_layer=self.n_layers,
                n_embd=self.d_model,
                n_head=self.n_heads,
                vocab_size=self.d_vocab,
                n_positions=self.n_ctx,
                bos_token_id=0,
                eos_token_id=0,
            )
        return transformers.LlamaConfig(
            num_hidden_layers=self.n_layers,
            hidden_size=self.d_model,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_key_value_heads,
            intermediate_size=self.d_mlp,
            vocab_size=self.d_vocab,
            max_position_embeddings=self.n_ctx,
        )

    def transformer_lens_config(self) -> dict[str, Any]:
        """Arguments of its HookedTransformerConfig."""
        shared = {
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "d_head": self.d_model // self.n_heads,
            "d_vocab": self.d_vocab,
            "n_ctx": self.n_ctx,
            "attn_only": False,
            "device": "cpu",
        }
        if self.family == "gpt2":
            return shared | {
                "d_mlp": 4 * self.d_model,
                "act_fn": "gelu_new",
                "normalization_type": "LN",
                "positional_embedding_type": "standard",
                "eps": 1e-5,
            }
        return shared | {
            "d_mlp": self.d_mlp,
            "act_fn": "silu",
            "gated_mlp": True,
            "normalization_type": "RMS",
            "final_rms": True,
            "positional_embedding_type": "rotary",
            "rotary_dim": self.d_model // self.n_heads,
            "rotary_adjacent_pairs": False,
            "n_key_value_heads": self.n_key_value_heads,
            "eps": 1e-6,
        }


# Where Python is most of a forward pass, and GPT-2 small as it is.
SMALL = Size("gpt2", n_layers=12, d_model=64, n_heads=4, d_vocab=1000, n_ctx=1024)
SMALL_LLAMA = Size(
    "llama", n_layers=12, d_model=64, n_heads=4, n_key_value_heads=2, d_mlp=172, d_vocab=1000, n_ctx=1024
)
GPT2 = Size("gpt2", n_layers=12, d_model=768, n_heads=12, d_vocab=50257, n_ctx=1024)

# A LLaMA of 134 million parameters, 110 million without its embedding (the unembedding is not tied to it).
LLAMA_110M = Size(
    "llama", n_layers=12, d_model=768, n_heads=12, n_key_value_heads=12, d_mlp=2048, d_vocab=32000, n_ctx=1024
)

# More than a gigabyte in float32, to be loaded; the embedding is a quarter of it, its untied inverse another.
LARGE = Size("llama", n_layers=12, d_model=1024, n_heads=16, n_key_value_heads=8, d_mlp=2816, d_vocab=64000, n_ctx=2048)
TINY = Size("llama", n_layers=1, d_model=64, n_heads=4, n_key_value_heads=2, d_mlp=172, d_vocab=1000, n_ctx=2048)

# Where a [query, key] matrix of each head would be most of the memory.
LONG_POS = 4096
LONG = (
    Size("gpt2", n_layers=4, d_model=512, n_heads=8, d_vocab=1000, n_ctx=LONG_POS),
    Size("llama", n_layers=4, d_model=512, n_heads=8, n_key_value_heads=8, d_mlp=1376, d_vocab=1000, n_ctx=LONG_POS),
)
