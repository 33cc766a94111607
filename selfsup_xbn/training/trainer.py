"""The training loop, the same for every method: data, step, measurement, checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsup_xbn.config.schema import Config, differences, from_resolved, resolved, save_interval
from selfsup_xbn.data import Batch, eval_batches, limit
from selfsup_xbn.data.sampler import seed_for
from selfsup_xbn.errors import Diverged, Interrupted, UserError
from selfsup_xbn.evaluation.collapse import collapse_warning, embedding_std
from selfsup_xbn.evaluation.drift import FeatureDrift, moment_gap
from selfsup_xbn.evaluation.evaluators import RetrievalProbe, baselines
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.methods.metric_learning import MetricLearning
from selfsup_xbn.report.curves import draw_curves
from selfsup_xbn.report.gallery import draw_gallery
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import RunFolder, check_folder
from selfsup_xbn.training import build
from selfsup_xbn.training import preflight as limits
from selfsup_xbn.training.metrics import Meter
from selfsup_xbn.training.optimisation import learning_rate
from selfsup_xbn.training.progress import Progress
from selfsup_xbn.training.signals import stop_signals
from selfsup_xbn.utils import distributed
from selfsup_xbn.utils.distributed import rank, world

DRIFT_IMAGES = 128


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Trains as ``config`` says and returns the run's folder.

    Nothing is written before folder, data and sizes were found in order. A resumed run goes on from its last
    checkpoint and ends, on a CPU, bit for bit where it would have ended without the interruption. Of several
    processes that torchrun started, all must see the folder, which the first of them writes.

    Raises:
        UserError: the input is at fault.
        Diverged: the loss is no longer finite.
        ProcessLost: another process of the run ended, or did not answer in time.
        Interrupted: SIGTERM or SIGINT came; the run saved itself and can be resumed.
    """
    folder = Path(config.run_folder)
    with distributed.process_group(config.timeout) as first:
        run = _train(config, folder, resume=resume, overwrite=overwrite)
    if first:  # and alone: the others are done
        _draw(run, folder)
    return folder


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


def _draw(run: Run, folder: Path) -> None:
    try:
        draw_curves(folder)
        if isinstance(run.probe, RetrievalProbe):
            draw_gallery(folder, run.probe, run.method.encoder)
    except OSError as error:  # a full disk: the run is done and saved
        warnings.warn(f"a picture could not be drawn in {folder} ({error.strerror})", stacklevel=2)


def _fit(run: Run, log: RunFolder | None, asked_to_stop: list[int]) -> None:
    """Trains to the end. The process that is given a log keeps it and the checkpoints."""
    config, any_process = run.config, distributed.AnyProcess()
    save_epochs, save_seconds = save_interval(config.save_every)
    saved = time.monotonic()
    progress = Progress(run.steps * run.epochs, run.steps * run.epoch + run.step)
    with contextlib.closing(progress):
        while run.epoch < run.epochs:
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
            if run.is_best(record) and config.mode == "supervise":
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


class Run:
    """All that a run is made of, and its position: ``epoch`` epochs and ``step`` steps of the next one are done."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, build.device_of(config.device)
        with distributed.first_goes_first():
            self.data = build.data_of(config)
        build.check_sizes(config, len(self.data.train))
        limits.check_memory(config, len(self.data.train), self.device)
        torch.manual_seed(config.seed)
        encoder = build.encoder_of(config, self.data)
        self.method = build.method_of(config, encoder, len(self.data.train)).to(self.device)
        self.batches = build.batches_of(config, self.data, self.device, (rank(), world()))
        self.probe = build.probe_of(config, self.data, self.device)
        fixed = limit(self.data.train, DRIFT_IMAGES, config.seed)
        images = next(eval_batches(fixed, self.data, device=self.device, batch_size=DRIFT_IMAGES))
        self.drift = FeatureDrift(self.method.encoder, images)
        self.head_epochs = getattr(config, "head_epochs", 0)
        self.epochs, self.steps = self.head_epochs + config.epochs, len(self.batches)
        self.epoch = self.step = 0
        self.best = -math.inf
        self.meter = Meter(self.device)
        self.optimizer = self._make_optimizer()
        self.autocast = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        self.method.to(memory_format=self.layout)
        statistics = ("running_mean", "running_var")
        self.statistics = [value for name, value in self.method.named_buffers() if name.endswith(statistics)]
        if config.compile:
            for module in self.method.children():
                module.compile()

    @property
    def head_stage(self) -> bool:
        """Whether the head alone is trained as yet."""
        return self.epoch < self.head_epochs

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        if self.head_stage:
            return getattr(self.config, "head_lr", 0.0)
        return learning_rate(self.config, self.epoch - self.head_epochs, self.step / self.steps)

    def train_step(self, batch: Batch) -> None:
        """One step; nothing here waits for the device."""
        if rank() > 0:  # dropout of its own; process 0 draws from the stream that the checkpoint holds
            torch.manual_seed(seed_for(self.config.seed, rank(), self.epoch, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        views = tuple(view.contiguous(memory_format=self.layout) for view in batch.views)
        measured = self.config.drift_every > 0 and self.step % self.config.drift_every == 0
        if self.method.queue is not None:
            self.method.queue.recording = measured
        if measured:
            self.drift.update()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self._loss(views, batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        if world() > 1:
            self._share()
        self.optimizer.step()
        self.step += 1
        self.meter.add("loss", loss)
        if measured:
            self._measure()

    def _loss(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        if self.head_stage:
            assert isinstance(self.method, MetricLearning)
            return self.method.head_loss(views, labels)
        step = (self.epoch - self.head_epochs) * self.steps + self.step
        return self.method(views, labels, step, self.config.epochs * self.steps)

    def _share(self) -> None:
        """Makes the gradients those of the whole batch, and running statistics the mean over the processes."""
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        distributed.reduce_([parameter.grad for parameter in trained if parameter.grad is not None], self.statistics)

    def _measure(self) -> None:
        """Drift over the last step (Eq. 5), and what adapting made of the gap between queue and batch."""
        drift = self.drift.update()
        assert drift is not None
        self.meter.add("drift", drift.mean)
        self.meter.add_maximum("drift_max", drift.maximum)
        record = None if self.method.queue is None else self.method.queue.record
        if record is not None and self.epoch + self.step > 1:  # the very first step meets an empty queue
            for when, moments in (("before", record.before), ("after", record.after)):
                gap = moment_gap(moments, record.batch)
                self.meter.add(f"gap_mean_{when}", gap.mean)
                self.meter.add(f"gap_std_{when}", gap.std)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        if self.head_stage:
            head = self.method.encoder.head.parameters()
            return torch.optim.SGD(head, self.lr, momentum=self.config.sgd_momentum)
        return build.optimizer_of(self.config, self.method)

    def mean_loss(self) -> float:
        """Mean loss of the epoch as yet. Waits for the device.

        Raises:
            Diverged: it is not finite, or a weight is not (a mined loss of NaN embeddings has no pairs, and is 0).
        """
        loss = self.meter.mean("loss")
        if not math.isfinite(loss) or not all(weight.isfinite().all() for weight in self.method.encoder.parameters()):
            last = Path(self.config.run_folder) / checkpoint.NAME
            kept = f"the last good state is {last}" if last.exists() else "no checkpoint was written yet"
            raise Diverged(
                f"loss {loss}, or weights that are not finite, at epoch {self.epoch}, step {self.step}, "
                f"learning rate {self.lr:.3g}; {kept}; "
                "try a smaller --lr, --warmup-epochs, or --precision fp32"
            )
        return loss

    def end_epoch(self) -> dict[str, Any]:
        """The record of the epoch that is done: means, the queue's state, and an evaluation where one is due."""
        self.mean_loss()
        record: dict[str, Any] = {"epoch": self.epoch + 1, "step": (self.epoch + 1) * self.steps, "lr": self.lr}
        record |= self.meter.record(self.config.batch_size) | _queue_record(self.method.queue)
        record["embedding_std"] = embedding_std(self.drift.embeddings()).item()
        self.epoch, self.step, self.meter = self.epoch + 1, 0, Meter(self.device)
        if self.epoch == self.head_epochs:
            self.optimizer = self._make_optimizer()
        every = self.config.eval_every
        if self.epoch == self.epochs or (every and self.epoch % every == 0):
            try:
                record |= self.probe.encoder(self.method.encoder)
            except UserError as error:  # the same evaluation went well before training
                raise Diverged(f"the encoder cannot be evaluated after epoch {self.epoch}: {error}") from error
        return record

    def is_best(self, record: dict[str, Any]) -> bool:
        """Whether the record's evaluation, if it has one, is the best as yet; remembers it."""
        value = record.get(self.probe.main, -math.inf)
        better = value > self.best
        self.best = max(self.best, value)
        return better

    def baselines(self) -> dict[str, float]:
        """What an encoder must beat: raw pixels, and its own random start."""
        return baselines(self.probe, self.method.encoder)

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs."""
        return {
            "config": resolved(self.config),
            "network": {"channels": self.data.channels, "image_size": self.data.image_size},
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "meter": self.meter.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there.

        Raises:
            UserError: the checkpoint is of another configuration.
        """
        if found := differences(from_resolved(state["config"]), self.config):
            raise UserError(f"the checkpoint is of another configuration ({found[0]}): drop the option")
        try:
            self._restore(state)
        except Exception as error:  # values of another version make torch raise nearly anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"the checkpoint does not fit this run, it is damaged or of another version: {reason}"
            ) from None

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.step, self.best = index(state["epoch"]), index(state["step"]), float(state["best"])
        if not (0 <= self.epoch <= self.epochs and 0 <= self.step <= self.steps):
            raise ValueError(f"epoch {self.epoch}, step {self.step}")
        self.method.load_state_dict(state["method"])
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.meter.load_state_dict(state["meter"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def _queue_record(queue: FeatureQueue | None) -> dict[str, int | float]:
    if queue is None:
        return {}
    gain = getattr(queue.adaptation, "gain", None)
    return {"skipped_batches": int(queue.skipped)} | ({} if gain is None else {"gain": gain.item()})
