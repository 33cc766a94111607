"""A run for other programs: its metrics as CSV; its encoder for torchvision, as safetensors, or as an ONNX graph.

Axis legend: B batch, C channels, S side of the square images in pixels, F features, D embedding dimensions.
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

from selfsup_xbn.config.schema import EXPORTS
from selfsup_xbn.data import data_of
from selfsup_xbn.errors import UserError, require_package
from selfsup_xbn.models.backbones import CIFAR, SMALL_BACKBONES, TIMM
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.runs.folder import read_config, read_metrics
from selfsup_xbn.runs.load import TrainedRun, load_run
from selfsup_xbn.utils import atomic


def export_run(
    folder: Path, kind: str, out: Path | None = None, *, best: bool = False, overwrite: bool = False
) -> list[str]:
    """Writes what ``kind`` names, by default into the run's folder; says what it is and how to use it.

    Args:
        folder: the run's.
        kind: a key of ``EXPORTS``: ``"csv"``, ``"torchvision"``, ``"safetensors"`` or ``"onnx"``.
        out: the file; its folder is made if it is not there.
        best: the run's best model by Recall@1 in place of its last.
        overwrite: replace the file.

    Raises:
        UserError: no run there, the file exists, the encoder cannot be had in that format, or a package is missing.
    """
    read_config(folder)
    path = out or folder / EXPORTS[kind]
    if path.is_dir() or (path.exists() and not overwrite):
        raise UserError(f"{path} exists: give another --out, or --overwrite to replace the file")
    if best and kind == "csv":
        raise UserError("--best chooses an encoder, and --format csv has none: give one of them")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path, "make room there, or give another --out") as file:
        lines = _write(folder, kind, file, best)
    return [f"{path}: {lines[0]}", *lines[1:]]


def _write(folder: Path, kind: str, file: BinaryIO, best: bool) -> list[str]:
    if kind == "csv":
        return write_csv(folder, file)
    run = load_run(folder, best)
    run.trained.eval()
    write = {"torchvision": write_torchvision, "safetensors": write_safetensors, "onnx": write_onnx}[kind]
    return [*write(run, file), _input_line(run)]


def write_csv(folder: Path, file: BinaryIO) -> list[str]:
    """``metrics.jsonl`` as a table: a column for each name that any record has, blank where a record has none."""
    records = read_metrics(folder)
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, names)  # None and what is missing become an empty cell
    writer.writeheader()
    writer.writerows(records)
    text.detach()
    return [f"{len(records)} records of {len(names)} columns"]


def write_torchvision(run: TrainedRun, file: BinaryIO) -> list[str]:
    """The backbone as the whole state dict of torchvision's model: names and all, the classifier zeros.

    Raises:
        UserError: the backbone is none of torchvision's.
    """
    name = run.config.backbone
    if name in SMALL_BACKBONES or name.startswith(TIMM):
        raise UserError(f"backbone {name!r} is none of torchvision's: try --format safetensors or onnx")
    plain = name.removesuffix(CIFAR)
    with torch.device("meta"):
        wanted = torchvision.models.get_model(plain).state_dict()
    own = _tensors(run.trained.backbone)
    classifier = {key: torch.zeros(value.shape) for key, value in wanted.items() if key not in own}
    atomic.save({key: own.get(key, classifier.get(key)) for key in wanted}, file)
    lines = [f"the backbone of {name} for torchvision, without the head", _classifier_line(classifier)]
    if name.endswith(CIFAR):
        stem = f"torch.nn.Conv2d({run.channels}, 64, 3, padding=1, bias=False)"
        lines += [f"not the plain {plain}; before loading: model.conv1 = {stem}; model.maxpool = torch.nn.Identity()"]
    else:
        lines += [
            f"not the plain {plain}: {key} is {list(own[key].shape)} in place of {list(wanted[key].shape)}; "
            "adapt that part before loading"
            for key in own
            if own[key].shape != wanted[key].shape
        ]
    return [*lines, f"torchvision.models.{plain}().load_state_dict(torch.load(FILE, weights_only=True))"]


def _classifier_line(classifier: dict[str, Tensor]) -> str:
    parts = ", ".join(f"{key} {list(value.shape)}" for key, value in classifier.items())
    return f"zeros, as the run has no classifier: {parts}"


def write_safetensors(run: TrainedRun, file: BinaryIO) -> list[str]:
    """Backbone and head (``backbone.*``, ``head.*``), with the settings that rebuild them as metadata."""
    from safetensors.torch import save

    settings = {name: str(getattr(run.config, name)) for name in ("backbone", "head", "dim")}
    settings |= {"channels": str(run.channels), "image_size": str(run.image_size)}
    tensors = _tensors(run.trained)
    file.write(save(tensors, {"format": "pt", **settings}))
    return [f"{len(tensors)} tensors of the encoder, backbone.* and head.*"]


def write_onnx(run: TrainedRun, file: BinaryIO) -> list[str]:
    """A graph from ``images`` [B,C,S,S] to ``features`` [B,F] and ``embeddings`` [B,D], for any B.

    Raises:
        UserError: a package is missing, or the network has an operation that ONNX lacks.
    """
    for package in ("onnx", "onnxscript"):
        require_package(package, "--format onnx", "export")
    model = _FeaturesAndEmbeddings(run.trained).eval()
    images = torch.zeros(2, run.channels, run.image_size, run.image_size)  # 1 would be taken for a constant
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
        raise UserError(f"backbone {run.config.backbone!r} has no ONNX form ({reason}): try safetensors") from None
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    assert shape is not None
    if isinstance(shape[0], int):
        raise UserError(f"backbone {run.config.backbone!r} has no ONNX form for any batch size: try safetensors")
    file.write(program.model_proto.SerializeToString())
    return [f"images to features [B, {run.trained.feature_dim}] and embeddings [B, {run.trained.dim}], not normalised"]


class _FeaturesAndEmbeddings(nn.Module):
    """Both outputs of an encoder."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Float[Tensor, "B C S S"]) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B D"]]:
        features = self.encoder.features(images)
        return features, self.encoder.head(features)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict in the usual memory layout; no two tensors share memory."""
    return {name: value.contiguous().clone() for name, value in module.state_dict().items()}


def _input_line(run: TrainedRun) -> str:
    """Return a line about the encoder's input; its normalisation only where the data set can be read."""
    shape = f"input: float32 [B, {run.channels}, {run.image_size}, {run.image_size}]"
    try:
        data = data_of(replace(run.config, limit_train=0))
    except (UserError, OSError):
        return f"{shape}, normalised as in {run.config.data}, which is not here to ask"
    return f"{shape}, (pixel / 255 - {_shown(data.mean)}) / {_shown(data.std)} for each channel"


def _shown(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
