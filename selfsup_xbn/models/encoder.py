"""Encoders: a backbone (images to features) and a head (features to embeddings), both by name.

Axis legend: B batch, C channels, S side of the square images in pixels, F features, D embedding dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import UserError
from selfsup_xbn.models.backbones import build_backbone, require_known
from selfsup_xbn.models.heads import HEADS
from selfsup_xbn.models.split_batch_norm import SplitBatchNorm2d, split_batch_norms
from selfsup_xbn.utils.distributed import world


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
    require_known(head, HEADS, "head")
    if weights is not None:
        require_known(weights, ["imagenet"], "weights")
    try:
        network = build_backbone(backbone, channels, image_size, weights)
        feature_dim = _feature_dim(network, channels, image_size)
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = f"{image_size}-pixel images: {error}".partition("\n")[0]
        raise UserError(f"{backbone!r} cannot take {reason}; try another image size, or a '-cifar' ResNet") from error
    if bn_splits > 1:
        _split_norms(network, bn_splits, backbone)
    return Encoder(network, HEADS[head](feature_dim, dim), feature_dim, dim)


def random_encoder(
    config: Config, channels: int, image_size: int, weights: Literal["imagenet"] | None = None
) -> Encoder:
    """Return the config's network for images of ``channels`` and ``image_size``, with random or ImageNet weights.

    Each of several processes has its share of ``bn_splits``: BatchNorm then sees the parts that one process would see.
    """
    return build_encoder(
        config.backbone,
        config.dim,
        channels=channels,
        image_size=image_size,
        head=config.head,
        bn_splits=max(1, config.bn_splits // world()),
        weights=weights,
    )


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
