"""Configuration of a run in each mode: a dataclass whose fields are the options of the command line.

``dataclasses.replace(recipe, adaptation="xbn")`` makes a variant of a recipe. This module does not import torch, so
that ``--help`` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass

from selfsup_xbn.config.options import option
from selfsup_xbn.config.parsing import parse_arguments, parse_share
from selfsup_xbn.config.registry import DATA_SETS
from selfsup_xbn.config.schema import DATA_HELP, Config, queue_rows
from selfsup_xbn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Options of self-supervised pretraining with a momentum encoder and a queue (MoCo)."""

    bn_splits: int = option(1, "number of parts of a batch that BatchNorm normalizes separately", minimum=1)
    momentum: float = option(0.99, "momentum m of the key encoder", minimum=0, maximum=1)
    momentum_schedule: str = option(
        "constant", "schedule of the momentum m: constant, or cosine from m to 1", choices=("constant", "cosine")
    )
    enqueue: str = option(
        "before_loss",
        "time at which keys enter the queue: before the loss (the paper) or after the loss (MoCo)",
        choices=("before_loss", "after_loss"),
    )
    normalize_first: bool = option(True, "normalize the keys to unit length before their moments are matched")
    symmetric: bool = option(False, "average the losses of both assignments of the two views to query and key")

    mode = "pretrain"
    method = "selfsup_xbn.methods.moco:MoCo"
    views = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if queue_rows(self, 100) == 0:
            raise UserError(f"--queue-size: expected at least 1 row in mode {self.mode}, got {self.queue_size!r}")


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig(Config):
    """Options of supervised metric learning with a cross-batch memory (Sec. 5.1 of arXiv 2303.17127)."""

    data: str = option("digits-disjoint", DATA_HELP, names=DATA_SETS)
    validation: str = option(
        "0",
        "share P% of the training classes to hold out for selecting best.pt; 0 selects on the test set (the paper)",
        added_later=True,
    )
    augmentation: str = option(
        "supervised",
        "augmentation; supervised is RandAugment with random erasing for image files (of several sizes), crops and "
        "flips for color images in memory, and slight affine maps for gray ones",
        choices=("supervised", "cifar", "photo", "digits", "none"),
    )
    images_per_class: int = option(4, "number of images per class in a batch", minimum=1)
    head: str = option("l2", "head: l2, l2+ln or l2+bn (Table 3)")
    queue_size: str = option(
        "100%", "number of rows M in the memory, or P% of the training images; 0 disables the memory"
    )
    memory_start: int = option(
        0, "number of initial steps that fill the memory and use the loss within the batch", minimum=0
    )
    batch_loss_weight: float = option(
        0.0, "weight of the loss within the batch, added to the loss against the memory", minimum=0
    )
    loss: str = option("SupConLoss", "loss: SupConLoss, or the name of another loss of pytorch-metric-learning")
    loss_args: str = option("", "arguments of the loss: name=value,name=value")
    miner: str = option(
        "PairMarginMiner", "miner: PairMarginMiner, none, or the name of another miner of pytorch-metric-learning"
    )
    miner_args: str = option(
        "", "arguments of the miner: name=value,name=value (PairMarginMiner: pos_margin=0.2,neg_margin=0.8)"
    )
    miner_distance: str = option(
        "euclidean", "distance that the margins of PairMarginMiner refer to", choices=("euclidean", "cosine")
    )
    moment_gradient: bool = option(
        False,
        "xbn, small batches: add the gradient by the moments of the batch, with which the rows of the memory move",
        added_later=True,
        elsewhere="the moments are those of keys, which have no gradient",
    )
    renew: int = option(
        0,
        "number of rows of the memory per step whose images are embedded again; 0 renews none",
        minimum=0,
        added_later=True,
        elsewhere="keys of the momentum encoder change slowly",
    )
    drift_residual: bool = option(
        False,
        "measure how far rows of the memory are from the present embeddings of their images, every --drift-every steps",
        added_later=True,
        elsewhere="rows are compared with the encoder that is trained, not with the key encoder",
    )
    head_epochs: int = option(0, "number of epochs before those of --epochs that train the head only", minimum=0)
    head_lr: float = option(0.001, "learning rate of the head epochs (SGD)", minimum=0)

    mode = "supervise"
    method = "selfsup_xbn.methods.metric_learning:MetricLearning"
    evaluator = "retrieval"
    labelled = True
    keeps_best = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.images_per_class:
            raise UserError(
                f"--batch-size {self.batch_size}: expected a multiple of --images-per-class {self.images_per_class}"
            )
        parse_share(self.validation, "--validation")
        check_memory_options(self)
        parse_arguments(self.loss_args, "--loss-args")
        parse_arguments(self.miner_args, "--miner-args")


def check_memory_options(config: SuperviseConfig) -> None:
    """Check the options that need a memory of one process, and when the drift residual is measured.

    Raises:
        UserError: There is no memory, or its rows are shared out among the processes. The drift residual is never
            measured, or when the rows of a step have moved already.
    """
    for name in ("moment_gradient", "renew", "drift_residual"):
        option = "--" + name.replace("_", "-")
        if getattr(config, name) and queue_rows(config, 100) == 0:
            raise UserError(f"{option}: expected a memory, got --queue-size {config.queue_size}")
        if getattr(config, name) and config.shard_queue:
            raise UserError(f"{option}: expected all rows in each process, got --shard-queue")
    if config.drift_residual and config.drift_every == 0:
        raise UserError("--drift-residual: expected --drift-every above 0, got 0, which measures nothing")
    if config.drift_residual and config.accumulate > 1:
        raise UserError(
            f"--drift-residual: expected --accumulate 1, got {config.accumulate}: each micro-batch moves the rows of "
            "those before it"
        )
