"""The one table of architectures and their variants that parity is tested over, and what is needed to build them.

A new family is one entry in `TINY` and its rows in `ROWS`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lenskit.checkpoints.load import complete
from lenskit.models.config import DecoderConfig
from lenskit.models.registry import family

# What most families call the sizes of a small model.
COMMON: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 44, "vocab_size": 59, "max_position_embeddings": 40,
}  # fmt: skip
WINDOW = 7  # tokens: less than a row has

# Hugging Face's config of a small model, by its `model_type`.
TINY: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 44,
        "vocab_size": 59, "max_position_embeddings": 40,
    },
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 3, "vocab_size": 59, "n_positions": 40},
    "gpt_neox": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 44,
        "vocab_size": 59, "max_position_embeddings": 40,
    },
    "llama": COMMON,
    "mistral": {**COMMON, "sliding_window": WINDOW},
    "mixtral": {**COMMON, "num_local_experts": 5, "intermediate_size": 20},
    "olmo2": COMMON,
    "gptj": {"n_embd": 36, "n_layer": 3, "n_head": 3, "vocab_size": 59, "n_positions": 40, "rotary_dim": 4},
    "phi": COMMON,
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 59},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "local"], 1]],
        "window_size": WINDOW, "vocab_size": 59, "max_position_embeddings": 40, "intermediate_size": 44,
    },
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 59, "max_seq_len": 40},
    "falcon": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 44, "vocab_size": 59,
        "max_position_embeddings": 40,
    },
    "opt": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 44, "vocab_size": 59,
        "max_position_embeddings": 40,
    },
    "qwen2": COMMON,
    "starcoder2": {**COMMON, "sliding_window": WINDOW},
    "smollm3": {**COMMON, "no_rope_layer_interval": 2},
    "olmo": COMMON,
    "qwen3": {**COMMON, "head_dim": 10},
    "gemma": {**COMMON, "head_dim": 10},
    "granite": {
        **COMMON, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "gemma2": {
        **COMMON, "head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 14,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **COMMON, "head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 14, "sliding_window_pattern": 2,
    },
    "gpt_oss": {
        **COMMON, "head_dim": 10, "sliding_window": WINDOW, "num_local_experts": 5, "num_experts_per_tok": 2,
        "intermediate_size": 20, "swiglu_limit": 0.5,
    },
    "deepseek_v3": {
        **COMMON, "num_key_value_heads": 4, "q_lora_rank": 11, "kv_lora_rank": 9, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4, "v_head_dim": 7, "first_k_dense_replace": 1, "moe_intermediate_size": 12,
        "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
    },
}  # fmt: skip
MODEL_TYPES = tuple(TINY)
ENCODERS = ("bert",)  # which see both ways and generate nothing; the others are decoders
DECODERS = tuple(model_type for model_type in MODEL_TYPES if model_type not in ENCODERS)
WRITTEN_OUT = ("gpt2", "llama")  # whose forward passes tests write out once more

LENGTH = 24  # tokens a row: more than the original context of the scaled rope types below


@dataclass(frozen=True)
class Row:
    """A variant: Hugging Face's attributes where they differ from the family's tiny model.

    lengths: sequence lengths, in tokens, at which the variant computes differently.
    """

    name: str
    model_type: str
    attributes: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (LENGTH,)

    @property
    def hf(self) -> dict[str, Any]:
        """What goes into Hugging Face's config class."""
        # A token that ends or pads would be one among 59: none has a meaning here.
        no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return {"model_type": self.model_type, **TINY[self.model_type], **no_tokens, **self.attributes}

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it, so that the model can generate."""
        return self.model_type not in ENCODERS

    @property
    def length_matters(self) -> bool:
        """Whether a sequence's length changes what its first tokens compute."""
        return self.attributes.get("rope_parameters", {}).get("rope_type") in ("dynamic", "longrope")

    @property
    def routed(self) -> bool:
        """Whether rounding can send a token to another expert."""
        return any("expert" in name for name in self.hf)

    @property
    def sdpa_only(self) -> bool:
        """Whether Hugging Face's "eager" attention is not what the model is: Falcon's adds ALiBi twice."""
        return bool(self.hf.get("alibi"))

    def __str__(self) -> str:
        return f"{self.model_type}-{self.name}"


def rope(rope_type: str, *, theta: float = 100.0, **scaling: Any) -> dict[str, Any]:
    """The attribute; theta so small that most pairs turn within a tiny context."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}


ORIGINAL = 10  # tokens: the context before it was made longer
BOTH_SIDES = (ORIGINAL, ORIGINAL + 1, LENGTH)
DIVISORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [2.0, 3.0, 5.5, 8.0]}

ROWS = [
    Row("default", "bert"),
    Row("untied, relu", "bert", {"tie_word_embeddings": False, "hidden_act": "relu"}),
    Row("one token type, two heads", "bert", {"type_vocab_size": 1, "num_attention_heads": 2}),
    Row("large eps, tanh gelu", "bert", {"layer_norm_eps": 0.3, "hidden_act": "gelu_new"}),
    Row("default", "gpt2"),
    Row("mlp width", "gpt2", {"n_inner": 50}),
    Row("exact gelu", "gpt2", {"activation_function": "gelu"}),
    Row("relu", "gpt2", {"activation_function": "relu"}),
    Row("silu", "gpt2", {"activation_function": "silu"}),
    Row("quick gelu", "gpt2", {"activation_function": "quick_gelu"}),
    Row("unscaled scores", "gpt2", {"scale_attn_weights": False}),
    Row("scaled by layer", "gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    Row("scaled by layer only", "gpt2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    Row("upcast scores", "gpt2", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    Row("untied", "gpt2", {"tie_word_embeddings": False}),
    Row("odd heads", "gpt2", {"n_embd": 21}),
    Row("one head", "gpt2", {"n_head": 1}),
    Row("one layer", "gpt2", {"n_layer": 1}),
    Row("large eps", "gpt2", {"layer_norm_epsilon": 0.3}),
    Row("full context", "gpt2", {"n_positions": LENGTH}),
    Row("default", "llama"),
    Row("multi-head", "llama", {"num_key_value_heads": 4}),
    Row("multi-query", "llama", {"num_key_value_heads": 1}),
    Row("groups of three", "llama", {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}),
    Row("attention bias", "llama", {"attention_bias": True}),
    Row("mlp bias", "llama", {"mlp_bias": True}),
    Row("all biases", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    Row("tied", "llama", {"tie_word_embeddings": True}),
    Row("wide heads", "llama", {"head_dim": 14}),
    Row("narrow heads", "llama", {"head_dim": 2}),
    Row("gelu", "llama", {"hidden_act": "gelu_pytorch_tanh"}),
    Row("relu", "llama", {"hidden_act": "relu"}),
    Row("large eps", "llama", {"rms_norm_eps": 0.3}),
    Row("large theta", "llama", rope("default", theta=500_000.0)),
    Row("past the context", "llama", {"max_position_embeddings": ORIGINAL}),
    Row("rope linear", "llama", rope("linear", factor=4.0)),
    Row("rope dynamic", "llama", {"max_position_embeddings": ORIGINAL, **rope("dynamic", factor=3.0)}, BOTH_SIDES),
    Row("rope yarn", "llama", rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL), BOTH_SIDES),
    Row(
        "rope yarn, amplitude", "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, attention_factor=0.7),
    ),
    Row(
        "rope yarn, betas", "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, beta_fast=1.2, beta_slow=0.1,
             mscale=0.7, mscale_all_dim=1.5, truncate=False),
    ),
    Row(
        "rope longrope", "llama",
        rope("longrope", original_max_position_embeddings=ORIGINAL, factor=4.0, **DIVISORS), BOTH_SIDES,
    ),
    Row(
        "rope longrope, amplitude", "llama",
        rope("longrope", original_max_position_embeddings=ORIGINAL, factor=4.0, attention_factor=1.3, **DIVISORS),
    ),
    Row(
        "rope llama3", "llama",
        rope("llama3", factor=8.0, original_max_position_embeddings=ORIGINAL, low_freq_factor=0.1,
             high_freq_factor=1.0), BOTH_SIDES,
    ),
    Row("default", "mistral"),
    Row("no window", "mistral", {"sliding_window": None}),
    Row("wide heads", "mistral", {"head_dim": 14, "num_key_value_heads": 1}),
    Row("default", "qwen2"),
    Row("windows", "qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    Row("tied", "qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Row("default", "gpt_neox"),
    Row("one after the other", "gpt_neox", {"use_parallel_residual": False}),
    Row("whole rotation", "gpt_neox", rope("default", partial_rotary_factor=1.0)),
    Row("no attention bias", "gpt_neox", {"attention_bias": False, "hidden_act": "gelu_new"}),
    Row("default", "gemma2"),
    Row("no caps", "gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    Row("full attention, biases", "gemma2", {"layer_types": ["full_attention"] * 3, "attention_bias": True}),
    Row("default", "gemma3_text"),
    Row("capped logits, biases", "gemma3_text", {"final_logit_softcapping": 3.0, "attention_bias": True}),
    Row("linear in full layers, untied, multi-query", "gemma3_text", {
        "num_key_value_heads": 1, "tie_word_embeddings": False, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    }),
    Row("default", "gpt_oss"),
    Row("steeper gates, hardly cut off", "gpt_oss", {"swiglu_alpha": 3.0, "swiglu_limit": 2.0}),
    Row("no windows, no biases, tied", "gpt_oss", {
        "layer_types": ["full_attention"] * 3, "attention_bias": False, "tie_word_embeddings": True,
    }),
    Row(
        "past the original context", "gpt_oss",
        rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, beta_fast=32.0, beta_slow=1.0,
             truncate=False), BOTH_SIDES,
    ),
    Row("default", "deepseek_v3"),
    Row("queries from the stream, wide values", "deepseek_v3", {
        "q_lora_rank": None, "v_head_dim": 14, "first_k_dense_replace": 0, "norm_topk_prob": False,
    }),
    Row("biases, halves, all groups", "deepseek_v3", {
        "attention_bias": True, "rope_interleave": False, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
        "routed_scaling_factor": 0.7, "tie_word_embeddings": True,
    }),
    Row("dense, yarn and its scale", "deepseek_v3", {
        "first_k_dense_replace": 3, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
            "beta_fast": 1.2, "beta_slow": 0.1, "mscale": 1.0, "mscale_all_dim": 1.5,
        },
    }, BOTH_SIDES),
    Row("default", "olmo2"),
    Row("attention bias", "olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    Row("default", "gptj"),
    Row("whole rotation, mlp width", "gptj", {"rotary_dim": 12, "n_inner": 50}),
    Row("tied, relu", "gptj", {"tie_word_embeddings": True, "activation_function": "relu"}),
    Row("default", "phi"),
    Row("norms of heads", "phi", {"qk_layernorm": True}),
    Row("tied, multi-head", "phi", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Row("whole rotation", "phi", rope("default", partial_rotary_factor=1.0)),
    Row("default", "bloom"),
    Row("six heads, untied", "bloom", {"hidden_size": 36, "n_head": 6, "tie_word_embeddings": False}),
    Row("default", "gpt_neo"),
    Row("global, untied", "gpt_neo", {"attention_types": [[["global"], 3]], "tie_word_embeddings": False}),
    Row("usual mlp width, relu", "gpt_neo", {"intermediate_size": None, "activation_function": "relu"}),
    Row("default", "mpt"),
    Row("clipped, six heads", "mpt", {"d_model": 36, "n_heads": 6, "attn_config": {"clip_qkv": 0.5}}),
    Row("scale, untied", "mpt", {"attn_config": {"softmax_scale": 0.2}, "tie_word_embeddings": False}),
    Row("default", "falcon"),
    Row("biases, alibi, as rw-1b", "falcon", {
        "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "num_attention_heads": 2,
    }),
    Row("alibi, six heads", "falcon", {"alibi": True, "hidden_size": 36, "num_attention_heads": 6}),
    Row("multi-query, one after the other", "falcon", {"parallel_attn": False}),
    Row("two norms, as 40b", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Row("groups, one norm, as 11b", "falcon", {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False,
    }),
    Row("two norms, alibi, biases", "falcon", {
        "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True, "bias": True, "activation": "relu",
    }),
    Row("default", "opt"),
    Row("as 350m", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    Row("post-norm", "opt", {"do_layer_norm_before": False, "activation_function": "gelu"}),
    Row("narrow embedding, untied", "opt", {"word_embed_proj_dim": 20, "tie_word_embeddings": False}),
    Row("no final norm", "opt", {"_remove_final_layer_norm": True}),
    Row("no biases, no gains", "opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    Row("default", "mixtral"),
    Row("one expert a token, window", "mixtral", {"num_experts_per_tok": 1, "sliding_window": WINDOW}),
    Row("default", "qwen3"),
    Row(
        "windows in later layers", "qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    Row("biases, tied", "qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    Row("default", "gemma"),
    Row("multi-query, biases", "gemma", {"num_key_value_heads": 1, "attention_bias": True}),
    Row("untied", "gemma", {"tie_word_embeddings": False}),
    Row("default", "granite"),
    Row("biases, tied", "granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    Row("default", "starcoder2"),
    Row("no biases, no window", "starcoder2", {"use_bias": False, "sliding_window": None}),
    Row("untied, relu", "starcoder2", {"tie_word_embeddings": False, "hidden_act": "relu"}),
    Row("default", "smollm3"),
    Row("windows without positions", "smollm3", {"use_sliding_window": True, "sliding_window": WINDOW}),
    Row("biases", "smollm3", {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 1, 1]}),
    Row("default", "olmo"),
    Row("clipped", "olmo", {"clip_qkv": 0.7}),
    Row("multi-query, biases, tied", "olmo",
        {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True}),
]  # fmt: skip


CAUSAL = [row for row in ROWS if row.causal]


def from_hf(row: Row) -> DecoderConfig:
    """The variant's config, as lenskit's."""
    return family(row.model_type, where=str(row)).config.from_hf(complete(row.hf, where=str(row)))


def perturb(model: nn.Module, seed: int) -> None:
    """Make every weight, gain and bias of a model random, in place.

    Fresh models have gains of one and biases of zero, where a mistake would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.25 * noise)
            else:
                # Gains that start at zero are added to one.
                parameter.copy_(0.3 * noise if name.endswith("bias") or not parameter.any() else 1 + 0.3 * noise)
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():  # what is learned, if not by gradient
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def hf_class(model_type: str) -> type[PreTrainedModel]:
    """Hugging Face's class for a family, with its head."""
    found: type[PreTrainedModel] = getattr(transformers, family(model_type, where="the table").hf_class)
    return found


def new_hf_model(row: Row) -> PreTrainedModel:
    """The variant as Hugging Face's, with new weights."""
    attributes = {name: value for name, value in row.hf.items() if name != "model_type"}
    return hf_class(row.model_type)(AutoConfig.for_model(row.model_type, **attributes))


def hf_folder(row: Row, folder: Path, *, seed: int = 0) -> Path:
    """Write the variant as a Hugging Face checkpoint with random weights."""
    model = new_hf_model(row)
    perturb(model, seed)
    model.save_pretrained(folder)
    return folder


def hf_model(folder: Path, *, attention: str = "eager", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Hugging Face's model of a folder. With "eager" it can return attention patterns; some have nothing else."""
    found = hf_class((config := AutoConfig.from_pretrained(folder)).model_type)
    attention = attention if found._supports_sdpa else "eager"
    attention = "sdpa" if getattr(config, "alibi", False) else attention  # see Row.sdpa_only
    config._experts_implementation = "eager"  # the loop over experts, which computes in any dtype
    return found.from_pretrained(folder, config=config, attn_implementation=attention, dtype=dtype).eval()


def on_disk(hf: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors by the names, and in the shapes, that it writes to disk."""
    return dict(revert_weight_conversion(hf, tensors))


def read(model_type: str, cfg: DecoderConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of Hugging Face's tensors that anything reads: without tied copies, and what has no effect there."""
    table = family(model_type, where="the table").weights(cfg)
    unread = {name for placement in table.placements() if not placement.ours for name in placement.on_disk}
    return {name: tensor for name, tensor in tensors.items() if name not in unread}


def ids(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Random ids [rows length] of the tiny models' vocabulary."""
    return torch.randint(59, (rows, length), generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of `theirs`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max())
