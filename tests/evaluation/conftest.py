from __future__ import annotations

import jaxtyping
import pytest


@pytest.fixture
def as_users_run_it():
    """Annotations unchecked, so that a fault in shapes reaches the function's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
