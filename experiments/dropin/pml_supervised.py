"""Train a PML program with the CrossBatchMemory of PyTorch Metric Learning (PML) and with the one of this package.

    -from pytorch_metric_learning.losses import CrossBatchMemory
    +from selfsup_xbn import CrossBatchMemory

    python -m experiments.dropin.pml_supervised [--epochs 10] [--batch 32] [--memory 512] [--dtype float64]

PML's trainer trains an embedding of digits, and PML's tester evaluates it on other images. The program prints for each
epoch the mean loss and the mean average precision at R (MAP@R) of three runs, and the largest differences between the
first two. Losses with and without adaptation are not comparable, because the rows of the memories differ.

All runs use the same weights and batches. With ``xbm`` the values equal PML's except for rounding. In float32, training
amplifies the differences to about 1e-2 of the loss in ten epochs. In float64 they remain rounding differences.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytorch_metric_learning.losses
import torch
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.miners import PairMarginMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import selfsup_xbn

DIM = 64
METRIC = "mean_average_precision_at_r"
CPU = torch.device("cpu")


class Curves(NamedTuple):
    """Loss of each step, and MAP@R of each epoch in percent."""

    losses: list[float]
    accuracies: list[float]


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the training set and the test set of images [N, 1, 8, 8] and labels [N], by different writers."""
    data = load_digits()
    images, labels = torch.tensor(data.images[:, None] / 16, dtype=torch.float32), torch.tensor(data.target)
    return TensorDataset(images[:900], labels[:900]), TensorDataset(images[900:], labels[900:])


def small_convnet() -> nn.Sequential:
    """Return a network that maps images [B, 1, 8, 8] to features [B, 64]."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def run(make_memory: Callable[..., nn.Module], args: argparse.Namespace) -> Curves:
    """Train and test with a memory."""
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    dtype = getattr(torch, args.dtype)
    train, test = digits()
    models = {"trunk": small_convnet().to(dtype), "embedder": nn.Linear(64, DIM, dtype=dtype)}
    memory = make_memory(SupConLoss(), DIM, memory_size=args.memory, miner=PairMarginMiner())
    curves = Curves([], [])

    tester = GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0,
        data_device=CPU,
        dtype=dtype,
        accuracy_calculator=AccuracyCalculator(include=(METRIC,), device=CPU),
    )

    def test_epoch(trainer: Any) -> None:
        tester.test({"test": test}, trainer.epoch, models["trunk"], models["embedder"])
        curves.accuracies.append(100 * tester.all_accuracies["test"][f"{METRIC}_level0"])

    MetricLossOnly(
        models=models,
        optimizers={f"{name}_optimizer": torch.optim.Adam(m.parameters(), lr=1e-3) for name, m in models.items()},
        batch_size=args.batch,
        loss_funcs={"metric_loss": memory},
        dataset=train,
        data_device=CPU,
        dtype=dtype,
        sampler=MPerClassSampler(train.tensors[1], m=4, batch_size=None, length_before_new_iter=len(train)),
        dataloader_num_workers=0,
        end_of_iteration_hook=lambda trainer: curves.losses.append(trainer.losses["metric_loss"].item()),
        end_of_epoch_hook=test_epoch,
    ).train(num_epochs=args.epochs)
    return curves


def report(curves: dict[str, Curves], epochs: int) -> None:
    """Print the mean loss and the accuracy of each epoch, and the largest differences between the first two runs."""
    print("epoch", *(name.rjust(9) for name in curves), "  |", *(f"{name} MAP@R".rjust(12) for name in curves))
    peer, ours, *_ = curves.values()
    steps = len(peer.losses) // epochs
    for epoch in range(epochs):
        means = [np.mean(curve.losses[epoch * steps : (epoch + 1) * steps]) for curve in curves.values()]
        accuracies = [curve.accuracies[epoch] for curve in curves.values()]
        print(f"{epoch + 1:5}", *(f"{m:9.4f}" for m in means), "  |", *(f"{a:12.2f}" for a in accuracies))
    gaps = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(peer, ours, strict=True)]
    print(f"largest difference between PML and xbm: loss {gaps[0]:.1e}, MAP@R {gaps[1]:.1e} %")


def main() -> None:
    """Run the program with each memory and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="training epochs (default 10)")
    parser.add_argument("--batch", type=int, default=32, help="batch size (default 32)")
    parser.add_argument("--memory", type=int, default=512, help="rows of the memory (default 512)")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64", help="(default float64)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads slow down a network of this size

    def xbm(loss: nn.Module, embedding_size: int, **settings: Any) -> nn.Module:
        return selfsup_xbn.CrossBatchMemory(loss, embedding_size, adaptation="xbm", **settings)

    kinds = {
        "PML": pytorch_metric_learning.losses.CrossBatchMemory,
        "xbm": xbm,
        "xbn": selfsup_xbn.CrossBatchMemory,
    }
    with contextlib.redirect_stderr(io.StringIO()):  # hides the progress bars
        curves = {name: run(make_memory, args) for name, make_memory in kinds.items()}
    report(curves, args.epochs)


if __name__ == "__main__":
    main()
