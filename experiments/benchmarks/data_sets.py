"""How long the retrieval benchmarks take to open: official layouts at the official size, images being empty files.

    python -m experiments.benchmarks.data_sets [--scale 1] [--only sop inshop ...] [--folder DIR]

Prints a line a data set: seconds to open, and to open again (DeepFashion2 then reads its cache), with the counts found.
Two cores, files in the page cache:

    sop           0.0 s
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from selfsup_xbn.data import load_data

from .official_layouts import WRITERS


def opened(spec: str) -> tuple[float, tuple[str, ...]]:
    """Seconds that ``load_data`` takes, and the notes."""
    start = time.perf_counter()
    notes = load_data(spec).notes
    return time.perf_counter() - start, notes


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
        print(f"{name:13} {first:6.2f} s, again {again:6.2f} s; {'; '.join(notes)}", flush=True)


if __name__ == "__main__":
    main()
