"""Evaluators and evaluated epochs of a run."""

from __future__ import annotations

from dataclasses import replace

import torch

from selfsup_xbn.config.registry import EVALUATORS
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data import ImageData
from selfsup_xbn.evaluation.evaluators import Evaluator
from selfsup_xbn.models.encoder import Encoder


class NoEvaluation:
    """Evaluator of a data set without test images, which has no metrics."""

    main = ""

    @classmethod
    def from_config(cls, config: Config, data: ImageData, device: torch.device) -> NoEvaluation:
        """Return the evaluator."""
        return cls()

    @classmethod
    def title(cls, config: Config) -> str:
        """Return the title of a table."""
        return f"no evaluation on {config.data}"

    def encoder(self, encoder: Encoder) -> dict[str, float]:
        """Return no metrics."""
        return {}

    def raw_pixels(self) -> dict[str, float]:
        """Return no metrics."""
        return {}


def evaluator_of(config: Config, data: ImageData, device: torch.device) -> Evaluator:
    """Return the evaluator of a run on the test images, which has no metrics if there are none."""
    if not len(data.test):
        return NoEvaluation()
    evaluator: Evaluator = EVALUATORS[config.evaluator].from_config(config, data, device)
    return evaluator


def validator_of(config: Config, data: ImageData, device: torch.device) -> Evaluator | None:
    """Return the evaluator of a run on the validation images, or ``None`` if there are none."""
    if data.validation is None:
        return None
    disjoint = not torch.isin(data.validation.labels, data.train.labels).any()
    return evaluator_of(config, replace(data, test=data.validation, gallery=None, disjoint=disjoint), device)


def evaluated_epochs(config: Config) -> list[int]:
    """Return the numbers of the epochs, with the head epochs and counted from 1, after which a run is evaluated.

    Example:
        >>> from selfsup_xbn.config.modes import PretrainConfig
        >>> evaluated_epochs(PretrainConfig(epochs=5, eval_every=2))
        [2, 4, 5]
    """
    last, every = config.head_epochs + config.epochs, config.eval_every
    return [epoch for epoch in range(1, last + 1) if epoch == last or (every and epoch % every == 0)]
