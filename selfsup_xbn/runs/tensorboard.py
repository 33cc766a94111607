"""Log of the records of ``metrics.jsonl`` as TensorBoard scalars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EVENTS = "events.out.tfevents.*"


class ScalarLog:
    """A TensorBoard log with one scalar per metric. TensorBoard shows the name ``recall@1`` as ``recall_1``.

    Args:
        folder: Run folder, so that ``tensorboard --logdir runs`` shows the name of the folder.
        records: Existing records of the run. They are written again and replace earlier event files, which may have
            steps that a resumed run repeats.
    """

    def __init__(self, folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for path in folder.glob(EVENTS):
            path.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=0)  # a running TensorBoard discards what it has read
        for record in records:
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of a record, at step 0 if the record has no step (as the baselines)."""
        step = record.get("step", 0)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
