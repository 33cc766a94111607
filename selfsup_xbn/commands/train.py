"""Training of a run, including its plots."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfsup_xbn.config.schema import Config
from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation.evaluators import RetrievalEvaluator
from selfsup_xbn.report.curves import draw_curves, result_lines
from selfsup_xbn.report.gallery import draw_gallery
from selfsup_xbn.training.progress import Watch
from selfsup_xbn.training.trainer import Run, train


def train_run(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    explicit: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> list[str]:
    """Train a run, draw its plots into the run folder, and return the lines of its results.

    In a distributed run the first process draws the plots, and the other processes return no lines.

    Args:
        config: Configuration of the run.
        resume: Whether to continue from the last checkpoint in the run folder, if there is one.
        overwrite: Whether to replace an existing run.
        explicit: As in ``train``.
        watch: Function that is called with the numbers of completed and of all steps, about once per second.

    Raises:
        UserError: The configuration, the data or the run folder is invalid.
        Diverged: The loss or a weight is not finite.
        ProcessLost: Another process of the run ended or timed out.
        Interrupted: The run was stopped by a signal and can be resumed.
    """
    run = train(config, resume=resume, overwrite=overwrite, explicit=explicit, watch=watch)
    if run is None:
        return []
    folder = Path(config.run_folder)
    _draw(run, folder)
    return result_lines(folder)


def _draw(run: Run, folder: Path) -> None:
    try:
        draw_curves(folder)
        if isinstance(run.evaluator, RetrievalEvaluator):
            draw_gallery(folder, run.evaluator, run.method.encoder)
    except UserError as error:  # such as a full disk: the run itself is complete and saved
        warnings.warn(f"could not draw a plot: {error}", stacklevel=2)
