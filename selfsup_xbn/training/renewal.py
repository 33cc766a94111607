"""Images of rows of the queue that are embedded again: to renew the rows, and to measure how far they have drifted.

Axis legend: B batch, C channels, S side of an image, D dimensions, R renewed rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup_xbn.config.schema import Config
from selfsup_xbn.memory.row_images import RowImages
from selfsup_xbn.methods.base import Method
from selfsup_xbn.training.metrics import MetricAccumulator
from selfsup_xbn.utils.distributed import gather

SAMPLE = 256
"""Number of rows whose drift residual is measured."""


def renews(config: Config) -> bool:
    """Return whether a run embeds images of rows again."""
    return config.renew > 0 or config.drift_residual


class Renewal:
    """Renew rows of the queue (``--renew N``), and measure their drift residual (``--drift-residual``).

    Every k = B / N steps (rounded up) k N rows are renewed: their images are embedded again, without gradient, in new
    views, in batches of about B and with the BatchNorm statistics of these batches. Running statistics do not change.
    The rows are those whose renewal reduces the summed age of the rows most (``RowImages.stalest``).

    Args:
        config: Configuration of the run, with one of both options.
        method: Method with a queue.
        views: Function of the numbers of training images and of the seed of the views (epoch, step, number). It
            returns a random view of each image of this process's shard.

    Attributes:
        rows: Images of the rows, a part of the checkpoint.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        views: Callable[[Int64[Tensor, "R"], int, int, int], Float[Tensor, "r C S S"]],
    ) -> None:
        assert method.queue is not None
        self.encoder, self.views, self.batch_size = method.encoder, views, config.batch_size
        self.rows = RowImages(method.queue, SAMPLE if config.drift_residual else 0)
        self.interval = -(-self.batch_size // config.renew) if config.renew else 0
        self.count = min(self.interval * config.renew, method.queue.size)

    def renew(self, epoch: int, step: int, enqueued: int) -> None:
        """Renew rows, if it is time to.

        Args:
            epoch: Epoch of the next step, for the seed of the views.
            step: Number of the next step in its epoch.
            enqueued: Number of steps that have filled the queue.
        """
        if self.interval and enqueued % self.interval == 0 and 0 < self.count <= enqueued * self.batch_size:
            slots = self.rows.stalest(self.count)
            self.rows.renew(slots, self._embed(self.rows.images[slots], epoch, step, first=0))

    def measure(self, meter: MetricAccumulator, epoch: int, step: int) -> None:
        """Add the drift residual of a sample of rows, and that of rows without adaptation, to their means.

        The random numbers of the training do not change.
        """
        if not len(self.rows.sample):
            return
        devices = [self.rows.images.device] if self.rows.images.is_cuda else []
        with torch.random.fork_rng(devices):
            images = self.rows.images[self.rows.sample].clamp(min=0)
            embeddings = self._embed(images, epoch, step, first=1)
        adapted, new = self.rows.residuals(embeddings)
        meter.add("residual", adapted)
        meter.add("residual_unadapted", new)

    @torch.no_grad()
    def _embed(self, images: Int64[Tensor, "R"], epoch: int, step: int, first: int) -> Float[Tensor, "R D"]:
        """Return unit embeddings of training images in random views. All processes must call it.

        They are embedded in batches of about B, whose views are drawn with the numbers ``first``, ``first`` + 1, ...
        """
        parts = images.tensor_split(max(1, len(images) // self.batch_size))
        with running_statistics_kept(self.encoder):
            own = [
                gather(self.encoder(self.views(part, epoch, step, number)), len(part))
                for number, part in enumerate(parts, first)
            ]
        rows = torch.cat(own)
        return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


@contextlib.contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Restore, at the end, the running statistics of all BatchNorm layers."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
