"""Run a frozen network over images.

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
    """Features of all images, in order, on the device where ``function`` leaves them.

    Args:
        function: a module, a module's method such as ``encoder.features``, or any other callable. A module is in
            eval mode meanwhile; each part's own mode is restored.
        batches: image batches, already on the device that ``function`` wants.

    Raises:
        UserError: there are no images.
    """
    with torch.inference_mode(), evaluating(function):
        features = [function(images).float() for images in batches]
    if not features:
        raise UserError("expected at least one batch of images, got none")
    # outside of inference mode: the result may be used in training, for a linear probe say
    return torch.cat(features)


@contextmanager
def evaluating(function: Callable[..., Tensor]) -> Iterator[None]:
    """Eval mode for ``function``, if it is a module or the method of one; each part's own mode comes back after it."""
    module = getattr(function, "__self__", function)
    modes = [(part, part.training) for part in module.modules()] if isinstance(module, nn.Module) else []
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
