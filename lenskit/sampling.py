"""`Sampling`: the options of `generate` that say how the next token is chosen and what ends a row.

They mean what they mean in Hugging Face's `generate`, and the same seed gives the same tokens. On purpose:

- Nothing is taken from a checkpoint but its end-of-sequence ids, so that the same call means the same on every model.
  In particular all tokens may be drawn unless `top_k` says otherwise; Hugging Face keeps the 50 likeliest.
- A seed belongs to one generation; torch's global generator stays as it is.
- A padded row is penalised, and stopped, as it is alone.
- What would be without effect is an error, not a warning.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, final

import torch

from lenskit.choosing import Chooser
from lenskit.errors import GenerationError
from lenskit.extras import load


@final
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How each next token is chosen and what ends a row.

    do_sample: draw tokens by their probability; without it the likeliest is taken.
    temperature: above 0; divides the logits.
    top_k: at least 1; only so many of the likeliest tokens are drawn.
    top_p: above 0, at most 1; only the likeliest tokens that together have this probability are drawn.
    min_p: 0 to 1; only tokens of at least this share of the likeliest one's probability are drawn.
    repetition_penalty: above 0; tokens that a row holds, its prompt included, lose this factor (arXiv:1909.05858).
    eos_token_id: one id or several, each of which ends a row; None or [] for none.
    stop_strings: texts that end a row once its newest token completes one.
    seed: -2**63 to 2**64 - 1, of this generation's random numbers; None draws from torch's global generator.
    logits_processor: Hugging Face's, or any callables (ids [batch seq], scores [batch d_vocab]) -> scores. They run
        after the repetition penalty and before the other parameters; a RepetitionPenaltyLogitsProcessor takes the
        parameter's place. They see padding as any other id.
    stopping_criteria: Hugging Face's, or any callables as `Chooser.ends` describes. An EosTokenCriteria or
        StopStringCriteria takes the parameter's place.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    seed: int | None = None
    logits_processor: Sequence[Any] | Any | None = None
    stopping_criteria: Sequence[Any] | Any | None = None

    def check(self, d_vocab: int) -> None:
        """See that every value makes sense, before anything runs.

        Raises:
            GenerationError: one does not, or would be without effect.
        """
        if not isinstance(self.do_sample, bool):
            raise _bad("do_sample", self.do_sample, "True or False", "pass do_sample=True to draw tokens")
        _number("temperature", self.temperature, "above 0", "for the likeliest token pass do_sample=False alone")
        _number("top_p", self.top_p, "above 0, at most 1", "leave it out to draw from all tokens", most=1)
        _number("min_p", self.min_p, "0 to 1", "leave it out to draw from all tokens", zero=True, most=1)
        _number("repetition_penalty", self.repetition_penalty, "above 0", "leave it out to penalise nothing")
        _integer("top_k", self.top_k, "leave it out to draw from all tokens", least=1)
        _integer("seed", self.seed, "leave it out for torch's global generator", least=-(2**63), most=2**64 - 1)
        for token in several(self.eos_token_id):
            if not _is_whole(token, 0, d_vocab - 1):
                raise _bad("eos_token_id", token, f"ids from 0 to {d_vocab - 1}", "pass [] for rows that nothing ends")
        for text in several(self.stop_strings):
            if not isinstance(text, str) or not text:
                raise _bad("stop_strings", text, "texts of at least one character", "pass a text or a list of texts")
        for name in ("logits_processor", "stopping_criteria"):
            for part in several(getattr(self, name)):
                if isinstance(part, type) or not callable(part):
                    raise _bad(name, part, "objects to call with (ids, scores)", "pass a list of objects, not classes")
        idle = [name for name in _WARPERS if getattr(self, name) is not None]
        if idle and not self.do_sample:
            raise GenerationError(
                f"{' and '.join(idle)} would be without effect",
                got=", ".join(f"{name}={getattr(self, name)!r}" for name in idle) + " with do_sample=False",
                expected="do_sample=True with parameters that say how tokens are drawn",
                fix="pass do_sample=True, or leave them out",
            )

    def chooser(self, *, tokenizer: Any, device: torch.device, pad: int) -> Chooser:
        """One generation's choices.

        Args:
            tokenizer: a Hugging Face tokenizer, read for `stop_strings` only.
            device: where the ids are.
            pad: the id that the caller's own processors and criteria see where a row is padded.

        Raises:
            GenerationError: `stop_strings` without a tokenizer, or ones that it cannot make.
        """
        penalties, strings = self._penalty(), self._stop_strings(tokenizer)
        processors, criteria = several(self.logits_processor), several(self.stopping_criteria)
        eos = [int(token) for token in several(self.eos_token_id)]
        if eos and criteria and load("transformers").EosTokenCriteria in map(type, criteria):
            eos = []
        return Chooser(
            do_sample=self.do_sample,
            seed=None if self.seed is None else int(self.seed),
            processors=[*_merged(penalties, processors), *self._warpers()],
            criteria=_merged(strings, criteria),
            parameters=[*penalties, *strings],
            eos=eos,
            device=device,
            pad=pad,
        )

    def _penalty(self) -> list[Any]:
        """What Hugging Face makes of the parameters before the caller's processors."""
        if self.repetition_penalty is None or self.repetition_penalty == 1:
            return []
        return [load("transformers").RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty))]

    def _warpers(self) -> list[Any]:
        """What it makes of them after those."""
        warpers: list[Any] = []
        if self.temperature is not None and self.temperature != 1:
            warpers.append(load("transformers").TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(load("transformers").TopKLogitsWarper(int(self.top_k)))
        if self.top_p is not None and self.top_p < 1:
            warpers.append(load("transformers").TopPLogitsWarper(float(self.top_p)))
        if self.min_p is not None:
            warpers.append(load("transformers").MinPLogitsWarper(float(self.min_p)))
        return warpers

    def _stop_strings(self, tokenizer: Any) -> list[Any]:
        strings = list(several(self.stop_strings))
        if not strings:
            return []
        if tokenizer is None:
            raise GenerationError(
                "stop_strings need a tokenizer",
                got=f"stop_strings={strings!r} and a model without a tokenizer",
                expected="a Hugging Face tokenizer, which knows the texts of tokens",
                fix="set model.tokenizer, or pass the ids that end a row as eos_token_id",
            )
        try:
            return [load("transformers").StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)]
        except ValueError as error:
            raise _bad("stop_strings", strings, "texts that tokens can make", "leave out those it cannot") from error


_WARPERS = ("temperature", "top_k", "top_p", "min_p")
_COUNTS = ("max_new_tokens", "num_return_sequences")
CHOICES = (*(field.name for field in fields(Sampling)), *_COUNTS)
_OTHERS = ("prompts", "hooks", "past", "mask", "generation_config", "streamer", "progress", "return_logits")
_OPTIONS = (*_OTHERS, *CHOICES)

# What Hugging Face's `generate` and GenerationConfig know and lenskit does not: the object that does it, ...
_OBJECTS = {
    "begin_suppress_tokens": "SuppressTokensAtBeginLogitsProcessor",
    "bad_words_ids": "NoBadWordsLogitsProcessor",
    "encoder_no_repeat_ngram_size": "EncoderNoRepeatNGramLogitsProcessor",
    "encoder_repetition_penalty": "EncoderRepetitionPenaltyLogitsProcessor",
    "epsilon_cutoff": "EpsilonLogitsWarper",
    "eta_cutoff": "EtaLogitsWarper",
    "exponential_decay_length_penalty": "ExponentialDecayLengthPenalty",
    "forced_bos_token_id": "ForcedBOSTokenLogitsProcessor",
    "forced_eos_token_id": "ForcedEOSTokenLogitsProcessor",
    "max_time": "MaxTimeCriteria",
    "min_length": "MinLengthLogitsProcessor",
    "min_new_tokens": "MinNewTokensLengthLogitsProcessor",
    "no_repeat_ngram_size": "NoRepeatNGramLogitsProcessor",
    "prefix_allowed_tokens_fn": "PrefixConstrainedLogitsProcessor",
    "remove_invalid_values": "InfNanRemoveLogitsProcessor",
    "renormalize_logits": "LogitNormalization",
    "sequence_bias": "SequenceBiasLogitsProcessor",
    "suppress_tokens": "SuppressTokensLogitsProcessor",
    "top_h": "TopHLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "watermarking_config": "WatermarkLogitsProcessor",
}
# ... or what to do instead; the last lines are TransformerLens's spellings.
_INSTEAD = {
    "max_length": "pass max_new_tokens, which does not count the prompt",
    "num_beams length_penalty early_stopping num_beam_groups diversity_penalty constraints force_words_ids": (
        "there is no beam search: take the likeliest token, or draw with do_sample=True and num_return_sequences"
    ),
    "penalty_alpha dola_layers low_memory custom_generate trust_remote_code token_healing": (
        "write it as a logits processor, if it only changes logits; decoding is greedy or by drawing tokens"
    ),
    "guidance_scale negative_prompt_ids negative_prompt_attention_mask": (
        "run both prompts in one batch and combine their logits in a logits processor"
    ),
    "assistant_model assistant_tokenizer is_assistant num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind "
    "assistant_ensemble_weight prompt_lookup_num_tokens max_matching_ngram_size speculation_type use_mtp": (
        "leave it out: every token comes from a forward pass of the model itself"
    ),
    "use_cache cache_implementation cache_config max_cache_len past_key_values prefill_chunk_size compile_config "
    "disable_compile continuous_batching_config synced_gpus": (
        "leave it out: there is one kind of cache, always used; past=model.prefill(prompt) starts from a filled one"
    ),
    "output_scores output_logits": "pass return_logits=True",
    "output_attentions output_hidden_states": "pass hooks=[Save(...)] with the names of what you want to see",
    "return_dict_in_generate": "leave it out: generate always returns a Generation, which has tokens, texts and more",
    "inputs input_ids inputs_embeds position_ids": (
        "pass the prompts as the first argument: texts, ids, or a tokenizer's encoding with its mask"
    ),
    "attention_mask": "pass it as mask, or the tokenizer's encoding as the prompts",
    "tokenizer": "set model.tokenizer",
    "pad_token_id bos_token_id decoder_start_token_id": (
        "leave it out: padding is masked whatever its id, and prompts start with the tokens that you give"
    ),
    "input": "pass the prompts as the first argument",
    "freq_penalty": "pass repetition_penalty, or a logits processor that subtracts what you like per occurrence",
    "stop_at_eos": "leave it out to stop at the checkpoint's end of sequence; pass eos_token_id=[] to go on",
    "return_type": "read what you want from the result: .texts, .new_texts, .tokens, .new_tokens",
    "use_past_kv_cache": "leave it out: the cache is always used",
    "prepend_bos": "write the token into the prompt: the tokenizer adds the special tokens that it is configured to",
    "padding_side": "leave it out: rows are padded on the left, and padding never counts",
    "remote server backend": (
        'say it when the model is made: from_pretrained(name, device="meta", remote=lk.connect(url)), or '
        "lk.connect(url).model(name)"
    ),
    "verbose": "pass progress=True or progress=False",
}
_HINTS = {name: hint for names, hint in _INSTEAD.items() for name in names.split()} | {
    name: f"pass Hugging Face's {made} in {'stopping_criteria' if 'Criteria' in made else 'logits_processor'}"
    + (", where it runs before temperature, top_k, top_p and min_p" if "Warper" in made else "")
    for name, made in _OBJECTS.items()
}

# Values in a GenerationConfig that ask for nothing: Hugging Face's defaults.
_NEUTRAL: dict[str, Any] = {
    "assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10, "diversity_penalty": 0, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "guidance_scale": 1, "is_assistant": False, "length_penalty": 1, "max_length": 20, "min_length": 0,
    "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant", "num_beam_groups": 1, "num_beams": 1, "output_attentions": False,
    "output_hidden_states": False, "output_logits": False, "output_scores": False, "remove_invalid_values": False,
    "renormalize_logits": False, "return_dict_in_generate": False, "target_lookbehind": 10, "token_healing": False,
    "typical_p": 1, "use_cache": True, "use_mtp": False,
}  # fmt: skip
_MEANINGLESS = ("bos_token_id", "decoder_start_token_id", "pad_token_id", "transformers_version")


def sampling_from(
    options: Mapping[str, Any], generation_config: Any = None, defaults: Mapping[str, Any] | None = None
) -> tuple[Sampling, int | None, int]:
    """The options of `generate` as they act together: a `Sampling`, max_new_tokens, and num_return_sequences.

    Args:
        options: what the caller wrote, by name; None is nothing.
        generation_config: a Hugging Face GenerationConfig, or a dict of its attributes, under `options`. With an
            explicit do_sample=False it may still say how tokens would be drawn.
        defaults: the checkpoint's own generation config. Its end-of-sequence ids are used where neither of the others
            says any; nothing else is, so that the same call means the same on every checkpoint.

    Raises:
        GenerationError: an option, or an attribute with another value than Hugging Face's default, that is not
            supported, or a count that makes no sense. `Sampling.check` looks at the other values.
    """
    refuse_unknown({name: value for name, value in options.items() if name not in CHOICES})
    given = {name: value for name, value in options.items() if value is not None}
    merged = {"eos_token_id": (defaults or {}).get("eos_token_id"), **_taken(generation_config, given), **given}
    max_new_tokens, rows = merged.pop("max_new_tokens", None), merged.pop("num_return_sequences", 1)
    _integer("max_new_tokens", max_new_tokens, "pass how many tokens to generate", least=1)
    _integer("num_return_sequences", rows, "leave it out for one continuation a prompt", least=1)
    sampling = Sampling(**merged)
    if rows > 1 and not sampling.do_sample:
        raise _bad("num_return_sequences", rows, "1 with do_sample=False, which has one result", "pass do_sample=True")
    return sampling, None if max_new_tokens is None else int(max_new_tokens), int(rows)


def _taken(generation_config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of a GenerationConfig takes part, under the options that were given."""
    attributes = {name: value for name, value in _attributes(generation_config).items() if value is not None}
    for name, value in attributes.items():
        neutral = name in _MEANINGLESS or (name in _NEUTRAL and value == _NEUTRAL[name])
        replaced = name == "max_length" and ("max_new_tokens" in given or "max_new_tokens" in attributes)
        if name not in CHOICES and not neutral and not replaced:
            raise _unsupported(name, value, "generation_config")
    taken = {name: value for name, value in attributes.items() if name in CHOICES}
    if given.get("do_sample") is False:
        return {name: value for name, value in taken.items() if name not in _WARPERS}
    # As defaults are written out in a config: top_k=0 is none, and the others ask for nothing without do_sample.
    idle: dict[str, tuple[float, ...]] = {"top_k": (0,)}
    if not {**taken, **given}.get("do_sample"):
        idle = {"temperature": (1,), "top_p": (1,), "top_k": (0, 50)}
    return {name: value for name, value in taken.items() if value not in idle.get(name, ())}


def _attributes(generation_config: Any) -> dict[str, Any]:
    if generation_config is None:
        return {}
    if isinstance(generation_config, Mapping):
        attributes = dict(generation_config)
    elif isinstance(generation_config, load("transformers").GenerationConfig):
        attributes = vars(generation_config)
    else:
        raise _bad("generation_config", generation_config, "a GenerationConfig of transformers, or a dict", "pass one")
    return {name: value for name, value in attributes.items() if not name.startswith("_")}


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raise for keyword arguments that `generate` does not have; an empty mapping is fine.

    Raises:
        GenerationError: it names the first of them, and what to write instead.
    """
    for name, value in options.items():
        raise _unsupported(name, value, "generate")


def _unsupported(name: str, value: Any, where: str) -> GenerationError:
    options = _OPTIONS if where == "generate" else CHOICES
    hint = _HINTS.get(name)
    if hint is None:
        close, foreign = (get_close_matches(name, known, n=1) for known in (options, _HINTS))
        hint = f"did you mean {close[0]}?" if close else "leave it out"
        if foreign and not close:
            hint = f"if you meant {foreign[0]}: {_HINTS[foreign[0]]}"
    return GenerationError(
        f"{where} does not support {name}" if name in _HINTS else f"{where} has no {name}",
        got=f"{name}={_short(value)}",
        expected=f"any of {', '.join(options)}",
        fix=hint if where == "generate" else f"{hint}; set {name} to None in generation_config",
    )


def default_eos(generation_config: Mapping[str, Any], hf_config: Mapping[str, Any] | None, tokenizer: Any) -> list[int]:
    """The ids that end a row of a checkpoint, where the caller says none.

    Ids outside the config's vocabulary, as small models with a default config have them, end nothing and are left out.

    Args:
        generation_config: the checkpoint's, asked first.
        hf_config: its Hugging Face config, asked next.
        tokenizer: a Hugging Face tokenizer, asked last; None for none.
    """
    config = hf_config or {}
    own = None if tokenizer is None else tokenizer.eos_token_id
    found = [generation_config.get("eos_token_id"), config.get("eos_token_id"), own]
    first = next((ids for ids in found if ids is not None), None)
    return [int(token) for token in several(first) if 0 <= token < config.get("vocab_size", math.inf)]


def several(value: Any) -> Sequence[Any]:
    """A sequence's parts; of anything else, one; None is nothing."""
    if value is None:
        return ()
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _merged(defaults: Sequence[Any], custom: Sequence[Any]) -> list[Any]:
    """As Hugging Face merges: one of the caller's takes the place of a default of its class, and none runs twice."""
    merged = [next((own for own in custom if type(own) is type(default)), default) for default in defaults]
    for own in custom:
        if own not in merged:
            merged.append(own)
    return merged


def _number(name: str, value: Any, range_: str, fix: str, *, zero: bool = False, most: float = math.inf) -> None:
    if value is None:
        return
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not (value > 0 or (zero and value == 0)) or value > most:
        raise _bad(name, value, f"a number {range_}", fix)


def _integer(name: str, value: Any, fix: str, *, least: int, most: float = math.inf) -> None:
    if value is not None and not _is_whole(value, least, most):
        raise _bad(name, value, f"an integer of at least {least}{'' if most == math.inf else f', at most {most}'}", fix)


def _is_whole(value: Any, least: int, most: float) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def _bad(name: str, value: Any, expected: str, fix: str) -> GenerationError:
    return GenerationError(f"{name} makes no sense", got=f"{name}={_short(value)}", expected=expected, fix=fix)


def _short(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())
