"""A run in memory: its parts, its position, and one step of training."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsup_xbn.config.registry import EVALUATORS
from selfsup_xbn.config.schema import Config, differences, from_resolved, resolved
from selfsup_xbn.data import Batch, Batches, data_of, eval_batches, limit
from selfsup_xbn.data.sampler import seed_for
from selfsup_xbn.errors import Diverged, UserError
from selfsup_xbn.evaluation.collapse import embedding_std
from selfsup_xbn.evaluation.drift import FeatureDrift, moment_gap
from selfsup_xbn.evaluation.evaluators import Evaluator, baselines
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.methods.base import Method, method_class
from selfsup_xbn.models.pretrained import initial_encoder
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.training import preflight as limits
from selfsup_xbn.training.cuda_graph import GraphedStep
from selfsup_xbn.training.metrics import MetricAccumulator
from selfsup_xbn.training.optimisation import learning_rate, make_optimizer
from selfsup_xbn.utils import distributed
from selfsup_xbn.utils.device import device_of
from selfsup_xbn.utils.distributed import rank, world

DRIFT_IMAGES = 128


class Run:
    """All that a run is made of, and its position: ``epoch`` epochs and ``step`` steps of the next one are done."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, device_of(config.device)
        with distributed.first_goes_first():
            self.data = data_of(config)
        limits.check_sizes(config, len(self.data.train))
        limits.check_memory(config, len(self.data.train), self.device)
        torch.manual_seed(config.seed)
        encoder = initial_encoder(config, self.data.channels, self.data.image_size)
        self.method: Method = method_class(config).from_config(config, encoder, len(self.data.train)).to(self.device)
        self.batches = Batches.from_config(config, self.data, self.device, (rank(), world()))
        self.evaluator: Evaluator = EVALUATORS[config.evaluator].from_config(config, self.data, self.device)
        self.validator: Evaluator | None = None
        if self.data.validation is not None:
            held_out = replace(self.data, test=self.data.validation, gallery=None, disjoint=True)
            self.validator = EVALUATORS[config.evaluator].from_config(config, held_out, self.device)
        fixed = limit(self.data.train, DRIFT_IMAGES, config.seed)
        images = next(eval_batches(fixed, self.data, device=self.device, batch_size=DRIFT_IMAGES))
        self.drift = FeatureDrift(self.method.encoder, images)
        self.head_epochs = config.head_epochs
        self.epochs, self.steps = self.head_epochs + config.epochs, len(self.batches)
        self.epoch = self.step = 0
        self.best = -math.inf
        self.meter = MetricAccumulator(self.device)
        self.graphed = self._graph()
        self.optimizer = self._make_optimizer()
        self.autocast = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        self.method.to(memory_format=self.layout)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        statistics = ("running_mean", "running_var")
        self.statistics = [value for name, value in self.method.named_buffers() if name.endswith(statistics)]
        if config.compile:
            for module in self.method.children():
                module.compile()

    @property
    def head_stage(self) -> bool:
        """Whether this epoch trains the head alone."""
        return self.epoch < self.head_epochs

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        if self.head_stage:
            return self.config.head_lr
        return learning_rate(self.config, self.epoch - self.head_epochs, self.step / self.steps)

    def train_step(self, batch: Batch) -> None:
        """One step; nothing here waits for the device."""
        if rank() > 0:  # dropout of its own; process 0 draws from the stream that the checkpoint holds
            torch.manual_seed(seed_for(self.config.seed, rank(), self.epoch, self.step))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr)
            else:
                group["lr"] = self.lr
        views = tuple(view.contiguous(memory_format=self.layout) for view in batch.views)
        measured = self.config.drift_every > 0 and self.step % self.config.drift_every == 0
        if self.method.queue is not None:
            self.method.queue.recording = measured
        if measured:
            self.drift.update()
        loss = (self._step if measured or self.graphed is None else self._graphed)(views, batch.labels)
        self.step += 1
        self.meter.add("loss", loss)
        if measured:
            self._measure()

    def _step(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Forward pass, backward pass and optimiser step of one batch; returns the loss."""
        self.optimizer.zero_grad()
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=self.graphed is None
        ):
            loss = self._loss(views, labels)
        loss.backward()
        if world() > 1:
            self._share()
        self.optimizer.step()
        return loss.detach()

    def _graphed(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """``_step`` from a CUDA graph; eagerly from then on, with a warning, if the step cannot be captured."""
        assert self.graphed is not None
        try:
            loss = self.graphed(views, labels)
        except RuntimeError as error:
            self.graphed = None
            warnings.warn(f"the step runs without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=2)
            return self._step(views, labels)
        queue = self.method.queue
        if queue is not None and self.graphed.replays * len(labels) >= queue.size:
            queue.refresh()  # a graph cannot decide to
            self.graphed.replays = 0
        return loss

    def _graph(self) -> GraphedStep | None:
        """The step as a CUDA graph, where the device, the method and the settings allow one."""
        allowed = self.config.cuda_graph and self.device.type == "cuda" and world() == 1
        return GraphedStep(self._step) if allowed and self.method.capturable else None

    def _loss(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        if self.head_stage:
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
        return make_optimizer(self.config, self.method)

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
        self.epoch, self.step, self.meter = self.epoch + 1, 0, MetricAccumulator(self.device)
        if self.epoch == self.head_epochs:
            self.optimizer = self._make_optimizer()
        every = self.config.eval_every
        if self.epoch == self.epochs or (every and self.epoch % every == 0):
            try:
                record |= self._evaluate()
            except UserError as error:  # the same evaluation went well before training
                raise Diverged(f"the encoder cannot be evaluated after epoch {self.epoch}: {error}") from error
        return record

    def is_best(self, record: dict[str, Any]) -> bool:
        """Whether the record's evaluation, if it has one, is the best as yet; remembers it."""
        main = self.evaluator.main if self.validator is None else f"{self.evaluator.main}_validation"
        value = record.get(main, -math.inf)
        better = value > self.best
        self.best = max(self.best, value)
        return better

    def baselines(self) -> dict[str, float]:
        """Return the values of raw pixels and of the untrained encoder."""
        return baselines(self.evaluator, self.method.encoder) | self._validate()

    def _evaluate(self) -> dict[str, float]:
        return self.evaluator.encoder(self.method.encoder) | self._validate()

    def _validate(self) -> dict[str, float]:
        """Return the values on the held-out training classes, as ``NAME_validation``, if there are any."""
        values = {} if self.validator is None else self.validator.encoder(self.method.encoder)
        return {f"{name}_validation": value for name, value in values.items()}

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
        self.graphed = self._graph()
        self.meter.load_state_dict(state["meter"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def _queue_record(queue: FeatureQueue | None) -> dict[str, int | float]:
    if queue is None:
        return {}
    gain = getattr(queue.adaptation, "gain", None)
    return {"skipped_batches": int(queue.skipped)} | ({} if gain is None else {"gain": gain.item()})
