"""Mean and standard deviation of the images that the weights of a library were trained on."""

from __future__ import annotations

import torchvision

from selfsup_xbn.models.backbones import SMALL_BACKBONES, TIMM, library_name

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def statistics_of(backbone: str) -> Statistics | None:
    """Return mean and standard deviation of each channel for the pretrained weights of a backbone.

    Args:
        backbone: name of the backbone, as in ``build_encoder``.

    Returns:
        The statistics of timm's ``default_cfg`` or of torchvision's weights; None if the backbone has no such weights.

    Example:
        >>> statistics_of("efficientnet-lite0"), statistics_of("convnet4")
        (((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), None)
    """
    name = library_name(backbone)
    if name in SMALL_BACKBONES:
        return None
    if name.startswith(TIMM):
        import timm

        config = timm.get_pretrained_cfg(name.removeprefix(TIMM))
        return (tuple(config.mean), tuple(config.std)) if config else None
    if name not in torchvision.models.list_models(torchvision.models):
        return None
    transform = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
    return tuple(transform.mean), tuple(transform.std)
