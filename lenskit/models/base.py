"""The ground of the zoo: `Block`, `Decoder`, and `Family`, which ties one architecture together.

A family file says what its parts are and how its block goes from the stream to the stream. Everything here is
the same for all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lenskit.errors import HookConflictError, InputError, NotCausalError
from lenskit.hooks import THREAD, HookPoint, Watch
from lenskit.models.config import DecoderConfig
from lenskit.modules.attention import SelfAttention
from lenskit.modules.forward_pass import ForwardPass
from lenskit.modules.kv_cache import KVCache
from lenskit.modules.linear import Embed, LearnedPositions, TokenTypes, Unembed
from lenskit.modules.mlp import FeedForward
from lenskit.modules.module import Identity, Module, run_for_readers
from lenskit.modules.norms import Norm
from lenskit.modules.qkv import HeadInputs
from lenskit.recording import Recorded
from lenskit.weights import WeightTable


class Block(Module):
    """One layer: attention and an MLP around the residual stream, whose points are these.

    `hook_attn_out` and `hook_mlp_out` are exactly what is added to the stream: after a norm of the sublayer's output
    (`ln1_post`, `ln2_post`), after a multiplier. Where both sublayers read the stream that enters the block
    (`parallel`) there is no `hook_resid_mid`.

    `hook_attn_in`, `hook_q_input`, `hook_k_input` and `hook_v_input` are copies of the stream, one a head, before
    the norm; they exist while somebody asks for them. Under grouped-query attention `hook_attn_in` has one copy
    a key-value head, which its group of query heads reads too. An edit of `hook_mlp_in` changes what the MLP
    reads and leaves the stream alone.

    Args:
        ln1, ln2: norms of what attention and the MLP read. None for ln1: they read the stream itself. None for ln2:
            the same, or the MLP reads ln1's output (`read_both`).
        ln1_post, ln2_post: norms of what they give.
        ln1_sum, ln2_sum: norms of the stream itself, after that was added: `hook_resid_mid` and `hook_resid_post` are
            what comes out of them, as is what the next sublayer reads.
        parallel: whether both read the same stream.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        *,
        attn: SelfAttention,
        mlp: Module,
        ln1: Module | None = None,
        ln2: Module | None = None,
        ln1_post: Module | None = None,
        ln2_post: Module | None = None,
        ln1_sum: Module | None = None,
        ln2_sum: Module | None = None,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        groups = cfg.n_key_value_heads

        def stream() -> HookPoint:
            return HookPoint("batch pos d_model", d_model=cfg.d_model)

        def per_head(n: int) -> HookPoint:
            return HookPoint("batch pos head d_model", on_demand=True, head=n, d_model=cfg.d_model)

        self.hook_resid_pre = stream()
        self.ln1 = ln1 or Identity()  # runs before the inputs by head, for those who read its points
        self.hook_attn_in, self.hook_q_input = per_head(groups), per_head(cfg.n_heads)
        self.hook_k_input, self.hook_v_input = per_head(groups), per_head(groups)
        self.watch = Watch(self.hook_attn_in, self.hook_q_input, self.hook_k_input, self.hook_v_input)
        self.attn = attn
        self.ln1_post = ln1_post or Identity()
        self.hook_attn_out = stream()
        if ln1_sum is not None:
            self.ln1_sum = ln1_sum
        if not parallel:
            self.hook_resid_mid = stream()
        self.hook_mlp_in = HookPoint("batch pos d_model", on_demand=True, d_model=cfg.d_model)
        self.ln2 = ln2 or Identity()
        self.mlp = mlp
        self.ln2_post = ln2_post or Identity()
        self.hook_mlp_out = stream()
        if ln2_sum is not None:
            self.ln2_sum = ln2_sum
        self.hook_resid_post = stream()

    def read(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor | HeadInputs:
        """What attention reads of the stream: its norm, or the norm of a copy for each head if asked for."""
        return self._read_by_head(resid) if self.watch.used else self.ln1(resid)

    def read_both(self, resid: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor | HeadInputs, Tensor]:
        """What attention reads, and what the MLP reads, where both read ln1's output; the MLP's is hooked as usual."""
        attn_in = self.read(resid)
        if self.hook_mlp_in.attachments is None and not isinstance(attn_in, HeadInputs):
            return attn_in, attn_in
        norm = self.ln1
        if isinstance(norm, Norm):
            self._refuse_hooks_on(norm, "hook_mlp_in", "hook_mlp_in")
            norm = norm.fused  # type: ignore[assignment]
        return attn_in, norm(self.hook_mlp_in(resid))

    def _read_by_head(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor | HeadInputs:
        norm = self.ln1
        if not any(p.used for p in (self.hook_attn_in, self.hook_q_input, self.hook_k_input, self.hook_v_input)):
            return norm(resid)  # only another thread's pass asked
        if isinstance(norm, Norm):
            self._refuse_hooks_on(norm, "per-head inputs", "hook_q_input, hook_k_input or hook_v_input")
        whole = norm(resid)  # now, for those who read the norm's own points
        norm = norm.fused if isinstance(norm, Norm) else norm  # type: ignore[assignment]
        run_for_readers(self.attn.qkv, whole, instead="this block's per-head inputs")
        group, groups = self.attn.group, self.hook_attn_in.sizes["head"]
        attn_in = self.hook_attn_in(resid.unsqueeze(2).expand(-1, -1, groups, -1))
        return HeadInputs(
            norm(self.hook_q_input(attn_in.repeat_interleave(group, 2))),
            norm(self.hook_k_input(attn_in)),
            norm(self.hook_v_input(attn_in)),
            whole,
        )

    def _refuse_hooks_on(self, norm: Norm, inputs: str, instead: str) -> None:
        for point in (norm.hook_scale, norm.hook_normalized, norm.hook_out):
            if not point.only_read:
                raise HookConflictError(
                    f"a hook on {point.name!r} would be without effect",
                    got=f"hooks on {point.name!r} and on this block's {inputs} at once",
                    expected="one or the other: each of those inputs is normalised on its own",
                    fix=f"edit {instead} instead of the norm",
                )


class Parts(NamedTuple):
    """What a family builds a decoder from. `pos_embed` is `Identity()` where positions enter in attention.

    token_types: adds a vector for each token's type. ln_embed: a norm of what the embeddings sum to. None for none.
    """

    embed: Embed
    pos_embed: LearnedPositions | Identity
    blocks: Iterable[Block]
    ln_final: Module
    unembed: Unembed
    token_types: TokenTypes | None = None
    ln_embed: Norm | None = None


@dataclass(frozen=True)
class Family:
    """One architecture: its config, its parts, its weights' names on disk, and Hugging Face's class for it."""

    config: type[DecoderConfig]
    parts: Callable[[Any], Parts]
    weights: Callable[[Any], WeightTable]
    hf_class: str


class Decoder(Module):
    """Embedding, blocks, final norm, unembedding: the forward pass, nothing more.

    causal: whether a token sees only those before it. Where it does not, in an encoder, nothing can be generated.
    """

    __call__ = nn.Module.__call__  # with keywords
    inputs_on: torch.device | None = None  # where inputs go, if not to the embedding

    def __init__(self, cfg: DecoderConfig, parts: Parts) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = parts.embed
        self.hook_embed = HookPoint("batch pos d_model", d_model=cfg.d_model)
        token_types = parts.token_types or Identity()
        for name, point in (*parts.pos_embed.named_children(), *token_types.named_children()):
            setattr(self, name, point)  # named hook_pos_embed, not pos_embed.hook_pos_embed
        self.pos_embed, self.token_type_embed = parts.pos_embed, token_types
        self.ln_embed = parts.ln_embed or Identity()
        self.blocks = nn.ModuleList(parts.blocks)
        self.ln_final = parts.ln_final
        self.unembed = parts.unembed
        self.tie()
        self.causal = all(module.causal for module in self.modules() if isinstance(module, SelfAttention))
        self.hook_logits = HookPoint("batch pos d_vocab", d_vocab=cfg.d_vocab)
        self.name_modules()

    def name_modules(self) -> None:
        """Tell every module its path, and every hook point its place: after modules were added or moved, too."""
        self.hook_points: dict[str, HookPoint] = {}
        self._between: dict[tuple[int | None, int | None], dict[str, HookPoint]] = {}
        for name, module in self.named_modules():
            if isinstance(module, Recorded):
                module.name = name
            if isinstance(module, HookPoint):
                module.place = len(self.hook_points)
                self.hook_points[name] = module

    @property
    def device(self) -> torch.device:
        """Where inputs go: to the embedding, or, where the weights are on a server, the CPU."""
        return self.inputs_on or self.embed.weight.device

    def tie(self) -> None:
        """Make the unembedding the embedding's transpose, in models where it is: after either was replaced."""
        if self.cfg.tie_embeddings:
            self.unembed.weight = self.embed.weight

    def decode(
        self,
        tokens: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "batch pos"] | None = None,
        token_types: Int[Tensor, "batch pos"] | None = None,
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        cache: KVCache | None = None,
        step: int = 0,
        prompts: Sequence[int] | None = None,
        n_logits: int | None = None,
    ) -> Float[Tensor, "batch _ d_vocab_or_d_model"]:
        """Logits [batch pos d_vocab], or the residual stream [batch pos d_model] if stopped before the end.

        Args:
            tokens: ids; with `start_at_layer`, the stream that enters that layer instead.
            mask: True for a row's own tokens, False for (left) padding; None where nothing is padded.
            token_types: each token's type, in models that have such; None where all are 0.
            start_at_layer: the first block to run, from the stream given; negative counts from the end.
            stop_at_layer: the first block not to run; what would enter it is returned.
            cache: the tokens before these, which are added to it; `mask` is still of these alone.
            step: what hook functions read as `hook.step`.
            prompts: what they read as `hook.prompts`; None for the rows' own numbers.
            n_logits: logits of so many columns only, from the end: [batch n_logits d_vocab]; None for all.

        Raises:
            InputError: no such layer; a cache of another batch, or for a part of the layers.
            NotCausalError: a cache for an encoder.
        """
        if cache is not None:
            check_causal(self, "a key-value cache")
            _check_cache(cache, tokens, whole=start_at_layer is None and stop_at_layer is None)
        prompts = range(tokens.shape[0]) if prompts is None else prompts
        run = ForwardPass(
            tokens.shape[1],
            tokens.device,
            mask,
            token_types=token_types,
            cache=cache,
            step=step,
            prompts=prompts,
            n_logits=n_logits,
        )
        blocks = islice(self.blocks, self._layer(start_at_layer, 0), self._layer(stop_at_layer, len(self.blocks)))
        layers = list(blocks)  # the compiler cannot take up an iterator
        if torch.compiler.is_compiling():  # a graph has no thread
            return self._through(layers, tokens, run, enter=start_at_layer is None, leave=stop_at_layer is None)
        outer, THREAD.run = THREAD.run, run
        THREAD.depth += 1
        try:
            return self._through(layers, tokens, run, enter=start_at_layer is None, leave=stop_at_layer is None)
        finally:
            THREAD.depth -= 1
            THREAD.run = outer

    def _through(
        self, layers: Iterable[nn.Module], x: Tensor, run: ForwardPass, *, enter: bool, leave: bool
    ) -> Float[Tensor, "batch _ d_vocab_or_d_model"]:
        """The pass: from ids if it enters at the start, to logits if it leaves at the end."""
        resid = self._enter(x, run) if enter else x
        for block in layers:
            resid = block(resid, run)
        if not leave:
            return resid
        logits = self.hook_logits(self.unembed(self._last(resid, run)))
        if run.cache is not None:
            run.cache.advance(run.n_tokens, run.mask)  # not before: what fails on the way leaves the cache as it was
        return logits

    def _enter(self, tokens: Int[Tensor, "batch pos"], run: ForwardPass) -> Float[Tensor, "batch pos d_model"]:
        resid = self.pos_embed(self.hook_embed(self.embed(tokens)), run.positions, run.n_keys)
        return self.ln_embed(self.token_type_embed(resid, run.token_types))

    def _last(self, resid: Float[Tensor, "batch pos d_model"], run: ForwardPass) -> Float[Tensor, "batch n d_model"]:
        """What the unembedding reads: the final norm, of the columns that get logits."""
        norm = self.ln_final
        if run.n_logits is None or run.n_logits >= run.n_tokens:
            return norm(resid)
        first = run.n_tokens - run.n_logits
        if isinstance(norm, Norm) and not norm.watch.used:
            return norm(resid.narrow(1, first, run.n_logits))
        return norm(resid).narrow(1, first, run.n_logits)  # somebody looks at all positions

    def points_between(self, start: int | None, stop: int | None) -> dict[str, HookPoint]:
        """The hook points of a pass from layer `start` to before layer `stop`: all of them where neither is given."""
        if start is None and stop is None:
            return self.hook_points
        if (start, stop) not in self._between:  # the same mapping each time: plans know their programs by it
            self._between[start, stop] = self._points_between(start, stop)
        return self._between[start, stop]

    def _points_between(self, start: int | None, stop: int | None) -> dict[str, HookPoint]:
        blocks = range(self._layer(start, 0), self._layer(stop, len(self.blocks)))
        before, after = start is None, stop is None
        first = next(point.place for point in self.hook_points.values() if point.layer is not None)
        ends = {point.name: before if point.place < first else after for point in self.hook_points.values()}
        return {
            name: point
            for name, point in self.hook_points.items()
            if (ends[name] if point.layer is None else point.layer in blocks)
        }

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


def check_causal(model: Decoder, what: str) -> None:
    """See that a model's tokens see only those before them.

    Args:
        what: takes such a model.

    Raises:
        NotCausalError: it is an encoder.
    """
    if not model.causal:
        raise NotCausalError(
            f"{what} takes a model whose tokens see only those before them",
            got=f"an encoder ({model.cfg.model_type}), whose tokens see the whole row",
            expected="a decoder",
            fix="put the tokenizer's mask token where one is to be foretold, and read the logits there: model(text), "
            "run_with_hooks(text) or run_with_cache(text)",
        )


def _check_cache(cache: KVCache, tokens: Tensor, *, whole: bool) -> None:
    if not whole:
        raise InputError(
            "a key-value cache needs all layers",
            got="a cache together with start_at_layer or stop_at_layer",
            expected="one or the other: a part of the model would leave a cache of unequal layers",
            fix="leave the cache out to run some of the layers",
        )
    if cache.n_rows not in (None, tokens.shape[0]):
        raise InputError(
            "the cache is of another batch",
            got=f"{tokens.shape[0]} rows of tokens, for a cache of {cache.n_rows}",
            expected="tokens that continue the rows of the cache, in their order",
            fix="take the rows that go on with cache.branch(rows, capacity), or start with a new KVCache()",
        )


def init_weights(model: Decoder, seed: int) -> None:
    """Draw weights as GPT-2 does (Radford et al. 2019): normal, the projections into the stream scaled by depth.

    Args:
        seed: of a generator of its own; torch's global one is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    cfg = model.cfg
    into_stream = {id(p) for block in model.blocks for p in _writers(block)}
    gains = {id(norm.weight): norm.neutral for norm in model.modules() if isinstance(norm, Norm)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or id(parameter) in gains:
                parameter.fill_(gains.get(id(parameter), 0.0))
            else:
                scale = (2 * cfg.n_layers) ** -0.5 if id(parameter) in into_stream else 1.0
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(noise * cfg.init_range * scale)


def _writers(block: nn.Module) -> list[nn.Parameter]:
    """The weights through which a block writes to the stream."""
    written = [module.o.weight for module in block.modules() if isinstance(module, SelfAttention)]
    return written + [module.w_out.weight for module in block.modules() if isinstance(module, FeedForward)]
