"""The README's first table: MoCo on digits with a plain queue, XBN and AXBN, beside pixels and an untrained encoder.

python -m experiments.digits                    # trains 9 runs, about 3 minutes on two cores
python -m experiments.digits --from-results     # prints the committed table
"""

from __future__ import annotations

from dataclasses import replace

from experiments import runs
from selfsup_xbn.config import RECIPES

NAME = "digits"
CELLS = {name: replace(RECIPES["digits"], adaptation=name, eval_every=0) for name in ("xbm", "xbn", "axbn")}
COLUMNS = {
    "knn_top1_raw_pixels": "raw pixels",
    "knn_top1_untrained": "untrained, projection",
    "knn_top1_backbone_untrained": "untrained, backbone",
    "knn_top1": "trained, projection",
    "knn_top1_backbone": "trained, backbone",
}


def main() -> None:
    """Trains what is not done, writes the results, prints the table."""
    options = runs.parser(__doc__ or "").parse_args()
    if not options.from_results:
        runs.write(NAME, runs.run_all(NAME, CELLS, range(options.seeds), options.folder, options.jobs))
    print(*runs.table(runs.read(NAME), COLUMNS), sep="\n")


if __name__ == "__main__":
    main()
