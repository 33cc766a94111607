"""From a config to the parts of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from selfsup_xbn.adaptation import AXBN, Adaptation, make_adaptation
from selfsup_xbn.config import Config, PretrainConfig
from selfsup_xbn.data import Batches, ImageData, RandomBatches, limit, load_data
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.probe import KnnProbe
from selfsup_xbn.feature_queue import FeatureQueue
from selfsup_xbn.methods.moco import MoCo
from selfsup_xbn.models import Encoder, build_encoder
from selfsup_xbn.weights import load_weights

VIEWS = {"pretrain": 2}


def device_of(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device, or not on this machine, or one without float64, which the queue's moments need.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu")
    return device


def data_of(config: Config) -> ImageData:
    """The data set, cut to ``limit_train`` images, at ``image_size``."""
    data = load_data(config.data, root=config.data_root, workers=config.workers or 1)
    if config.limit_train:
        data = replace(data, train=limit(data.train, config.limit_train, config.seed))
    return replace(data, image_size=config.image_size or data.image_size)


def check_sizes(config: Config, images: int) -> None:
    """Refuses a batch or a queue larger than the training set.

    Raises:
        UserError: naming the option, its value and the largest that the data allow.
    """
    if config.batch_size > images:
        raise UserError(
            f"--batch-size {config.batch_size} is more than the {images} training images; give at most {images}"
        )
    queue_size = getattr(config, "queue_size", 0)
    if isinstance(queue_size, int) and queue_size > images:
        raise UserError(f"--queue-size {queue_size} is more than the {images} training images; give at most {images}")


def random_encoder(
    config: Config, channels: int, image_size: int, weights: Literal["imagenet"] | None = None
) -> Encoder:
    """The config's network for images of ``channels`` and ``image_size``, from random weights or ImageNet's."""
    return build_encoder(
        config.backbone,
        config.dim,
        channels=channels,
        image_size=image_size,
        head=config.head,
        bn_splits=getattr(config, "bn_splits", 1),
        weights=weights,
    )


def encoder_of(config: Config, data: ImageData) -> Encoder:
    """The network that training starts from: random weights, ImageNet's, or a file's, which says what fitted."""
    if config.weights in ("", "imagenet"):
        return random_encoder(config, data.channels, data.image_size, "imagenet" if config.weights else None)
    encoder = random_encoder(config, data.channels, data.image_size)
    print(*load_weights(encoder, config.weights).lines(), sep="\n")
    return encoder


def adaptation_of(config: Config) -> Adaptation:
    """The adaptation with the config's constants."""
    if config.adaptation == "axbn":
        return AXBN(config.kalman_q, config.kalman_r, config.kalman_p0, config.gain_interval)
    return make_adaptation(config.adaptation)


def method_of(config: Config, encoder: Encoder) -> MoCo:
    """The method of the config's mode."""
    assert isinstance(config, PretrainConfig)
    dtype = getattr(torch, config.queue_dtype)
    queue = FeatureQueue(config.queue_size, config.dim, adaptation_of(config), dtype=dtype)
    return MoCo(
        encoder,
        queue,
        temperature=config.temperature,
        momentum=config.momentum,
        momentum_schedule=config.momentum_schedule,
        order=config.order,
        moments=config.moments,
        symmetric=config.symmetric,
    )


def optimizer_of(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that are trained."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay)


def batches_of(config: Config, data: ImageData, device: torch.device) -> Batches:
    """Random views of the training images."""
    return Batches(
        data.train,
        data.augmentation,
        data=data,
        views=VIEWS[config.mode],
        sampler=RandomBatches(len(data.train), config.batch_size),
        device=device,
        seed=config.seed,
        workers=config.workers,
    )


def probe_of(config: Config, data: ImageData, device: torch.device) -> KnnProbe:
    """The evaluator of the config's mode."""
    return KnnProbe(data, k=config.knn_k, temperature=config.knn_temperature, device=device, workers=config.workers)
