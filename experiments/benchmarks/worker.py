"""Run one implementation of a work in this process: ``python -m experiments.benchmarks.worker WORK NAME ...``.

The process writes ``{"ready": true}``. For each line of standard input it performs one round and writes a line of JSON
with the median seconds of a call and the peak memory since the inputs were created. Works that run in another process
have no memory values. The process ends at the end of its input.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUND_SECONDS = 0.4
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    """Create the inputs, and perform a round for each line of standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("work", "name", "device"):
        parser.add_argument(name)
    parser.add_argument("threads", type=int)
    parser.add_argument("scale", type=float)
    options = parser.parse_args()
    import torch

    from experiments.benchmarks.works import ELSEWHERE, works

    torch.set_num_threads(options.threads)
    try:
        run = works(options.device, options.scale)[options.work][options.name]()
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    before = _start_watching(options.device)
    run()  # warm-up
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        seconds = _round(run)
        memory = {} if options.work in ELSEWHERE else _memory(options.device, before)
        print(json.dumps({"seconds": seconds} | memory), flush=True)


def _round(run: Callable[[], Any]) -> float:
    """Return the median seconds of a call, over at least one call and ``ROUND_SECONDS``."""
    seconds: list[float] = []
    while sum(seconds) < ROUND_SECONDS:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _start_watching(device: str) -> int:
    """Reset the peak memory; return the bytes in use."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc only
        trim(0)
    CLEAR.write_text("5")
    return _status("VmRSS")


def _memory(device: str, before: int) -> dict[str, int]:
    """Return the peak memory in bytes, and its increase since the inputs were created."""
    if device != "cpu":
        import torch

        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _status("VmHWM")
    return {"peak_bytes": peak, "extra_bytes": peak - before}


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
