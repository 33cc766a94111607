"""Readers of randomly damaged files must return a result or raise an error of one line.

python -m tests.robustness.bad_input        # 2,500 cases

``bad_input_targets.py`` writes valid files for every loader, the configuration, the metrics, the checkpoint and
pretrained weights. A case changes bytes, lines, fields or the encoding of one file, cuts off its end, or puts a FIFO, a
device, a folder or a link in its place, drawn by ``--seed``; then the program reads it. A case fails if the reader
raises anything but a ``UserError`` of one line of printable characters, takes more than ``SECONDS``, or returns another
number of rows than an independent count of the damaged files. The results go to
``experiments/results/bad_input.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
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
from tests.robustness.bad_input_target import Target
from tests.robustness.bad_input_targets import TARGETS

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
TOKENS = (
    *WORDS,
    "/",
    "..",
    "../x",
    "a//b",
    "\\",
    "\0",
    "\x85",
    "\u2028",
    "é",
    "\r",
    "\x1b[2J",
    "\x07",
    "\u202e",
    "\ufeff",
)
REPLACED = 0.2
"""Share of the cases in which something else is put in the place of a file."""
LINKS = {"device": "/dev/zero", "dangling": "nowhere", "loop": "", "up": "..", "root": "/"}
ASIDE = ".aside"
EXTREMES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b"\xff\xff\xff\xff", b"\0\0\0\0", b"[" * 3000, b"9" * 5000)


def spoil(content: bytes, rng: random.Random) -> bytes:
    """Return the content with one to four random changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = rng.choice((_bytes, _digit, _line, _field, _cut, _encoded))(content, rng)
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


def _encoded(content: bytes, rng: random.Random) -> bytes:
    """Begin with a byte order mark, or encode the text as UTF-16."""
    mark = b"\xef\xbb\xbf"
    return mark + content if rng.random() < 0.7 else content.decode("latin-1").encode("utf-16")


def replace(file: Path, rng: random.Random) -> str:
    """Put something that is no regular file, or a link, in the place of a file; return its kind."""
    content = file.read_bytes()
    file.unlink()
    kind = rng.choice(("fifo", "folder", *LINKS, "copy"))
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "copy":
        (file.parent / ASIDE).write_bytes(content)
        file.symlink_to(ASIDE)
    else:
        file.symlink_to(file if kind == "loop" else LINKS[kind])
    return kind


def restore(file: Path, content: bytes) -> None:
    """Put a regular file in the place of whatever is there."""
    (file.parent / ASIDE).unlink(missing_ok=True)
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.write_bytes(content)


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
        return ("refused", "") if str(error).isprintable() else ("failed", f"not printable: {str(error)!r}")
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
    """Spoil or replace one file of a target, read the target, and restore the file."""
    target = TARGETS[name]
    file = rng.choice(sorted((folder / name).glob(target.spoiled)))
    content, kind = file.read_bytes(), "spoiled"
    try:
        if target.opened and rng.random() < REPLACED:
            kind = replace(file, rng)
        else:
            file.write_bytes(spoil(content, rng))
        end, reason = verdict(target, folder / name)
    finally:
        restore(file, content)
    return {"target": name, "file": file.name, "kind": kind, "end": end, "reason": reason}


def main() -> None:
    """Run the campaign, write its results, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cases = campaign(Path(folder), options.seed, options.cases)
    ends = Counter((case["target"], case["end"]) for case in cases)
    counts = {name: {end: ends[name, end] for end in ("read", "refused", "failed")} for name in TARGETS}
    kinds = dict(sorted(Counter(case["kind"] for case in cases).items()))
    failed = [case for case in cases if case["end"] == "failed"]
    result = {
        "label": "bad input",
        **vars(options),
        "counts": counts,
        "kinds": kinds,
        "failed": failed,
        "environment": environment(),
    }
    write(RESULTS / "bad_input.json", [result | {"seconds": round(time.perf_counter() - started)}])
    for name, ends_of in counts.items():
        print(f"{name:<22}" + "".join(f"{end} {number:>4}   " for end, number in ends_of.items()))
    print(f"{len(cases)} cases, {len(failed)} failed")
    for case in failed:
        print(json.dumps(case, indent=1).replace("\\n", "\n"))


if __name__ == "__main__":
    main()
