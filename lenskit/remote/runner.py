"""The runner of a model whose weights are on a server: a batch and a plan become a job, and its bytes a result."""

import json
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

from torch import Tensor

from lenskit.generation import Decode
from lenskit.inputs import Batch
from lenskit.interventions.forward import Result
from lenskit.interventions.plan import Plan
from lenskit.remote.talk import Order
from lenskit.remote.wire import JSON, SAFETENSORS, pack, result_from_wire, unpack
from lenskit.text_access import TextAccess


@final
class JobRunner:
    """Makes jobs of what a model is told.

    Args:
        name: under which the server has the model.
        start: what is done with a job: have it run, hand it in, or keep it until it is awaited.
        logits: whether the results of forward passes have them.
    """

    def __init__(self, name: str, start: Callable[[Order], Any], *, logits: bool = True) -> None:
        self.name, self._start, self._logits = name, start, logits

    def forward(
        self,
        model: TextAccess,
        batch: Batch,
        plan: Plan,
        *,
        make: Callable[[Result], Any] | None = None,
        logits: bool | None = None,
    ) -> Any:
        """See `elsewhere.Runner`."""
        asked = {"verb": "forward", "logits": self._logits if logits is None else logits}
        return self._start(self._order(model, batch, plan, asked, partial(result_of, make=make)))

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
        """See `elsewhere.Runner`."""
        asked = {"verb": "generate", "logits": return_logits, "options": options}
        decode = None if model.tokenizer is None else model.to_string
        return self._start(self._order(model, batch, plan, asked, partial(result_of, decode=decode), progress))

    def _order(
        self,
        model: TextAccess,
        batch: Batch,
        plan: Plan,
        asked: Mapping[str, Any],
        read: Callable[[bytes], Any],
        show: bool | None = None,
    ) -> Order:
        """Raises:
        PlanFormatError: a Python function or predicate; it names the op.
        """
        mask = None if batch.mask is None else batch.mask.int().tolist()
        ids = {"model": self.name, "tokens": batch.tokens.tolist(), "mask": mask}
        data = {**ids, **asked, "plan": plan.to_json(model)}
        tensors = plan.tensors()
        return Order(*_body(data, tensors), key=str(uuid.uuid4()), read=read, show=show)


def _body(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    if tensors:
        return pack(data, tensors), SAFETENSORS
    return json.dumps(data, allow_nan=False, separators=(",", ":")).encode(), JSON


def result_of(body: bytes, *, decode: Decode | None = None, make: Callable[[Result], Any] | None = None) -> Any:
    """What a job's result says.

    Args:
        decode: makes text of ids.
        make: what becomes of the result of a forward pass.

    Raises:
        PlanFormatError, RemoteError: it is none.
    """
    result = result_from_wire(*unpack(body), decode)
    return result if make is None or not isinstance(result, Result) else make(result)
