"""Measure the time to open the retrieval data sets, in their official layout and size with empty image files.

    python -m experiments.benchmarks.data_sets [--scale 1] [--only sop inshop ...] [--folder DIR]

The program prints a line for each data set: wall time and processor time (without workers) to open it, the same for a
second time, when DeepFashion2 reads its cache, and the number of images and classes. The files are in the page cache.
On two cores with about five other processes:

    sop           1.25 s (0.89 s), again 1.35 s (0.90 s); train: 59,551 images of 11,318 classes; ...
    inshop        1.04 s (0.69 s), again 0.86 s (0.64 s); ...
    cub200        0.05 s (0.05 s), again 0.10 s (0.05 s); ...
    cars196       0.17 s (0.17 s), again 0.34 s (0.34 s); ...
    deepfashion2  22.55 s (6.31 s), again 7.29 s (5.37 s); ...

Writing DeepFashion2's 780,000 files took three minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from selfsup_xbn.data import load_data

from .official_layouts import WRITERS


def opened(spec: str) -> tuple[str, tuple[str, ...]]:
    """Open a data set; return the wall and processor time, and its notes."""
    wall, processor = time.perf_counter(), time.process_time()
    notes = load_data(spec).notes
    return f"{time.perf_counter() - wall:.2f} s ({time.process_time() - processor:.2f} s)", notes


def main() -> None:
    """Write and open every data set, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the official size (default 1)")
    parser.add_argument(
        "--only", nargs="+", choices=list(WRITERS), default=list(WRITERS), help="data sets (default all)"
    )
    parser.add_argument(
        "--folder", help="folder of the temporary files; DeepFashion2 needs 3.5 GB (default: the system's)"
    )
    args = parser.parse_args()
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            WRITERS[name](Path(folder), args.scale, b"")
            (first, notes), (again, _) = (opened(f"{name}:{folder}") for _ in range(2))
            print(f"{name:13} {first}, again {again}; {'; '.join(notes)}", flush=True)


if __name__ == "__main__":
    main()
