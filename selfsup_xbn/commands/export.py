"""Export of a run: metrics as CSV; the encoder for torchvision, as safetensors, or as an ONNX graph.

Axis legend: B batch, C channels, S height and width in pixels, F features, D embedding dimension.
"""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from selfsup_xbn.config.registry import EXPORTS
from selfsup_xbn.data import data_of, normalization
from selfsup_xbn.errors import UserError, require_package
from selfsup_xbn.models.backbones import CIFAR, SMALL_BACKBONES, TIMM, library_name
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.runs.folder import read_config, read_metrics
from selfsup_xbn.runs.load import TrainedRun, load_run
from selfsup_xbn.utils import atomic


def export_run(
    folder: Path, kind: str, out: Path | None = None, *, best: bool = False, overwrite: bool = False
) -> list[str]:
    """Export a run to a file, and return lines that describe the file and its use.

    Args:
        folder: Run folder.
        kind: Export format, a key of ``EXPORTS``: ``"csv"``, ``"torchvision"``, ``"safetensors"`` or ``"onnx"``.
        out: Output file, by default the file of ``EXPORTS`` in the run folder. Missing directories are created.
        best: Whether to export the best model, ``best.pt``, instead of the last one.
        overwrite: Whether to replace an existing file.

    Raises:
        UserError: The folder has no run, the file exists, the format does not support the encoder, or a required
            package is not installed.
    """
    read_config(folder)
    path = out or folder / EXPORTS[kind]
    if path.is_dir() or (path.exists() and not overwrite):
        raise UserError(f"{path} exists: choose another --out, or replace the file with --overwrite")
    if best and kind == "csv":
        raise UserError("--best is not valid with --format csv, which exports no encoder")
    atomic.check_creatable(path.parent)
    created = [f"new folder: {path.parent}"] if not path.parent.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path, "free disk space, or choose another --out") as file:
        lines = _write(folder, kind, file, best)
    return [*created, f"{path}: {lines[0]}", *lines[1:]]


def _write(folder: Path, kind: str, file: BinaryIO, best: bool) -> list[str]:
    if kind == "csv":
        return write_csv(folder, file)
    run = load_run(folder, best)
    run.trained.eval()
    write = {"torchvision": write_torchvision, "safetensors": write_safetensors, "onnx": write_onnx}[kind]
    return [*write(run, file), _input_line(run)]


def write_csv(folder: Path, file: BinaryIO) -> list[str]:
    """Write ``metrics.jsonl`` as a table with one column per name, and return a line that describes it.

    Cells of values that a record does not have are empty.
    """
    records = read_metrics(folder)
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, names)  # writes None and missing values as empty cells
    writer.writeheader()
    writer.writerows(records)
    text.detach()
    return [f"{len(records)} records of {len(names)} columns"]


def write_torchvision(run: TrainedRun, file: BinaryIO) -> list[str]:
    """Write the backbone as a complete state dict of the model of torchvision.

    The weights of the classifier, which a run does not have, are zeros.

    Returns:
        Lines that describe the state dict and how to load it.

    Raises:
        UserError: The backbone is not a model of torchvision.
    """
    name = run.config.backbone
    if name in SMALL_BACKBONES or library_name(name).startswith(TIMM):
        raise UserError(f"backbone {name!r} is not a model of torchvision: use --format safetensors or onnx")
    plain = name.removesuffix(CIFAR)
    with torch.device("meta"):
        reference = torchvision.models.get_model(plain).state_dict()
    tensors = _tensors(run.trained.backbone)
    classifier = {key: torch.zeros(value.shape) for key, value in reference.items() if key not in tensors}
    atomic.save({key: tensors.get(key, classifier.get(key)) for key in reference}, file)
    lines = [f"backbone {name} for torchvision, without the head", _classifier_line(classifier)]
    if name.endswith(CIFAR):
        stem = f"torch.nn.Conv2d({run.channels}, 64, 3, padding=1, bias=False)"
        lines += [
            f"differs from the plain {plain}; before loading: model.conv1 = {stem}; model.maxpool = torch.nn.Identity()"
        ]
    else:
        lines += [
            f"differs from the plain {plain}: {key} is {list(value.shape)} instead of {list(reference[key].shape)}; "
            "adapt this layer of the model before loading"
            for key, value in tensors.items()
            if value.shape != reference[key].shape
        ]
    return [*lines, f"torchvision.models.{plain}().load_state_dict(torch.load(FILE, weights_only=True))"]


def _classifier_line(classifier: dict[str, Tensor]) -> str:
    parts = ", ".join(f"{key} {list(value.shape)}" for key, value in classifier.items())
    return f"classifier, set to zeros: {parts}"


def write_safetensors(run: TrainedRun, file: BinaryIO) -> list[str]:
    """Write the tensors of backbone and head, and return lines that describe them.

    The metadata of the file has the arguments of ``build_encoder``, mean and standard deviation of the channels, and
    the line that loads the backbone into a model of timm.
    """
    from safetensors.torch import save

    settings = {name: str(getattr(run.config, name)) for name in ("backbone", "head", "dim")}
    settings |= {"channels": str(run.channels), "image_size": str(run.image_size)}
    if (statistics := _statistics(run)) is not None:
        settings |= {name: _formatted(values) for name, values in zip(("mean", "std"), statistics, strict=True)}
    lines = []
    if (name := library_name(run.config.backbone)).startswith(TIMM):
        model = f'timm.create_model("{name.removeprefix(TIMM)}", num_classes=0, in_chans={run.channels})'
        state = '{k[9:]: v for k, v in safetensors.torch.load_file(FILE).items() if k.startswith("backbone.")}'
        lines = [f"model = {model}; model.load_state_dict({state})"]
        settings["load"] = lines[0]
    tensors = _tensors(run.trained)
    file.write(save(tensors, {"format": "pt", **settings}))
    return [f"{len(tensors)} tensors of the encoder: backbone.* and head.*", *lines]


def write_onnx(run: TrainedRun, file: BinaryIO) -> list[str]:
    """Write a graph from ``images`` [B,C,S,S] to ``features`` [B,F] and ``embeddings`` [B,D], for any B.

    Returns:
        A line that describes the outputs.

    Raises:
        UserError: A required package is not installed, or the network cannot be converted to ONNX.
    """
    for package in ("onnx", "onnxscript"):
        require_package(package, "--format onnx", "export")
    model = _FeaturesAndEmbeddings(run.trained).eval()
    # torch.export would specialize a batch size of 1
    images = torch.zeros(2, run.channels, run.image_size, run.image_size)
    try:
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features", "embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"backbone {run.config.backbone!r} cannot be converted to ONNX ({reason}): use --format safetensors"
        ) from None
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    assert shape is not None
    if isinstance(shape[0], int):
        raise UserError(
            f"backbone {run.config.backbone!r} cannot be converted to ONNX with a variable batch size: "
            "use --format safetensors"
        )
    file.write(program.model_proto.SerializeToString())
    return [f"images to features [B, {run.trained.feature_dim}] and embeddings [B, {run.trained.dim}], not normalized"]


class _FeaturesAndEmbeddings(nn.Module):
    """Module that returns the features and the embeddings of an encoder."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Float[Tensor, "B C S S"]) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B D"]]:
        """Return the features and the embeddings of images."""
        features = self.encoder.features(images)
        return features, self.encoder.head(features)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with contiguous tensors that share no memory."""
    return {name: value.contiguous().clone() for name, value in module.state_dict().items()}


def _input_line(run: TrainedRun) -> str:
    """Return a line on the input of the encoder. Statistics of a data set that is not available are omitted."""
    statistics = _statistics(run)
    shape = f"input: float32 [B, {run.channels}, {run.image_size}, {run.image_size}]"
    if statistics is None:
        return f"{shape}, normalized as in {run.config.data}, which is not available here"
    mean, std = map(_formatted, statistics)
    return f"{shape}, (pixel / 255 - {mean}) / {std} for each channel"


def _statistics(run: TrainedRun) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation of the channels, or ``None`` if they are those of an unavailable data set."""
    mean, std = normalization(run.config, run.channels)
    if mean is not None and std is not None:
        return mean, std
    try:
        data = data_of(replace(run.config, limit_train=0))
    except (UserError, OSError):
        return None
    return data.mean, data.std


def _formatted(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
