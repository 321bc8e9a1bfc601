"""`HookedTransformer`: the front door. A decoder with a tokenizer and the users' verbs."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lenskit.cache import ActivationCache
from lenskit.checkpoints import load as loading
from lenskit.checkpoints import write as writing
from lenskit.checkpoints.devices import Device
from lenskit.checkpoints.source import find
from lenskit.errors import InputError
from lenskit.hooks import HookPoint
from lenskit.inputs import Batch, Input, to_batch, with_mask
from lenskit.interventions.scope import Hook, attached, on_points, on_sites
from lenskit.interventions.sites import Site, resolve
from lenskit.models.base import Decoder, DecoderConfig, init_weights
from lenskit.models.registry import family
from lenskit.models.weight_access import WeightAccess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Result:
    """What `run_with_hooks` returns.

    logits: [batch pos d_vocab] (or the stream [batch pos d_model], if stopped at a layer).
    tokens: [batch pos], left-padded where prompts differ in length.
    mask: [batch pos], True for a row's own tokens; None where nothing is padded.
    """

    logits: Tensor
    tokens: Tensor
    mask: Tensor | None
    saved: dict[str, Any] = field(default_factory=dict)


class HookedTransformer(WeightAccess, Decoder):
    """A transformer whose every activation is a named hook point.

    Args:
        cfg: a family's config, e.g. `lenskit.models.gpt2.GPT2Config(...)`.
        tokenizer: for text; any Hugging Face tokenizer.
        seed: of the new weights, drawn as GPT-2's; None leaves them unset, for a loader.
    """

    def __init__(
        self, cfg: DecoderConfig, *, tokenizer: "PreTrainedTokenizerBase | None" = None, seed: int | None = 0
    ) -> None:
        super().__init__(cfg, family(cfg.model_type, where="the config").parts(cfg))
        self.tokenizer = tokenizer
        self.source = "new weights"  # what a saved checkpoint's manifest says they come from
        self.hf_config: dict[str, Any] | None = None
        if seed is not None:
            init_weights(self, seed)

    # -- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
        device_map: str | Mapping[str, Device] | None = None,
        revision: str | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        token: str | bool | None = None,
    ) -> Self:
        """A checkpoint as a model in eval mode.

        Args:
            name_or_path: an embedded name ("demo-gpt2"), a folder (Hugging Face's or lenskit's), or a hub id.
            device: where all weights go; the CPU if nothing is said. "meta" loads no weights at all.
            dtype: of all weights; the one that most of them have on disk if nothing is said.
            device_map: "auto", or module path prefix -> device, through accelerate; instead of `device`.
            revision: the hub's branch, tag or commit.
            tokenizer: instead of the checkpoint's own.
            token: for private or gated repositories on the hub.

        Raises:
            CheckpointError, ConfigError: see `lenskit.errors`; nothing is half loaded.
        """
        source = find(name_or_path, revision=revision, token=token)
        described = loading.describe(source)
        with torch.device("meta"):
            model = cls(described.cfg, seed=None)
        model.tokenizer = loading.tokenizer_of(source) if tokenizer is None else tokenizer
        model.source, model.hf_config = source.name, described.hf_config
        loading.give_weights(model, source, described, device=device, dtype=dtype, device_map=device_map)
        return model.eval()

    def save_pretrained(self, dest: str | Path) -> Path:
        """Write a lenskit checkpoint to a folder that is not there yet; `from_pretrained(dest)` gives it back.

        Raises:
            CheckpointError: `dest` is in the way; nothing is written.
        """
        return writing.save(
            dest,
            family=family(self.cfg.model_type, where="the config"),
            cfg=self.cfg,
            parameters=dict(self.named_parameters(remove_duplicate=False)),
            hf_config=self.hf_config,
            tokenizer=self.tokenizer,
            source=self.source,
        )

    # -- text

    def to_tokens(self, text: Input) -> Batch:
        """Ids [batch pos] and mask, as every verb sees them; rows of unequal length are padded on the left."""
        return to_batch(text, d_vocab=self.cfg.d_vocab, tokenizer=self.tokenizer, device=self.device)

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

    # -- running

    def forward(
        self,
        input: Input,
        mask: Tensor | None = None,
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Tensor:
        """Logits [batch pos d_vocab]; padding positions hold nothing meaningful.

        Args:
            input: text, texts, ids, or a tokenizer's encoding; with `start_at_layer`, the residual stream
                [batch pos d_model] that enters that layer.
            mask: [batch pos], nonzero for a row's own tokens, where `input` is a padded tensor.
            start_at_layer: the first block to run.
            stop_at_layer: the first block not to run; the stream [batch pos d_model] before it is returned.

        Raises:
            InputError: the input is none that the model can take.
        """
        batch = self._batch(input, mask, start_at_layer)
        return self.decode(*batch, start_at_layer=start_at_layer, stop_at_layer=stop_at_layer)

    def run_with_hooks(
        self,
        input: Input,
        hooks: Sequence[Hook] = (),
        *,
        bwd_hooks: Sequence[Hook] = (),
        mask: Tensor | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Result:
        """One forward pass with hooks, which leave with it.

        Args:
            hooks: (site, function) pairs, run in list order. A site is a hook point's name, a glob, a predicate on
                names, or a list. The function gets a copy of the activation and the `HookPoint`; what it returns,
                or has made of the copy if it returns None, goes on through the model.
            bwd_hooks: the same for gradients, which run when somebody calls backward on what comes of the result.
            input, mask, start_at_layer, stop_at_layer: as `forward`'s.

        Raises:
            UnknownHookPointError: a site matches nothing; nothing runs then.
            ReplacementError: a function returned something of another shape, dtype or device.
        """
        batch = self._batch(input, mask, start_at_layer)
        points = self._points_that_run(start_at_layer, stop_at_layer)
        with attached(on_sites(hooks, points, "edit") + on_sites(bwd_hooks, points, "grad")):
            logits = self.decode(*batch, start_at_layer=start_at_layer, stop_at_layer=stop_at_layer)
        return Result(logits, *batch)

    def run_with_cache(
        self,
        input: Input,
        names: Site | None = None,
        *,
        device: Device | None = None,
        grad: bool = False,
        mask: Tensor | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> tuple[Tensor, ActivationCache]:
        """Logits, and activations by name.

        Args:
            names: which points: a name, glob, predicate or list; None for all but the on-demand ones.
            device: where the cache keeps its tensors; None for where they are.
            grad: keep activations in the autograd graph; without it the pass runs under no_grad.
            input, mask, start_at_layer, stop_at_layer: as `forward`'s.

        Raises:
            UnknownHookPointError: `names` matches nothing.
        """
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: HookPoint) -> None:
            kept[hook.name] = activation if device is None else activation.to(device)

        batch = self._batch(input, mask, start_at_layer)
        running = self._points_that_run(start_at_layer, stop_at_layer)
        if names is None:
            points = [point for point in running.values() if not point.on_demand]
        else:
            points = resolve(names, running)
        with nullcontext() if grad else torch.no_grad(), attached(on_points(points, keep, "read")):
            logits = self.decode(*batch, start_at_layer=start_at_layer, stop_at_layer=stop_at_layer)
        return logits, ActivationCache(kept, n_layers=self.cfg.n_layers, mask=batch.mask)

    def hooks(self, hooks: Sequence[Hook] = (), *, bwd_hooks: Sequence[Hook] = ()) -> AbstractContextManager[None]:
        """A `with` block in which every forward pass of this thread runs with these hooks; they leave with it."""
        return attached(on_sites(hooks, self.hook_points, "edit") + on_sites(bwd_hooks, self.hook_points, "grad"))

    # -- looking

    def hook_names(self, pattern: Site = "*") -> list[str]:
        """The names of the hook points that a glob, predicate or list matches, in the order of the forward pass."""
        return [point.name for point in resolve(pattern, self.hook_points)]

    def shapes(self, input: Input, mask: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        """Every hook point's shape for an input, without computing anything."""
        rows, pos = self._batch(input, mask, None).tokens.shape
        sizes = {"batch": rows, "pos": pos, "query_pos": pos, "key_pos": pos}
        return {name: point.shape(**sizes) for name, point in self.hook_points.items()}

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so where inputs go."""
        return self.embed.weight.device

    def _points_that_run(self, start: int | None, stop: int | None) -> dict[str, HookPoint]:
        """The hook points of a pass over some of the layers; a hook anywhere else would be without effect."""
        if start is None and stop is None:
            return self.hook_points
        blocks = range(self._layer(start, 0), self._layer(stop, len(self.blocks)))
        before, after = start is None, stop is None
        ends = {point.name: before if "embed" in point.name else after for point in self.hook_points.values()}
        return {
            name: point
            for name, point in self.hook_points.items()
            if (ends[name] if point.layer is None else point.layer in blocks)
        }

    def _batch(self, input: Input, mask: Tensor | None, start_at_layer: int | None) -> Batch:
        if start_at_layer is not None:
            if not (isinstance(input, torch.Tensor) and input.dim() == 3 and input.shape[2] == self.cfg.d_model):
                raise InputError(
                    "start_at_layer takes the residual stream",
                    got=f"a tensor {tuple(input.shape)}" if isinstance(input, torch.Tensor) else repr(input),
                    expected=f"a tensor [batch pos {self.cfg.d_model}], as cache['resid_pre', layer] is",
                    fix="pass the stream that enters that layer, or leave start_at_layer out",
                )
            return Batch(input, None if mask is None else with_mask(input[..., 0], mask.to(input.device)).mask)
        batch = self.to_tokens(input)
        return batch if mask is None else with_mask(batch.tokens, mask.to(batch.tokens.device))
