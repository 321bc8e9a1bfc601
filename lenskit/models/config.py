"""`DecoderConfig`: what every decoder's config has, and how it is read from Hugging Face's and written as one."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from lenskit.errors import ConfigError
from lenskit.models.hf_config import HFConfig
from lenskit.modules.rope_types import RopeConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ABC):
    """What every decoder's config has. A family's subclass adds what is unusual about it.

    `hf_names` says which of Hugging Face's attributes each field is, and is read in both directions; most families
    write `common_names(...)`. Only what is not one attribute's value goes into `unusual_from_hf` and `unusual_to_hf`.
    Fields hold numbers, words, tuples of them, and `RopeConfig`s.

    d_model: width of the residual stream.      n_layers: number of blocks.
    n_heads: query heads.                       n_key_value_heads: key and value heads, a divisor of n_heads.
    d_head: width of a head.                    d_mlp: width of an MLP's hidden layer.
    d_vocab: number of tokens.                  n_ctx: longest sequence in training, in tokens.
    act_fn: the MLP's activation function, by Hugging Face's name.
    eps: of the norms, in squared activation units.
    tie_embeddings: the unembedding is the embedding's transpose.
    init_range: standard deviation of a new model's weights.
    """

    model_type: ClassVar[str]
    hf_names: ClassVar[Mapping[str, str]]

    d_model: int
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    act_fn: str
    eps: float
    tie_embeddings: bool
    init_range: float = 0.02

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith(("d_", "n_"))}
        wrong = {name: size for name, size in sizes.items() if type(size) is not int or size < 1}
        if not wrong and self.n_heads % self.n_key_value_heads:
            wrong = {name: sizes[name] for name in ("n_heads", "n_key_value_heads")}
        if wrong:
            raise ConfigError(
                f"{type(self).__name__} describes no model",
                got=", ".join(f"{name}={size!r}" for name, size in wrong.items()),
                expected="whole numbers from 1 on, and n_key_value_heads a divisor of n_heads",
                fix="correct these sizes",
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        """Our config from Hugging Face's, given as a dict with every attribute.

        Raises:
            UnsupportedConfigError: an attribute that would change the computation and is not handled.
        """
        with HFConfig(hf) as read:
            named = {ours: read(theirs) for ours, theirs in cls.hf_names.items() if ours not in _WITH_DEFAULTS}
            optional = {ours: read.optional(cls.hf_names[ours]) for ours in _WITH_DEFAULTS if ours in cls.hf_names}
            given = {ours: value for ours, value in optional.items() if value is not None}
            values = {**named, **given, **cls.unusual_from_hf(read)}
        values.setdefault("n_key_value_heads", values["n_heads"])
        values.setdefault("d_head", values["d_model"] // values["n_heads"])
        return cls.from_json(values)

    def to_hf(self) -> dict[str, Any]:
        """Hugging Face's config from ours: the attributes that `from_hf` reads."""
        ours = self.to_json()
        return {theirs: ours[name] for name, theirs in self.hf_names.items()} | self.unusual_to_hf()

    @classmethod
    def unusual_from_hf(cls, read: HFConfig) -> dict[str, Any]:
        """Fields that are no attribute of Hugging Face's under another name; what the family refuses or ignores.

        A value here goes before the table's.
        """
        return {}

    def unusual_to_hf(self) -> dict[str, Any]:
        """The attributes that `unusual_from_hf` reads."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{name: _typed(value, data["n_ctx"]) for name, value in data.items()})


# What a config may leave out: as many key-value heads as query heads, whose widths make d_model.
_WITH_DEFAULTS = ("n_key_value_heads", "d_head")


def _plain(value: Any) -> Any:
    """A field's value as JSON has it."""
    if isinstance(value, RopeConfig):
        return value.to_hf()
    return list(value) if isinstance(value, tuple) else value


def _typed(value: Any, n_ctx: int) -> Any:
    """The inverse: a dictionary is a rotary embedding's, a list is a tuple."""
    if isinstance(value, dict):
        return RopeConfig.from_hf(value, n_ctx=n_ctx)
    return tuple(value) if isinstance(value, list) else value
