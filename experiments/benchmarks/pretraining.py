"""Images a second of MoCo pretraining, end to end: views, both encoders, queue, loss, gradient, optimiser.

    python -m experiments.benchmarks.pretraining --device cuda --batch 128 512 [--compile]
    python -m experiments.benchmarks.pretraining --backbone convnet4 --steps 5      # a try on a CPU

ResNet-18 for CIFAR with the settings of Fig. 2 on 50,000 random images of 32 x 32, which cost what real ones do.
Writes ``results/pretraining-DEVICE.json``. Not yet run on a GPU; the goals there are 15,000 images/s at batch 128 and
30,000 at 512 on one H200.
"""

from __future__ import annotations

import argparse
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


def random_images(config: Config) -> ImageData:
    """Noise in the form of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(torch.arange(IMAGES) % 10, pixels)
    test = split.subset(torch.arange(1000))
    return ImageData("noise", split, test, augmentation="cifar", mean=(0.5,) * 3, std=(0.25,) * 3)


def images_per_second(config: Config, steps: int) -> tuple[float, float]:
    """The median over five stretches of ``steps`` steps, and the peak of device memory in MB."""
    with mock.patch("selfsup_xbn.training.trainer.data_of", random_images):
        run = train.Run(config)
    found: list[float] = []
    batches = (batch for epoch in range(10**6) for batch in run.batches.epoch(epoch))
    for count in (WARM_UP, *[steps] * 5):
        started = time.perf_counter()
        for _ in range(count):
            run.train_step(next(batches))
            run.step %= run.steps
        run.mean_loss()  # waits for the device
        found.append(count * config.batch_size / (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated() / 2**20 if run.device.type == "cuda" else 0.0
    return statistics.median(found[1:]), peak


def main() -> None:
    """Measures every batch size and both memories, writes and prints what was found."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu")
    made.add_argument("--batch", type=int, nargs="+", default=[128])
    made.add_argument("--backbone", default="resnet18-cifar")
    made.add_argument("--steps", type=int, default=50)
    made.add_argument("--compile", action="store_true")
    options = made.parse_args()
    results: list[dict[str, Any]] = []
    for batch in options.batch:
        for adaptation in ("xbm", "xbn"):
            config = replace(
                RECIPES["cifar10-fig2"],
                adaptation=adaptation,
                batch_size=batch,
                backbone=options.backbone,
                device=options.device,
                compile=options.compile,
                drift_every=0,
            )
            speed, peak = images_per_second(config, options.steps)
            results.append({"adaptation": adaptation, "batch": batch, "images_per_second": speed, "peak_mb": peak})
            print(f"{adaptation}  batch {batch:>4}  {speed:>9,.0f} images/s  {peak:,.0f} MB", flush=True)
    text = json.dumps({"options": vars(options), "results": results, "environment": environment()}, indent=1)
    (RESULTS / f"pretraining-{options.device}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
