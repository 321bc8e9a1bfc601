"""`HookedTransformer`: the front door. A decoder with a tokenizer and the users' verbs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lenskit.cache import ActivationCache
from lenskit.checkpoints import companions
from lenskit.checkpoints import load as loading
from lenskit.checkpoints import write as writing
from lenskit.checkpoints.devices import Device
from lenskit.checkpoints.source import find
from lenskit.elsewhere import Remote, refuse
from lenskit.errors import InputError
from lenskit.generation import Generation, Step, left_padded, repeated
from lenskit.hooks import HookPoint
from lenskit.inputs import Batch, Input
from lenskit.interventions.forward import Past, Result, check_for_cache, forward, prefill
from lenskit.interventions.ops import Hook, Save
from lenskit.interventions.plan import Plan
from lenskit.interventions.scope import attached, on_points, on_sites
from lenskit.interventions.sites import Site, resolve
from lenskit.models.base import check_causal, init_weights
from lenskit.models.config import DecoderConfig
from lenskit.models.registry import family
from lenskit.models.weight_access import WeightAccess
from lenskit.preparing import Hooks, Preparing
from lenskit.sampling import CHOICES
from lenskit.tracing.steps import checked
from lenskit.tracing.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HookedTransformer(WeightAccess, Preparing):
    """A transformer, decoder or encoder, whose every activation is a named hook point.

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
        self.hf_config = None
        self.generation_config = {}
        self.remote = None
        if seed is not None:
            init_weights(self, seed)

    # -- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        adapter: str | Path | None = None,
        merge: bool = True,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
        device_map: str | Mapping[str, Device] | None = None,
        revision: str | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        token: str | bool | None = None,
        remote: Remote | None = None,
    ) -> Self:
        """A checkpoint as a model in eval mode; of a multi-modal one, the text model.

        Args:
            name_or_path: an embedded name ("demo-gpt2"), or the folder or hub id of a checkpoint, or of a PEFT adapter.
            adapter: a LoRA that PEFT saved, to be put on the checkpoint: a folder or hub id.
            merge: add an adapter to the weights, or keep it beside them, with hook points (`...qkv.q.hook_adapter`).
            device: where all weights go; the CPU if nothing is said. "meta" loads no weights at all.
            dtype: of the weights; the one that most of them have on disk if nothing is said.
            device_map: "auto", or module path prefix -> device, through accelerate; instead of `device`.
            revision: the hub's branch, tag or commit.
            tokenizer: instead of the checkpoint's own.
            token: for private or gated repositories on the hub.
            remote: what `lk.connect` returned, with device="meta": the server's model of that name runs what this one
                is told.

        Raises:
            CheckpointError, ConfigError: see `lenskit.errors`; nothing is half loaded.
            RemoteError: the server does not answer, or has another model of that name.
        """
        if remote is not None and (device != "meta" or dtype is not None):
            raise InputError(
                "a model that runs on a server has no weights here",
                got=f"remote={remote!r}, device={device!r}, dtype={dtype!r}",
                expected='device="meta", and no dtype: it is the server\'s',
                fix='write from_pretrained(name, device="meta", remote=lk.connect(url))',
            )
        source = find(name_or_path, adapter=adapter, revision=revision, token=token)
        described = loading.describe(source)
        with torch.device("meta"):
            model = cls(described.cfg, seed=None)
        model.tokenizer = companions.tokenizer_of(source) if tokenizer is None else tokenizer
        model.source, model.hf_config = source.described, described.hf_config
        model.generation_config = companions.generation_config_of(source)
        loading.give_weights(model, source, described, merge=merge, device=device, dtype=dtype, device_map=device_map)
        if remote is not None:
            model.remote = remote.attach(model, source.name)
        return model.eval()

    def save_pretrained(self, dest: str | Path) -> Path:
        """Write a lenskit checkpoint to a folder that is not there yet: with an adapter that was kept apart, merged.

        Raises:
            CheckpointError: `dest` is in the way; nothing is written.
        """
        return writing.save(
            dest,
            self,
            hf_config=self.hf_config,
            tokenizer=self.tokenizer,
            source=self.source,
            generation_config=self.generation_config,
        )

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
            input: text, texts, ids, or a tokenizer's encoding (whose `token_type_ids` an encoder reads); with
                `start_at_layer`, the residual stream [batch pos d_model] that enters that layer.
            mask: [batch pos], nonzero for a row's own tokens, where `input` is a padded tensor.
            start_at_layer: the first block to run.
            stop_at_layer: the first block not to run; the stream [batch pos d_model] before it is returned.

        Raises:
            InputError: the input is none that the model can take.
        """
        if self.remote is not None:
            refuse(start_at_layer=start_at_layer, stop_at_layer=stop_at_layer)
            batch = self.batch(input, mask)
            return self.remote.forward(self, batch, Plan(), make=attrgetter("logits"), logits=True)
        batch = self.batch(input, mask, start_at_layer=start_at_layer)
        return self.decode(*batch, start_at_layer=start_at_layer, stop_at_layer=stop_at_layer)

    def run_with_hooks(
        self,
        input: Input,
        hooks: Hooks = (),
        *,
        bwd_hooks: Sequence[Hook] = (),
        mask: Tensor | None = None,
        past: Past | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Result:
        """One forward pass with hooks, which leave with it.

        Args:
            hooks: ops (`lk.Save`, `lk.Set`, `lk.Add`, `lk.Scale`, `lk.Stop`) and (site, function) pairs, run in list
                order, or a `lk.Plan` of these. A site is a hook point's name, a glob, a predicate on names, or a list.
                A function gets a copy of the activation and the `HookPoint`; what it returns, or has made of the copy
                if it returns None, goes on through the model.
            bwd_hooks: (site, function) pairs for gradients, which run when somebody calls backward on what comes of
                the result.
            past: what `prefill` returned: the input continues it.
            input, mask, start_at_layer, stop_at_layer: as `forward`'s.

        Raises:
            PlanError, HookError: an op cannot be carried out, a site matches nothing; nothing runs then.
            ReplacementError: a function returned something of another shape, dtype or device.
        """
        layers = {"start_at_layer": start_at_layer, "stop_at_layer": stop_at_layer}
        if self.remote is not None:
            refuse(bwd_hooks=bwd_hooks, past=past, **layers)
        batch = self.batch(input, mask, start_at_layer=start_at_layer, past=past)
        points = self.points_between(start_at_layer, stop_at_layer)
        plan = hooks if isinstance(hooks, Plan) else Plan(hooks)
        program = self._program(plan, batch, past, points)
        if self.remote is not None:
            return self.remote.forward(self, batch, plan)
        gradients = on_sites(bwd_hooks, points, "grad")
        return forward(self, batch, program, past=past, behind=gradients, **layers)

    def run_with_cache(
        self,
        input: Input,
        names: Site | None = None,
        *,
        hooks: Hooks = (),
        device: Device | None = None,
        grad: bool = False,
        mask: Tensor | None = None,
        past: Past | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> tuple[Tensor, ActivationCache]:
        """Logits, and activations by name.

        Args:
            names: which points: a name, glob, predicate or list; None for all but the on-demand ones.
            hooks: interventions, as `run_with_hooks`'s; the cache holds what they make of the activations.
            device: where the cache keeps its tensors; None for where they are.
            grad: keep activations in the autograd graph; without it the pass runs under no_grad.
            input, mask, past, start_at_layer, stop_at_layer: as `run_with_hooks`'s.

        Raises:
            UnknownHookPointError: `names` matches nothing. PlanError, HookError: see `run_with_hooks`.
        """
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: HookPoint) -> None:
            kept[hook.name] = activation if device is None else activation.to(device)

        def cached(result: Result) -> tuple[Any, ActivationCache]:
            for point in points:
                keep(result.saved[point.name], point)
            return result.output, ActivationCache(kept, n_layers=self.cfg.n_layers, mask=batch.mask)

        layers = {"start_at_layer": start_at_layer, "stop_at_layer": stop_at_layer}
        if self.remote is not None:
            refuse(grad=grad, past=past, **layers)
        batch = self.batch(input, mask, start_at_layer=start_at_layer, past=past)
        running = self.points_between(start_at_layer, stop_at_layer)
        points = [p for p in running.values() if not p.on_demand] if names is None else resolve(names, running)
        plan = hooks if isinstance(hooks, Plan) else Plan(hooks)
        program = self._program(plan, batch, past, running)
        check_for_cache(program)
        if self.remote is not None:
            return self.remote.forward(self, batch, Plan([*plan.ops, Save([p.name for p in points])]), make=cached)
        reads = on_points(points, keep, "read")
        with nullcontext() if grad else torch.no_grad():
            result = forward(self, batch, program, past=past, behind=reads, **layers)
        return result.logits, ActivationCache(kept, n_layers=self.cfg.n_layers, mask=batch.mask)

    def prefill(self, input: Input, hooks: Hooks = (), *, mask: Tensor | None = None, past: Past | None = None) -> Past:
        """Process tokens once, so that any number of later calls may start after them (`past=`), all unharmed.

        Args:
            input: one prompt, which all rows of later calls share, or several, one for each row.
            hooks: as `run_with_hooks`'s; what they do to keys and values stays, what they save is in `.saved`.
            mask: as `forward`'s.
            past: what `input` continues.

        Raises:
            PlanError, HookError, InputError: see `run_with_hooks`. NotCausalError: the model is an encoder.
        """
        check_causal(self, "prefill")
        refuse(prefill=self.remote)
        batch = left_padded(self.batch(input, mask, past=past))
        return prefill(self, batch, self._program(hooks, batch, past, self.hook_points), past)

    def generate(
        self,
        prompts: Input,
        *,
        max_new_tokens: int | None = None,
        hooks: Hooks = (),
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        num_return_sequences: int | None = None,
        seed: int | None = None,
        past: Past | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        streamer: Any = None,
        progress: bool | None = None,
        return_logits: bool = False,
        mask: Tensor | None = None,
        **unsupported: Any,
    ) -> Generation:
        """Continue prompts token by token, with hooks that may differ from step to step.

        Step 0 processes the prompts and yields the first new token, step k processes new token k alone;
        `max_new_tokens=N` is N steps. Runs under no_grad.

        Args:
            prompts: as `forward`'s input; rows of any lengths.
            hooks: as `run_with_hooks`'s; `steps=` says at which steps an op is live, every step if left out.
            do_sample: draw tokens; without it the likeliest is taken.
            temperature, top_k, top_p, min_p: how they are drawn, by Hugging Face's logits processors.
            repetition_penalty: above 1 makes tokens that a row holds less likely.
            eos_token_id: ids that end a row; the checkpoint's own if None, none if [].
            stop_strings: texts that end a row.
            num_return_sequences: rows a prompt, next to each other; `prompts=` of ops counts rows.
            seed: of this generation's random numbers; None draws from torch's global generator.
            past: what `prefill` returned. The prompts continue it: text is tokenised without special tokens.
            logits_processor, stopping_criteria: Hugging Face's objects, one or a list.
            generation_config: Hugging Face's; options given here go before its own.
            streamer: Hugging Face's, told of the prompt and of every token.
            progress: a progress bar; None shows one at a terminal if it takes more than a second.
            return_logits: keep the logits of each new token, and its log-probability.
            mask: as `forward`'s.
            unsupported: refused, each with what to do instead.

        Raises:
            GenerationError: an option that makes no sense or is not supported. NotCausalError: the model is an encoder.
            PlanError, HookError, InputError: see `run_with_hooks`. Nothing runs then.
        """
        given = {name: value for name, value in locals().items() if name in (*CHOICES, "generation_config")}
        if self.remote is not None:
            refuse(past=past, streamer=streamer)
            ready = self.prepared(prompts, hooks, {**given, **unsupported}, mask=mask)
            asked = self, ready.batch, ready.plan, ready.options()
            return self.remote.generate(*asked, return_logits=return_logits, progress=progress)
        how = {"hooks": hooks, "mask": mask, "past": past, "streamer": streamer, "return_logits": return_logits}
        return self.generator(prompts, progress=progress, **how, **given, **unsupported).run()

    def generate_steps(self, prompts: Input, **options: Any) -> Iterator[Step]:
        """`generate`, one step at a time: each `Step` has its tokens and what was saved in it, as soon as it ran.

        All is checked at the call; options are `generate`'s. Between steps nothing is attached; the iterator may be
        closed at any moment.
        """
        refuse(generate_steps=self.remote)
        return self.generator(prompts, **options).steps()

    def trace(
        self,
        prompt: Input | None = None,
        *,
        max_new_tokens: int | None = None,
        past: Past | None = None,
        **options: Any,
    ) -> Trace:
        """A `with` block in which activations are read, set and saved by name; its end runs it as a plan.

        Args:
            prompt: what `generate` takes; None for several, each opened with `run.invoke(prompt)`.
            max_new_tokens: of a generation; None for one forward pass.
            past, options: `generate`'s.

        Raises:
            GenerationError: options that do not fit. In the block: TraceError, PlanError, at the line.
        """
        if self.remote is not None:
            refuse(past=past, **{name: options.get(name) for name in ("logits_processor", "stopping_criteria")})
        n_steps, copies = checked(self, max_new_tokens, options)

        def run(batch: Batch, plan: Plan) -> Result | Generation:
            if n_steps is None:
                return self.run_with_hooks(batch, plan, past=past)
            given = {**options, "max_new_tokens": n_steps, "num_return_sequences": 1}  # the rows are there already
            return self.generate(batch, hooks=plan, past=past, **given)

        def read(given: Input) -> Batch:
            return repeated(self.batch(given, past=past), copies)

        return Trace(self, read=read, run=run, text=self.to_string, n_steps=n_steps, prompt=prompt, past=past)

    def hooks(self, hooks: Sequence[Hook] = (), *, bwd_hooks: Sequence[Hook] = ()) -> AbstractContextManager[None]:
        """A `with` block in which every forward pass of this thread runs with these hooks; they leave with it."""
        refuse(hooks=self.remote)
        return attached(on_sites(hooks, self.hook_points, "edit") + on_sites(bwd_hooks, self.hook_points, "grad"))

    # -- looking

    def hook_names(self, pattern: Site = "*") -> list[str]:
        """The names of the hook points that a glob, predicate or list matches, in the order of the forward pass."""
        return [point.name for point in resolve(pattern, self.hook_points)]

    def shapes(self, input: Input, mask: Tensor | None = None) -> dict[str, tuple[int, ...]]:
        """Every hook point's shape for an input, without computing anything."""
        rows, pos = self.batch(input, mask).tokens.shape
        sizes = {"batch": rows, "pos": pos, "query_pos": pos, "key_pos": pos}
        return {name: point.shape(**sizes) for name, point in self.hook_points.items()}
