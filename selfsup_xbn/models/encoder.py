"""Encoders: a backbone (images to features) and a head (features to embeddings), both by name.

Axis legend: B batch, C channels, S side of the square images in pixels, F features, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_xbn.errors import UserError, near
from selfsup_xbn.models.split_batch_norm import SplitBatchNorm2d, split_batch_norms

TIMM = "timm:"
CIFAR = "-cifar"


class Encoder(nn.Module):
    """``head(backbone(images))``.

    Attributes:
        backbone: images [B,C,S,S] to features [B,F].
        head: features [B,F] to embeddings [B,D], not normalised.
        feature_dim: F.
        dim: D.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_dim = feature_dim
        self.dim = dim

    def features(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B F"]:
        """The backbone's output, which is what other tasks use."""
        return self.backbone(images)

    def forward(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D"]:
        """Embeddings as the head leaves them."""
        return self.head(self.backbone(images))


def build_encoder(
    backbone: str,
    dim: int,
    *,
    channels: int = 3,
    image_size: int = 32,
    head: str = "linear",
    bn_splits: int = 1,
    weights: str | None = None,
) -> Encoder:
    """An encoder from the names of its parts.

    Args:
        backbone: ``"convnet4"``, ``"convnet-digits"`` or ``"conv4-64"`` (small, for a CPU), a torchvision
            classification model (``"resnet50"``), a torchvision ResNet with the stem for small images
            (``"resnet18-cifar"``), or a timm model (``"timm:vit_small_patch16_224"``). Parameters keep the names of
            their library.
        dim: D, dimensions of the embedding.
        channels: C, channels of the images.
        image_size: S, side of the images in pixels; an architecture that adapts to it is built for it.
        head: one of ``HEADS``.
        bn_splits: parts of a batch whose BatchNorm statistics are apart (``SplitBatchNorm2d``); MoCo's notebook has 8.
        weights: ``"imagenet"`` fetches the library's weights; ``None`` starts at random.

    Raises:
        UserError: unknown name, an image size that the backbone cannot take, weights that cannot be fetched, or
            ``bn_splits`` for a backbone without plain BatchNorm.
    """
    _require_known(head, HEADS, "head")
    if weights is not None:
        _require_known(weights, ["imagenet"], "weights")
    try:
        network = _build_backbone(backbone, channels, image_size, weights)
        feature_dim = _feature_dim(network, channels, image_size)
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = f"{image_size}-pixel images: {error}".partition("\n")[0]
        raise UserError(f"{backbone!r} cannot take {reason}; try another image size, or a '-cifar' ResNet") from error
    if bn_splits > 1:
        _split_norms(network, bn_splits, backbone)
    return Encoder(network, HEADS[head](feature_dim, dim), feature_dim, dim)


def _build_backbone(name: str, channels: int, image_size: int, weights: str | None) -> nn.Module:
    if weights is not None and (name in SMALL_BACKBONES or name.endswith(CIFAR)):
        raise UserError(f"there are no {weights} weights for {name!r}; give a file: --weights FILE")
    if name in SMALL_BACKBONES:
        return SMALL_BACKBONES[name](channels).to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU
    build = _timm if name.startswith(TIMM) else _torchvision
    return build(name, channels, image_size, weights)


# ---------------------------------------------------------------- torchvision and timm


def _torchvision_names() -> list[str]:
    """Names of torchvision's classification models whose classifier ends in one linear layer."""
    headless = ("googlenet", "inception", "squeezenet")
    return [n for n in torchvision.models.list_models(torchvision.models) if not n.startswith(headless)]


def _torchvision(name: str, channels: int, image_size: int, weights: str | None) -> nn.Module:
    known = _torchvision_names()
    resnets = [n + CIFAR for n in known if n.startswith(("resnet", "resnext", "wide_resnet"))]
    _require_known(name, [*SMALL_BACKBONES, *known, *resnets], "backbone")
    if weights is not None and channels != 3:
        raise UserError(f"the {weights} weights of {name!r} are for 3 channels, got {channels}; try {TIMM + name!r}")
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
    if not timm.is_model(short):
        _require_known(name, [TIMM + n for n in timm.list_models()], "backbone")
    model = _with_weights(
        lambda tag: timm.create_model(short, pretrained=tag is not None, num_classes=0, in_chans=channels),
        weights,
        name,
    )
    resize = getattr(model, "set_input_size", None)
    if resize is not None:
        resize(img_size=image_size)
    return model


def _with_weights(build: Callable[[str | None], nn.Module], weights: str | None, name: str) -> nn.Module:
    """``build(weights)``; whatever goes wrong with weights to fetch is one line for the user."""
    if weights is None:
        return build(None)
    try:
        return build(weights)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"no ImageNet weights for {name!r} ({reason}); give a file: --weights FILE") from error


def _use_small_stem(resnet: nn.Module) -> None:
    """3x3 stride-1 stem and no max-pool, initialised as the MoCo CIFAR-10 notebook does (PyTorch's default)."""
    resnet.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    resnet.maxpool = nn.Identity()


def _replace_first_conv(model: nn.Module, channels: int) -> None:
    """The first convolution again, at random, with ``channels`` inputs."""
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
    """The last linear layer becomes the identity; all other names stay."""
    name = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    model.set_submodule(name, nn.Identity())


def _split_norms(network: nn.Module, splits: int, name: str) -> None:
    split_batch_norms(network, splits)
    if not any(isinstance(module, SplitBatchNorm2d) for module in network.modules()):
        raise UserError(f"backbone {name!r} has no plain BatchNorm to split; use bn_splits=1, got {splits}")


@torch.no_grad()
def _feature_dim(network: nn.Module, channels: int, image_size: int) -> int:
    """F, by a look at one blank image in eval mode (the running statistics stay as they are)."""
    features = network.eval()(torch.zeros(1, channels, image_size, image_size))
    network.train()
    return features.shape[1]


def _require_known(name: str, known: Iterable[str], what: str) -> None:
    choices = list(known)
    if name in choices:
        return
    raise UserError(f"no {what} named {name!r}{near(name, choices, likeness=0.0)}")


# ---------------------------------------------------------------- small backbones


def _convnet(channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """3x3 convolutions with BatchNorm and ReLU, each but the last max-pooled; then the mean over pixels.

    The max-pool stands before BatchNorm and ReLU: these then see a quarter of the pixels (1.35 times as fast a step).
    """
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(o), nn.ReLU())
        for i, o in pairwise((channels, *widths))
    ]
    blocks[-1][1] = nn.Identity()
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _conv4(channels: int) -> nn.Sequential:
    """Few-shot learning's four blocks of 64 channels (Vinyals et al., arXiv 1606.04080), from 16 x 16 on."""
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


# ---------------------------------------------------------------- heads


class UnitLength(nn.Module):
    """Rows of Euclidean length 1."""

    def forward(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return F.normalize(z)


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    # MoCo v1 (arXiv 1911.05722) and v2 (arXiv 2003.04297)
    "linear": lambda features, dim: nn.Linear(features, dim),
    "mlp": lambda features, dim: nn.Sequential(
        nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim)
    ),
    # Table 3 of the paper; the L2 normalisation of "l2" is the method's own
    "l2": lambda features, dim: nn.Linear(features, dim),
    "l2+ln": lambda features, dim: nn.Sequential(nn.Linear(features, dim), UnitLength(), nn.LayerNorm(dim)),
    "l2+bn": lambda features, dim: nn.Sequential(nn.Linear(features, dim), UnitLength(), nn.BatchNorm1d(dim)),
}
