"""A worker: the loop of one replica of a model. Claims jobs, runs them together, keeps their results.

While a batch of generations runs, others join it between two steps, and forward passes run there. What is to be done,
and what was, is in the database; what a worker is told (`awake`, `cancelled`) and tells are hints only.
"""

import contextlib
import gc
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sqlalchemy.exc import SQLAlchemyError

from lenskit.batching import Forward, Member, SharedRun
from lenskit.errors import JobCancelledError, LenskitError, OutOfRoomError, RemoteError
from lenskit.generation import Generation, Step
from lenskit.interventions.execution import Execution
from lenskit.interventions.forward import Result, forward
from lenskit.remote.wire import error_to_wire, pack, result_to_wire, unpack
from lenskit.server.admission import Ready, admit
from lenskit.server.config import Config
from lenskit.server.database import Entry
from lenskit.server.jobs import FINAL, Beside, Jobs, Report, by_step
from lenskit.server.results import Results
from lenskit.transformer import HookedTransformer

IDLE_SECONDS = 1.0  # after which an idle worker looks again, though nobody woke it
NOTED_SECONDS = 1.0  # between two notes in the database of how far jobs are
TOLD_SECONDS = 0.05  # between two lines about it
CLOSED_SECONDS = 0.15  # between two looks at what has come, which then comes together
NEWCOMERS = 0.15  # of a batch's time may go into first steps of those who come later, and forward passes
COPYING = 0.05  # of its time may go into putting them under each other


@dataclass(eq=False)
class Task:
    """A claimed job, on its way.

    member: in a batch, what it is there.
    """

    id: str
    row: Entry
    ready: Ready
    member: Member = field(init=False)


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
        self._later: list[Entry] = []  # claimed, to be run once the batch that runs is over
        self._ended: queue.Queue[Ended] = queue.Queue()
        threading.Thread(target=self._keep_results, name="results", daemon=True).start()
        self._noted = self._told = self._looked = self._closed_until = 0.0

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
        rows = self._claimed()
        found = bool(rows)
        while rows:
            tasks = self._prepared(rows)
            self._ended.join()  # so that no more results wait to be written than one batch has
            self._run_all(tasks)
            rows, self._later = self._later, []
        self.cancelled.clear()
        return found

    def _claimed(self, beside: Beside | None = None) -> Sequence[Entry]:
        self._looked = time.monotonic()
        limits = {"rows": self.config.batch_rows, "tokens": self.config.batch_tokens}
        try:
            rows = self.jobs.claim(self.model_name, self.name, **limits, beside=beside)
        except SQLAlchemyError as error:  # the disk is full, or the database away: it may come back
            print(f"cannot claim jobs: {error}", file=sys.stderr)
            return []
        if rows:
            joined = beside if beside is not None and rows[0].verb == "generate" else None
            n_rows = sum(row.rows for row in rows) + (0 if joined is None else joined.rows)
            ids = [row.id for row in rows]
            self.tell({"event": "begun", "jobs": ids, "rows": n_rows, "joined": joined is not None})
        return rows

    def _prepared(self, rows: Sequence[Entry]) -> list[Task]:
        tasks = []
        for row in rows:
            try:
                job, tensors = unpack(row.body)
                tasks.append(Task(row.id, row, admit(self.model, job, tensors)))
            except Exception as error:
                self._failed(row.id, error)
        return tasks

    def _run_all(self, tasks: Sequence[Task]) -> None:
        """Together where that can be, and each alone where together it cannot."""
        shared: list[Task] = []
        apart: list[Task] = []
        for task in tasks:
            (apart if task.ready.alone or task.row.attempts > 1 else shared).append(task)
        may_grow = sum(task.row.rows for task in shared) < self.config.batch_rows
        if len(shared) > 1 or (shared and shared[0].row.verb == "generate" and may_grow):
            try:
                self._together(shared)
            except Exception as error:  # no room for all of them, or two that exclude each other: nobody's fault
                print(f"a batch of {len(shared)} jobs is run one by one: {error!r}"[:500], file=sys.stderr)
                self._let_go()
                shared = self._prepared([task.row for task in shared])  # because what runs has drawn random numbers
        for task in (*shared, *apart):
            self._alone(task)

    def _together(self, going: list[Task]) -> None:
        """Run them as one batch, and what comes meanwhile with them. `going` has those that are not over."""
        run = self._batch_of(going)
        while going:
            run.step()
            self._settle(going)
            self._at_step({task.id: task.member.index for task in going})
            if going and run.generating:
                self._let_in(run, going)

    def _batch_of(self, tasks: Sequence[Task]) -> SharedRun:
        run = SharedRun(self.model, [task.ready.work for task in tasks])
        for task, member in zip(tasks, run.members, strict=True):
            task.member = member
        return run

    def _settle(self, going: list[Task]) -> None:
        """Report those that a step has ended, and take them out."""
        before = len(going)
        for task in going:
            if task.member.output is not None or task.member.error is not None:
                self._finished(task, task.member.error or task.member.output)
            elif task.id in self.cancelled:
                task.member.drop()
        going[:] = [task for task in going if not task.member.over]
        if len(going) < before:
            self.awake.set()  # there is room

    def _let_in(self, run: SharedRun, going: list[Task]) -> None:
        """Between two steps: take in the generations that wait, or run the forward passes, whichever comes first."""
        began = time.monotonic()
        if self.stopping or began < self._closed_until or self._later or not self._ended.empty():
            return
        if not self.awake.is_set() and began - self._looked < IDLE_SECONDS:
            return
        self.awake.clear()
        rows = self._claimed(Beside(run.n_rows, run.n_columns)) if run.open else ()
        tasks, copying = self._prepared(rows), 0.0
        if rows and rows[0].verb == "forward":
            self._run_all(tasks)
        elif tasks:
            copying = self._join(run, going, tasks)
        self.cancelled.intersection_update([task.id for task in going])
        now = time.monotonic()
        self._closed_until = now + max(CLOSED_SECONDS, (now - began) * (1 / NEWCOMERS - 1), copying / COPYING)

    def _join(self, run: SharedRun, going: list[Task], tasks: list[Task]) -> float:
        """Take tasks in, or put them off; gives the seconds that it took to put them under the others."""
        try:
            others = self._batch_of(tasks)
            if others.open:
                others.step()
                self._settle(tasks)
                began = time.monotonic()
                if tasks:
                    run.join(others)
                    going += tasks
                return time.monotonic() - began
        except Exception as error:  # no room for them now
            print(f"{len(tasks)} jobs do not join a batch: {error!r}"[:500], file=sys.stderr)
            self._let_go()
        self._later = [task.row for task in tasks]
        return 0.0

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
            self._at_step({task.id: step.index + 1})
        return work.result(execution, steps)

    def _at_step(self, steps: Mapping[str, int]) -> None:
        """Say how far jobs are, now and then; learn of those that were cancelled."""
        now = time.monotonic()
        if steps and now - self._told > TOLD_SECONDS:
            self._told = now
            for step, ids in by_step(steps).items():
                self.tell({"event": "step", "jobs": ids, "step": step})
        if steps and now - self._noted > NOTED_SECONDS:
            self._noted = now
            with contextlib.suppress(SQLAlchemyError):
                self.cancelled |= steps.keys() - self.jobs.progress(steps, self.name)

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
