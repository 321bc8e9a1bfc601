"""Reading Hugging Face configs closed: every attribute is used, known to change nothing, or refused by name."""

from collections.abc import Container, Mapping
from types import TracebackType
from typing import Any, Self

from lenskit.errors import ConfigError, UnsupportedConfigError

# Attributes that change nothing in what the forward pass computes in eval mode: names, tokens, training,
# generation, other tasks' heads, output formats, kernels, and what old releases or other tools left behind.
HARMLESS = frozenset(
    """
    _name_or_path _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation
    architectures model_type transformers_version dtype torch_dtype auto_map
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout initializer_range use_cache
    id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params classifier_dropout
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    output_attentions output_hidden_states output_past output_scores return_dict return_dict_in_generate torchscript
    is_decoder cross_attention_hidden_size tie_encoder_decoder chunk_size_feed_forward
    use_bfloat16 gradient_checkpointing neftune_noise_alpha pretraining_tp tf_legacy_loss xla_device

    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty num_return_sequences
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids remove_invalid_values exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens

    n_ctx n_special predict_special_tokens max_sequence_length is_llama_config is_composition
    cache_implementation output_router_logits router_aux_loss_coef router_jitter_noise
    unsloth_fixed unsloth_version transformers.js_config _flash_attn_2_enabled
    """.split()  # noqa: SIM905 (a list of words reads better than a list of quotes)
)

# Attributes that change nothing as long as they have this value, and why another would.
NEUTRAL: dict[str, tuple[Any, str]] = {
    "quantization_config": (None, "lenskit computes with plain weights; load a version that is not quantised"),
    "is_encoder_decoder": (False, "there is no encoder here"),
    "pruned_heads": ({}, "every layer has all its heads"),
    "add_cross_attention": (False, "there is nothing else to attend to"),
    "qk_layer_norms": (False, "queries and keys are as they are"),
    "rope_interleaved": (False, "pairs of rotated dimensions are halves apart"),
}


# Our fields and the attributes that they are in most families.
COMMON_NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_key_value_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
    "d_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "act_fn": "hidden_act",
    "eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_range": "initializer_range",
    "rope": "rope_parameters",
}


def common_names(*, without: Container[str] = (), **changes: str | None) -> dict[str, str]:
    """`COMMON_NAMES` for a family's `hf_names`, with other names and more fields.

    Args:
        without: fields that are no attribute of this family's. None instead of a name says the same.
        changes: field -> attribute.
    """
    names = {ours: theirs for ours, theirs in {**COMMON_NAMES, **changes}.items() if theirs is not None}
    return {ours: theirs for ours, theirs in names.items() if ours not in without}


class HFConfig:
    """A config's attributes, read one by one; what was left unread when the block ends is checked.

    Args:
        hf: every attribute of Hugging Face's config, defaults included.
    """

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self._hf = hf
        self._seen: set[str] = set()

    def __enter__(self) -> Self:
        for name, (value, why) in NEUTRAL.items():
            self.refuse_unless(name, value, why)
        return self

    def __call__(self, name: str) -> Any:
        """The attribute's value.

        Raises:
            ConfigError: the config does not have it.
        """
        if name not in self._hf:
            raise ConfigError(
                f"the config has no {name!r}",
                got=f"a {self._hf.get('model_type')} config with {', '.join(sorted(self._hf))}",
                expected=f"{name!r} among them",
                fix="check that config.json is complete",
            )
        self._seen.add(name)
        return self._hf[name]

    def optional(self, name: str) -> Any:
        """The attribute's value; None if the config does not have it."""
        self._seen.add(name)
        return self._hf.get(name)

    def refuse_unless(self, name: str, value: Any, why: str) -> None:
        """Accept the attribute at `value`, None or absent only, because of `why`."""
        self._seen.add(name)
        if self._hf.get(name) not in (value, None):
            raise UnsupportedConfigError(
                f"config attribute {name!r} is not supported",
                got=f"{name}={self._hf[name]!r}",
                expected=f"{name}={value!r}: {why}",
                fix="use a checkpoint without it, or teach the family file to compute it",
            )

    def ignore(self, *names: str) -> None:
        """Mark attributes that change nothing here."""
        self._seen.update(names)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # None asks for nothing.
        unread = sorted(name for name in set(self._hf) - self._seen - HARMLESS if self._hf[name] is not None)
        if error is None and unread:
            raise UnsupportedConfigError(
                f"config attributes that are not handled: {', '.join(unread)}",
                got=", ".join(f"{name}={repr(self._hf[name])[:60]}" for name in unread),
                expected=f"only attributes that lenskit's {self._hf.get('model_type')} reads",
                fix="if they change nothing in the computation, remove them; else the family file has to learn them",
            )
