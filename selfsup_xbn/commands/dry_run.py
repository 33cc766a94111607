"""Size of a run, computed without training or downloads."""

from __future__ import annotations

import torch

from selfsup_xbn.config.parsing import parse_validation
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data import data_of
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.methods.base import method_class
from selfsup_xbn.models.encoder import random_encoder
from selfsup_xbn.training.preflight import check_sizes

DOWNLOADED = {"cifar10": 50_000, "cifar100": 50_000}
"""Number of training images of the data sets that are downloaded on first use."""


def cost_lines(config: Config) -> list[str]:
    """Return lines with the number of images, steps and parameters, and the size of the queue.

    Raises:
        UserError: The configuration is invalid, as in ``train``.
    """
    size, channels, images, classes = config.image_size or 32, 3, DOWNLOADED.get(config.data), 2
    if images is None or parse_validation(config.validation):
        data = data_of(config)
        size, channels, images = data.image_size, data.channels, len(data.train)
        classes = 1 + int(data.train.labels.max())
    images = min(images, config.limit_train or images)
    check_sizes(config, images)
    with torch.device("meta"):
        method = method_class(config).from_config(config, random_encoder(config, channels, size), images)
    method.try_loss(classes)
    steps = images // config.batch_size
    trained = sum(parameter.numel() for parameter in method.encoder.parameters())
    return [
        f"training images  {images:,} of {size} x {size} pixels, {channels} channels",
        f"steps            {steps:,} per epoch, {steps * config.epochs:,} in total",
        f"parameters       {trained:,} in the encoder {config.backbone}",
        f"queue            {_queue_line(method.queue)}",
    ]


def _queue_line(queue: FeatureQueue | None) -> str:
    if queue is None:
        return "none"
    size = sum(buffer.numel() * buffer.element_size() for buffer in queue.buffers())
    return f"{queue.size:,} rows of dimension {queue.dim}, {size / 2**20:.1f} MiB"
