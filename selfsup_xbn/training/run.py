"""State of a run, and one step of its training."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsup_xbn.config.schema import Config
from selfsup_xbn.data import Batch, Batches, data_of, eval_batches, limit
from selfsup_xbn.data.sampler import seed_for
from selfsup_xbn.errors import Diverged, UserError
from selfsup_xbn.evaluation.collapse import embedding_std
from selfsup_xbn.evaluation.drift import FeatureDrift
from selfsup_xbn.evaluation.evaluators import baselines
from selfsup_xbn.evaluation.plan import evaluated_epochs, evaluator_of, validator_of
from selfsup_xbn.methods.base import Method, method_class
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.models.pretrained import initial_encoder
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.training.cuda_graph import CaptureError, GraphedStep
from selfsup_xbn.training.data_parallel import GradientSum
from selfsup_xbn.training.metrics import MetricAccumulator, add_gaps, queue_record
from selfsup_xbn.training.optimization import learning_rate, make_optimizer, set_learning_rate
from selfsup_xbn.training.preflight import check_config, check_memory, check_sizes
from selfsup_xbn.training.renewal import Renewal, renews
from selfsup_xbn.utils import distributed
from selfsup_xbn.utils.device import device_of
from selfsup_xbn.utils.distributed import rank, world

DRIFT_IMAGES = 128


class Run:
    """Data, method, optimizer and evaluators of a run, and its position.

    Args:
        config: Configuration of the run.

    Attributes:
        epoch: Number of completed epochs, including the head epochs.
        step: Number of completed steps of the current epoch.
        best: Largest value of the main metric.
        evaluation_seconds: Duration of the last evaluation.
        weight_lines: Lines that describe the initial weights.

    Raises:
        UserError: The configuration or the data is invalid, or the queue does not fit into the memory.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, device_of(config.device)
        with distributed.main_process_first():
            check_config(config)
            self.data = data_of(config)
        check_sizes(config, len(self.data.train), self.data.notes)
        check_memory(config, len(self.data.train), self.device)
        torch.manual_seed(config.seed)
        encoder, self.weight_lines = initial_encoder(config, self.data.channels, self.data.image_size)
        self.method: Method = method_class(config).from_config(config, encoder, len(self.data.train)).to(self.device)
        self.batches = Batches.from_config(config, self.data, self.device, (rank(), world()))
        self.evaluator = evaluator_of(config, self.data, self.device)
        self.validator = validator_of(config, self.data, self.device)
        fixed = limit(self.data.train, DRIFT_IMAGES, config.seed)
        images = next(eval_batches(fixed, self.data, device=self.device, batch_size=DRIFT_IMAGES))
        self.drift = FeatureDrift(self.method.encoder, images)
        self.head_epochs = config.head_epochs
        self.epochs, self.steps = self.head_epochs + config.epochs, len(self.batches)
        self.epoch = self.step = 0
        self.best, self.evaluation_seconds = -math.inf, 0.0
        self.meter = MetricAccumulator(self.device)
        self.graphed: GraphedStep | None = None
        self.renewal = Renewal(config, self.method, self._views) if renews(config) else None
        self.start_stage()
        self.autocast = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        self.method.to(memory_format=self.layout)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high" if self.autocast else "highest")
        self.statistics = [b for n, b in self.method.named_buffers() if n.endswith(("running_mean", "running_var"))]
        if config.compile:
            for module in (child for child in self.method.children() if isinstance(child, Encoder)):
                module.compile()

    @property
    def head_stage(self) -> bool:
        """Whether the current epoch trains the head only."""
        return self.epoch < self.head_epochs

    @property
    def logged_position(self) -> str:
        """The current epoch, counted from 1 as in the log, and the number of its completed steps."""
        return f"epoch {self.epoch + 1}, step {self.step}"

    @property
    def _position(self) -> tuple[int, int]:
        """Numbers of completed and of all steps, without those of the head epochs."""
        return (self.epoch - self.head_epochs) * self.steps + self.step, self.config.epochs * self.steps

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        if self.head_stage:
            return self.config.head_lr
        return learning_rate(self.config, self.epoch - self.head_epochs, self.step / self.steps)

    def train_step(self, batch: Batch) -> None:
        """Perform one training step. Does not synchronize the host with the device.

        Args:
            batch: Views and labels of the batch, or of the shard of this process.
        """
        if rank() > 0:  # for different dropout masks; rank 0 uses the state of the checkpoint
            torch.manual_seed(seed_for(self.config.seed, rank(), self.epoch, self.step))
        set_learning_rate(self.optimizer, self.lr)
        views = tuple(view.contiguous(memory_format=self.layout) for view in batch.views)
        renewal = None if self.head_stage else self.renewal
        if renewal is not None:
            with self._precision():
                renewal.renew(self.epoch, self.step, self._position[0])
        measured = self.config.drift_every > 0 and self.step % self.config.drift_every == 0
        if self.method.queue is not None:
            self.method.queue.recording = measured
        if measured:
            self.drift.update()
        loss = (self._step if measured or self.graphed is None else self._graphed)(views, batch.labels)
        if renewal is not None:
            renewal.rows.record(batch.index)
        self.step += 1
        self.meter.add("loss", loss)
        if self.config.labelled:  # a loss of pairs is 0 if the miner keeps none
            self.meter.add("steps_without_pairs", loss.detach() == 0)
        if measured:
            self._measure()
        if measured and renewal is not None:
            with self._precision():
                renewal.measure(self.meter, self.epoch, self.step)

    def _step(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Perform the forward pass, the backward pass and the optimizer step, and return the loss."""
        self.optimizer.zero_grad()
        loss, parts = partial(self._next, self._losses(views, labels)), self.config.accumulate
        values = [self.gradients.backward(loss, last=left == 1).detach() for left in range(parts, 0, -1)]
        distributed.average_(self.statistics)
        self.optimizer.step()
        return values[0] if parts == 1 else torch.stack(values).sum()

    def _graphed(self, views: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Perform ``_step`` as a CUDA graph. If the capture fails, warn and run all further steps eagerly."""
        assert self.graphed is not None
        self.method.update_schedules(*self._position)
        try:
            loss = self.graphed(views, labels)
        except CaptureError as error:
            self.graphed = None
            warnings.warn(f"cannot capture the step as a CUDA graph, continuing without: {error}", stacklevel=2)
            return self._step(views, labels)
        queue = self.method.queue
        if queue is not None and self.graphed.replays * len(labels) >= queue.size:
            queue.refresh()  # a graph has no control flow
            self.graphed.replays = 0
        return loss

    def _graph(self) -> GraphedStep | None:
        """Return the step as a CUDA graph, or ``None`` if device, method, stage or configuration rule it out."""
        allowed = self.config.cuda_graph and self.device.type == "cuda" and world() == 1 and not self.head_stage
        return GraphedStep(self._step) if allowed and self.method.capturable else None

    def _losses(self, views: tuple[Tensor, ...], labels: Tensor) -> Iterator[Tensor]:
        """Yield the loss, or that of each micro-batch divided by their number."""
        parts, position = self.config.accumulate, self._position
        if parts == 1:
            yield self.method.head_loss(views, labels) if self.head_stage else self.method(views, labels, *position)
            return
        split = zip(zip(*(view.chunk(parts) for view in views), strict=True), labels.chunk(parts), strict=True)
        if self.head_stage:
            yield from (self.method.head_loss(*part) / parts for part in split)
        else:
            yield from self.method.losses(list(split), *position)

    def _next(self, losses: Iterator[Tensor]) -> Tensor:
        with self._precision():
            return next(losses)

    def _precision(self) -> torch.autocast:
        cached = self.graphed is None
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=cached)

    def _views(self, index: Tensor, *seed: int) -> Tensor:
        return self.batches.views(index, *seed).contiguous(memory_format=self.layout)

    def _measure(self) -> None:
        """Record the drift of the last step (Eq. 5), and the moment gaps before and after the adaptation."""
        drift = self.drift.update()
        assert drift is not None
        self.meter.add("drift", drift.mean)
        self.meter.add_maximum("drift_max", drift.maximum)
        first = (self.epoch, self.step) == (self.head_epochs, 1)  # of the steps that use the queue, which is empty
        if self.method.queue is not None and not first:
            add_gaps(self.meter, self.method.queue.record)

    def start_stage(self) -> None:
        """Create the optimizer of the current stage, the sum over processes of its gradients, and the graph."""
        if self.head_stage:
            head = self.method.encoder.head.parameters()
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(head, self.lr, momentum=self.config.sgd_momentum)
        else:
            self.optimizer = make_optimizer(self.config, self.method)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.gradients = GradientSum(self.method, trained, self.config.gradient_compression)
        self.graphed = self._graph()

    def mean_loss(self) -> float:
        """Return the mean loss of the current epoch. Synchronizes the host with the device.

        Raises:
            Diverged: The loss or a weight is not finite. With a miner the loss of NaN embeddings is 0.
        """
        loss = self.meter.mean("loss")
        if not math.isfinite(loss) or not all(weight.isfinite().all() for weight in self.method.encoder.parameters()):
            last = Path(self.config.run_folder) / checkpoint.NAME
            saved = f"the last checkpoint is {last}" if last.exists() else "there is no checkpoint"
            raise Diverged(
                f"expected a finite loss and finite weights, got loss {loss} at {self.logged_position}, "
                f"learning rate {self.lr:.3g}; {saved}; try a smaller --lr, --warmup-epochs, or --precision fp32"
            )
        return loss

    def end_epoch(self) -> dict[str, Any]:
        """Complete the epoch and return its record.

        The record has the means of the epoch, the state of the queue and, if it is due, an evaluation.

        Raises:
            Diverged: The loss or a weight is not finite, or the encoder cannot be evaluated.
        """
        self.mean_loss()
        record: dict[str, Any] = {"epoch": self.epoch + 1, "step": (self.epoch + 1) * self.steps, "lr": self.lr}
        record |= self.meter.record(self.config.batch_size) | queue_record(self.method.queue)
        if self.head_stage:
            record["head_loss"] = record.pop("loss")  # another loss, which is another curve
        record["embedding_std"] = embedding_std(self.drift.embeddings()).item()
        self.epoch, self.step, self.meter = self.epoch + 1, 0, MetricAccumulator(self.device)
        if self.epoch == self.head_epochs:
            self.start_stage()
        if self.epoch in evaluated_epochs(self.config):
            started = time.monotonic()
            try:
                record |= self.evaluator.encoder(self.method.encoder) | self._validate()
            except UserError as error:  # the same evaluation succeeded before the training
                raise Diverged(f"the encoder cannot be evaluated after epoch {self.epoch}: {error}") from error
            self.evaluation_seconds = time.monotonic() - started
        return record

    def is_best(self, record: dict[str, Any]) -> bool:
        """Return whether the record has a new best value of the main metric, and store that value."""
        main = self.evaluator.main if self.validator is None else f"{self.evaluator.main}_validation"
        value = record.get(main, -math.inf)
        better, self.best = value > self.best, max(self.best, value)
        return better

    def baselines(self) -> dict[str, float]:
        """Return the metrics of raw pixels and of the untrained encoder, in percent."""
        return baselines(self.evaluator, self.method.encoder) | self._validate()

    def _validate(self) -> dict[str, float]:
        """Return the metrics on the held-out training classes, if there are any, as ``NAME_validation``."""
        values = {} if self.validator is None else self.validator.encoder(self.method.encoder)
        return {f"{name}_validation": value for name, value in values.items()}
