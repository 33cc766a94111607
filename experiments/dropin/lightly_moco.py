"""Train MoCo in a lightly program with the NTXentLoss of lightly and with the one of this package.

    -from lightly.loss import NTXentLoss
    +from selfsup_xbn import NTXentLoss

    python -m experiments.dropin.lightly_moco [--data digits | --data DIR] [--steps 100] [--double]

DIR contains DIR/train/CLASS/* and DIR/test/CLASS/*. The program prints the mean loss of three runs for each tenth of
the steps, the largest difference between the first two, and the top-1 accuracy of cosine 20-NN on the features of the
backbone. Losses with and without adaptation are not comparable, because adapted negatives are harder.

All runs use the same weights, batches, views and initial bank. With ``xbm`` the values equal lightly's except for
rounding, if --bank is a multiple of --batch. Otherwise lightly drops rows at the end of the bank. In float32, training
amplifies rounding differences to the second digit within a dozen steps, as it does for two runs of lightly whose
weights differ by 1e-7. With --double the curves agree.
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
    """Subset of a data set of (image, label) with a transform of the images."""

    def __init__(self, items: Any, chosen: list[int], transform: Callable[[Image.Image], Any]) -> None:
        self.items, self.chosen, self.transform = items, chosen, transform

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.items[self.chosen[index]]
        return self.transform(image.convert("RGB")), label


def train_and_test(data: str) -> tuple[Any, Any]:
    """Return the training set and the test set, sequences of (image, label)."""
    if data != "digits":
        return ImageFolder(Path(data, "train")), ImageFolder(Path(data, "test"))
    digits = load_digits()
    images = [Image.fromarray(np.uint8(pixels * 15)).resize((SIDE, SIDE)) for pixels in digits.images]
    items = list(zip(images, digits.target.tolist(), strict=True))
    return items[:1400], items[1400:]


def seed_all(seed: int) -> None:
    """Seed the random number generators of torch, torchvision and lightly."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def small_backbone() -> nn.Sequential:
    """Return a network that maps images [B, 3, S, S] to features [B, 128]."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def run(make_loss: Callable[..., nn.Module], items: Any, args: argparse.Namespace) -> tuple[list[float], nn.Module]:
    """Train with a loss; return the loss of each step and the backbone."""
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
    """Return the top-1 accuracy of 20-NN in percent, with at most ``limit`` training and test images."""

    def embedded(items: Any) -> tuple[np.ndarray, np.ndarray]:
        chosen = random.Random(0).sample(range(len(items)), min(limit, len(items)))
        batches = [(backbone(x).numpy(), y.numpy()) for x, y in DataLoader(Transformed(items, chosen, TO_TENSOR), 500)]
        features, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return features, labels

    backbone.float().eval()
    knn = KNeighborsClassifier(20, weights="distance", metric="cosine").fit(*embedded(train))
    return 100 * knn.score(*embedded(test))


def report(curves: dict[str, list[float]], every: int) -> None:
    """Print the mean losses of every ``every`` steps and the largest difference between the first two curves."""
    print("steps".rjust(9), *(name.rjust(9) for name in curves))
    peers, xbm, *_ = curves
    peer, ours = curves[peers], curves[xbm]
    for start in range(0, len(peer), every):
        stop = min(start + every, len(peer))
        means = [sum(losses[start:stop]) / (stop - start) for losses in curves.values()]
        print(f"{start + 1:4}-{stop:4}", *(f"{mean:9.4f}" for mean in means))
    print(
        f"largest difference between {peers} and {xbm}: {max(abs(a - b) for a, b in zip(peer, ours, strict=True)):.1e}"
    )


def main() -> None:
    """Run the program with each loss and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/ (default digits)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    parser.add_argument("--batch", type=int, default=64, help="batch size (default 64)")
    parser.add_argument("--bank", type=int, default=1024, help="rows of the memory bank (default 1024)")
    parser.add_argument("--workers", type=int, default=0, help="workers of the data loader (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument(
        "--double", dest="dtype", action="store_const", const=torch.float64, default=torch.float32, help="use float64"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads slow down a network of this size

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
