"""Checks of arguments that several modules share."""

from __future__ import annotations

from torch import Tensor


def check_tensors(**values: object) -> None:
    """Check that every value that is given is a tensor.

    Args:
        values: Values by the name that the message gives them. None stands for an argument that is left out.

    Raises:
        TypeError: A value is neither a tensor nor None.

    Example:
        >>> check_tensors(labels=[0, 1])
        Traceback (most recent call last):
        TypeError: expected a tensor as labels, got a list
    """
    for name, value in values.items():
        if not (value is None or isinstance(value, Tensor)):
            raise TypeError(f"expected a tensor as {name}, got a {type(value).__name__}")
