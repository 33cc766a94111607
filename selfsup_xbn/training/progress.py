"""Progress of a run: a bar on a terminal, and a line per epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from selfsup_xbn.evaluation.summary import progress_text

Watch = Callable[[int, int], None]
"""Function of the number of completed steps and the number of all steps of a run."""


class Progress:
    """A progress bar on a terminal, and a line per epoch on standard output.

    Args:
        total: Number of steps of the run.
        done: Number of steps that were done before this process started.
        watch: Function that is called with the number of completed steps and ``total``, about once per second.
    """

    def __init__(self, total: int, done: int, watch: Watch | None = None) -> None:
        self.total, self.done, self.initial = total, done, done
        self.watch = watch or (lambda done, total: None)
        self.seconds = 0.0
        self.resumed = self.updated = time.monotonic()
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self.watch(done, total)

    def step(self) -> bool:
        """Count a step. Return whether the values beside the bar are due for an update, about once per second."""
        self.done += 1
        self.bar.update()
        now = time.monotonic()
        due = now - self.updated >= 1
        if due:
            self.updated = now
            self.watch(self.done, self.total)
        return due

    def show(self, **values: Any) -> None:
        """Show values beside the bar."""
        self.bar.set_postfix(values)

    def resume(self) -> None:
        """Start to count the time of steps."""
        self.resumed = time.monotonic()

    def pause(self) -> None:
        """Stop to count the time of steps, before an evaluation."""
        self.seconds += time.monotonic() - self.resumed

    def epoch(self, epoch: int, epochs: int, record: dict[str, Any], evaluation_seconds: float = 0.0) -> None:
        """Print the line of a completed epoch, with its metrics and the estimated time left.

        Args:
            epoch: Number of the epoch, from 1.
            epochs: Number of epochs of the run.
            record: Record of the epoch.
            evaluation_seconds: Estimated time of the evaluations that are left.
        """
        parts = progress_text(record)
        seconds_per_step = self.seconds / max(1, self.done - self.initial)
        parts.append(duration(seconds_per_step * (self.total - self.done) + evaluation_seconds))
        tqdm.write(f"epoch {epoch:>{len(str(epochs))}}/{epochs}   " + "   ".join(parts) + " left", file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Close the bar."""
        self.bar.close()


def duration(seconds: float) -> str:
    """Return the text of a duration.

    Example:
        >>> duration(59.6), duration(3600.0)
        ('1 min 00 s', '1 h 00 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
