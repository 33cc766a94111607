"""A run from its settings to its pictures."""

from __future__ import annotations

import warnings
from pathlib import Path

from selfsup_xbn.config.schema import Config
from selfsup_xbn.evaluation.evaluators import RetrievalEvaluator
from selfsup_xbn.report.curves import draw_curves, result_lines
from selfsup_xbn.report.gallery import draw_gallery
from selfsup_xbn.training.trainer import Run, train


def train_run(config: Config, *, resume: bool = False, overwrite: bool = False) -> list[str]:
    """Train, draw the pictures into the run's folder, and return the lines of its results.

    Of several processes the first one draws; the others return no lines.

    Raises:
        Exception: those of ``train``.
    """
    run = train(config, resume=resume, overwrite=overwrite)
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
    except OSError as error:  # a full disk: the run is done and saved
        warnings.warn(f"a picture could not be drawn in {folder} ({error.strerror})", stacklevel=2)
