"""The training loop, the same for every method: data, step, measurement, checkpoint."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsup_xbn import build, checkpoint
from selfsup_xbn.config import Config, differences, from_resolved, resolved
from selfsup_xbn.data import Batch, eval_batches, limit
from selfsup_xbn.errors import Diverged, Interrupted, UserError
from selfsup_xbn.evaluation.drift import Drift, FeatureDrift
from selfsup_xbn.feature_queue import FeatureQueue
from selfsup_xbn.progress import Progress
from selfsup_xbn.report import draw_curves
from selfsup_xbn.run_log import RunFolder, check_folder
from selfsup_xbn.schedules import learning_rate

DRIFT_IMAGES = 128


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Trains as ``config`` says and returns the run's folder.

    Nothing is written before folder, data and sizes were found in order. A resumed run goes on from its last
    checkpoint and ends, on a CPU, bit for bit where it would have ended without the interruption.

    Raises:
        UserError: the input is at fault.
        Diverged: the loss is no longer finite.
        Interrupted: SIGTERM or SIGINT came; the run saved itself and can be resumed.
    """
    folder = Path(config.run_folder)
    check_folder(folder, config, resume=resume, overwrite=overwrite)
    run = Run(config)
    state = checkpoint.load(folder) if resume and (folder / checkpoint.NAME).exists() else None
    if state:
        run.load_state_dict(state)
    with (
        _signals() as asked_to_stop,
        contextlib.closing(RunFolder(folder, config, keep_bytes=state["log_bytes"] if state else 0)) as log,
    ):
        if not state:
            log.log({"epoch": 0, **run.baselines()})
        _fit(run, log, asked_to_stop)
    draw_curves(folder)
    return folder


def _fit(run: Run, log: RunFolder, asked_to_stop: list[int]) -> None:
    config = run.config
    progress = Progress(run.steps * config.epochs, run.steps * run.epoch + run.step)
    with contextlib.closing(progress):
        while run.epoch < config.epochs:
            for batch in run.batches.epoch(run.epoch, start=run.step):
                run.train_step(batch)
                if progress.step():
                    progress.look(loss=f"{run.mean_loss():.3f}", lr=f"{run.lr:.2g}")
                if asked_to_stop:
                    _save(run, log)
                    raise Interrupted(f"stopped at epoch {run.epoch}, step {run.step}; go on with --resume")
            record = run.end_epoch()
            log.log(record)
            progress.epoch(run.epoch, config.epochs, record)
            if run.epoch % config.save_every == 0 or run.epoch == config.epochs:
                _save(run, log)


def _save(run: Run, log: RunFolder) -> None:
    checkpoint.save(run.state_dict() | {"log_bytes": log.position}, log.folder)


class Meter:
    """Sums over an epoch, on the device until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, drift, largest drift
        self.steps = self.drifts = 0
        self.seconds = 0.0
        self._since = time.perf_counter()

    def add(self, loss: Tensor, drift: Drift | None) -> None:
        """Counts a step."""
        self.steps += 1
        self.sums[0] += loss.detach()
        if drift is not None:
            self.drifts += 1
            self.sums[1] += drift.mean
            self.sums[2] = torch.maximum(self.sums[2], drift.maximum)

    def record(self, batch_size: int) -> dict[str, float]:
        """Means over the epoch, and images a second end to end. Waits for the device."""
        loss, drift, largest = self.sums.tolist()
        seconds = self.seconds + time.perf_counter() - self._since
        found = {"loss": loss / self.steps, "images_per_second": self.steps * batch_size / seconds}
        return found | ({"drift": drift / self.drifts, "drift_max": largest} if self.drifts else {})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of an epoch needs."""
        seconds = self.seconds + time.perf_counter() - self._since
        return {"sums": self.sums, "steps": self.steps, "drifts": self.drifts, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.sums.copy_(state["sums"])
        self.steps, self.drifts, self.seconds = state["steps"], state["drifts"], state["seconds"]


class Run:
    """All that a run is made of, and its position: ``epoch`` epochs and ``step`` steps of the next one are done."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, build.device_of(config.device)
        self.data = build.data_of(config)
        build.check_sizes(config, len(self.data.train))
        torch.manual_seed(config.seed)
        self.method = build.method_of(config, build.encoder_of(config, self.data)).to(self.device)
        self.optimizer = build.optimizer_of(config, self.method)
        self.batches = build.batches_of(config, self.data, self.device)
        self.probe = build.probe_of(config, self.data, self.device)
        fixed = limit(self.data.train, DRIFT_IMAGES, config.seed)
        images = next(eval_batches(fixed, self.data, device=self.device, batch_size=DRIFT_IMAGES))
        self.drift = FeatureDrift(self.method.encoder, images)
        self.epoch = self.step = 0
        self.meter = Meter(self.device)
        self.autocast = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        self.method.to(memory_format=self.layout)
        if config.compile:
            for module in self.method.children():
                module.compile()

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.batches)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.config, self.epoch, self.step / self.steps)

    def train_step(self, batch: Batch) -> None:
        """One step; nothing here waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        progress = (self.epoch + self.step / self.steps) / self.config.epochs
        views = tuple(view.contiguous(memory_format=self.layout) for view in batch.views)
        measured = self.config.drift_every and self.step % self.config.drift_every == 0
        if measured:
            self.drift.update()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.method(views, batch.labels, progress)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.meter.add(loss, self.drift.update() if measured else None)

    def mean_loss(self) -> float:
        """Mean loss of the epoch as yet. Waits for the device.

        Raises:
            Diverged: it is not finite.
        """
        loss = self.meter.sums[0].item() / max(1, self.meter.steps)
        if not math.isfinite(loss):
            last = Path(self.config.run_folder) / checkpoint.NAME
            kept = f"the last good state is {last}" if last.exists() else "no checkpoint was written yet"
            raise Diverged(
                f"the loss is {loss} at epoch {self.epoch}, step {self.step}, learning rate {self.lr:.3g}; {kept}; "
                "try a smaller --lr, --warmup-epochs, or --precision fp32"
            )
        return loss

    def end_epoch(self) -> dict[str, Any]:
        """The record of the epoch that is done: means, the queue's state, and an evaluation where one is due."""
        self.mean_loss()
        record: dict[str, Any] = {"epoch": self.epoch + 1, "step": (self.epoch + 1) * self.steps, "lr": self.lr}
        record |= self.meter.record(self.config.batch_size) | _queue_record(self.method.queue)
        self.epoch, self.step, self.meter = self.epoch + 1, 0, Meter(self.device)
        every = self.config.knn_every
        if self.epoch == self.config.epochs or (every and self.epoch % every == 0):
            record |= self.probe.encoder(self.method.encoder)
        return record

    def baselines(self) -> dict[str, float]:
        """What an encoder must beat: raw pixels, and its own random start."""
        return {"knn_top1_raw_pixels": self.probe.raw_pixels()} | self.probe.encoder(self.method.encoder, "_untrained")

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs."""
        return {
            "config": resolved(self.config),
            "network": {"channels": self.data.channels, "image_size": self.data.image_size},
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
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
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meter.load_state_dict(state["meter"])
        self.epoch, self.step = state["epoch"], state["step"]
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def _queue_record(queue: FeatureQueue | None) -> dict[str, int | float]:
    if queue is None:
        return {}
    gain = getattr(queue.adaptation, "gain", None)
    return {"skipped_batches": int(queue.skipped)} | ({} if gain is None else {"gain": gain.item()})


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that gets the number of a SIGTERM or SIGINT; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
