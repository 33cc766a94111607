"""Readers of randomly damaged files must return a result or raise an error of one line.

python -m tests.robustness.bad_input        # 2,000 cases, half a minute on one core

``bad_input_targets.py`` writes valid files for every loader, the configuration, the metrics and the checkpoint. A case
changes bytes, lines or fields of one file, or cuts off its end, drawn by ``--seed``; then the program reads it. A case
fails if the reader raises anything but a ``UserError`` of one line, takes more than ``SECONDS``, or returns another
number of rows than an independent count of the damaged files. The results go to
``experiments/results/bad_input.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.runs import RESULTS
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs.environment import environment
from selfsup_xbn.runs.results import write
from tests.robustness.bad_input_targets import TARGETS, Target

SECONDS = 20
WORDS = (
    "",
    "-1",
    "0",
    "1",
    "1e3",
    "201",
    "9999999999",
    "NaN",
    "null",
    "true",
    "[",
    "{}",
    '"',
    "query",
    "train",
    "id_1",
)
TOKENS = (*WORDS, "/", "..", "../x", "a//b", "\\", "\0", "\x85", "\u2028", "é", "\r")
EXTREMES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b"\xff\xff\xff\xff", b"\0\0\0\0", b"[" * 3000, b"9" * 5000)


def spoil(content: bytes, rng: random.Random) -> bytes:
    """Return the content with one to four random changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = rng.choice((_bytes, _digit, _line, _field, _cut))(content, rng)
    return content


def _bytes(content: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(content) + 1), rng.choice((0, 1, 1, 4))
    noise = rng.choice((rng.randbytes(rng.randint(0, 4)), rng.choice(EXTREMES)))
    return content[:place] + noise + content[place + length :]


def _digit(content: bytes, rng: random.Random) -> bytes:
    """Replace one digit: the list stays readable but its meaning changes."""
    digits = [place for place, byte in enumerate(content[:100_000]) if 48 <= byte < 58]
    if not digits:
        return content
    place = rng.choice(digits)
    return content[:place] + str(rng.randrange(10)).encode() + content[place + 1 :]


def _line(content: bytes, rng: random.Random) -> bytes:
    """Repeat a line, delete a line, or swap two."""
    lines = content.split(b"\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(3)
    if kind == 0:
        lines.insert(other, lines[one])
    elif kind == 1:
        del lines[one]
    else:
        lines[one], lines[other] = lines[other], lines[one]
    return b"\n".join(lines)


def _field(content: bytes, rng: random.Random) -> bytes:
    """Replace one token between spaces, quotes or commas."""
    ends = [place for place, byte in enumerate(content[:100_000]) if byte in b' ,:"\n\t[]']
    if len(ends) < 2:
        return content
    index = rng.randrange(len(ends) - 1)
    return content[: ends[index] + 1] + rng.choice(TOKENS).encode() + content[ends[index + 1] :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.3 else content


class HangError(BaseException):
    """Raised when a reader takes too long; no ``Exception``, so that no reader catches it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``HangError`` after so many seconds. Works in the main thread only."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def verdict(target: Target, folder: Path, seconds: float = SECONDS) -> tuple[str, str]:
    """Read a target; return "read" or "refused" with "", or "failed" with the reason."""
    try:
        with time_limit(seconds):
            rows = target.read(folder)
    except UserError as error:
        return ("failed", f"several lines: {error}") if "\n" in str(error) else ("refused", "")
    except (Exception, HangError):
        return "failed", traceback.format_exc()
    expected = target.count(folder)
    return ("read", "") if rows == expected else ("failed", f"{rows} rows of {expected}")


def campaign(folder: Path, seed: int, cases: int) -> list[dict[str, Any]]:
    """Run so many cases, the targets in turn; return one record a case."""
    write_targets(folder)
    names = [list(TARGETS)[number % len(TARGETS)] for number in range(cases)]
    seeds = [f"{seed} {number}" for number in range(cases)]
    return [case(folder, name, random.Random(s)) | {"seed": s} for name, s in zip(names, seeds, strict=True)]


def write_targets(folder: Path) -> None:
    """Write valid files of each kind into a folder each."""
    for name, target in TARGETS.items():
        (folder / name).mkdir()
        target.write(folder / name)
        assert verdict(target, folder / name) == ("read", ""), name


def case(folder: Path, name: str, rng: random.Random) -> dict[str, Any]:
    """Spoil one file of a target, read the target, and restore the file."""
    target = TARGETS[name]
    file = rng.choice(sorted((folder / name).glob(target.spoiled)))
    content = file.read_bytes()
    file.write_bytes(spoil(content, rng))
    try:
        end, reason = verdict(target, folder / name)
    finally:
        file.write_bytes(content)
    return {"target": name, "file": file.name, "end": end, "reason": reason}


def main() -> None:
    """Run the campaign, write its results, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cases = campaign(Path(folder), options.seed, options.cases)
    ends = Counter((case["target"], case["end"]) for case in cases)
    counts = {name: {end: ends[name, end] for end in ("read", "refused", "failed")} for name in TARGETS}
    failed = [case for case in cases if case["end"] == "failed"]
    result = {"label": "bad input", **vars(options), "counts": counts, "failed": failed, "environment": environment()}
    write(RESULTS / "bad_input.json", [result | {"seconds": round(time.perf_counter() - started)}])
    for name, ends_of in counts.items():
        print(f"{name:<22}" + "".join(f"{end} {number:>4}   " for end, number in ends_of.items()))
    print(f"{len(cases)} cases, {len(failed)} failed")
    for case in failed:
        print(json.dumps(case, indent=1).replace("\\n", "\n"))


if __name__ == "__main__":
    main()
