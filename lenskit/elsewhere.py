"""Running elsewhere: whom a model without weights gives its calls to, and which calls have to stay here.

This is only the place where that is known; `lenskit.remote` has a runner that asks a server.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lenskit.errors import RemoteError
from lenskit.inputs import Batch
from lenskit.interventions.forward import Result
from lenskit.interventions.plan import Plan
from lenskit.text_access import TextAccess


class Runner(Protocol):
    """Runs batches and plans for a model. What it gives back is the result, or a handle of a job that will have it."""

    def forward(
        self,
        model: TextAccess,
        batch: Batch,
        plan: Plan,
        *,
        make: Callable[[Result], Any] | None = None,
        logits: bool | None = None,
    ) -> Any:
        """A forward pass.

        Args:
            make: what becomes of the result before anybody sees it.
            logits: whether the result has to have them; None for what the runner does by itself.
        """

    def generate(
        self,
        model: TextAccess,
        batch: Batch,
        plan: Plan,
        options: Mapping[str, Any],
        *,
        return_logits: bool,
        progress: bool | None,
    ) -> Any:
        """A generation; `options` are as they act, with nothing left to defaults but the seed."""


class Remote(Protocol):
    """What `lk.connect` returns, as far as loading a model is concerned."""

    def attach(self, model: TextAccess, name: str) -> Runner:
        """What runs a model that has no weights here: the server's model of that name, which has to be the same."""


_INSTEAD = {
    "bwd_hooks": "put lk.Backward(loss) and lk.Save(lk.Grad(...)) into hooks, or trace with run.backward(loss):",
    "grad": "put lk.Backward(loss) and lk.Save(lk.Grad(...)) into hooks, or trace with run.backward(loss):",
    "past": "pass the whole prompt each time",
    "prefill": "pass the whole prompt each time",
    "start_at_layer": 'pass ids, and put lk.Set("blocks.3.hook_resid_pre", stream) into hooks',
    "stop_at_layer": 'put lk.Save("blocks.2.hook_resid_post") and lk.Stop("blocks.2.hook_resid_post") into hooks',
    "logits_processor": 'use the options by name (temperature, top_k, ...), or lk.Add("hook_logits", ...) in hooks',
    "stopping_criteria": "use eos_token_id, stop_strings or max_new_tokens",
    "streamer": "leave it out; progress=True shows how far it is",
    "hooks": "pass hooks=[...] to each call",
    "generate_steps": "use generate with lk.Save(...), which keeps a list, one tensor a step",
}


def refuse(**given: Any) -> None:
    """Refuse what would be asked of a server and cannot be.

    Args:
        given: by name; None, False, and lists without an entry are nothing.

    Raises:
        RemoteError: there is something.
    """
    for name, value in given.items():
        if value is not None and value is not False and not (isinstance(value, list | tuple) and not value):
            raise RemoteError(
                f"{name} cannot go to a server",
                got=f"{name}, for a model whose weights are on a server",
                expected="ids, ops and options, which are data",
                fix=f"{_INSTEAD[name]}; or load the weights, and run it here",
            )
