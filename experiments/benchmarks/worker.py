"""One work of one implementation in a process of its own: ``python -m experiments.benchmarks.worker WORK NAME ...``.

Says ``ready``, then for each line that it reads works for a while and answers with a line of JSON: the seconds of a
call, the median of those in this round, and the peak of memory since the inputs were made (not where the work is
another process's). Ends with its input.
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
    """Makes the inputs, then works when told to."""
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
    run()  # warm
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        seconds = _round(run)
        memory = {} if options.work in ELSEWHERE else _memory(options.device, before)
        print(json.dumps({"seconds": seconds} | memory), flush=True)


def _round(run: Callable[[], Any]) -> float:
    """Median seconds of a call, of those that fit into a round; at least one."""
    found: list[float] = []
    while sum(found) < ROUND_SECONDS:
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _start_watching(device: str) -> int:
    """Resets the peak; the bytes in use now, without those that making the inputs has freed."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # where the C library is glibc
        trim(0)
    CLEAR.write_text("5")
    return _status("VmRSS")


def _memory(device: str, before: int) -> dict[str, int]:
    """Peak of the process in bytes, and how much of it came after the inputs were made."""
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
