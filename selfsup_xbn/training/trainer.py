"""The training loop, the same for every method: data, step, measurement, checkpoint."""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path

from selfsup_xbn.config.parsing import parse_save_interval
from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import Interrupted
from selfsup_xbn.evaluation.collapse import collapse_warning
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import RunFolder, check_folder
from selfsup_xbn.training import preflight as limits
from selfsup_xbn.training.progress import Progress
from selfsup_xbn.training.run import Run
from selfsup_xbn.training.signals import stop_signals
from selfsup_xbn.utils import distributed
from selfsup_xbn.utils.distributed import rank


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Run | None:
    """Train as ``config`` says. Return the run that is done; None on all processes but the first.

    Nothing is written before folder, data and sizes were found in order. A resumed run goes on from its last
    checkpoint and ends, on a CPU, bit for bit where it would have ended without the interruption. Of several
    processes that torchrun started, all must see the folder, which the first of them writes.

    Raises:
        UserError: the input is wrong.
        Diverged: the loss is no longer finite.
        ProcessLost: another process of the run ended, or did not answer in time.
        Interrupted: SIGTERM or SIGINT came; the run saved itself and can be resumed.
    """
    folder = Path(config.run_folder)
    with distributed.process_group(config.timeout) as first:
        run = _train(config, folder, resume=resume, overwrite=overwrite)
    return run if first else None


def _train(config: Config, folder: Path, *, resume: bool, overwrite: bool) -> Run:
    check_folder(folder, config, resume=resume, overwrite=overwrite)
    run = Run(config)
    state = checkpoint.load(folder) if resume and checkpoint.exists(folder) else None
    if state:
        run.load_state_dict(state)
    notes = [*run.data.notes, limits.queue_note(config, len(run.data.train))]
    print(*filter(None, notes), sep="\n", end="\n" * any(notes))
    before = {} if state else run.baselines()  # what cannot be evaluated is found here, before anything is replaced
    distributed.wait_for_all()  # all have read the folder
    with stop_signals() as asked_to_stop, contextlib.ExitStack() as stack:
        log = None
        if rank() == 0:
            log = RunFolder(folder, config, keep_bytes=state["log_bytes"] if state else 0)
            stack.callback(log.close)
            if not state:
                log.log({"epoch": 0, **before})
        _fit(run, log, asked_to_stop)
    return run


def _fit(run: Run, log: RunFolder | None, asked_to_stop: list[int]) -> None:
    """Trains to the end. The process that is given a log keeps it and the checkpoints."""
    config, any_process = run.config, distributed.AnyProcess()
    save_epochs, save_seconds = parse_save_interval(config.save_every)
    saved = time.monotonic()
    progress = Progress(run.steps * run.epochs, run.steps * run.epoch + run.step)
    with contextlib.closing(progress):
        while run.epoch < run.epochs:
            run.meter.start()
            for batch in run.batches.epoch(run.epoch, start=run.step):
                run.train_step(batch)
                if progress.step():
                    progress.look(loss=f"{run.mean_loss():.3f}", lr=f"{run.lr:.2g}")
                if save_seconds and time.monotonic() - saved >= save_seconds:
                    _save_good(run, log)
                    saved = time.monotonic()
                if any_process(bool(asked_to_stop)):
                    _save_good(run, log)
                    distributed.wait_for_all()
                    raise Interrupted(f"stopped at epoch {run.epoch}, step {run.step}; go on with --resume")
            record = run.end_epoch()
            if not log:
                continue
            log.log(record)
            progress.epoch(run.epoch, run.epochs, record)
            if warning := collapse_warning(record["embedding_std"], config.dim):
                warnings.warn(f"epoch {run.epoch}: {warning}", stacklevel=2)
            if run.is_best(record) and config.keeps_best:
                checkpoint.save(run.state_dict(), log.folder, checkpoint.BEST)
            if run.epoch == run.epochs or (save_epochs and run.epoch % save_epochs == 0):
                _save(run, log)


def _save_good(run: Run, log: RunFolder | None) -> None:
    """Saves in the middle of an epoch, unless the run has diverged: the last good checkpoint stays."""
    if log:
        run.mean_loss()
        _save(run, log)


def _save(run: Run, log: RunFolder) -> None:
    checkpoint.save(run.state_dict() | {"log_bytes": log.position}, log.folder, keep=run.config.keep)
