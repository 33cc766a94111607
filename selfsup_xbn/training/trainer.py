"""Training loop of all methods."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selfsup_xbn.config.parsing import parse_save_interval
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data.parts import part_lines
from selfsup_xbn.errors import Interrupted
from selfsup_xbn.evaluation.collapse import collapse_warning
from selfsup_xbn.evaluation.plan import evaluated_epochs
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import RunFolder, began_in_this_launch, check_data, check_folder, has_run
from selfsup_xbn.runs.lock import FolderLock
from selfsup_xbn.training.agreement import agreed_checkpoint, agreed_config, check_same_data, on_first
from selfsup_xbn.training.preflight import accumulation_note, empty_queue_note, queue_note
from selfsup_xbn.training.progress import Progress, Watch
from selfsup_xbn.training.run import Run
from selfsup_xbn.training.signals import stop_signals
from selfsup_xbn.training.state import restore, state_of
from selfsup_xbn.utils import distributed
from selfsup_xbn.utils.console import show
from selfsup_xbn.utils.distributed import from_first, rank
from selfsup_xbn.utils.process_group import process_group


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    explicit: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Run | None:
    """Train a run.

    Folder, data and sizes are checked before anything is written. A resumed run continues from its last checkpoint. On
    a CPU its results are bitwise equal to those of an uninterrupted run. The first process of a distributed run reads
    and writes the run folder; the others need no access to it. After torchrun has restarted the processes, the run
    that they have begun is resumed.

    Args:
        config: Configuration of the run.
        resume: Whether to continue from the last checkpoint in the run folder, if there is one.
        overwrite: Whether to replace an existing run.
        explicit: With ``resume``, the options that the user of this process set; the processes of a distributed run
            take all others from the first one. ``None``: all of them.
        watch: Function that is called with the numbers of completed and of all steps, about once per second.

    Returns:
        The completed run, or ``None`` on all processes but the first.

    Raises:
        UserError: The configuration, the data or the run folder is invalid, or differs between the processes.
        Diverged: The loss or a weight is not finite.
        ProcessLost: Another process of the run ended or timed out.
        Interrupted: The run received SIGTERM or SIGINT and wrote a checkpoint.
    """
    with process_group(config.timeout) as first, contextlib.ExitStack() as stack:
        config = agreed_config(config, explicit if resume else None)
        lock = FolderLock(Path(config.run_folder))
        stack.callback(lock.release)
        run = _train(config, lock, stack, resume=resume, overwrite=overwrite, watch=watch)
    return run if first else None


def _train(
    config: Config,
    lock: FolderLock,
    stack: contextlib.ExitStack,
    *,
    resume: bool,
    overwrite: bool,
    watch: Watch | None,
) -> Run:
    folder, first = lock.folder, rank() == 0
    lock_folder = partial(_lock_folder, lock, config, overwrite=overwrite)
    resume = bool(from_first(torch.tensor(on_first(partial(lock_folder, resume)) or False)))
    run = Run(config)
    check_same_data(run.data)
    run.method.try_loss(1 + int(run.data.train.labels.max()))
    state = agreed_checkpoint(folder, resume)
    if state:
        on_first(partial(check_data, folder, run.data.digest))
        restore(run, state)
    if resume:
        show([_resume_line(run, folder, bool(state))])
    notes = [queue_note(config, len(run.data.train)), empty_queue_note(config), accumulation_note(config, run.method)]
    parts = [*run.data.notes, *part_lines(run.data, config.evaluator)]
    show(filter(None, [*parts, *run.weight_lines, *notes, *run.method.notes()]))
    if not state and len(run.data.test):
        show(["evaluating raw pixels and the untrained encoder ..."])
    baselines = {} if state else run.baselines()  # an evaluation that fails must fail before files are replaced
    distributed.wait_for_all()  # until all processes have read the folder
    signals = stack.enter_context(stop_signals())
    log = None
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(resume)
        kept = (state["log_bytes"], state.get("log_sha256", "")) if state else (0, "")
        log = RunFolder(folder, config, *kept, data=run.data.digest)
        stack.callback(log.close)
        if not state:
            log.log({"epoch": 0, **baselines})
    _fit(run, log, signals, watch)
    return run


def _lock_folder(lock: FolderLock, config: Config, resume: bool, *, overwrite: bool) -> bool:
    """Lock and check the run folder, unless it is locked already, and return whether to resume the run in it."""
    lock.acquire()
    resume = resume or began_in_this_launch(lock.folder)
    check_folder(lock.folder, config, resume=resume, overwrite=overwrite and not resume)
    return resume


def _resume_line(run: Run, folder: Path, has_checkpoint: bool) -> str:
    """Return what a run with ``--resume`` does: where it continues, that it is finished, or why it starts."""
    if not has_checkpoint:
        return f"{folder} has no checkpoint: starting" if has_run(folder) else f"no run in {folder}: starting one"
    if run.epoch == run.epochs:
        return "already finished"
    step = f"step {run.step} of " if run.step else ""
    return f"continuing after {step}epoch {run.epoch + bool(run.step)} of {run.epochs}"


def _fit(run: Run, log: RunFolder | None, signals: list[int], watch: Watch | None) -> None:
    """Train until the last epoch. The process that has a log writes the log and the checkpoints."""
    config, any_process = run.config, distributed.AnyProcess()
    save_epochs, save_seconds = parse_save_interval(config.save_every)
    saved = time.monotonic()
    progress = Progress(run.steps * run.epochs, run.steps * run.epoch + run.step, watch)
    with contextlib.closing(progress):
        while run.epoch < run.epochs:
            run.meter.start()
            progress.resume()
            for batch in run.batches.epoch(run.epoch, start=run.step):
                run.train_step(batch)
                if progress.step():
                    progress.show(loss=f"{run.mean_loss():.3f}", lr=f"{run.lr:.2g}")
                due = save_seconds > 0 and time.monotonic() - saved >= save_seconds
                stop, save = any_process(bool(signals), due)
                if save:
                    _save_if_finite(run, log)
                    saved = time.monotonic()
                if stop:
                    _save_if_finite(run, log)
                    distributed.wait_for_all()
                    raise Interrupted(f"stopped at {run.logged_position}; continue with --resume")
            progress.pause()
            record = run.end_epoch()
            if log:
                log.log(record)
                evaluations = sum(epoch > run.epoch for epoch in evaluated_epochs(config))
                progress.epoch(run.epoch, run.epochs, record, evaluations * run.evaluation_seconds)
                _warn(run, record)
            keeps_best = config.keeps_best or run.validator is not None
            if from_first(torch.tensor(run.is_best(record))) and keeps_best:
                _save(run, log, best=True)
            if run.epoch == run.epochs or (save_epochs and run.epoch % save_epochs == 0):
                _save(run, log)


def _warn(run: Run, record: dict[str, Any]) -> None:
    """Warn about the epoch of a record: collapsed embeddings, steps without pairs, a loss of 0."""
    if warning := collapse_warning(record["embedding_std"], run.config.dim):
        warnings.warn(f"epoch {run.epoch}: {warning}", stacklevel=2)
    if share := record.get("steps_without_pairs"):
        warnings.warn(
            f"epoch {run.epoch}: {share:.0%} of the steps had no pairs, so that their loss is 0 and nothing is "
            "learned; try other margins in --miner-args, or --miner none",
            stacklevel=2,
        )
    elif record.get("loss") == 0:
        warnings.warn(
            f"epoch {run.epoch}: the loss was 0 at every step, so nothing was trained: no pair was counted; "
            "check --loss, --miner, their arguments and --images-per-class",
            stacklevel=2,
        )


def _save_if_finite(run: Run, log: RunFolder | None) -> None:
    """Save a checkpoint within an epoch, unless the run has diverged.

    Raises:
        Diverged: The loss or a weight is not finite. The last checkpoint is kept.
    """
    if log:
        run.mean_loss()
    _save(run, log)


def _save(run: Run, log: RunFolder | None, *, best: bool = False) -> None:
    """Write a checkpoint. All processes must call it, as each has a part of a sharded queue."""
    state = state_of(run)
    if log and best:
        checkpoint.save(state, log.folder, checkpoint.BEST)
    elif log:
        checkpoint.save(state | log.log_state(), log.folder, keep=run.config.keep)
