"""Load pretrained weights: match the tensors of a checkpoint with those of an encoder by name and shape.

Each tensor of the file, at any depth of nesting, gets a dotted name. Wrappers (``state_dict``, ``module.``,
``encoder_q.``, ``backbone.``, ...) are prefixes of these names. The prefix and the naming scheme with the most matching
tensors are used.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import Tensor, nn

from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import UserError
from selfsup_xbn.models.backbones import check_backbone, require_known
from selfsup_xbn.models.encoder import Encoder, random_encoder
from selfsup_xbn.models.heads import HEADS
from selfsup_xbn.utils.safe_loading import read_values


@dataclass(frozen=True)
class LoadReport:
    """Result of ``load_weights``.

    Attributes:
        path: path of the file.
        prefix: prefix of the names in the file.
        matched: names of the tensors that were loaded.
        missing: names of the model's tensors that are not in the file. They are unchanged.
        mismatched: names of the model's tensors with another shape in the file, with both shapes. They are unchanged.
        unexpected: names, without the prefix, of the tensors of the file that the model does not have.
        outside: number of tensors of the file without the prefix, such as those of a second encoder or an optimizer.
    """

    path: str
    prefix: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]
    outside: int

    def lines(self) -> list[str]:
        """Return the report as lines of text. Each list shows at most four names."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        under = f" under {self.prefix!r}" if self.prefix else ""
        lists = {
            "missing in the file": self.missing,
            "mismatched in shape": self.mismatched,
            "unexpected in the file": self.unexpected,
        }
        lines = [f"{self.path}: {len(self.matched)} of {total} tensors matched{under}"]
        lines += [f"  {title} ({len(names)}): {_shortened(names)}" for title, names in lists.items() if names]
        if self.outside:
            lines.append(f"  not loaded, without the prefix: {self.outside} tensors")
        return lines


SHARE = 0.9
"""Smallest share of the tensors of a backbone that a file must fit. A first layer of another shape is one tensor."""


def load_weights(model: nn.Module, path: str | PathLike[str], *, partial: bool = False) -> LoadReport:
    """Load the tensors of a checkpoint that match the model in name and shape.

    Supported are state dicts of torchvision and timm, checkpoints of MoCo (``module.encoder_q.*``), lightly
    (``backbone.*``, with the names of the ResNet's children or their indices in an ``nn.Sequential``) and Lightning,
    and ``checkpoint.pt`` of this package. If two encoders of the file match equally well, the first one is loaded,
    which is the query encoder of MoCo. No code in the file is executed.

    Args:
        model: an ``Encoder`` or another module, such as a backbone.
        path: file written by ``torch.save``, or a ``.safetensors`` file.
        partial: whether to load a file that fits less than ``SHARE`` of the backbone, whose other tensors stay random,
            or has further layers. A head that is missing or has another shape is no reason to refuse a file.

    Returns:
        Names of the tensors that were loaded, missing, mismatched and unexpected.

    Raises:
        UserError: the file does not exist, is no checkpoint, contains objects other than tensors and plain values, or
            no tensor matches, or too few match and ``partial`` is False.
    """
    tensors = _read_tensors(Path(path))
    own = model.state_dict()
    prefix, names = _best_fit(tensors, own, _namings(model))
    under = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    candidates = {names[alias]: tensor for alias, tensor in under.items() if alias in names}
    fitting = {name: tensor for name, tensor in candidates.items() if tensor.shape == own[name].shape}
    if not any(tensor.ndim for tensor in fitting.values()):  # the scalar step count of a BatchNorm matches any model
        raise UserError(_nothing_fits(path, tensors, own))
    report = LoadReport(
        path=fspath(path),
        prefix=prefix,
        matched=tuple(fitting),
        missing=tuple(n for n in own if n not in candidates and not n.endswith("num_batches_tracked")),
        mismatched=tuple(_shapes(n, t, own[n]) for n, t in candidates.items() if n not in fitting),
        unexpected=tuple(alias for alias in under if alias not in names),
        outside=len(tensors) - len(under),
    )
    if not partial:
        _check_share(report, model, names)
    model.load_state_dict(fitting, strict=False)
    return report


def initial_encoder(config: Config, channels: int, image_size: int) -> tuple[Encoder, list[str]]:
    """Return the encoder of a config with its initial weights, and lines that describe them.

    The weights are random, those of ImageNet, or those of a file.

    Args:
        config: settings of the run.
        channels: number of image channels.
        image_size: side of the images in pixels.

    Raises:
        UserError: the encoder cannot be built, or the weights cannot be loaded.
    """
    if config.weights == "":
        return random_encoder(config, channels, image_size), []
    if config.weights == "imagenet":
        encoder = random_encoder(config, channels, image_size, "imagenet")
        return encoder, [f"imagenet: all {len(encoder.backbone.state_dict())} tensors of the backbone; random head"]
    encoder = random_encoder(config, channels, image_size)
    return encoder, load_weights(encoder, config.weights, partial=config.partial_weights).lines()


def check_weights(config: Config, *, download: bool = True) -> None:
    """Check that the network of a config exists and that its initial weights can be loaded, before data is read.

    The number of channels and the side of the images are not known yet. Networks for 3 channels and for 1 channel and
    the side of the config, by default 224 pixels, are tried.

    Args:
        config: settings of the run.
        download: whether ImageNet weights may be downloaded. Otherwise they are not loaded.

    Raises:
        UserError: the backbone or the head is unknown, or the weights cannot be loaded.
    """
    check_backbone(config.backbone, "imagenet" if config.weights == "imagenet" else None)
    require_known(config.head, HEADS, "head")
    if not config.weights or (config.weights == "imagenet" and not download):
        return
    try:
        initial_encoder(config, 3, config.image_size or 224)
    except UserError as error:
        if config.weights == "imagenet":
            raise
        try:
            initial_encoder(config, 1, config.image_size or 224)
        except UserError:
            raise error from None


# ---------------------------------------------------------------- reading


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of the file by dotted name."""
    if not path.is_file():  # a FIFO would block the reader of safetensors
        raise UserError(f"expected a .pt, .pth, .ckpt or .safetensors file, got {str(path)!r}, which is not a file")
    try:
        content = _load(path)
    except Exception as error:  # the readers raise many types of errors for a damaged file
        raise UserError(_unreadable(path, error)) from error
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in _flat(content)}


def _load(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # many training scripts store their `args`
        return read_values(path)


def _unreadable(path: Path, error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"expected tensors and plain values in {str(path)!r}, got {code[1]}; save only the state_dict()"
    return f"expected a file of torch.save or safetensors, got {str(path)!r}, which is no checkpoint or is truncated"


def _flat(value: object, name: str = "") -> list[tuple[str, Tensor]]:
    """Return the tensors of nested mappings with their names, the keys joined by dots."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if not isinstance(value, Mapping):
        return []
    return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}" if name else str(key))]


# ---------------------------------------------------------------- fitting


def _namings(model: nn.Module) -> list[dict[str, str]]:
    """Return the naming schemes of files, as maps from their names to the model's. The model's own scheme is first."""
    own = {name: name for name in model.state_dict()}
    if not isinstance(model, Encoder):
        return [own, *_numberings(model)]
    head = {f"fc.{name}": f"head.{name}" for name in model.head.state_dict()}
    bare = [{alias: f"backbone.{name}" for alias, name in naming.items()} for naming in _namings(model.backbone)]
    return [own, *(naming | head for naming in bare)]


def _numberings(backbone: nn.Module) -> list[dict[str, str]]:
    """Return the names in an ``nn.Sequential`` of the backbone's children, with and without identities."""
    children = list(backbone.named_children())
    kept = [(name, child) for name, child in children if not isinstance(child, nn.Identity)]
    return [
        {f"{i}.{inner}": f"{name}.{inner}" for i, (name, child) in enumerate(group) for inner in child.state_dict()}
        for group in (children, kept)
    ]


def _best_fit(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], namings: list[dict[str, str]]
) -> tuple[str, dict[str, str]]:
    """Return the first prefix and naming scheme with the largest number of tensors equal in name and shape."""
    fits: Counter[tuple[str, int]] = Counter()
    for i, names in enumerate(namings):
        for name, tensor in tensors.items():
            for start in [0, *(dot.end() for dot in re.finditer(r"\.", name))]:
                target = names.get(name[start:])
                fits[name[:start], i] += target is not None and tensor.shape == own[target].shape
    if not fits:
        return "", namings[0]
    prefix, i = max(fits, key=lambda fit: fits[fit])
    return prefix, namings[i]


def _check_share(report: LoadReport, model: nn.Module, names: Mapping[str, str]) -> None:
    """Check that file and backbone are the same network, up to ``1 - SHARE`` of the tensors of both.

    Tensors of the file count if they are in a part of the network that the model has too, such as ``layer3``: the
    tensors of a smaller network may all fit a larger one and leave layers random, or the other way round.

    Args:
        report: what would be loaded.
        model: the encoder or backbone.
        names: naming scheme of the file.

    Raises:
        UserError: too few tensors match.
    """
    backbone = {
        name
        for name in model.state_dict()
        if not (isinstance(model, Encoder) and name.startswith("head.")) and not name.endswith("num_batches_tracked")
    }
    parts = {alias.split(".")[0] for alias, name in names.items() if name in backbone}
    further = sum(
        (alias.split(".")[0] in parts or alias[0].isdigit()) and not alias.endswith("num_batches_tracked")
        for alias in report.unexpected
    )
    loaded, total = len(backbone & set(report.matched)), len(backbone) + further
    if loaded < SHARE * total:
        raise UserError(
            f"{report.path!r} fits {loaded} of the {len(backbone)} tensors of the backbone and has {further} further "
            f"tensors for it; expected at least {SHARE:.0%} of them in common: set --backbone to the architecture of "
            "the file, or insist with --partial-weights"
        )


# ---------------------------------------------------------------- messages


def _nothing_fits(path: str | PathLike[str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    if not tensors:
        return f"expected a checkpoint with a state_dict, got {fspath(path)!r}, which contains no tensors"
    name, own_name = next(iter(tensors)), next(iter(own))
    return (
        f"no tensor of {fspath(path)!r} matches the encoder: expected {own_name} {list(own[own_name].shape)}, ..., "
        f"got {name} {list(tensors[name].shape)}, ...; set --backbone to the architecture of the file"
    )


def _shapes(name: str, tensor: Tensor, own: Tensor) -> str:
    return f"{name}: expected {list(own.shape)}, got {list(tensor.shape)}"


def _shortened(names: tuple[str, ...], limit: int = 4) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
