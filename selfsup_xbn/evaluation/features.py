"""Features of images from a frozen network.

Axis legend: N samples, B batch, F features, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from selfsup_xbn.errors import UserError


def extract_features(
    function: Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B F"]],
    batches: Iterable[Float[Tensor, "_ C H W"]],
) -> Float32[Tensor, "N F"]:
    """Return the features of all images, in order, without gradient.

    Args:
        function: A function from images to features: a module, a method of a module such as ``encoder.features``, or
            another callable. A module is in eval mode during the call, and the mode of each submodule is restored.
        batches: Batches of images, on the device of ``function``.

    Returns:
        The features in float32, on the device of the results of ``function``.

    Raises:
        UserError: If there are no batches.

    Example:
        >>> batches = torch.randn(10, 3, 4, 4).split(4)
        >>> extract_features(nn.Flatten(), batches).shape
        torch.Size([10, 48])
    """
    with torch.inference_mode(), evaluating(function):
        features = [function(images).float() for images in batches]
    if not features:
        raise UserError("expected at least one batch of images, got none")
    # Outside of inference mode, so that the result can be used in training, e.g. of a linear classifier.
    return torch.cat(features)


@contextmanager
def evaluating(function: Callable[..., Tensor]) -> Iterator[None]:
    """Set a module, or the module of a method, to eval mode within the context; restore all modes on exit.

    Args:
        function: A module, a method of a module, or another callable, which is not changed.

    Example:
        >>> module = nn.Dropout()
        >>> with evaluating(module):
        ...     module.training
        False
        >>> module.training
        True
    """
    module = getattr(function, "__self__", function)
    modes = [(submodule, submodule.training) for submodule in module.modules()] if isinstance(module, nn.Module) else []
    try:
        for submodule, _ in modes:
            submodule.training = False
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode
