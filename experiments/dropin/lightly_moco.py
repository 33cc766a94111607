"""A MoCo loop as lightly's users write it, with lightly's loss and, by one changed line, with ours.

    -from lightly.loss import NTXentLoss
    +from selfsup_xbn import NTXentLoss

    python -m experiments.dropin.lightly_moco [--data digits | --data DIR] [--steps 100] [--double]

DIR is a tree of images, DIR/train/CLASS/* and DIR/test/CLASS/*. Prints the loss of the three runs, each the mean of as
many steps as a row stands for; then how far apart the first two are, and the top-1 accuracy of cosine 20-NN on the
backbone's features. Losses with and without adaptation are not to be compared: adapted negatives are harder.

All three draw the same weights, batches, views and bank. With ``xbm`` only rounding sets ours apart from lightly's,
if --bank is a multiple of --batch: otherwise lightly drops rows where the bank ends, and ours does not. Training
makes of a rounding in float32 a difference in the second digit within a dozen steps, as it does of two runs of lightly
whose weights differ by 1e-7; with --double the curves stay together.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightly.loss
import numpy as np
import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.moco_transform import MoCoV2Transform
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import selfsup_xbn

SIDE, DIM = 32, 128
TO_TENSOR = v2.Compose(
    [
        v2.Resize(SIDE),
        v2.CenterCrop(SIDE),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5], [0.2]),
    ]
)


class Transformed(Dataset):
    """Chosen items (image, label) of a data set, each image seen through a transform."""

    def __init__(self, items: Any, chosen: list[int], transform: Callable[[Image.Image], Any]) -> None:
        self.items, self.chosen, self.transform = items, chosen, transform

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.items[self.chosen[index]]
        return self.transform(image.convert("RGB")), label


def train_and_test(data: str) -> tuple[Any, Any]:
    """Sequences of (image, label)."""
    if data != "digits":
        return ImageFolder(Path(data, "train")), ImageFolder(Path(data, "test"))
    digits = load_digits()
    images = [Image.fromarray(np.uint8(pixels * 15)).resize((SIDE, SIDE)) for pixels in digits.images]
    items = list(zip(images, digits.target.tolist(), strict=True))
    return items[:1400], items[1400:]


def seed_all(seed: int) -> None:
    """All generators that torch, torchvision and lightly draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def small_backbone() -> nn.Sequential:
    """Images [B, 3, S, S] to features [B, 128]."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def run(make_loss: Callable[..., nn.Module], items: Any, args: argparse.Namespace) -> tuple[list[float], nn.Module]:
    """Loss of each step, and the backbone."""
    seed_all(args.seed)
    backbone = small_backbone()
    query_encoder = nn.Sequential(backbone, MoCoProjectionHead(128, 128, DIM)).to(args.dtype)
    key_encoder = copy.deepcopy(query_encoder)
    deactivate_requires_grad(key_encoder)
    criterion = make_loss(temperature=0.1, memory_bank_size=(args.bank, DIM))
    optimizer = torch.optim.SGD(query_encoder.parameters(), lr=0.06)
    views = Transformed(items, list(range(len(items))), MoCoV2Transform(input_size=SIDE))
    loader = DataLoader(views, args.batch, shuffle=True, drop_last=True, num_workers=args.workers)

    losses: list[Tensor] = []
    while len(losses) < args.steps:
        for (x_query, x_key), _ in loader:
            update_momentum(query_encoder, key_encoder, m=0.99)
            with torch.no_grad():
                key = key_encoder(x_key.to(args.dtype))
            loss = criterion(query_encoder(x_query.to(args.dtype)), key)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if len(losses) == args.steps:
                break
    return torch.stack(losses).tolist(), backbone


@torch.no_grad()
def knn_top1(backbone: nn.Module, train: Any, test: Any, limit: int = 5000) -> float:
    """Percent of test images whose 20 nearest training images vote for their class; at most ``limit`` of each."""

    def embedded(items: Any) -> tuple[np.ndarray, np.ndarray]:
        chosen = random.Random(0).sample(range(len(items)), min(limit, len(items)))
        batches = [(backbone(x).numpy(), y.numpy()) for x, y in DataLoader(Transformed(items, chosen, TO_TENSOR), 500)]
        features, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return features, labels

    backbone.float().eval()
    knn = KNeighborsClassifier(20, weights="distance", metric="cosine").fit(*embedded(train))
    return 100 * knn.score(*embedded(test))


def report(curves: dict[str, list[float]], every: int) -> None:
    """A row of mean losses for each ``every`` steps, and the gap between the first two curves."""
    print("steps".rjust(9), *(name.rjust(9) for name in curves))
    peers, xbm, *_ = curves
    peer, ours = curves[peers], curves[xbm]
    for start in range(0, len(peer), every):
        stop = min(start + every, len(peer))
        means = [sum(losses[start:stop]) / (stop - start) for losses in curves.values()]
        print(f"{start + 1:4}-{stop:4}", *(f"{mean:9.4f}" for mean in means))
    print(f"largest difference of {peers} and {xbm}: {max(abs(a - b) for a, b in zip(peer, ours, strict=True)):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bank", type=int, default=1024, help="rows of the memory bank")
    parser.add_argument("--workers", type=int, default=0, help="processes that make views")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--double", dest="dtype", action="store_const", const=torch.float64, default=torch.float32)
    args = parser.parse_args()
    torch.set_num_threads(1)  # in a network as small as this one threads mostly wait for one another

    losses: dict[str, Callable[..., nn.Module]] = {
        "lightly": lambda **settings: lightly.loss.NTXentLoss(**settings).to(args.dtype),
        "xbm": partial(selfsup_xbn.NTXentLoss, adaptation="xbm", dtype=args.dtype),
        "xbn": partial(selfsup_xbn.NTXentLoss, dtype=args.dtype),
    }
    train, test = train_and_test(args.data)
    curves, top1 = {}, {}
    for name, make_loss in losses.items():
        curves[name], backbone = run(make_loss, train, args)
        top1[name] = knn_top1(backbone, train, test)
    report(curves, max(1, args.steps // 10))
    print("20-NN top-1:", ", ".join(f"{name} {percent:.1f} %" for name, percent in top1.items()))


if __name__ == "__main__":
    main()
