"""A worker: one process with one replica of a model. Claims jobs, runs them together, keeps their results.

The process that started it writes lines of JSON to its standard input ({"wake": true}, {"cancel": id}; the end of it is
the worker's end, too) and reads lines from its standard output: what happens, as it happens. Both are hints only. What
is to be done, and what was, is in the database.
"""

import contextlib
import gc
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from sqlalchemy.exc import SQLAlchemyError

from lenskit.batching import Forward, SharedRun
from lenskit.errors import JobCancelledError, LenskitError, OutOfRoomError, RemoteError
from lenskit.generation import Generation, Step
from lenskit.interventions.execution import Execution
from lenskit.interventions.forward import Result, forward
from lenskit.remote.wire import error_to_wire, pack, result_to_wire, unpack
from lenskit.server.admission import Ready, admit
from lenskit.server.config import Config, Model
from lenskit.server.database import Entry, connect, is_shared
from lenskit.server.jobs import FINAL, Jobs, Report
from lenskit.server.lease import Lease
from lenskit.server.results import Results
from lenskit.transformer import HookedTransformer

IDLE_SECONDS = 1.0  # after which an idle worker looks again, though nobody woke it
NOTED_SECONDS = 1.0  # between two notes in the database of how far jobs are
TOLD_SECONDS = 0.05  # between two lines about it
SECONDS_A_JOB = 0.002  # that are given to clients to send their next one, after a batch of many
LONGEST_GATHERING = 0.15
SECONDS_A_LOOK = 0.01


@dataclass(eq=False)
class Task:
    """A claimed job, on its way."""

    id: str
    row: Entry
    ready: Ready


Ended = tuple[Task, Result | Generation] | Report


@dataclass(eq=False)
class Worker:
    """The loop.

    tell: takes what happens, as data. attempts: see `Config`.
    """

    name: str
    model_name: str
    model: HookedTransformer
    jobs: Jobs
    results: Results
    config: Config
    tell: Callable[[Mapping[str, Any]], None]
    cancelled: set[str] = field(default_factory=set)
    awake: threading.Event = field(default_factory=threading.Event)
    stopping: bool = False

    def __post_init__(self) -> None:
        self._over: set[str] = set()  # of the batch that runs
        self._ended: queue.Queue[Ended] = queue.Queue()
        threading.Thread(target=self._keep_results, name="results", daemon=True).start()
        self._noted = self._told = 0.0
        self._newest = 0  # how many jobs the newest batch had

    def run(self) -> None:
        """Work until `stopping`."""
        while not self.stopping:
            self.awake.clear()
            if not self._next_batch():
                self.awake.wait(IDLE_SECONDS)
        self._ended.join()

    def once(self) -> bool:
        """Run the next batch to the end, if there is one."""
        found = self._next_batch()
        self._ended.join()
        return found

    def _next_batch(self) -> bool:
        try:
            self._gather()
            rows = self.jobs.claim(
                self.model_name, self.name, rows=self.config.batch_rows, tokens=self.config.batch_tokens
            )
        except SQLAlchemyError as error:  # the disk is full, or the database away: it may come back
            print(f"cannot claim jobs: {error}", file=sys.stderr)
            return False
        self._newest = len(rows)
        if not rows:
            return False
        self.tell({"event": "begun", "jobs": [row.id for row in rows], "rows": sum(row.rows for row in rows)})
        tasks = [task for row in rows if (task := self._prepared(row)) is not None]
        self._ended.join()  # so that no more results wait to be written than one batch has
        self._run_all(tasks)
        self.cancelled.clear()
        return True

    def _gather(self) -> None:
        """Where many jobs ran together, many come at once when they are answered: wait until as many are there."""
        end = time.monotonic() + min(LONGEST_GATHERING, self._newest * SECONDS_A_JOB)
        while self._newest > 1 and time.monotonic() < end and self.jobs.waiting(self.model_name) < self._newest:
            time.sleep(SECONDS_A_LOOK)

    def _prepared(self, row: Entry) -> Task | None:
        try:
            job, tensors = unpack(row.body)
            return Task(row.id, row, admit(self.model, job, tensors))
        except Exception as error:
            self._failed(row.id, error)
            return None

    def _run_all(self, tasks: Sequence[Task]) -> None:
        """Together where that can be, and each alone where together it cannot."""
        shared = [task for task in tasks if not task.ready.alone]
        if len(shared) > 1:
            try:
                shared = self._together(shared)
            except Exception as error:  # no room for all of them, or two that exclude each other: nobody's fault
                print(f"a batch of {len(shared)} jobs is run one by one: {error!r}"[:500], file=sys.stderr)
                self._let_go()
                # Anew, because what runs has drawn random numbers.
                left = [task.row for task in shared if task.id not in self._over]
                shared = [task for row in left if (task := self._prepared(row)) is not None]
        for task in (*shared, *(task for task in tasks if task.ready.alone)):
            self._alone(task)

    def _together(self, tasks: Sequence[Task]) -> list[Task]:
        """Run them as one batch; gives none back."""
        self._over = set()
        run = SharedRun(self.model, [task.ready.work for task in tasks])
        pairs = list(zip(tasks, run.members, strict=True))
        while not run.over:
            run.step()
            for task, member in pairs:
                if task.id in self._over:
                    continue
                if member.output is not None or member.error is not None:
                    self._over.add(task.id)
                    self._finished(task, member.error or member.output)
                elif task.id in self.cancelled:
                    self._over.add(task.id)
                    member.drop()
            self._at_step(run.index, [task.id for task in tasks if task.id not in self._over])
        return []

    def _alone(self, task: Task) -> None:
        try:
            self._finished(task, self._outcome(task))
        except Exception as error:
            self._finished(task, error)
            self._let_go()

    def _outcome(self, task: Task) -> Result | Generation | Exception:
        work = task.ready.work
        if isinstance(work, Forward):
            with torch.set_grad_enabled(bool(work.program.gradients)):
                return forward(self.model, work.batch, work.program)
        execution = Execution(work.program, generating=True)
        steps: dict[int, list[Step]] = {}
        for number, step in work.each(execution):
            steps.setdefault(number, []).append(step)
            if task.id in self.cancelled:
                return _cancelled()
            self._at_step(step.index + 1, [task.id])
        return work.result(execution, steps)

    def _at_step(self, step: int, ids: Sequence[str]) -> None:
        """Say how far jobs are, now and then; learn of those that were cancelled."""
        now = time.monotonic()
        if ids and now - self._told > TOLD_SECONDS:
            self._told = now
            self.tell({"event": "step", "jobs": list(ids), "step": step})
        if ids and now - self._noted > NOTED_SECONDS:
            self._noted = now
            with contextlib.suppress(SQLAlchemyError):
                self.cancelled |= set(ids) - self.jobs.progress(ids, self.name, step)

    # -- what came of it

    def _finished(self, task: Task, outcome: Result | Generation | Exception | None) -> None:
        if isinstance(outcome, Exception):
            self._failed(task.id, outcome)
        elif outcome is not None:
            self._ended.put((task, outcome))

    def _failed(self, id: str, error: Exception) -> None:
        if not isinstance(error, LenskitError):
            print(f"{id} failed: {error!r}"[:2000], file=sys.stderr)
        self._ended.put(Report(id, error_to_wire(_told(error))))

    def _keep_results(self) -> None:
        """Write results and note how jobs ended: of all that are there at once, in one transaction."""
        while True:
            ended = [self._ended.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    ended.append(self._ended.get_nowait())
            reports = [some if isinstance(some, Report) else self._written(*some) for some in ended]
            self._report(reports)
            for _ in ended:
                self._ended.task_done()

    def _written(self, task: Task, outcome: Result | Generation) -> Report:
        try:
            if isinstance(outcome, Result) and not task.ready.logits:
                outcome = Result(outcome.tokens, outcome.mask, outcome.saved, None)
            data = pack(*result_to_wire(outcome))
            self.results.write(task.id, data)
        except Exception as error:
            print(f"the result of {task.id} cannot be written: {error!r}"[:2000], file=sys.stderr)
            return Report(task.id, error_to_wire(_told(error)))
        self.tell({"event": "saved", "job": task.id})
        return Report(task.id, result_bytes=len(data), step=task.ready.steps)

    def _report(self, reports: Sequence[Report]) -> None:
        """As often as it takes: a job whose end nobody notes would never end."""
        while True:
            try:
                ended = self.jobs.finish(reports, self.name)
                break
            except SQLAlchemyError as error:
                print(f"cannot note how {len(reports)} jobs ended: {error}"[:500], file=sys.stderr)
                time.sleep(0.5)
        for report, status in zip(reports, ended, strict=True):
            if status in (None, "cancelled") and report.error is None:
                self.results.delete(report.job)
            if status in FINAL:  # and not taken from here, and run elsewhere
                self.tell({"event": "over", "job": report.job, "status": status})

    def _let_go(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _told(error: Exception) -> Exception:
    """What is told of an error."""
    text = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    if isinstance(error, LenskitError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return OutOfRoomError(
            "there was no memory left for the job",
            got=text,
            expected="a job that fits",
            fix="send fewer or shorter prompts at once, or save less of them",
        )
    if isinstance(error, OSError):
        return OutOfRoomError(
            "the result could not be written",
            got=f"{type(error).__name__}: {os.strerror(error.errno) if error.errno else 'no reason given'}",
            expected="room where results are kept",
            fix="try again later; whoever runs the server has to make room",
        )
    return RemoteError(
        "the job failed while it ran",
        got=f"{type(error).__name__}: {text}",
        expected="ops that can be carried out",
        fix="run the same plan on a small local model, where every error says more",
    )


def _cancelled() -> JobCancelledError:
    return JobCancelledError(
        "the job was cancelled", got="a DELETE while it ran", expected="a job that may end", fix="send it again"
    )


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
