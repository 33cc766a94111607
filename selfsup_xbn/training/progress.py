"""What a person sees of a run: a bar on a terminal, a line an epoch in a pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from selfsup_xbn.evaluation.summary import progress_text


class Progress:
    """Shows ``total`` steps of which ``done`` were made by an earlier process."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.first = total, done, done
        self.started = self.shown = time.monotonic()
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def step(self) -> bool:
        """Counts a step. True about once a second: the time to look at what the device has made."""
        self.done += 1
        self.bar.update()
        now = time.monotonic()
        due = now - self.shown >= 1
        if due:
            self.shown = now
        return due

    def look(self, **values: Any) -> None:
        """Shows values beside the bar."""
        self.bar.set_postfix(values)

    def epoch(self, epoch: int, epochs: int, record: dict[str, Any]) -> None:
        """One line for a finished epoch."""
        parts = progress_text(record)
        seconds_a_step = (time.monotonic() - self.started) / max(1, self.done - self.first)
        parts.append(_duration(seconds_a_step * (self.total - self.done)))
        tqdm.write(f"epoch {epoch:>{len(str(epochs))}}/{epochs}   " + "   ".join(parts) + " left", file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Takes the bar away."""
        self.bar.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
