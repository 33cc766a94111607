"""How long the retrieval benchmarks take to open: official layouts at the official size, images being empty files.

    python -m experiments.benchmarks.data_sets [--scale 1] [--only sop inshop ...] [--folder DIR]

Prints a line a data set: seconds to open, wall and processor (without workers), and to open again, when DeepFashion2
reads its cache; then the counts found. The files were just written, so they are in the page cache. On two cores, with
about five other processes at work:

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
    """Seconds that ``load_data`` takes, and the notes."""
    wall, processor = time.perf_counter(), time.process_time()
    notes = load_data(spec).notes
    return f"{time.perf_counter() - wall:.2f} s ({time.process_time() - processor:.2f} s)", notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the official size")
    parser.add_argument("--only", nargs="+", choices=list(WRITERS), default=list(WRITERS))
    parser.add_argument(
        "--folder", help="where the files are written (and removed): DeepFashion2 takes 3.5 GB of blocks"
    )
    args = parser.parse_args()
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            WRITERS[name](Path(folder), args.scale, b"")
            (first, notes), (again, _) = (opened(f"{name}:{folder}") for _ in range(2))
            print(f"{name:13} {first}, again {again}; {'; '.join(notes)}", flush=True)


if __name__ == "__main__":
    main()
