"""Size of a run, computed without training or downloads."""

from __future__ import annotations

import torch

from selfsup_xbn.config.parsing import parse_share
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data import data_of
from selfsup_xbn.data.datasets.cifar import place_without_files
from selfsup_xbn.data.loader import sampler_of
from selfsup_xbn.data.parts import part_lines
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.methods.base import method_class
from selfsup_xbn.models.backbones import LITE0
from selfsup_xbn.models.encoder import random_encoder
from selfsup_xbn.models.pretrained import initial_encoder
from selfsup_xbn.training.preflight import check_config, check_images, check_memory, check_sizes
from selfsup_xbn.utils.device import device_of

DOWNLOADED = {"cifar10": 50_000, "cifar100": 50_000}
"""Number of training images of the data sets that are downloaded on first use."""


def cost_lines(config: Config, *, decode: bool = False) -> list[str]:
    """Return lines with the number of images, steps and parameters, and the size of the queue.

    Args:
        config: Configuration of the run.
        decode: Whether to decode every image of a folder or of a list.

    Raises:
        UserError: The configuration is invalid, as in ``train``, or an image is broken.
    """
    device = device_of(config.device)
    check_config(config, download=False)
    name, _, path = config.data.partition(":")
    size, channels, images, classes = config.image_size or 32, 3, DOWNLOADED.get(name), 2
    parts, notes, data = list[str](), tuple[str, ...](), None
    if name in DOWNLOADED and (place := place_without_files(name, path, root=config.data_root)):
        parts = [f"{'data':<19}{name} is not in {place}: the run downloads it"]
    if images is None or parse_share(config.validation, "--validation"):
        data = data_of(config)
        size, channels, images = data.image_size, data.channels, len(data.train)
        classes, notes = 1 + int(data.train.labels.max()), data.notes
        parts += [*notes, *part_lines(data, config.evaluator)]
    images = min(images, config.limit_train or images)
    check_sizes(config, images, notes)
    check_memory(config, images, device)
    if data is not None:
        sampler_of(config, data.train.labels)  # raises if the batch size does not fit the classes
    with torch.device("meta"):
        method = method_class(config).from_config(config, random_encoder(config, channels, size), images)
    method.try_loss(classes)
    if decode and data is not None:
        check_images(data, config.workers)
    steps = images // config.batch_size
    epochs = _count(config.epochs, "epoch") + f" after {config.head_epochs} of the head" * bool(config.head_epochs)
    trained = sum(parameter.numel() for parameter in method.encoder.parameters())
    return [
        *parts,
        f"{'images':<19}{images:,} for training, of {size} x {size} pixels, {_count(channels, 'channel')}",
        f"{'steps':<19}{steps:,} per epoch, {steps * (config.head_epochs + config.epochs):,} in total, {epochs}",
        f"{'parameters':<19}{trained:,} in the encoder {config.backbone}",
        *_weight_lines(config, channels, size),
        f"{'queue':<19}{_queue_line(method.queue)}",
    ]


def _weight_lines(config: Config, channels: int, size: int) -> list[str]:
    """Return lines on the initial weights. ImageNet weights are not downloaded."""
    if not config.weights:
        return [f"{'weights':<19}random"]
    if config.weights == "imagenet" and config.backbone != LITE0:
        return [f"{'weights':<19}of ImageNet, downloaded by the run if needed; random head"]
    return [f"{'weights':<19}{line}" for line in initial_encoder(config, channels, size)[1]]


def _queue_line(queue: FeatureQueue | None) -> str:
    if queue is None:
        return "none"
    size = sum(buffer.numel() * buffer.element_size() for buffer in queue.buffers())
    amount = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
    return f"{_count(queue.size, 'row')} of dimension {queue.dim}, {amount}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
