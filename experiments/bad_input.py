"""Valid files, spoiled at random: every loader, the config, the metrics and the checkpoint reader answer with a result,
or with one line that says what is wrong.

python -m experiments.bad_input             # 2,000 cases, half a minute on one core

``bad_input_targets.py`` writes valid files of each kind. Of one of them bytes, lines or fields are changed, or its end
is cut off, by ``--seed``; then it is read. Anything but a result or a ``UserError`` of one line fails, and so does an
answer after ``SECONDS``, or a result of another number of rows than a count of its own finds in the files.
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

from experiments import runs
from experiments.bad_input_targets import TARGETS, Target
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs.folder import environment

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
    """The content with one to four random changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = rng.choice((_bytes, _digit, _line, _field, _cut))(content, rng)
    return content


def _bytes(content: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(content) + 1), rng.choice((0, 1, 1, 4))
    noise = rng.choice((rng.randbytes(rng.randint(0, 4)), rng.choice(EXTREMES)))
    return content[:place] + noise + content[place + length :]


def _digit(content: bytes, rng: random.Random) -> bytes:
    """Another digit in place of one: what leaves a list readable, but says something else."""
    digits = [place for place, byte in enumerate(content[:100_000]) if 48 <= byte < 58]
    if not digits:
        return content
    place = rng.choice(digits)
    return content[:place] + str(rng.randrange(10)).encode() + content[place + 1 :]


def _line(content: bytes, rng: random.Random) -> bytes:
    """A line more, a line less, or two that change places."""
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
    """Another token in place of one between spaces, quotes or commas."""
    ends = [place for place, byte in enumerate(content[:100_000]) if byte in b' ,:"\n\t[]']
    if len(ends) < 2:
        return content
    index = rng.randrange(len(ends) - 1)
    return content[: ends[index] + 1] + rng.choice(TOKENS).encode() + content[ends[index + 1] :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.3 else content


# ---------------------------------------------------------------------------------------------------------- campaign


class HangError(BaseException):
    """No ``Exception``, which a reader might take for a broken file."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises ``HangError`` after ``SECONDS``. In the main thread only."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(target: Target, folder: Path) -> tuple[str, str]:
    """ "read" or "refused", or "failed" with the reason."""
    try:
        with time_limit():
            found = target.read(folder)
    except UserError as error:
        return ("failed", f"several lines: {error}") if "\n" in str(error) else ("refused", "")
    except (Exception, HangError):
        return "failed", traceback.format_exc()
    expected = target.count(folder)
    return ("read", "") if found == expected else ("failed", f"{found} rows of {expected}")


def campaign(folder: Path, seed: int, cases: int) -> list[dict[str, Any]]:
    """So many cases, the targets in turn; each with what became of it."""
    write_targets(folder)
    names = [list(TARGETS)[number % len(TARGETS)] for number in range(cases)]
    seeds = [f"{seed} {number}" for number in range(cases)]
    return [case(folder, name, random.Random(s)) | {"seed": s} for name, s in zip(names, seeds, strict=True)]


def write_targets(folder: Path) -> None:
    """Valid files of each kind, in a folder each."""
    for name, target in TARGETS.items():
        (folder / name).mkdir()
        target.write(folder / name)
        assert verdict(target, folder / name) == ("read", ""), name


def case(folder: Path, name: str, rng: random.Random) -> dict[str, Any]:
    """What becomes of a target of which one file is spoiled; afterwards the file is as before."""
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
    """Runs the campaign, writes its results, prints the counts."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--cases", type=int, default=2000)
    options = made.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cases = campaign(Path(folder), options.seed, options.cases)
    ends = Counter((case["target"], case["end"]) for case in cases)
    counts = {name: {end: ends[name, end] for end in ("read", "refused", "failed")} for name in TARGETS}
    failed = [case for case in cases if case["end"] == "failed"]
    result = {"label": "bad input", **vars(options), "counts": counts, "failed": failed, "environment": environment()}
    runs.write(runs.RESULTS / "bad_input.json", [result | {"seconds": round(time.perf_counter() - started)}])
    for name, found in counts.items():
        print(f"{name:<22}" + "".join(f"{end} {number:>4}   " for end, number in found.items()))
    print(f"{len(cases)} cases, {len(failed)} failed")
    for case in failed:
        print(json.dumps(case, indent=1).replace("\\n", "\n"))


if __name__ == "__main__":
    main()
