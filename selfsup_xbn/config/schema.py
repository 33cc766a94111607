"""Configuration of a run: the options that all modes share (``config.modes`` has the dataclass of each mode).

This module does not import torch, so that ``--help`` is fast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar, get_type_hints

from selfsup_xbn.config.options import check_option, option
from selfsup_xbn.config.parsing import parse_channels, parse_numbers, parse_rows, parse_share
from selfsup_xbn.config.parsing import parse_save_interval as parse_interval
from selfsup_xbn.config.registry import ADAPTATIONS, DATA_SETS, METHODS

execution = partial(option, affects_results=False)
DATA_HELP = "data set: {names}; append :PATH to set its directory: folder:PATH, list:FILE.csv"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of the options that all modes share.

    Raises:
        UserError: A value has the wrong type, is not one of the choices, or is out of bounds.
    """

    # Data
    data: str = option("digits", DATA_HELP, names=DATA_SETS)
    data_root: str = option("data", "directory of downloaded data sets", affects_results=False)
    limit_train: int = option(
        0, "number of training images to use, a random subset given by the seed; 0 uses all images", minimum=0
    )
    limit_test: int = option(
        0,
        "number of test images to use, a random subset, of whole classes if they do not train; 0 uses all images",
        minimum=0,
        added_later=True,
    )
    split_classes: str = option(
        "0",
        "data sets without test images: share P% of the sorted classes that train; the others are test classes",
        added_later=True,
    )
    image_size: int = option(
        0,
        "height and width in pixels of the images passed to the network: random crops in training, the resized center "
        "in evaluation; 0 uses the data set's size",
        minimum=0,
    )

    # Network
    backbone: str = option(
        "convnet4",
        "backbone: convnet4, convnet-digits, conv4-64, resnet18-cifar, efficientnet-lite0 (ImageNet weights without a "
        "download: extra pretrained), a torchvision model name, or timm:NAME",
    )
    head: str = option("linear", "projection head from features to embeddings: linear, mlp, ...")
    dim: int = option(128, "dimension D of the embeddings", minimum=1, maximum=2**20)
    weights: str = option("", "initial weights of the backbone: path of a state dict, or 'imagenet'; random if not set")

    partial_weights: bool = option(
        False,
        "load the file of --weights even if it fits less than 90% of the tensors of the backbone",
        affects_results=False,
    )

    mean: str = option(
        "",
        "mean of each channel of the images, 0.5 or 0.485,0.456,0.406; that of the network if it has initial weights, "
        "otherwise that of the data set",
        added_later=True,
    )
    std: str = option("", "standard deviation of each channel, as --mean", added_later=True)
    freeze_bn: bool = option(
        False,
        "keep statistics, scale and shift of the backbone's BatchNorm layers, if it has initial weights",
        added_later=True,
    )

    # Memory
    queue_size: str = option("1024", "number of rows M in the queue, or P% of the training images")
    adaptation: str = option("xbn", "method that adapts the queue at each step", choices=ADAPTATIONS)
    queue_dtype: str = option("float32", "dtype of the rows in the queue", choices=("float32", "bfloat16", "float16"))
    kalman_q: float = option(1.0, "axbn: process variance of the Kalman filter", minimum=0)
    kalman_r: float = option(0.01, "axbn: observation variance of a single sample", minimum=0)
    kalman_p0: float = option(1.0, "axbn: initial variance of the estimate", minimum=0)
    gain_interval: int = option(
        100, "axbn: number of steps between updates of the Kalman gain", minimum=1, maximum=2**31
    )
    temperature: float = option(0.1, "temperature T of the loss", minimum=1e-6)
    shard_queue: bool = execution(False, "share the rows of the queue out among the processes of a distributed run")

    # Optimization
    epochs: int = option(20, "number of passes over the training images", minimum=1)
    batch_size: int = option(128, "number of images per step, summed over all processes", minimum=2)
    accumulate: int = option(
        1, "number of micro-batches of a step, whose gradients are added up", minimum=1, added_later=True
    )
    gradient_compression: str = option(
        "none",
        "compression of the gradients that the processes exchange",
        choices=("none", "bf16", "powersgd"),
        added_later=True,
    )
    optimizer: str = option("sgd", "optimizer", choices=("sgd", "adamw"))
    lr: float = option(0.03, "learning rate after the warm-up", minimum=0)
    sgd_momentum: float = option(0.9, "sgd: momentum", minimum=0)
    weight_decay: float = option(5e-4, "weight decay", minimum=0)
    schedule: str = option("cosine", "learning rate schedule", choices=("constant", "cosine", "step"))
    step_epochs: int = option(15, "schedule step: number of epochs between decays of the learning rate", minimum=1)
    step_factor: float = option(0.33, "schedule step: factor of each decay", minimum=0)
    warmup_epochs: float = option(0.0, "number of epochs of linear warm-up", minimum=0)
    seed: int = option(0, "seed of all random number generators", minimum=0, maximum=2**62)

    # Evaluation
    eval_every: int = option(1, "number of epochs between evaluations; 0 evaluates after the last epoch", minimum=0)
    knn_k: int = option(200, "k-NN: number of neighbors", minimum=1)
    recall_ks: str = option("1,10", "retrieval: values of K for Recall@K, separated by commas; 1 is always measured")
    knn_temperature: float = option(0.1, "k-NN: temperature of the vote weights", minimum=1e-6)
    drift_every: int = option(
        50, "number of steps between measurements of the feature drift; 0 disables them", minimum=0
    )

    # Execution: changes results by rounding errors at most
    device: str = option("auto", "device: cpu, cuda, cuda:1, ..., or auto (cuda if available)", affects_results=False)
    precision: str = option(
        "auto",
        "precision of the networks: auto is bf16 on cuda and fp32 on cpu; on cuda, bf16 lets float32 products use TF32",
        choices=("auto", "fp32", "bf16"),
        affects_results=False,
    )
    compile: bool = execution(False, "compile the networks, and views of images in memory, with torch.compile")
    cuda_graph: bool = execution(
        True, "capture the training step as a CUDA graph, on cuda if nothing in it rules that out"
    )
    workers: int = execution(2, "number of processes that decode images from disk", minimum=0, maximum=1024)
    save_every: str = execution("1", "interval between checkpoints: number of epochs, or minutes as in 10m")
    keep: int = execution(
        2,
        "number of checkpoints to keep: checkpoint.pt, the previous one checkpoint-1.pt, ...",
        minimum=1,
        maximum=10**6,
    )
    timeout: int = execution(
        600, "seconds that a process waits for the other processes of a distributed run", minimum=1, maximum=10**6
    )
    tensorboard: bool = option(False, "also log to TensorBoard in the run folder", affects_results=False)
    out: str = option("", "run folder; runs/MODE-DATA-ADAPTATION-SEED if not set", affects_results=False)

    # Constants of a mode
    mode: ClassVar[str] = ""
    """Name of the mode, which is also the name of the command."""
    method: ClassVar[Any] = ""
    """Class of the method to train, or its ``"module:attribute"``."""
    evaluator: ClassVar[str] = "knn"
    """Name in ``EVALUATORS`` of the evaluator that is used during training."""
    views: ClassVar[int] = 1
    """Number of random views per image in a batch."""
    labelled: ClassVar[bool] = False
    """Whether the queue stores labels."""
    keeps_best: ClassVar[bool] = False
    """Whether the best model of a run is saved to ``best.pt`` in addition to the last one, also if there are no
    validation images to choose it by."""

    # Values of the options that exist in some modes only, for the modes without them
    bn_splits = 1
    images_per_class = 0
    augmentation = ""
    head_epochs = 0
    head_lr = 0.0
    validation = "0"
    renew = 0
    drift_residual = False

    def __post_init__(self) -> None:
        """Check the type, the choices and the bounds of each field."""
        types = get_type_hints(type(self))
        for item in fields(self):
            check_option(item.name, getattr(self, item.name), types[item.name], item.metadata)
        parse_numbers(self.recall_ks, "--recall-ks")
        parse_interval(self.save_every)
        parse_share(self.split_classes, "--split-classes")
        parse_channels(self.mean, "--mean")
        parse_channels(self.std, "--std")
        queue_rows(self, 100)

    @property
    def run_folder(self) -> str:
        """Path of the run folder: ``out``, or a name made of mode, data set, adaptation and seed."""
        return self.out or f"runs/{self.mode}-{self.data_name}-{self.adaptation}-{self.seed}"

    @property
    def data_name(self) -> str:
        """Name of the data set in the names of folders."""
        return self.data.replace("\\", "/").rstrip("/").replace(":", "-").split("/")[-1]


def queue_rows(config: Config, images: int) -> int:
    """Return the number of rows in the queue.

    Args:
        config: Configuration of the run.
        images: Number of training images.

    Raises:
        UserError: ``queue_size`` is neither an integer nor a percentage of at most 100.
    """
    return parse_rows(config.queue_size, images)


def options_of_other_modes(config: Config) -> dict[str, str]:
    """Return, for options that the mode does not have, what an error says of them: the mode that has it, and why."""
    own = {item.name for item in fields(config)}
    return {
        item.name.replace("_", "-"): f", an option of {mode}: in {config.mode} {item.metadata['elsewhere']}"
        for mode, kind in METHODS.items()
        for item in fields(kind)
        if item.metadata["elsewhere"] and item.name not in own
    }


def resolved(config: Config) -> dict[str, Any]:
    """Return the mode and all fields as a dictionary, which is the content of ``config.json``."""
    return {"mode": config.mode, **asdict(config)}
