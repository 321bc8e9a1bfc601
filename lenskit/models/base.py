"""The ground of the zoo: `DecoderConfig`, `Block`, `Decoder`, and `Family`, which ties one architecture together.

A family file says what its parts are and how its block goes from the stream to the stream. Everything here is
the same for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lenskit.errors import ConfigError, HookConflictError, InputError
from lenskit.hooks import HookPoint
from lenskit.modules.attention import Attention, HeadInputs
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.linear import Embed, LearnedPositions, Unembed
from lenskit.modules.mlp import FeedForward
from lenskit.modules.module import Identity, Module
from lenskit.modules.norms import Norm
from lenskit.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ABC):
    """What every decoder's config has. A family's subclass adds what is unusual about it.

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
    @abstractmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        """Our config from Hugging Face's, given as a dict with every attribute.

        Raises:
            UnsupportedConfigError: an attribute that would change the computation and is not handled.
        """

    @abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """Hugging Face's config from ours: the attributes that `from_hf` reads, and the class's name."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**data)


class Block(Module):
    """One layer: attention and an MLP around the residual stream, whose points are these.

    `hook_attn_in`, `hook_q_input`, `hook_k_input` and `hook_v_input` are copies of the stream, one a head, before
    the norm; they exist while somebody asks for them. Under grouped-query attention `hook_attn_in` has one copy
    a key-value head, which its group of query heads reads too. An edit of `hook_mlp_in` changes what the MLP
    reads and leaves the stream alone.
    """

    def __init__(self, cfg: DecoderConfig, *, attn: Attention, mlp: Module, ln1: Module, ln2: Module) -> None:
        super().__init__()
        groups = cfg.n_key_value_heads

        def stream() -> HookPoint:
            return HookPoint("batch pos d_model", d_model=cfg.d_model)

        def per_head(n: int) -> HookPoint:
            return HookPoint("batch pos head d_model", on_demand=True, head=n, d_model=cfg.d_model)

        self.hook_resid_pre = stream()
        self.hook_attn_in, self.hook_q_input = per_head(groups), per_head(cfg.n_heads)
        self.hook_k_input, self.hook_v_input = per_head(groups), per_head(groups)
        self.ln1 = ln1
        self.attn = attn
        self.hook_attn_out = stream()
        self.hook_resid_mid = stream()
        self.hook_mlp_in = HookPoint("batch pos d_model", on_demand=True, d_model=cfg.d_model)
        self.ln2 = ln2
        self.mlp = mlp
        self.hook_mlp_out = stream()
        self.hook_resid_post = stream()

    def read(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor | HeadInputs:
        """What attention reads of the stream: its norm, or the norm of a copy for each head if asked for."""
        if (
            self.hook_attn_in.attachments is None
            and self.hook_q_input.attachments is None
            and self.hook_k_input.attachments is None
            and self.hook_v_input.attachments is None
        ):
            return self.ln1(resid)
        return self._read_by_head(resid)

    def _read_by_head(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor | HeadInputs:
        norm = self.ln1
        if not any(p.used for p in (self.hook_attn_in, self.hook_q_input, self.hook_k_input, self.hook_v_input)):
            return norm(resid)  # only another thread's pass asked
        if isinstance(norm, Norm):
            self._refuse_hooks_on(norm)
            norm(resid)  # for those who read the norm's own points
            norm = norm.fused  # type: ignore[assignment]
        group, groups = self.attn.group, self.hook_attn_in.sizes["head"]
        attn_in = self.hook_attn_in(resid.unsqueeze(2).expand(-1, -1, groups, -1))
        return HeadInputs(
            norm(self.hook_q_input(attn_in.repeat_interleave(group, 2))),
            norm(self.hook_k_input(attn_in)),
            norm(self.hook_v_input(attn_in)),
        )

    def _refuse_hooks_on(self, norm: Norm) -> None:
        for point in (norm.hook_scale, norm.hook_normalized):
            if not point.only_read:
                raise HookConflictError(
                    f"a hook on {point.name!r} would be without effect",
                    got=f"hooks on {point.name!r} and on this block's per-head inputs at once",
                    expected="one or the other: each head's input is normalised on its own",
                    fix="edit hook_q_input, hook_k_input or hook_v_input instead of the norm",
                )


class Parts(NamedTuple):
    """What a family builds a decoder from. `pos_embed` is `Identity()` where positions enter in attention."""

    embed: Embed
    pos_embed: LearnedPositions | Identity
    blocks: Iterable[Block]
    ln_final: Module
    unembed: Unembed


@dataclass(frozen=True)
class Family:
    """One architecture: its config, its parts, its weights' names on disk, and Hugging Face's class for it."""

    config: type[DecoderConfig]
    parts: Callable[[Any], Parts]
    weights: Callable[[Any], WeightTable]
    hf_class: str


class Decoder(Module):
    """Embedding, blocks, final norm, unembedding: the forward pass, nothing more."""

    __call__ = nn.Module.__call__  # with keywords

    def __init__(self, cfg: DecoderConfig, parts: Parts) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = parts.embed
        self.hook_embed = HookPoint("batch pos d_model", d_model=cfg.d_model)
        for name, point in parts.pos_embed.named_children():  # named hook_pos_embed, not pos_embed.hook_pos_embed
            setattr(self, name, point)
        self.pos_embed = parts.pos_embed
        self.blocks = nn.ModuleList(parts.blocks)
        self.ln_final = parts.ln_final
        self.unembed = parts.unembed
        self.tie()
        self.hook_logits = HookPoint("batch pos d_vocab", d_vocab=cfg.d_vocab)
        self.hook_points: dict[str, HookPoint] = {}
        for name, module in self.named_modules():
            if isinstance(module, HookPoint):
                module.name = name
                self.hook_points[name] = module

    def tie(self) -> None:
        """Make the unembedding the embedding's transpose, in models where it is: after either was replaced."""
        if self.cfg.tie_embeddings:
            self.unembed.weight = self.embed.weight

    def decode(
        self,
        tokens: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Float[Tensor, "batch pos d_vocab_or_d_model"]:
        """Logits [batch pos d_vocab], or the residual stream [batch pos d_model] if stopped before the end.

        Args:
            tokens: ids; with `start_at_layer`, the stream that enters that layer instead.
            mask: True for a row's own tokens, False for (left) padding; None where nothing is padded.
            start_at_layer: the first block to run, from the stream given; negative counts from the end.
            stop_at_layer: the first block not to run; what would enter it is returned.
        """
        run = ForwardPass(tokens.shape[1], tokens.device, mask)
        resid = self._enter(tokens, run) if start_at_layer is None else tokens
        for block in islice(self.blocks, self._layer(start_at_layer, 0), self._layer(stop_at_layer, len(self.blocks))):
            resid = block(resid, run)
        if stop_at_layer is not None:
            return resid
        return self.hook_logits(self.unembed(self.ln_final(resid)))

    def _enter(self, tokens: Int[Tensor, "batch pos"], run: ForwardPass) -> Float[Tensor, "batch pos d_model"]:
        return self.pos_embed(self.hook_embed(self.embed(tokens)), run.positions, run.n_tokens)

    def _layer(self, layer: int | None, default: int) -> int:
        n = len(self.blocks)
        if layer is None:
            return default
        if not -n <= layer <= n:
            raise InputError(
                "no such layer to start or stop at",
                got=str(layer),
                expected=f"from {-n} to {n}: the model has {n} layers",
                fix="count from 0, or from the end with negative numbers",
            )
        return layer % n if layer < 0 else layer


def init_weights(model: Decoder, seed: int) -> None:
    """Draw weights as GPT-2 does (Radford et al. 2019): normal, the projections into the stream scaled by depth.

    Args:
        seed: of a generator of its own; torch's global one is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    cfg = model.cfg
    into_stream = {id(p) for block in model.blocks for p in _writers(block)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                scale = (2 * cfg.n_layers) ** -0.5 if id(parameter) in into_stream else 1.0
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(noise * cfg.init_range * scale)


def _writers(block: nn.Module) -> list[nn.Parameter]:
    """The weights through which a block writes to the stream."""
    written = [module.o.weight for module in block.modules() if isinstance(module, Attention)]
    return written + [module.w_out.weight for module in block.modules() if isinstance(module, FeedForward)]
