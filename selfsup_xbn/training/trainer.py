"""Training loop of all methods."""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path

from selfsup_xbn.config.parsing import parse_save_interval
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data.parts import part_lines
from selfsup_xbn.errors import Interrupted
from selfsup_xbn.evaluation.collapse import collapse_warning
from selfsup_xbn.evaluation.plan import evaluated_epochs
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import RunFolder, check_data, check_folder
from selfsup_xbn.training.preflight import empty_queue_note, queue_note
from selfsup_xbn.training.progress import Progress, Watch
from selfsup_xbn.training.run import Run
from selfsup_xbn.training.signals import stop_signals
from selfsup_xbn.utils import distributed
from selfsup_xbn.utils.console import show
from selfsup_xbn.utils.distributed import rank


def train(config: Config, *, resume: bool = False, overwrite: bool = False, watch: Watch | None = None) -> Run | None:
    """Train a run.

    Folder, data and sizes are checked before anything is written. A resumed run continues from its last checkpoint. On
    a CPU its results are bitwise equal to those of an uninterrupted run. All processes of a distributed run must have
    access to the run folder, which the first process writes.

    Args:
        config: Configuration of the run.
        resume: Whether to continue from the last checkpoint in the run folder, if there is one.
        overwrite: Whether to replace an existing run.
        watch: Function that is called with the numbers of completed and of all steps, about once per second.

    Returns:
        The completed run, or ``None`` on all processes but the first.

    Raises:
        UserError: The configuration, the data or the run folder is invalid.
        Diverged: The loss or a weight is not finite.
        ProcessLost: Another process of the run ended or timed out.
        Interrupted: The run received SIGTERM or SIGINT and wrote a checkpoint.
    """
    folder = Path(config.run_folder)
    with distributed.process_group(config.timeout) as first:
        run = _train(config, folder, resume=resume, overwrite=overwrite, watch=watch)
    return run if first else None


def _train(config: Config, folder: Path, *, resume: bool, overwrite: bool, watch: Watch | None) -> Run:
    check_folder(folder, config, resume=resume, overwrite=overwrite)
    run = Run(config)
    run.method.try_loss(1 + int(run.data.train.labels.max()))
    state = checkpoint.load(folder) if resume and checkpoint.exists(folder) else None
    if state:
        check_data(folder, run.data.digest)
        run.load_state_dict(state)
    notes = [queue_note(config, len(run.data.train)), empty_queue_note(config)]
    show(filter(None, [*run.data.notes, *part_lines(run.data), *run.weight_lines, *notes]))
    if not state and len(run.data.test):
        show(["evaluating raw pixels and the encoder before training ..."])
    baselines = {} if state else run.baselines()  # an evaluation that fails must fail before files are replaced
    distributed.wait_for_all()  # until all processes have read the folder
    with stop_signals() as signals, contextlib.ExitStack() as stack:
        log = None
        if rank() == 0:
            kept = (state["log_bytes"], state.get("log_sha256", "")) if state else (0, "")
            log = RunFolder(folder, config, *kept, data=run.data.digest)
            stack.callback(log.close)
            if not state:
                log.log({"epoch": 0, **baselines})
        _fit(run, log, signals, watch)
    return run


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
                if save_seconds and time.monotonic() - saved >= save_seconds:
                    _save_if_finite(run, log)
                    saved = time.monotonic()
                if any_process(bool(signals)):
                    _save_if_finite(run, log)
                    distributed.wait_for_all()
                    raise Interrupted(f"stopped at epoch {run.epoch}, step {run.step}; continue with --resume")
            progress.pause()
            record = run.end_epoch()
            if not log:
                continue
            log.log(record)
            evaluations = sum(epoch > run.epoch for epoch in evaluated_epochs(config))
            progress.epoch(run.epoch, run.epochs, record, evaluations * run.evaluation_seconds)
            if warning := collapse_warning(record["embedding_std"], config.dim):
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
            if run.is_best(record) and config.keeps_best:
                checkpoint.save(run.state_dict(), log.folder, checkpoint.BEST)
            if run.epoch == run.epochs or (save_epochs and run.epoch % save_epochs == 0):
                _save(run, log)


def _save_if_finite(run: Run, log: RunFolder | None) -> None:
    """Save a checkpoint within an epoch, unless the run has diverged.

    Raises:
        Diverged: The loss or a weight is not finite. The last checkpoint is kept.
    """
    if log:
        run.mean_loss()
        _save(run, log)


def _save(run: Run, log: RunFolder) -> None:
    checkpoint.save(run.state_dict() | log.log_state(), log.folder, keep=run.config.keep)
