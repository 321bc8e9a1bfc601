"""Configs of the zoo's families as they are published, with all that the releases of years left in them."""

from typing import Any

import pytest
from parity_table import TINY

from lenskit.checkpoints.load import complete
from lenskit.errors import UnsupportedConfigError
from lenskit.models.config import DecoderConfig
from lenskit.models.registry import family
from lenskit.modules.rope_types import RopeConfig

OPT = {
    "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
    "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2,
    "ffn_dim": 20480, "hidden_size": 5120, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
    "model_type": "opt", "num_attention_heads": 40, "num_hidden_layers": 40, "output_projection": True,
    "pad_token_id": 1, "prefix": "</s>", "use_cache": True, "vocab_size": 50272, "word_embed_proj_dim": 5120,
}  # fmt: skip
GPT_J = {
    "activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "gradient_checkpointing": False,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gptj", "n_embd": 4096, "n_head": 16,
    "n_inner": None, "n_layer": 28, "n_positions": 2048, "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 64,
    "scale_attn_weights": True, "summary_type": "cls_index", "tie_word_embeddings": False, "vocab_size": 50400,
}  # fmt: skip
PHI_2 = {
    "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "gelu_new", "hidden_size": 2560,
    "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
    "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
}  # fmt: skip
FALCON_7B = {
    "alibi": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "bias": False,
    "hidden_dropout": 0.0, "hidden_size": 4544, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "falcon", "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71,
    "num_hidden_layers": 32, "parallel_attn": True, "use_cache": True, "vocab_size": 65024,
}  # fmt: skip
BLOOM = {
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 1024, "n_inner": None, "n_layer": 24,
    "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1, "skip_bias_add": True,
    "skip_bias_add_qkv": False, "slow_but_exact": False, "unk_token_id": 0, "vocab_size": 250880,
}  # fmt: skip
MPT_7B = {
    "attn_config": {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False,
        "qk_ln": False, "softmax_scale": None,
    },
    "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_"}, "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None,
    "max_seq_len": 2048, "model_type": "mpt", "n_heads": 32, "n_layers": 32, "no_bias": True,
    "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "verbose": 0, "vocab_size": 50432,
}  # fmt: skip
GPT_NEO = {
    "activation_function": "gelu_new", "attention_dropout": 0, "attention_layers": ["global", "local"] * 12,
    "attention_types": [[["global", "local"], 12]], "embed_dropout": 0, "gradient_checkpointing": False,
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": None, "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neo", "num_heads": 16, "num_layers": 24, "resid_dropout": 0,
    "vocab_size": 50257, "window_size": 256,
}  # fmt: skip
GEMMA_3_1B = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GPT_OSS_20B = {
    "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
DEEPSEEK_V3 = {
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
BERT = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}  # fmt: skip

STABLELM_3B = {
    "architectures": ["StableLmForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu",
    "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 6912, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096, "model_type": "stablelm", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_qkv_bias": False, "vocab_size": 50304,
}  # fmt: skip
COMMAND_R = {
    "architectures": ["CohereForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 22528, "layer_norm_eps": 1e-05,
    "logit_scale": 0.0625, "max_position_embeddings": 8192, "model_max_length": 131072, "model_type": "cohere",
    "num_attention_heads": 64, "num_hidden_layers": 40, "num_key_value_heads": 64, "rope_theta": 8000000.0,
    "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
COMMAND_R7B = {
    "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "cache_implementation": "hybrid", "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "layer_norm_eps": 1e-05, "layer_switch": 4,
    "logit_scale": 0.25, "max_position_embeddings": 132096, "model_type": "cohere2", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0,
    "sliding_window": 4096, "sliding_window_pattern": 4, "use_cache": True, "use_embedding_sharing": True,
    "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True, "vocab_size": 256000,
}  # fmt: skip
OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024,
    "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 50304,
}  # fmt: skip
QWEN_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "decoder_sparse_step": 1, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192,
    "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "output_router_logits": False, "qkv_bias": True, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PHI_3_MINI = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0,
    "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 32064,
}  # fmt: skip

# The config and some of the fields that it must become.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bert-base-uncased": (BERT, {"d_head": 64, "n_token_types": 2, "tie_embeddings": True, "n_ctx": 512}),
    "bert-base-multilingual-cased": (
        {**BERT, "directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
         "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform",
         "vocab_size": 119547},
        {"d_vocab": 119547},
    ),
    "opt-13b": (OPT, {"d_embed": 5120, "pre_norm": True, "final_norm": True, "d_mlp": 20480}),
    "opt-350m": (
        {**OPT, "do_layer_norm_before": False, "hidden_size": 1024, "word_embed_proj_dim": 512},
        {"d_model": 1024, "d_embed": 512, "pre_norm": False, "final_norm": False},
    ),
    "gpt-j-6b": (GPT_J, {"d_rotary": 64, "d_head": 256, "d_mlp": 16384, "tie_embeddings": False}),
    "phi-2": (PHI_2, {"d_head": 80, "head_norms": False, "act_fn": "gelu_new"}),
    "falcon-7b": (FALCON_7B, {"n_key_value_heads": 1, "two_norms": False, "parallel": True, "d_mlp": 18176}),
    "falcon-40b": (
        {**FALCON_7B, "new_decoder_architecture": True, "hidden_size": 8192, "num_attention_heads": 128,
         "num_kv_heads": 8},
        {"n_key_value_heads": 8, "two_norms": True},
    ),
    "falcon-11b": (
        {**FALCON_7B, "new_decoder_architecture": True, "hidden_size": 4096, "num_attention_heads": 32,
         "num_kv_heads": 8, "num_ln_in_parallel_attn": 1, "ff_factor": 4, "ffn_hidden_size": 16384},
        {"n_key_value_heads": 8, "two_norms": False, "groups": True},
    ),
    "falcon-rw-1b": (
        {**FALCON_7B, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "hidden_size": 2048,
         "num_attention_heads": 32},
        {"n_key_value_heads": 32, "alibi": True, "parallel": False},
    ),
    "bloom-560m": (BLOOM, {"d_model": 1024, "n_heads": 16, "d_mlp": 4096, "n_ctx": 2048}),
    "mpt-7b": (MPT_7B, {"d_mlp": 16384, "clip": None, "score_scale": None, "n_ctx": 2048}),
    "gpt-neo-1.3b": (GPT_NEO, {"layer_types": ("full_attention", "sliding_attention") * 12, "d_mlp": 8192}),
    "gemma-3-1b": (
        GEMMA_3_1B,
        {"rope": RopeConfig(theta=1000000), "local_rope": RopeConfig(theta=10000), "window": 512, "logit_cap": None,
         "layer_types": (("sliding_attention",) * 5 + ("full_attention",)) * 4 + ("sliding_attention",) * 2},
    ),
    "the text model of gemma-3-4b": (
        {**GEMMA_3_1B, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        {"rope": RopeConfig(rope_type="linear", theta=1000000, factor=8.0), "local_rope": RopeConfig(theta=10000)},
    ),
    "gpt-oss-20b": (GPT_OSS_20B, {"n_experts": 32, "top_k": 4, "window": 128, "d_head": 64, "attention_bias": True}),
    "deepseek-v3": (
        DEEPSEEK_V3,
        {"d_head": 192, "n_key_value_heads": 128, "q_rank": 1536, "n_experts": 256, "unread_layers": 1,
         "rope": RopeConfig(rope_type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32,
                            beta_slow=1, mscale=1.0, mscale_all_dim=1.0)},
    ),
    "moonlight-16b": (
        {**DEEPSEEK_V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
         "rope_scaling": None, "rope_theta": 50000.0, "first_k_dense_replace": 1},
        {"q_rank": None, "n_groups": 1, "unread_layers": 0, "rope": RopeConfig(theta=50000.0)},
    ),
    "stablelm-3b-4e1t": (STABLELM_3B, {"rope": RopeConfig(partial_rotary_factor=0.25), "parallel": False}),
    "stablelm-2-12b": (
        {**STABLELM_3B, "hidden_size": 5120, "num_hidden_layers": 40, "num_key_value_heads": 8, "qk_layernorm": True,
         "use_parallel_residual": True, "intermediate_size": 13824, "vocab_size": 100352},
        {"parallel": True, "qk_norm": True, "d_head": 160},
    ),
    "command-r": (COMMAND_R, {"logits_multiplier": 0.0625, "qk_norm": False, "tie_embeddings": True, "d_head": 128}),
    "command-r-plus": (
        {**COMMAND_R, "hidden_size": 12288, "num_attention_heads": 96, "num_key_value_heads": 8, "use_qk_norm": True},
        {"qk_norm": True, "n_key_value_heads": 8},
    ),
    "command-r7b": (
        COMMAND_R7B,
        {"window": 4096, "layer_types": (*("sliding_attention",) * 3, "full_attention") * 8, "logits_multiplier": 0.25},
    ),
    "olmoe-1b-7b": (OLMOE, {"n_experts": 64, "top_k": 8, "normalised": False, "clip": None}),
    "qwen1.5-moe-a2.7b": (QWEN_MOE, {"n_experts": 60, "top_k": 4, "d_shared": 5632, "window": None, "qkv_bias": True}),
    "qwen3-30b-a3b": (QWEN3_30B, {"n_experts": 128, "top_k": 8, "normalised": True, "dense": (), "d_head": 128}),
    "phi-3-mini-4k": (PHI_3_MINI, {"window": 2047, "rope": RopeConfig(), "d_head": 96}),
}  # fmt: skip


def read(raw: dict[str, Any]) -> DecoderConfig:
    return family(raw["model_type"], where="here").config.from_hf(complete(raw, where="here"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    raw, fields = PUBLISHED[name]
    cfg = read(raw)
    assert {field: getattr(cfg, field) for field in fields} == fields


@pytest.mark.parametrize(
    ("model_type", "attributes"),
    [
        ("bert", {"is_decoder": True}),
        ("bert", {"add_cross_attention": True}),
        ("bert", {"position_embedding_type": "relative_key_query"}),
        ("bert", {"directionality": "left_to_right"}),
        ("opt", {"scale_embeddings": True}),
        ("gptj", {"rotary": False}),
        ("falcon", {"apply_residual_connection_post_layernorm": True}),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}),
        ("falcon", {"num_ln_in_parallel_attn": 2}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("bloom", {"n_inner": 50}),
        ("mpt", {"expansion_ratio": 2}),
        ("mpt", {"norm_type": "rmsnorm"}),
        ("mpt", {"attn_config": {"alibi": False}}),
        ("mpt", {"attn_config": {"qk_ln": True}}),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}),
        ("mpt", {"attn_config": {"sliding_window_size": 9}}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}),  # of no layer type
        ("gpt_oss", {"hidden_act": "relu"}),
        ("deepseek_v3", {"num_key_value_heads": 2}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("deepseek_v3", {"moe_layer_freq": 2}),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}),
    ],
    ids=str,
)
def test_what_would_change_the_computation_is_refused(model_type: str, attributes: dict[str, Any]) -> None:
    """By name, whether Hugging Face computes it or ignores it."""
    read({"model_type": model_type, **TINY[model_type]})
    with pytest.raises(UnsupportedConfigError) as refused:
        read({"model_type": model_type, **TINY[model_type], **attributes})
    name, value = list(attributes.items())[-1]
    assert (list(value)[-1] if isinstance(value, dict) else name) in str(refused.value)
