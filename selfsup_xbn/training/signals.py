"""Handling of the signals that stop a run after the current step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect the first SIGTERM or SIGINT instead of ending the process. A second signal ends the process.

    Outside of the main thread no signal is handled.

    Yields:
        List that receives the number of the signal.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
