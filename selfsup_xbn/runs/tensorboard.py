"""The records of ``metrics.jsonl`` once more, as TensorBoard scalars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EVENTS = "events.out.tfevents.*"


class ScalarLog:
    """Writes each number of a record under its name (TensorBoard makes ``recall_1`` of ``recall@1``), by step.

    Args:
        folder: the run's, so that ``tensorboard --logdir runs`` names it by its folder.
        records: those of the run so far. They are written again in place of earlier event files, which may hold steps
            that a resumed run repeats.
    """

    def __init__(self, folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for path in folder.glob(EVENTS):
            path.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=0)  # a TensorBoard that looks on forgets what it read
        for record in records:
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a record; what is not a number is left out. The baselines, which have no step, stand at step 0."""
        step = record.get("step", 0)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
