"""From a config to the parts of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from selfsup_xbn.config.schema import Config, PretrainConfig, SuperviseConfig, numbers, queue_rows
from selfsup_xbn.data import Batches, ClassBalancedBatches, ImageData, RandomBatches, limit, load_data
from selfsup_xbn.data.sampler import Sampler
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.evaluators import KnnProbe, Probe, RetrievalProbe
from selfsup_xbn.memory.adaptation import AXBN, Adaptation, make_adaptation
from selfsup_xbn.memory.feature_queue import FeatureQueue
from selfsup_xbn.methods.metric_learning import MetricLearning, make_loss
from selfsup_xbn.methods.moco import MoCo
from selfsup_xbn.models.encoder import Encoder, build_encoder
from selfsup_xbn.models.pretrained import load_weights
from selfsup_xbn.utils.distributed import launched, local_rank, world

Method = MoCo | MetricLearning


def device_of(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is CUDA where there is one, else the CPU.

    Of several processes that torchrun started on a machine, each has the CUDA device of its local rank, which becomes
    torch's current one.

    Raises:
        UserError: no such device, or not on this machine, or one without float64, which the queue's moments need.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and launched() > 1:
        if device.index is not None:
            raise UserError(f"--device {name}: each of {launched()} processes takes a device of its own; give cuda")
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu")
    if device.type == "cuda" and launched() > 1:
        torch.cuda.set_device(device)
    return device


def data_of(config: Config) -> ImageData:
    """The data set, cut to ``limit_train`` images, at ``image_size``."""
    data = load_data(config.data, root=config.data_root, workers=config.workers or 1)
    if config.limit_train:
        data = replace(data, train=limit(data.train, config.limit_train, config.seed))
    return replace(data, image_size=config.image_size or data.image_size)


def check_sizes(config: Config, images: int) -> None:
    """Refuses a batch or a queue larger than the training set, or a batch that the processes cannot share.

    Raises:
        UserError: naming the option, its value and the limit.
    """
    if config.batch_size < 2 * world():
        raise UserError(
            f"--batch-size {config.batch_size} leaves some of {world()} processes fewer than 2 images; "
            f"give at least {2 * world()}"
        )
    splits = getattr(config, "bn_splits", 1)
    if splits > 1 and splits % world():
        raise UserError(f"--bn-splits {splits} cannot be shared by {world()} processes; give a multiple of them, or 1")
    if config.batch_size > images:
        raise UserError(
            f"--batch-size {config.batch_size} is more than the {images} training images; give at most {images}"
        )
    queue_size = queue_rows(config, images)
    if queue_size > images:
        raise UserError(f"--queue-size {queue_size} is more than the {images} training images; give at most {images}")


def random_encoder(
    config: Config, channels: int, image_size: int, weights: Literal["imagenet"] | None = None
) -> Encoder:
    """The config's network for images of ``channels`` and ``image_size``, from random weights or ImageNet's.

    Each of several processes has its share of ``bn_splits``: BatchNorm then sees the very parts that one process
    would see.
    """
    return build_encoder(
        config.backbone,
        config.dim,
        channels=channels,
        image_size=image_size,
        head=config.head,
        bn_splits=max(1, getattr(config, "bn_splits", 1) // world()),
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


def method_of(config: Config, encoder: Encoder, images: int) -> Method:
    """The method of the config's mode, for a training set of so many images."""
    rows, dtype, labels = queue_rows(config, images), getattr(torch, config.queue_dtype), config.mode == "supervise"
    queue = FeatureQueue(rows, config.dim, adaptation_of(config), labels=labels, dtype=dtype) if rows else None
    if isinstance(config, SuperviseConfig):
        return MetricLearning(
            encoder,
            queue,
            make_loss(config),
            batch_loss_weight=config.batch_loss_weight,
            memory_start=config.memory_start,
        )
    assert isinstance(config, PretrainConfig)
    assert queue is not None
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
    """SGD or AdamW over the parameters that are trained.

    On CUDA one kernel updates all parameters, and the learning rate is a tensor, which a CUDA graph can follow.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    cuda = parameters[0].is_cuda
    lr = torch.tensor(config.lr, device=parameters[0].device) if cuda else config.lr
    options: dict[str, Any] = {"lr": lr, "weight_decay": config.weight_decay, "fused": cuda or None}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.SGD(parameters, momentum=config.sgd_momentum, **options)


def batches_of(config: Config, data: ImageData, device: torch.device, shard: tuple[int, int] = (0, 1)) -> Batches:
    """Random views of the training images: two for pretraining, one for supervised learning."""
    sampler: Sampler = RandomBatches(len(data.train), config.batch_size)
    augmentation, views = data.augmentation, 2
    if isinstance(config, SuperviseConfig):
        sampler = ClassBalancedBatches(data.train.labels, config.batch_size, config.images_per_class)
        augmentation, views = config.augmentation, 1
    return Batches(
        data.train,
        augmentation,
        data=data,
        views=views,
        sampler=sampler,
        device=device,
        seed=config.seed,
        workers=config.workers,
        shard=shard,
    )


def probe_of(config: Config, data: ImageData, device: torch.device) -> Probe:
    """The evaluator of the config's mode."""
    if isinstance(config, SuperviseConfig):
        return RetrievalProbe(data, numbers(config.recall_ks, "--recall-ks"), device=device, workers=config.workers)
    return KnnProbe(data, k=config.knn_k, temperature=config.knn_temperature, device=device, workers=config.workers)
