"""Test two additions to XBN at small batches: the gradient by the batch's moments, and rows that are renewed.

Recall@1 on classes that training never saw, with batches of 16, 32 and 64 (Cars196: 16 and 64). ``--renew`` embeds as
many images again as a batch has. Their forward pass is about a third of the operations of a step, because a backward
pass has about those of two forward passes. "XBN, more steps" trains a third more epochs than XBN, half more on glyphs.
The number of renewed rows was chosen on a fifth of the training classes (scale ``search``, which also has the gradient
with several learning rates on Cars196). A gain counts if the mean of the paired differences from XBN exceeds twice its
standard error.

    python -m experiments.beyond --scale search --seeds 1 --data omniglot=omniglot:FOLDER --data cars196=cars196:FOLDER
    python -m experiments.beyond --scale glyphs --seeds 5
    python -m experiments.beyond --scale omniglot --seeds 5 --data omniglot=omniglot:FOLDER
    python -m experiments.beyond --scale cars196 --seeds 5 --data cars196=cars196:FOLDER
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.cars196 import BASES as CARS196
from experiments.cars196 import SEARCHED
from experiments.pictures import Chart, save_chart, series
from experiments.retrieval import recipe
from experiments.runs import Experiment, Result, table
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.report.comparison import averaged_over
from selfsup_xbn.runs.results import difference

COLUMNS = {"recall@1": "Recall@1", "map@r": "MAP@R"}
BATCHES = (16, 32, 64)
GLYPHS, OMNIGLOT = recipe("glyphs"), recipe("omniglot")


def variants(base: SuperviseConfig, more_epochs: int) -> dict[str, SuperviseConfig]:
    """Return the compared configurations by name."""
    return {
        "no memory": replace(base, queue_size="0"),
        "XBN": base,
        "gradient": replace(base, moment_gradient=True),
        "renewal": replace(base, renew=base.batch_size),
        "both": replace(base, moment_gradient=True, renew=base.batch_size),
        "XBN, more steps": replace(base, epochs=more_epochs),
    }


def cells(base: SuperviseConfig, more_epochs: int, batches: Sequence[int] = BATCHES) -> dict[str, SuperviseConfig]:
    """Return all configurations with each batch size."""
    return {
        f"{name}, B {batch}": cell
        for batch in batches
        for name, cell in variants(replace(base, batch_size=batch), more_epochs).items()
    }


def searched(base: SuperviseConfig) -> dict[str, SuperviseConfig]:
    """Return numbers of renewed rows at batch 16, for the validation classes."""
    base = replace(base, validation="20%", batch_size=16)
    return {f"{base.data}: renew {rows}": replace(base, renew=rows) for rows in (0, 4, 8, 16, 32)}


def learning_rates() -> dict[str, SuperviseConfig]:
    """Return the gradient on Cars196 with the learning rates that XBN was given, for the validation classes."""
    return {
        f"cars196: gradient, B {batch}, lr {lr:g}": replace(
            CARS196[batch], validation="20%", lr=lr, moment_gradient=True
        )
        for batch in (16, 64)
        for lr in SEARCHED[batch]
    }


def show(results: list[Result], path: Path) -> Sequence[str]:
    """Return the table of the results and the paired differences, and save a chart of Recall@1 by batch size."""
    found = {result["label"]: result for result in results}
    if "search" in path.stem:
        return table(results, {"recall@1_validation": "validation Recall@1"})
    batches = sorted({int(label.rpartition(" ")[2]) for label in found})
    names = list(dict.fromkeys(label.rpartition(", B ")[0] for label in found))
    lines = {name: series([found.get(f"{name}, B {batch}") for batch in batches], "recall@1") for name in names}
    chart = Chart("", "batch size [images]", "Recall@1 on unseen classes [%]", batches, lines)
    title = f"{results[0]['config']['data']}: {averaged_over(results)}"
    save_chart(path.with_suffix(".png"), title, [chart], log=True, legend_columns=3)
    return [*table(results, COLUMNS), "", *differences(found, names, batches)]


def differences(found: dict[str, Result], names: Sequence[str], batches: Sequence[int]) -> Iterator[str]:
    """Yield the mean differences of Recall@1 from XBN with equal seeds, and whether they count."""
    yield "| minus XBN, same seeds | " + " | ".join(f"B {batch}" for batch in batches) + " |"
    yield "|---|" + "---|" * len(batches)
    for name in names:
        if name != "XBN":
            yield f"| {name} | " + " | ".join(_difference(found, name, batch) for batch in batches) + " |"


def _difference(found: dict[str, Result], name: str, batch: int) -> str:
    ours, xbn = (found.get(f"{label}, B {batch}") for label in (name, "XBN"))
    change = difference(ours, xbn, "recall@1") if ours and xbn else None
    if change is None or change.error is None:
        return "-"
    return f"{change.mean:+.2f} ± {change.error:.2f}" + " *" * (abs(change.mean) > 2 * change.error)


SCALES = {
    "glyphs": cells(GLYPHS, more_epochs=3),
    "omniglot": cells(OMNIGLOT, more_epochs=4),
    "cars196": cells(CARS196[16], 4, batches=(16,)) | cells(CARS196[64], 4, batches=(64,)),
    "search": searched(GLYPHS) | searched(OMNIGLOT) | learning_rates(),
}

if __name__ == "__main__":
    Experiment("beyond", __doc__ or "", SCALES, show, seeds=5, scale="glyphs").main()
