"""Queues, batches and the state of a queue, for the tests of the memory."""

import io

import numpy as np
import torch

from selfsup_xbn import FeatureQueue

ADAPTATIONS = ["xbm", "xbn", "axbn"]
MOVING = ["xbn", "axbn"]


def in_order(queue):
    """Adapted rows, oldest first, and their labels."""
    rows, n = queue.features().double().numpy(), len(queue)
    oldest = int(queue.pointer) if n == queue.size else 0
    labels = None if queue.labels is None else np.roll(queue.labels[:n].numpy(), -oldest).tolist()
    return np.roll(rows, -oldest, axis=0), labels


def random_batch(rng, rows, dim, moving=True):
    """Unit-free rows whose moments differ from batch to batch."""
    mean, std = (rng.normal(size=dim), np.exp(0.5 * rng.normal(size=dim))) if moving else (0, 1)
    return (rng.normal(size=(rows, dim)) * std + mean).astype(np.float32)


def filled(adaptation="xbn", size=40, dim=6, rows=40, **kwargs):
    queue = FeatureQueue(size, dim, adaptation, **kwargs)
    rng = np.random.default_rng(1)
    while rows > 0:
        batch = torch.tensor(random_batch(rng, min(rows, 16), dim))
        queue.adapt(batch)
        queue.enqueue(batch)
        rows -= 16
    return queue


def saved_and_loaded(queue):
    """A new queue with the state of this one, through a file."""
    buffer = io.BytesIO()
    torch.save(queue.state_dict(), buffer)
    buffer.seek(0)
    fresh = FeatureQueue(
        queue.size, queue.dim, type(queue.adaptation)(), labels=queue.labels is not None, dtype=queue.rows.dtype
    )
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh
