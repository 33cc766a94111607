"""Which image each row of a queue embeds, so that images can be embedded again: renewal of rows, and their drift.

Axis legend: B batch, M queue rows, D dimensions, R renewed rows, S sampled rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.memory.moments import power_sums


class RowImages(nn.Module):
    """Image number and age of each row of a queue, and the embeddings that a sample of rows had when they were new.

    The owner calls ``record`` after each ``enqueue``. No method waits for the device.

    Args:
        queue: the queue, which is not sharded. It is not part of the module's state.
        sample: number of rows S whose embeddings are kept, evenly spaced over the slots.

    Example:
        >>> queue = FeatureQueue(4, 2, "xbn")
        >>> images = RowImages(queue)
        >>> for number in range(2):
        ...     slots = queue.enqueue(torch.randn(2, 2))
        ...     images.record(2 * torch.arange(2) + number)
        >>> images.images
        tensor([0, 2, 1, 3])
        >>> images.stalest(1)
        tensor([1])
    """

    images: Tensor
    recorded_at: Tensor
    written: Tensor
    sample: Tensor
    new: Tensor

    def __init__(self, queue: FeatureQueue, sample: int = 0) -> None:
        super().__init__()
        self._queue = [queue]  # in a list, so that it is no submodule
        rows, device = queue.size, queue.rows.device
        sample = min(sample, rows)
        self.register_buffer("images", torch.full((rows,), -1, device=device))
        self.register_buffer("recorded_at", torch.zeros(rows, dtype=torch.int64, device=device))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("sample", torch.arange(sample, device=device) * rows // max(sample, 1), persistent=False)
        self.register_buffer("new", torch.zeros(sample, queue.dim, dtype=queue.rows.dtype, device=device))

    @property
    def queue(self) -> FeatureQueue:
        """The queue."""
        return self._queue[0]

    @torch.no_grad()
    def record(self, images: Int64[Tensor, "B"]) -> None:
        """Store the numbers of the images whose embeddings the queue took last. A batch that it skipped has no effect.

        Args:
            images: number of each image, in the order of the embeddings.
        """
        kept = images[-self.queue.size :]
        before = self.queue.written - len(kept)
        slots = (before + torch.arange(len(kept), device=before.device)).remainder_(self.queue.size)
        taken = self.queue.written > self.written
        self.images.index_copy_(0, slots, torch.where(taken, kept, self.images[slots]))
        self._note_new(slots, taken)
        self.written.copy_(self.queue.written)

    def stalest(self, count: int) -> Int64[Tensor, "R"]:
        """Return the slots, in ascending order, whose renewal reduces the summed age of all rows most.

        Renewed, a row is as much younger as it is old, until it is overwritten. That is age times remaining life. In a
        queue that is not full no row is overwritten soon, and the oldest rows come first. In a full queue the oldest
        rows are overwritten next, and rows of half the age come first. Of equal ones the first slots are taken, so that
        all devices choose the same.

        Args:
            count: number of slots R, at most the number of filled rows.
        """
        slots = torch.arange(self.queue.size, device=self.images.device)
        life = (slots - self.queue.written).remainder_(self.queue.size)
        gain = torch.where(self.images >= 0, (self.queue.written - self.recorded_at) * life, -1)
        return gain.sort(descending=True, stable=True).indices[:count].sort().values

    @torch.no_grad()
    def renew(self, slots: Int64[Tensor, "R"], embeddings: Float[Tensor, "R D"]) -> None:
        """Write embeddings over the rows at distinct filled slots. Labels, map and order of the queue stay.

        If a value is not finite, nothing changes.

        Args:
            slots: slots of rows.
            embeddings: embeddings of the images of these rows, in the space of the adapted rows.
        """
        queue, affine_map = self.queue, self.queue.affine_map()
        stored = affine_map.inverse(embeddings.to(affine_map.scale.dtype)).to(queue.rows.dtype)
        replaced, entering = queue.rows[slots], power_sums(stored, queue.sums.dtype)
        finite = entering.sum() < torch.inf
        if queue.adaptation.moves_queue:
            change = entering - power_sums(replaced, queue.sums.dtype)
            queue.sums.add_(torch.where(finite, change, 0.0))
        queue.rows.index_copy_(0, slots, torch.where(finite, stored, replaced))
        self._note_new(slots, finite)

    @torch.no_grad()
    def residuals(self, embeddings: Float[Tensor, "S D"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the mean squared distances of the sampled rows, as unit vectors, to their images' embeddings.

        Args:
            embeddings: present embeddings of the images ``images[sample]``; those of empty slots do not count.

        Returns:
            The distance of the adapted rows, and that of the rows as they were when they were new, which a memory
            without adaptation (XBM) has. NaN if no sampled slot is filled.
        """
        filled, now = self.sampled(), F.normalize(embeddings.float(), dim=1)
        adapted = self.queue.affine_map()(self.queue.rows[self.sample])
        distances = [(F.normalize(rows.float(), dim=1) - now).square().sum(1) for rows in (adapted, self.new)]
        adapted_mean, new_mean = (torch.where(filled, values, 0).sum() / filled.sum() for values in distances)
        return adapted_mean, new_mean

    def sampled(self) -> Bool[Tensor, "S"]:
        """Return which of the sampled slots are filled."""
        return self.images[self.sample] >= 0

    def _note_new(self, slots: Int64[Tensor, "R"], changed: Bool[Tensor, ""]) -> None:
        """Note the age of rows that were just written and, for the sampled ones, their embeddings."""
        self.recorded_at.index_copy_(0, slots, torch.where(changed, self.queue.written, self.recorded_at[slots]))
        if not len(self.sample):
            return
        written = torch.zeros_like(self.images, dtype=torch.bool).index_fill_(0, slots, True)  # isin waits for a GPU
        fresh = written[self.sample] & changed
        rows = self.queue.affine_map()(self.queue.rows[self.sample]).to(self.new.dtype)
        self.new.copy_(torch.where(fresh[:, None], rows, self.new))
