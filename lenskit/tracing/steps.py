"""Steps: at which of a generation's steps a trace writes down what it is told."""

from collections.abc import Mapping
from typing import Any

from lenskit.errors import GenerationError, StepError
from lenskit.interventions.selectors import Selector, Selectors, indices
from lenskit.models.base import Decoder, check_causal
from lenskit.recording import plainly
from lenskit.sampling import sampling_from
from lenskit.tracing.blocks import Block
from lenskit.tracing.ledger import Ledger, misused
from lenskit.tracing.scope import Steps


def advance(ledger: Ledger) -> None:
    """Go on to the next step; what is read or written past the last one is refused there."""
    generating(ledger, "next()")
    if ledger.steps.series:
        raise misused("next() within all() or iter", "a block about several steps", "one step", "leave the block")
    ledger.steps = ledger.at(ledger.steps.classes[0] + 1)


def every(ledger: Ledger) -> Block:
    """A block about every step."""
    n = generating(ledger, "all()")
    return _during(ledger, Steps(None, True, (0, 1) if n > 1 else (0,)))


class StepBlocks:
    """`run.iter`, which is indexed with steps."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @plainly
    def __getitem__(self, selector: Selector) -> Block:
        ledger = self._ledger
        n = generating(ledger, "iter")
        chosen = Selectors.of(steps=selector, where="iter").steps
        try:
            found = sorted(indices(chosen, n))
        except IndexError as error:
            raise _no_step(f"step {error.args[0]}", n) from None
        if not found:
            raise _no_step(f"iter[{selector}], where there is no step", n)
        if isinstance(chosen, int):
            return _during(ledger, ledger.at(chosen))
        later = [step for step in found if step][:1]
        return _during(ledger, Steps(chosen, True, tuple([0] * (found[0] == 0) + later)))


def _during(ledger: Ledger, steps: Steps) -> Block:
    outer = ledger.steps

    def begin() -> None:
        ledger.check_open()
        if ledger.steps.series:
            raise misused("steps within steps", "all() or iter in another", "one of them", "leave the outer block")
        ledger.steps = steps

    def end() -> None:
        ledger.steps = outer

    return Block(begin, end)


def generating(ledger: Ledger, what: str) -> int:
    """How many steps there are.

    Raises:
        TraceError: it is a forward pass.
    """
    ledger.check_open()
    if ledger.n_steps is None:
        raise misused(
            f"{what} is about steps of a generation",
            "a trace of one forward pass",
            "a trace that generates",
            f"write model.trace(..., max_new_tokens=20); without it, leave {what} out",
        )
    return ledger.n_steps


def _no_step(got: str, n: int) -> StepError:
    return StepError(
        "the generation does not have these steps",
        got=got,
        expected=f"steps from 0 to {n - 1}: max_new_tokens={n} makes so many",
        fix="raise max_new_tokens, or choose earlier steps",
    )


def checked(model: Decoder, max_new_tokens: Any, options: Mapping[str, Any]) -> tuple[int | None, int]:
    """How many steps a trace has (None for a forward pass), and how many rows a prompt.

    Raises:
        GenerationError: options that `generate` does not have or take, or options of a generation that is none.
        NotCausalError: a generation of an encoder.
    """
    choices = {name: value for name, value in options.items() if name not in ("streamer", "progress", "return_logits")}
    config = choices.pop("generation_config", None)
    _, n_steps, copies = sampling_from({**choices, "max_new_tokens": max_new_tokens}, config)
    if n_steps is None and options:
        raise GenerationError(
            "a trace that generates says how many tokens",
            got=f"{', '.join(options)}, and no max_new_tokens",
            expected="both; without max_new_tokens, a trace is one forward pass, and has no options",
            fix="pass max_new_tokens=20, or leave the options out",
        )
    if n_steps is not None:
        check_causal(model, "a trace that generates")
    return n_steps, copies
