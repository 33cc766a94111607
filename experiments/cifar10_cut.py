"""MoCo + XBN on CIFAR-10 photographs, the paper's Fig. 2 cut to what two cores do in minutes: does it learn?

A four-layer convnet in place of the ResNet-18, 20,000 of the training images, 5 epochs in place of 200. One run of

    selfsup-xbn pretrain --recipe cifar10-fig2 --data folder:PATH --backbone convnet4 --limit-train 20000 --epochs 5

is what each seed is here. PATH holds ``train/`` and ``test/`` with a folder of images a class.

    python -m experiments.cifar10_cut --data PATH --seeds 1     # trains what is not done
    python -m experiments.cifar10_cut --from-results            # prints the committed table
"""

from __future__ import annotations

from dataclasses import replace

from experiments import runs
from experiments.digits import COLUMNS
from selfsup_xbn.config import RECIPES

NAME = "cifar10_cut"
CELL = replace(RECIPES["cifar10-fig2"], backbone="convnet4", limit_train=20_000, epochs=5)


def main() -> None:
    """Trains what is not done, writes the results, prints the table."""
    parser = runs.parser(__doc__ or "")
    parser.add_argument("--data", help="folder of the images")
    options = parser.parse_args()
    if not options.from_results:
        if not options.data:
            parser.error("expected --data PATH or --from-results")
        cells = {"xbn": replace(CELL, data=f"folder:{options.data}")}
        runs.write(NAME, runs.run_all(NAME, cells, range(options.seeds), options.folder, options.jobs))
    print(*runs.table(runs.read(NAME), COLUMNS), sep="\n")


if __name__ == "__main__":
    main()
