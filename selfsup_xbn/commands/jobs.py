"""Runs in several worker processes. A worker trains one run after the other, so that imports and data are loaded once.

A worker is in a process group of its own: Ctrl-C reaches the parent only, which stops each worker once by SIGTERM. The
worker then writes a checkpoint after its current step.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import Diverged, Interrupted, ProcessLost, UserError
from selfsup_xbn.runs.folder import has_run
from selfsup_xbn.runs.results import FINISHED
from selfsup_xbn.training.signals import stop_signals
from selfsup_xbn.utils.console import show_warning

POLL = 0.25
"""Seconds between two checks for a signal."""


@dataclass(frozen=True)
class Job:
    """A run to train.

    Attributes:
        label: Label of the run's cell.
        seed: Seed.
        config: Configuration, with ``out``.
    """

    label: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path(self.config.out)

    @property
    def log(self) -> Path:
        """File with the output of the run, beside the run folder."""
        return Path(f"{self.config.out}.log")

    @property
    def name(self) -> str:
        """Label and seed."""
        return f"{self.label}, seed {self.seed}"


@dataclass(frozen=True)
class Report:
    """A message about a job.

    Attributes:
        job: The job.
        done: Number of completed steps.
        total: Number of steps.
        ended: Whether the job has ended.
        error: Why the job failed, or "".
    """

    job: Job
    done: int = 0
    total: int = 1
    ended: bool = False
    error: str = ""


def run_jobs(jobs: Sequence[Job], *, processes: int, threads: int = 1) -> Iterator[Report]:
    """Train runs in worker processes, and yield what they report. Interrupted runs are resumed.

    A job that fails does not affect the others. The output of a run is appended to ``FOLDER.log``.

    Args:
        jobs: Runs to train.
        processes: Number of worker processes.
        threads: Number of threads of each worker.

    Yields:
        Progress of each job, about once per second, and one report with ``ended`` for each job.

    Raises:
        Interrupted: A SIGTERM or SIGINT was received. The runs in progress have written checkpoints.
    """
    waiting = deque(jobs)
    workers = [_Worker(threads) for _ in range(min(processes, len(jobs)))]
    with stop_signals() as signals, _stopped_at_the_end(workers):
        while not signals:
            for worker in workers:
                if worker.job is None and waiting:
                    worker.start(waiting.popleft())
            busy = {worker.connection: worker for worker in workers if worker.job is not None}
            if not busy:
                return
            for connection in wait(list(busy), timeout=POLL):
                assert isinstance(connection, Connection)
                yield busy[connection].report()
    raise Interrupted("runs whose training had begun are saved at their last step; repeat the command to continue")


@contextlib.contextmanager
def _stopped_at_the_end(workers: Sequence[_Worker]) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()


class _Worker:
    """A worker process, its connection, and its current job. It is started for its first job, and after a crash."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.job: Job | None = None
        self.process: Any = None
        self.connection: Any = None

    def start(self, job: Job) -> None:
        """Send a job to the process."""
        if self.process is None:
            context = get_context("spawn")
            self.connection, other = context.Pipe()
            self.process = context.Process(target=_work, args=(other, self.threads))
            self.process.start()
            other.close()
        self.job = job
        self.connection.send(job.config)

    def report(self) -> Report:
        """Receive a message of the process, which is ready or has ended."""
        job = self.job
        assert job is not None
        try:
            done, total, ended, error = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            done, total, ended, error = 0, 1, True, f"its process ended with exit code {self.process.exitcode}"
            self.process = None
        if ended:
            self.job = None
        return Report(job, done, total, ended, error)

    def stop(self) -> None:
        """Tell the process to end: at once if it is idle, otherwise after a checkpoint."""
        if self.process is not None and self.job is None:
            self.connection.close()
        elif self.process is not None:
            self.process.terminate()

    def join(self) -> None:
        """Wait until the process has ended. Its connection stays open, as a run in progress reports its last steps."""
        if self.process is not None:
            self.process.join()


def _work(connection: Connection, threads: int) -> None:
    """Train the runs whose configurations are received, until the other end is closed."""
    os.setpgid(0, 0)
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError):
        while True:
            config = connection.recv()
            error = _train(config, lambda done, total: connection.send((done, total, False, "")))
            connection.send((0, 1, True, error))


def _train(config: Config, watch: Callable[[int, int], None]) -> str:
    """Train a run without plots, with its output in a log, and return why it failed, or "" for success."""
    from selfsup_xbn.training.trainer import train

    folder, started = Path(config.out), time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(f"{folder}.log", "a"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        stack.enter_context(warnings.catch_warnings())  # a warning of an earlier run of this process is shown again
        warnings.showwarning = show_warning
        try:
            train(config, resume=has_run(folder), watch=watch)
        except Interrupted:
            raise SystemExit from None
        except BrokenPipeError:  # the parent has ended
            raise SystemExit from None
        except (UserError, Diverged, ProcessLost, OSError) as error:
            print(error)
            return " ".join(str(error).split())
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())} (traceback in {folder}.log)"
        (folder / FINISHED).write_text(f"{time.perf_counter() - started:.1f}\n")
    return ""
