"""`connect`: a server, and its models as if they were here."""

from types import TracebackType
from typing import Any, Self, final

import torch

from lenskit.remote.jobs import Job
from lenskit.remote.runner import JobRunner
from lenskit.remote.settings import settings
from lenskit.remote.structure import Structure, check_same, dtype_of, fetched
from lenskit.remote.talk import Order, Talk
from lenskit.remote.transport import Transport
from lenskit.remote.watching import watch_for
from lenskit.remote.weights import take_away
from lenskit.text_access import TextAccess
from lenskit.transformer import HookedTransformer


def connect(url: str | None = None, api_key: str | None = None, *, patience: float | None = None) -> "Connection":
    """A server that runs models. Nothing is sent before something is asked for.

    Args:
        url: the server's address; None for LENSKIT_URL in the environment, else that of the file
            ~/.config/lenskit/config.toml (`url = "..."`).
        api_key: by which the server knows you; None for LENSKIT_API_KEY, else that of the file (`api_key = "..."`),
            which goes to the file's server only.
        patience: seconds for which a server that does not answer is asked again; None for 10 before its first answer,
            and 120 after.

    Raises:
        InputError: no URL, or one that is no server's address.
        KeyRefusedError: a key that can be none.
    """
    found = settings(url, api_key)
    return Connection(Talk(found.url, patience), Transport(found))


@final
class Connection:
    """A server: what `lk.connect` returns. Any number of threads may use it; as a `with` block it closes itself.

    url: the server's address.
    """

    def __init__(self, talk: Talk, transport: Transport) -> None:
        self.url = talk.url
        self._talk, self._transport = talk, transport

    def model(self, name: str, *, blocking: bool = True, logits: bool = True) -> HookedTransformer:
        """A model of the server's: structure, names, tokenizer and shapes are here, the weights are not.

        Its verbs are the same, and check what they are told before anything is sent. The results are on the CPU.

        Args:
            name: under which the server has it.
            blocking: whether the verbs wait for the result; without it they return a `Job`.
            logits: whether the results of `run_with_hooks` and `run_with_cache` have logits, which may be most of what
                is sent back. Without them, a result's `logits` raises, and `run_with_cache` has None in their place.

        Raises:
            CheckpointNotFoundError: the server has none of that name.
            RemoteError: the server does not answer, or not so that it could be used.
        """
        start = self._run if blocking else self._submit
        found = self._transport.run(fetched(self._talk, name))
        return loaded(found, name, self.url, JobRunner(name, start, logits=logits))

    def models(self) -> list[dict[str, Any]]:
        """What the server has: name, family, sizes, dtype, and whether it is ready."""
        return self._transport.run(self._talk.models())

    def describe(self, name: str) -> dict[str, Any]:
        """One of them: the same, its hook points, and a digest of its weights.

        Raises:
            CheckpointNotFoundError: the server has none of that name.
        """
        return self._transport.run(self._talk.model(name))

    def job(self, id: str) -> Job:
        """A handle of a job, also of one that another process has handed in. Nothing is asked yet."""
        return Job(self._talk, self._transport, id)

    def jobs(self, limit: int = 50) -> list[Job]:
        """Your jobs, the newest first; each one's `last` says how it is."""
        found = self._transport.run(self._talk.jobs(limit))
        return [Job(self._talk, self._transport, status.id, last=status) for status in found]

    def limits(self) -> dict[str, Any]:
        """What your key may do, and what of it is used."""
        return self._transport.run(self._talk.limits())

    def attach(self, model: TextAccess, name: str) -> JobRunner:
        """For `HookedTransformer.from_pretrained(name, device="meta", remote=connection)`.

        Raises:
            RemoteError: the server's model of that name is another one.
        """
        described = self._transport.run(self._talk.model(name))
        check_same(model, described, name, self.url)
        move(model, dtype_of(described))
        return JobRunner(name, self._run)

    def close(self) -> None:
        """Close it; jobs go on."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy of a model is at the same server

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    def _run(self, order: Order) -> Any:
        return self._transport.run(self._talk.run(order, watch_for(order.show)))

    def _submit(self, order: Order) -> Job:
        status = self._transport.run(self._talk.submit(order))
        return Job(self._talk, self._transport, status.id, read=order.read, last=status)


def loaded(found: Structure, name: str, url: str, runner: JobRunner) -> HookedTransformer:
    """A model of what was fetched, for the runner to run.

    Raises:
        ConfigError: this version of lenskit has no such architecture.
    """
    model = HookedTransformer.from_pretrained(found.folder, device="meta")
    model.source = f"{name} at {url}"
    move(model, dtype_of(found.described))
    model.remote = runner
    return model


def move(model: TextAccess, dtype: torch.dtype) -> None:
    """Make a model on the meta device one whose weights are on a server: inputs and results are on the CPU."""
    model.to(dtype)
    take_away(model)
    model.inputs_on = torch.device("cpu")
