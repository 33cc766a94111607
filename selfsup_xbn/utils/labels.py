"""Class labels of any dtype as int64."""

from __future__ import annotations

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from selfsup_xbn.errors import UserError
from selfsup_xbn.utils.checks import check_tensors


def class_indices(labels: Shaped[Tensor, "B"], rows: int, name: str = "labels") -> Int64[Tensor, "B"]:
    """Return labels as int64. Floating point labels must be whole numbers, and the host waits for the device.

    Args:
        labels: Class of each row, of any real dtype.
        rows: Number of rows B.
        name: Name of the labels for error messages.

    Raises:
        TypeError: The labels are not a tensor.
        UserError: The shape is not [B], or a label is not a whole number.

    Example:
        >>> class_indices(torch.tensor([3.0, 0.0]), rows=2)
        tensor([3, 0])
    """
    check_tensors(**{name: labels})
    if labels.shape != (rows,):
        raise UserError(f"expected {name} of shape [{rows}], one for each row, got {[*labels.shape]}")
    if labels.is_complex():
        raise UserError(f"expected whole numbers as {name}, got {labels.dtype}")
    whole = labels.long()
    if labels.is_floating_point() and not torch.equal(whole.to(labels.dtype), labels):
        fraction = labels[whole.to(labels.dtype) != labels][0].item()
        raise UserError(f"expected whole numbers as {name}, got {fraction}")
    return whole
