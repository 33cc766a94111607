"""Supervised metric learning on Omniglot: no memory, XBM, XBM*, XBN and AXBN at batch 64, and none, XBM, XBN at 16.

The paper's order (arXiv 2303.17127, Table 1) at a scale that two cores can do: a four-layer convnet, D 128, memory
6000, 3 epochs, 28 x 28 drawings with rotations by 90 degrees as further classes (624 to train on, 344 unseen ones to
search). The folder holds ``train/`` and ``test/`` with a folder of drawings a character.

    python -m experiments.omniglot --data FOLDER       # trains what is not done
    python -m experiments.omniglot --from-results      # prints the committed table
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from experiments import runs
from selfsup_xbn.config import RECIPES, SuperviseConfig

NAME = "omniglot"
BASE = replace(cast(SuperviseConfig, RECIPES["omniglot"]), eval_every=0)
SMALL = replace(BASE, batch_size=16)
CELLS = {
    "no memory, B 64": replace(BASE, queue_size="0"),
    "XBM, B 64": replace(BASE, adaptation="xbm"),
    "XBM*, B 64": replace(BASE, adaptation="xbm", batch_loss_weight=1.0),
    "XBN, B 64": BASE,
    "AXBN, B 64": replace(BASE, adaptation="axbn"),
}
CELLS_OF_ONE_SEED = {  # four times the steps
    "no memory, B 16": replace(SMALL, queue_size="0"),
    "XBM, B 16": replace(SMALL, adaptation="xbm"),
    "XBN, B 16": SMALL,
}
COLUMNS = {"recall@1": "Recall@1", "map@r": "MAP@R", "recall@1_untrained": "untrained", "recall@1_raw_pixels": "pixels"}


def main() -> None:
    """Trains what is not done, writes the results, prints the table."""
    parser = runs.parser(__doc__ or "")
    parser.add_argument("--data", help="folder of the drawings")
    options = parser.parse_args()
    if not options.from_results:
        if not options.data:
            parser.error("expected --data FOLDER or --from-results")
        results = []
        for cells, seeds in ((CELLS, options.seeds), (CELLS_OF_ONE_SEED, 1)):
            here = {label: replace(cell, data=f"omniglot:{options.data}") for label, cell in cells.items()}
            results += runs.run_all(NAME, here, range(seeds), options.folder, options.jobs)
        runs.write(NAME, results)
    print(*runs.table(runs.read(NAME), COLUMNS), sep="\n")


if __name__ == "__main__":
    main()
