"""What the verbs make of their arguments before anything runs, here or elsewhere. Everything is checked here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lenskit.choosing import Chooser
from lenskit.elsewhere import Runner, refuse
from lenskit.generation import Generator, checked_length, left_padded, repeated
from lenskit.hooks import HookPoint
from lenskit.inputs import Batch, Input, stream_batch, with_mask
from lenskit.interventions.forward import Past, geometry_of
from lenskit.interventions.ops import Hook, Op
from lenskit.interventions.plan import Plan
from lenskit.interventions.program import Program
from lenskit.models.base import check_causal
from lenskit.sampling import Sampling, default_eos, sampling_from, several
from lenskit.text_access import TextAccess

Hooks = Plan | Sequence[Op | Hook]  # what `hooks=` takes


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A generation with everything checked.

    batch: left-padded, each row as often as it is continued.
    """

    model: "Preparing"
    batch: Batch
    past: Past | None
    plan: Plan
    program: Program
    sampling: Sampling
    n_steps: int
    pad: int

    def generator(self, *, streamer: Any, show: bool | None, return_logits: bool) -> Generator:
        """What runs it here; its arguments are `Generator`'s."""
        return Generator(
            model=self.model,
            batch=self.batch,
            program=self.program,
            chooser=self._chooser(),
            past=self.past,
            streamer=streamer,
            show=show,
            return_logits=return_logits,
            decode=None if self.model.tokenizer is None else self.model.to_string,
        )

    def options(self) -> dict[str, Any]:
        """Its options as they act, as plain data; random numbers get a seed from torch's global generator.

        Raises:
            RemoteError: some are Python objects.
        """
        given = {name: several(value) for name, value in vars(self.sampling).items() if value is not None}
        refuse(**{name: given.pop(name, ()) for name in ("logits_processor", "stopping_criteria")})
        self._chooser()  # which checks
        lists = {"eos_token_id": [int(token) for token in given.pop("eos_token_id", ())]}
        if "stop_strings" in given:
            lists["stop_strings"] = list(given.pop("stop_strings"))
        numbers = {name: _plain(value) for name, (value,) in given.items()}
        if self.sampling.do_sample and self.sampling.seed is None:
            numbers["seed"] = int(torch.randint(2**62, ()))
        return {**numbers, **lists, "max_new_tokens": self.n_steps}

    def _chooser(self) -> Chooser:
        return self.sampling.chooser(tokenizer=self.model.tokenizer, device=self.batch.tokens.device, pad=self.pad)


def _plain(number: Any) -> bool | int | float:
    if isinstance(number, bool):
        return number
    return int(number) if isinstance(number, Integral) else float(number)


class Preparing(TextAccess):
    """A model that knows what it is asked.

    hf_config: Hugging Face's, where the checkpoint has one.
    generation_config: the checkpoint's, of which `generate` reads what ends a row.
    remote: who runs it, where its weights are elsewhere.
    """

    hf_config: dict[str, Any] | None
    generation_config: dict[str, Any]
    remote: Runner | None

    def prepared(
        self,
        prompts: Input,
        hooks: Hooks,
        options: Mapping[str, Any],
        *,
        mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Prepared:
        """A generation, checked as `generate` checks it; nothing runs.

        Args:
            options: of `generate`.

        Raises:
            GenerationError, PlanError, HookError, InputError: see `HookedTransformer.generate`.
        """
        check_causal(self, "generate")
        given = {name: value for name, value in options.items() if name != "generation_config"}
        eos = default_eos(self.generation_config, self.hf_config, self.tokenizer)
        sampling, n_steps, copies = sampling_from(given, options.get("generation_config"), {"eos_token_id": eos})
        sampling.check(self.cfg.d_vocab)
        batch = repeated(left_padded(self.batch(prompts, mask, past=past)), copies)
        past = None if past is None else past.repeated(copies)
        n_steps = checked_length(self, batch, past, n_steps)
        plan = hooks if isinstance(hooks, Plan) else Plan(hooks)
        return Prepared(
            model=self,
            batch=batch,
            past=past,
            plan=plan,
            program=self._program(plan, batch, past, self.hook_points, n_steps),
            sampling=sampling,
            n_steps=n_steps,
            pad=(*([] if self.tokenizer is None else [self.tokenizer.pad_token_id or 0]), *eos, 0)[0],
        )

    def generator(
        self,
        prompts: Input,
        *,
        hooks: Hooks = (),
        mask: Tensor | None = None,
        past: Past | None = None,
        streamer: Any = None,
        progress: bool | None = None,
        return_logits: bool = False,
        **options: Any,
    ) -> Generator:
        """A generation that is ready to run here; arguments as `HookedTransformer.generate`'s."""
        ready = self.prepared(prompts, hooks, options, mask=mask, past=past)
        return ready.generator(streamer=streamer, show=progress, return_logits=return_logits)

    def _program(
        self, hooks: Hooks, batch: Batch, past: Past | None, points: Mapping[str, HookPoint], n_steps: int | None = None
    ) -> Program:
        """Hooks as a program for a batch: everything about them is checked."""
        plan = hooks if isinstance(hooks, Plan) else Plan(hooks)
        return plan.compile(self, points, geometry_of(batch, past), n_steps=n_steps)

    def batch(
        self, input: Input, mask: Tensor | None = None, *, start_at_layer: int | None = None, past: Past | None = None
    ) -> Batch:
        """What the verbs make of an input: ids [batch pos] and their mask; arguments as `run_with_hooks`'s."""
        if start_at_layer is not None:
            return stream_batch(input, mask, d_model=self.cfg.d_model)
        batch = self.to_tokens(input, special_tokens=past is None)
        return batch if mask is None else batch._replace(mask=with_mask(batch.tokens, mask.to(self.device)).mask)
