"""Build encoders: a backbone (images to features) followed by a head (features to embeddings).

Axis legend: B batch, C channels, S side of the square images in pixels, F features, D embedding dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import UserError
from selfsup_xbn.models.backbones import build_backbone, require_known
from selfsup_xbn.models.heads import HEADS
from selfsup_xbn.models.split_batch_norm import SplitBatchNorm2d, split_batch_norms
from selfsup_xbn.utils.distributed import world


class Encoder(nn.Module):
    """Backbone followed by a head.

    Args:
        backbone: module that maps images [B, C, S, S] to features [B, F].
        head: module that maps features [B, F] to embeddings [B, D]. The embeddings are not normalized.
        feature_dim: number of features F.
        dim: number of embedding dimensions D.
        freeze_bn: whether the BatchNorm layers of the backbone stay in eval mode and are not trained.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, feature_dim: int, dim: int, *, freeze_bn: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_dim = feature_dim
        self.dim = dim
        self.freeze_bn = freeze_bn
        if freeze_bn:
            for norm in self._norms():
                norm.requires_grad_(False)
            self.train()

    def train(self, mode: bool = True) -> Encoder:
        """Set training or eval mode. Frozen BatchNorm layers stay in eval mode."""
        super().train(mode)
        if self.freeze_bn:
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]

    def features(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B F"]:
        """Return the output of the backbone, the representation for downstream tasks."""
        return self.backbone(images)

    def forward(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D"]:
        """Return the output of the head, which is not normalized."""
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
    freeze_bn: bool = False,
) -> Encoder:
    """Return an encoder with the given backbone and head.

    Args:
        backbone: name of a small network for CPUs (``"convnet4"``, ``"convnet-digits"``, ``"conv4-64"``), a torchvision
            classification model (``"resnet50"``), a torchvision ResNet with a stem for small images
            (``"resnet18-cifar"``), a timm model (``"timm:vit_small_patch16_224"``), or ``"efficientnet-lite0"``, timm's
            ``tf_efficientnet_lite0`` with weights that need no download. Parameters keep the names of the library.
        dim: number of embedding dimensions D.
        channels: number of image channels C.
        image_size: side S of the images in pixels. Architectures that depend on it are built for this size.
        head: a key of ``HEADS``.
        bn_splits: number of splits of a batch with separate BatchNorm statistics (``SplitBatchNorm2d``).
        weights: ``"imagenet"`` for the weights of the library, None for random weights.
        freeze_bn: whether the BatchNorm layers of the backbone keep their statistics, scale and shift.

    Returns:
        Encoder of images [B, C, S, S], in training mode.

    Raises:
        UserError: a name is unknown, the backbone does not accept the image size, the weights cannot be loaded, or the
            backbone has no BatchNorm2d to split.

    Example:
        >>> encoder = build_encoder("convnet4", 128, channels=3, image_size=32)
        >>> encoder(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """
    require_known(head, HEADS, "head")
    if weights is not None:
        require_known(weights, ["imagenet"], "weights")
    try:
        network = build_backbone(backbone, channels, image_size, weights)
        feature_dim = _feature_dim(network, channels, image_size)
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"backbone {backbone!r} does not accept {image_size}-pixel images ({reason}); "
            "try another image size or a '-cifar' ResNet"
        ) from error
    if bn_splits > 1:
        _split_norms(network, bn_splits, backbone)
    return Encoder(network, HEADS[head](feature_dim, dim), feature_dim, dim, freeze_bn=freeze_bn)


def random_encoder(
    config: Config, channels: int, image_size: int, weights: Literal["imagenet"] | None = None
) -> Encoder:
    """Return the encoder of a config, with random or ImageNet weights.

    In distributed training each rank uses ``bn_splits / world_size`` splits, so that the BatchNorm statistics are
    those of a single process.

    Args:
        config: settings of the run.
        channels: number of image channels C.
        image_size: side S of the images in pixels.
        weights: ``"imagenet"``, or None for random weights.
    """
    return build_encoder(
        config.backbone,
        config.dim,
        channels=channels,
        image_size=image_size,
        head=config.head,
        bn_splits=max(1, config.bn_splits // world()),
        weights=weights,
        freeze_bn=config.freeze_bn and config.weights != "",  # those of random weights have no statistics to keep
    )


def _split_norms(network: nn.Module, splits: int, name: str) -> None:
    split_batch_norms(network, splits)
    if not any(isinstance(module, SplitBatchNorm2d) for module in network.modules()):
        raise UserError(f"expected bn_splits=1 for backbone {name!r}, which has no BatchNorm2d, got {splits}")


@torch.no_grad()
def _feature_dim(network: nn.Module, channels: int, image_size: int) -> int:
    """Return F, from a forward pass of one blank image in eval mode. Running statistics do not change."""
    features = network.eval()(torch.zeros(1, channels, image_size, image_size))
    network.train()
    return features.shape[1]
