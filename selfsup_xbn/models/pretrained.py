"""Encoders from elsewhere: fit the tensors of a checkpoint to an encoder by name and shape.

One rule serves every source. All tensors of the file, however deeply nested, get a dotted name. Wrappers
(``state_dict``, ``module.``, ``encoder_q.``, ``backbone.``, ...) are prefixes of those names; the prefix and the naming
under which most tensors fit is the one that is read.
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
from selfsup_xbn.models.encoder import Encoder, random_encoder
from selfsup_xbn.utils.safe_loading import read_values


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file and of an encoder.

    Attributes:
        path: the file.
        prefix: what stands before the names in the file.
        matched: the encoder's tensors that were read.
        missing: the encoder's tensors that the file lacks; they are as they were.
        mismatched: the encoder's tensors that the file has in another shape, with both; they are as they were.
        unexpected: tensors under the prefix that the encoder has no place for, named without it.
        outside: number of tensors elsewhere in the file (a second encoder, an optimiser).
    """

    path: str
    prefix: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]
    outside: int

    def lines(self) -> list[str]:
        """The report for a reader, long lists cut short."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        under = f" under {self.prefix!r}" if self.prefix else ""
        lists = {
            "missing in the file": self.missing,
            "of another shape": self.mismatched,
            "left over in the file": self.unexpected,
        }
        lines = [f"{self.path}: {len(self.matched)} of {total} tensors matched{under}"]
        lines += [f"  {what} ({len(names)}): {_shortened(names)}" for what, names in lists.items() if names]
        if self.outside:
            lines.append(f"  elsewhere in the file, not used: {self.outside} tensors")
        return lines


def load_weights(model: nn.Module, path: str | PathLike[str]) -> LoadReport:
    """Read what fits of the checkpoint ``path`` into ``model``, and say what did and what did not.

    Known by test: torchvision and timm state dicts, MoCo checkpoints (``module.encoder_q.*``), lightly's
    (``backbone.*``, with the names of the ResNet's children or their numbers in an ``nn.Sequential``), Lightning's, and
    this project's ``checkpoint.pt``. Where a file holds two encoders that fit alike the first one is read: the
    query encoder. No code in the file is run.

    Args:
        model: an ``Encoder``, or any module, such as a backbone alone.
        path: a file of ``torch.save``, or ``.safetensors``.

    Raises:
        UserError: no such file, not a checkpoint, one that is more than tensors and plain values, or nothing fits.
    """
    tensors = _read_tensors(Path(path))
    own = model.state_dict()
    prefix, names = _best_fit(tensors, own, _namings(model))
    under = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    found = {names[alias]: tensor for alias, tensor in under.items() if alias in names}
    fitting = {name: tensor for name, tensor in found.items() if tensor.shape == own[name].shape}
    if not any(tensor.ndim for tensor in fitting.values()):  # a BatchNorm's step count fits anything
        raise UserError(_nothing_fits(path, tensors, own))
    model.load_state_dict(fitting, strict=False)
    return LoadReport(
        path=fspath(path),
        prefix=prefix,
        matched=tuple(fitting),
        missing=tuple(n for n in own if n not in found and not n.endswith("num_batches_tracked")),
        mismatched=tuple(_shapes(n, t, own[n]) for n, t in found.items() if n not in fitting),
        unexpected=tuple(alias for alias in under if alias not in names),
        outside=len(tensors) - len(under),
    )


def initial_encoder(config: Config, channels: int, image_size: int) -> Encoder:
    """Return the network that training starts from: with random weights, ImageNet's, or a file's.

    Of a file it prints which tensors fitted.
    """
    if config.weights in ("", "imagenet"):
        return random_encoder(config, channels, image_size, "imagenet" if config.weights else None)
    encoder = random_encoder(config, channels, image_size)
    print(*load_weights(encoder, config.weights).lines(), sep="\n")
    return encoder


# ---------------------------------------------------------------- reading


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file by dotted name."""
    if not path.is_file():
        raise UserError(f"no weights file {str(path)!r}; give the path of a .pt, .pth, .ckpt or .safetensors file")
    try:
        content = _load(path)
    except Exception as error:  # a damaged file can make the readers raise nearly anything
        raise UserError(_unreadable(path, error)) from error
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in _flat(content)}


def _load(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # the `args` of many training scripts: plain values
        return read_values(path)


def _unreadable(path: Path, error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"{str(path)!r} holds Python objects ({code[1]}), which are not loaded; save its state_dict() alone"
    return f"{str(path)!r} is no checkpoint, or is cut short; give a file of torch.save or safetensors"


def _flat(value: object, name: str = "") -> list[tuple[str, Tensor]]:
    """Tensors in nested mappings, named by their keys joined with dots."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if not isinstance(value, Mapping):
        return []
    return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}" if name else str(key))]


# ---------------------------------------------------------------- fitting


def _namings(model: nn.Module) -> list[dict[str, str]]:
    """The ways in which a file may name the tensors of ``model``: alias to own name, the model's own way first."""
    own = {name: name for name in model.state_dict()}
    if not isinstance(model, Encoder):
        return [own, *_numberings(model)]
    head = {f"fc.{name}": f"head.{name}" for name in model.head.state_dict()}
    bare = [{alias: f"backbone.{name}" for alias, name in naming.items()} for naming in _namings(model.backbone)]
    return [own, *(naming | head for naming in bare)]


def _numberings(backbone: nn.Module) -> list[dict[str, str]]:
    """Names in an ``nn.Sequential`` of the backbone's children: of all, or without identities (a dropped max-pool)."""
    children = list(backbone.named_children())
    kept = [(name, child) for name, child in children if not isinstance(child, nn.Identity)]
    return [
        {f"{i}.{inner}": f"{name}.{inner}" for i, (name, child) in enumerate(part) for inner in child.state_dict()}
        for part in (children, kept)
    ]


def _best_fit(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], namings: list[dict[str, str]]
) -> tuple[str, dict[str, str]]:
    """The prefix and the naming under which most tensors agree in name and shape; of equals the first."""
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


# ---------------------------------------------------------------- wording


def _nothing_fits(path: str | PathLike[str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    if not tensors:
        return f"{fspath(path)!r} holds no tensors; give a checkpoint with a state_dict"
    has, wants = next(iter(tensors)), next(iter(own))
    return (
        f"nothing in {fspath(path)!r} fits this encoder: it has {has} {list(tensors[has].shape)}, "
        f"wanted are {wants} {list(own[wants].shape)} and so on; name the architecture of the file with --backbone"
    )


def _shapes(name: str, found: Tensor, wanted: Tensor) -> str:
    return f"{name} {list(found.shape)} in place of {list(wanted.shape)}"


def _shortened(names: tuple[str, ...], limit: int = 4) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
