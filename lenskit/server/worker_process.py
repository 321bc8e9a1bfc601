"""A worker's process: its model, its loop, and the lines by which it and the process that started it tell each other.

Lines of JSON come on its standard input ({"wake": true}, {"cancel": id}; the end of it is the worker's end, too), and
go out on its standard output: what happens, as it happens. Both are hints only.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch

from lenskit.errors import LenskitError
from lenskit.remote.wire import error_to_wire
from lenskit.server.config import Config, Model
from lenskit.server.database import connect, is_shared
from lenskit.server.jobs import Jobs
from lenskit.server.lease import Lease
from lenskit.server.results import Results
from lenskit.server.worker import Worker
from lenskit.transformer import HookedTransformer


def load(model: Model) -> HookedTransformer:
    """The model with its weights."""
    dtype = None if model.dtype is None else getattr(torch, model.dtype)
    return HookedTransformer.from_pretrained(
        model.where, device=model.device, device_map=model.device_map, dtype=dtype, revision=model.revision
    )


def memory() -> list[dict[str, Any]]:
    """Devices, and what of their memory is in use, in bytes; of the CPU's, by this process."""
    found = [{"device": "cpu", "used": psutil.Process().memory_info().rss, "total": psutil.virtual_memory().total}]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append({"device": f"cuda:{index}", "used": total - free, "total": total})
    return found


def hired(name: str, model: Model, config: Config, tell: Callable[[Mapping[str, Any]], None]) -> Worker:
    """A worker with its weights, which has said that it is alive where others need to know.

    Raises:
        LenskitError: the model cannot be loaded.
    """
    loaded = load(model)
    jobs = Jobs(connect(config.database_url))
    if is_shared(config.database_url):
        Lease(name, model.name, jobs, config, memory)
    return Worker(
        name=name,
        model_name=model.name,
        model=loaded,
        jobs=jobs,
        results=Results(config.results_url),
        config=config,
        tell=tell,
    )


def main(arguments: Sequence[str]) -> None:
    """The process: its name, the model, and the server's configuration, as JSON on the first line of its input."""
    [name] = arguments
    told = json.loads(sys.stdin.readline())
    model = Model(**told["model"])
    config = Config(**told["config"])
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints must not be taken for a line of ours
    lock = threading.Lock()

    def tell(data: Mapping[str, Any]) -> None:
        with lock, contextlib.suppress(OSError):
            lines.write(json.dumps(data) + "\n")

    try:
        worker = hired(name, model, config, tell)
    except LenskitError as error:
        tell({"event": "failed", "error": error_to_wire(error)})
        raise SystemExit(3) from error
    threading.Thread(target=_listen, args=(worker,), daemon=True).start()
    tell({"event": "ready", "memory": memory()})
    worker.run()


def _listen(worker: Worker) -> None:
    for line in sys.stdin:
        told = json.loads(line)
        if "cancel" in told:
            worker.cancelled.add(told["cancel"])
        if told.get("memory"):
            worker.tell({"event": "memory", "memory": memory()})
        if told.get("stop"):
            worker.stopping = True
        worker.awake.set()
    os._exit(0)  # whoever started this is gone; what was running is in the database


if __name__ == "__main__":
    main(sys.argv[1:])
