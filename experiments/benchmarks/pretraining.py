"""Measure images per second of MoCo pretraining: views, both encoders, queue, loss, backward pass, optimizer.

    python -m experiments.benchmarks.pretraining --device cuda
    python -m experiments.benchmarks.pretraining --backbone convnet4 --batch 128 --modes eager --steps 5   # on a CPU

The network is ResNet-18 for CIFAR with the settings of Fig. 2. The data are 50,000 random images of 32 x 32 pixels,
which take the same time as real ones. Each mode is measured for each batch size and adaptation. The results are in
``results/pretraining-NAME.json``, where NAME is the GPU's name or ``cpu``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from experiments.runs import RESULTS
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.config.schema import Config
from selfsup_xbn.data import ImageData, Split
from selfsup_xbn.runs.environment import environment
from selfsup_xbn.training import trainer as train

IMAGES, WARM_UP = 50_000, 20
MODES: dict[str, dict[str, Any]] = {
    "eager": {"cuda_graph": False},
    "graph": {"cuda_graph": True},
    "compile": {"cuda_graph": False, "compile": True},
    "compile+graph": {"cuda_graph": True, "compile": True},
}


def random_images(config: Config) -> ImageData:
    """Return random images of the shape of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(torch.arange(IMAGES) % 10, pixels)
    test = split.subset(torch.arange(1000))
    return ImageData("noise", split, test, augmentation="cifar", mean=(0.5,) * 3, std=(0.25,) * 3)


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Return images per second of five intervals of ``steps`` steps, their median, and the peak device memory in MB."""
    with mock.patch("selfsup_xbn.training.run.data_of", random_images):
        run = train.Run(config)
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    speeds: list[float] = []
    batches = (batch for epoch in range(10**6) for batch in run.batches.epoch(epoch))
    for count in (WARM_UP, *[steps] * 5):
        started = time.perf_counter()
        for _ in range(count):
            run.train_step(next(batches))
            run.step %= run.steps
        run.mean_loss()  # the host waits for the device
        speeds.append(count * config.batch_size / (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    graphed = run.graphed is not None and run.graphed.graph is not None
    intervals = speeds[1:]
    return {
        "images_per_second": statistics.median(intervals),
        "stretches": intervals,
        "peak_mb": peak,
        "graphed": graphed,
    }


def main() -> None:
    """Measure every mode, batch size and adaptation, print a line for each, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512], help="batch sizes (default 128 512)")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="modes (default all)")
    parser.add_argument("--adaptations", nargs="+", default=["xbm", "xbn"], help="adaptations (default xbm xbn)")
    parser.add_argument("--backbone", default="resnet18-cifar", help="backbone (default resnet18-cifar)")
    parser.add_argument("--steps", type=int, default=40, help="steps of an interval (default 40)")
    options = parser.parse_args()
    name = torch.cuda.get_device_name().replace(" ", "-") if options.device.startswith("cuda") else options.device
    results: list[dict[str, Any]] = []
    for mode, batch, adaptation in itertools.product(options.modes, options.batch, options.adaptations):
        config = replace(
            RECIPES["cifar10-fig2"],
            adaptation=adaptation,
            batch_size=batch,
            backbone=options.backbone,
            device=options.device,
            drift_every=0,
            **MODES[mode],
        )
        result = {"mode": mode, "adaptation": adaptation, "batch": batch} | measure(config, options.steps)
        results.append(result)
        speed, peak = result["images_per_second"], result["peak_mb"] or 0
        print(f"{mode:<14} {adaptation}  batch {batch:>4}  {speed:>9,.0f} images/s  {peak:,.0f} MB", flush=True)
        text = json.dumps({"options": vars(options), "results": results, "environment": environment()}, indent=1)
        (RESULTS / f"pretraining-{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
