"""What a run is made of: one dataclass a mode, whose fields are the options of the command line, and named recipes.

A variant is ``replace(recipe, adaptation="xbn")``: the difference is the claim. This module does not import torch, so
that the command line can answer at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, get_type_hints

from selfsup_xbn.config.options import check_option, option
from selfsup_xbn.config.parsing import parse_arguments, parse_numbers, parse_rows, parse_save_interval, parse_validation
from selfsup_xbn.config.registry import ADAPTATIONS, DATA_SETS, METHODS
from selfsup_xbn.errors import UserError

DATA_HELP = "data set: {names}; with :PATH where its files are (folder:PATH holds train/ and test/)"

EXPORTS = {
    "csv": "metrics.csv",
    "torchvision": "backbone.pt",
    "safetensors": "encoder.safetensors",
    "onnx": "encoder.onnx",
}
"""The file of each format that a run is exported to, unless another is named."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all modes have in common. Units: epochs, images, pixels; sizes in rows."""

    # What is learned from
    data: str = option("digits", DATA_HELP, names=DATA_SETS)
    data_root: str = option("data", "where downloaded data sets are kept", affects_results=False)
    limit_train: int = option(0, "use only this many training images, drawn with the seed; 0: all", least=0)
    image_size: int = option(0, "side of the square that the network sees; 0: the data set's own", least=0)

    # The network
    backbone: str = option(
        "convnet4", "convnet4, convnet-digits, conv4-64, resnet18-cifar, a torchvision name, or timm:NAME"
    )
    head: str = option("linear", "what maps features to the embedding: linear, mlp, ...")
    dim: int = option(128, "dimensions D of the embedding", least=1, most=2**20)
    weights: str = option("", "state dict that the backbone starts from, or 'imagenet'; '': random")

    # The memory
    queue_size: str = option("1024", "rows M of the queue, or P% of the training images")
    adaptation: str = option("xbn", "what moves the queue each step", choices=ADAPTATIONS)
    queue_dtype: str = option("float32", "storage of the queue's rows", choices=("float32", "bfloat16", "float16"))
    kalman_q: float = option(1.0, "axbn: variance of the process", least=0)
    kalman_r: float = option(0.01, "axbn: variance of an observation of one sample", least=0)
    kalman_p0: float = option(1.0, "axbn: variance of the first estimate", least=0)
    gain_interval: int = option(100, "axbn: steps between renewals of the gain", least=1, most=2**31)
    temperature: float = option(0.1, "T of the loss", least=1e-6)

    # The optimisation
    epochs: int = option(20, "passes over the training images", least=1)
    batch_size: int = option(128, "images a step, over all processes", least=2)
    optimizer: str = option("sgd", "the optimiser", choices=("sgd", "adamw"))
    lr: float = option(0.03, "learning rate after warm-up", least=0)
    sgd_momentum: float = option(0.9, "sgd: momentum", least=0)
    weight_decay: float = option(5e-4, "weight decay", least=0)
    schedule: str = option("cosine", "learning rate over the epochs", choices=("constant", "cosine", "step"))
    step_epochs: int = option(15, "schedule step: epochs between two steps", least=1)
    step_factor: float = option(0.33, "schedule step: factor of each step", least=0)
    warmup_epochs: float = option(0.0, "epochs of linear warm-up", least=0)
    seed: int = option(0, "everything random follows from it", least=0, most=2**62)

    # What is measured
    eval_every: int = option(1, "epochs between evaluations; 0: at the end only", least=0)
    knn_k: int = option(200, "k-NN: neighbours", least=1)
    recall_ks: str = option("1,10", "retrieval: K of Recall@K, with commas")
    knn_temperature: float = option(0.1, "k-NN: temperature of the votes", least=1e-6)
    drift_every: int = option(50, "steps between measurements of feature drift; 0: none", least=0)

    # What should not change results, other than by rounding
    device: str = option("auto", "auto (cuda, else cpu), cpu, cuda, cuda:1, ...", affects_results=False)
    precision: str = option(
        "auto",
        "of the networks: auto (bf16 on cuda, else fp32)",
        choices=("auto", "fp32", "bf16"),
        affects_results=False,
    )
    compile: bool = option(False, "torch.compile the networks", affects_results=False)
    cuda_graph: bool = option(
        True, "cuda, pretrain: capture the training step as one CUDA graph", affects_results=False
    )
    workers: int = option(2, "processes that decode images from disk", least=0, most=1024, affects_results=False)
    save_every: str = option("1", "epochs between checkpoints, or minutes: 10m", affects_results=False)
    keep: int = option(
        2, "checkpoints kept: checkpoint.pt, checkpoint-1.pt before it, ...", least=1, most=10**6, affects_results=False
    )
    timeout: int = option(
        600, "several processes: seconds that one waits for the others", least=1, most=10**6, affects_results=False
    )
    tensorboard: bool = option(False, "log to TensorBoard too, in the run folder", affects_results=False)
    out: str = option("", "run folder; '': runs/MODE-DATA-ADAPTATION-SEED", affects_results=False)

    # What a mode fixes for all of its runs
    mode: ClassVar[str] = ""
    """The name of the mode, a command of the command line."""
    method: ClassVar[Any] = ""
    """The class that is trained, or ``"module:attribute"`` where it is."""
    evaluator: ClassVar[str] = "knn"
    """The evaluator during training, a name in ``EVALUATORS``."""
    views: ClassVar[int] = 1
    """Random views of each image in a batch."""
    labelled: ClassVar[bool] = False
    """Whether the queue keeps labels."""
    keeps_best: ClassVar[bool] = False
    """Whether the best model of a run is kept in ``best.pt``, beside the last."""

    # Options that only some modes have, as the other modes mean them
    bn_splits = 1
    images_per_class = 0
    augmentation = ""
    head_epochs = 0
    head_lr = 0.0
    validation = "0"

    def __post_init__(self) -> None:
        """Checks each field's type, choices and bound.

        Raises:
            UserError: naming the option, its value and what it takes.
        """
        types = get_type_hints(type(self))
        for item in fields(self):
            check_option(item.name, getattr(self, item.name), types[item.name], item.metadata)
        parse_numbers(self.recall_ks, "--recall-ks")
        parse_save_interval(self.save_every)
        queue_rows(self, 100)

    @property
    def run_folder(self) -> str:
        """``out``, or a name made of what sets the run apart."""
        data = self.data.replace("\\", "/").rstrip("/").replace(":", "-").split("/")[-1]
        return self.out or f"runs/{self.mode}-{data}-{self.adaptation}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Self-supervised pretraining with a momentum encoder and a queue (MoCo)."""

    bn_splits: int = option(1, "parts of a batch that BatchNorm normalises apart", least=1)
    momentum: float = option(0.99, "m of the key encoder", least=0, most=1)
    momentum_schedule: str = option(
        "constant", "m over the run: constant, or cosine up to 1", choices=("constant", "cosine")
    )
    enqueue: str = option(
        "before_loss",
        "when keys enter the queue: before the loss (the paper) or after it (classic MoCo)",
        choices=("before_loss", "after_loss"),
    )
    normalize_first: bool = option(True, "match the moments of keys of unit length, not of raw ones")
    symmetric: bool = option(False, "each view is query and key in turn")

    mode = "pretrain"
    method = "selfsup_xbn.methods.moco:MoCo"
    views = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if queue_rows(self, 100) == 0:
            raise UserError(f"--queue-size: expected at least one row in mode {self.mode}, got {self.queue_size!r}")


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig(Config):
    """Supervised metric learning with a cross-batch memory (Sec. 5.1 of arXiv 2303.17127)."""

    data: str = option("digits-disjoint", DATA_HELP, names=DATA_SETS)
    validation: str = option(
        "0",
        "hold out P% of the training classes and choose best.pt on them; 0: choose it on the test set, as the paper",
        later=True,
    )
    augmentation: str = option("supervised", "family of random views: supervised, cifar, photo, digits, none")
    images_per_class: int = option(4, "images of a class in a batch", least=1)
    head: str = option("l2", "the embedding: l2, l2+ln or l2+bn (Table 3)")
    queue_size: str = option("100%", "rows M of the memory, or P% of the training images; 0: no memory")
    memory_start: int = option(0, "steps before the memory is used, while it fills", least=0)
    batch_loss_weight: float = option(0.0, "weight of the loss in the batch, beside that against the memory", least=0)
    loss: str = option("SupConLoss", "SupConLoss, or another loss of pytorch-metric-learning by name")
    loss_args: str = option("", "its arguments: name=value,name=value")
    miner: str = option("PairMarginMiner", "PairMarginMiner, none, or another miner of pytorch-metric-learning by name")
    miner_args: str = option(
        "", "its arguments: name=value,name=value (PairMarginMiner: pos_margin=0.2,neg_margin=0.8)"
    )
    miner_distance: str = option(
        "euclidean", "what PairMarginMiner's margins are measured in", choices=("euclidean", "cosine")
    )
    head_epochs: int = option(0, "epochs before the others in which the head alone is trained", least=0)
    head_lr: float = option(0.001, "their learning rate (SGD)", least=0)

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
        parse_validation(self.validation)
        parse_arguments(self.loss_args, "--loss-args")
        parse_arguments(self.miner_args, "--miner-args")


def queue_rows(config: Config, images: int) -> int:
    """Return the rows of the queue for a training set of so many images: ``queue_size``, or its percentage of them.

    Raises:
        UserError: it is neither a whole number nor a percentage of at most 100.
    """
    return parse_rows(config.queue_size, images)


def resolved(config: Config) -> dict[str, Any]:
    """Return all fields by name, with the mode: the content of ``config.json``."""
    return {"mode": config.mode, **asdict(config)}


def from_resolved(values: Any) -> Config:
    """Return the config of a ``config.json``; keys that are no options (versions, commit) are ignored.

    An option that an older version did not have is at its default if it does not change results, or if the default is
    what that version did.

    Raises:
        UserError: no such mode, a missing option, or a value that the option does not take.
    """
    mode = values.get("mode") if isinstance(values, dict) else None
    if not isinstance(mode, str) or mode not in METHODS:
        raise UserError(f"expected a config with a mode, one of {', '.join(METHODS)}, got {mode!r}")
    kind: type[Config] = METHODS[mode]
    if type(rows := values.get("queue_size")) is int:  # as older versions of mode pretrain wrote it
        values = values | {"queue_size": str(rows)}
    for item in fields(kind):
        if item.name not in values and item.metadata["affects_results"] and not item.metadata["later"]:
            raise UserError(f"expected the option {item.name!r} in the config, found none")
    return kind(**{item.name: values[item.name] for item in fields(kind) if item.name in values})


def differences(a: Config, b: Config) -> list[str]:
    """Return ``name: value of a, value of b`` for each field that changes results and differs."""
    if a.mode != b.mode:
        return [f"mode: {a.mode}, {b.mode}"]
    pairs = [
        (item.name, getattr(a, item.name), getattr(b, item.name))
        for item in fields(a)
        if item.metadata["affects_results"]
    ]
    return [f"{name}: {left!r}, {right!r}" for name, left, right in pairs if left != right]
