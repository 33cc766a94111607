"""Checks of arguments that several modules share."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from selfsup_xbn.errors import UserError


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


def whole_numbers(**values: Any) -> list[int]:
    """Return values as Python integers. Integers of NumPy and integer tensors of one element count as whole numbers.

    Args:
        values: Values by the name that the message gives them.

    Raises:
        UserError: A value is not a whole number.

    Example:
        >>> whole_numbers(size=64, dim=8.0)
        Traceback (most recent call last):
        selfsup_xbn.errors.UserError: expected a whole number as dim, got 8.0
    """
    numbers = []
    for name, value in values.items():
        try:
            numbers.append(operator.index(value))
        except TypeError:
            raise UserError(f"expected a whole number as {name}, got {value!r}") from None
    return numbers
