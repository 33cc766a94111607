"""Features of all images of a split, computed in shards by several processes.

Axis legend: N samples, B batch, F features, C channels, H height, W width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from selfsup_xbn.data import ImageData, Split, eval_batches, raw_pixels
from selfsup_xbn.evaluation.features import evaluating, extract_features
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.utils.distributed import gather, shard_slice, world

CHUNK, CUDA_CHUNK = 256, 2000  # maximum number of images of a batch on a CPU and on a GPU
CPU_PIXELS = 300_000
"""Number of pixels of a batch on a CPU. EfficientNet-Lite0 takes twice the time with 256 images of 96 x 96 pixels,
because the memory of larger tensors returns to the system after each layer."""


def backbone_features(
    encoder: Encoder, split: Split, data: ImageData, device: torch.device, workers: int
) -> Float[Tensor, "N F"]:
    """Return the features of the backbone for a split, in order.

    On CUDA the network runs in bfloat16 and with the memory format channels_last. With several processes, each of them
    embeds a shard of the split and returns all features.

    Args:
        encoder: The encoder.
        split: The images.
        data: The side and the normalization of the images.
        device: The device of the encoder.
        workers: The number of processes that read image files.

    Raises:
        UserError: If an image file cannot be read.

    Example:
        >>> from selfsup_xbn.data import load_data
        >>> from selfsup_xbn.models.encoder import build_encoder
        >>> data, encoder = load_data("digits"), build_encoder("convnet4", 16, channels=1, image_size=8)
        >>> len(backbone_features(encoder, data.test, data, torch.device("cpu"), workers=0))
        360
    """
    cuda = device.type == "cuda"
    batch_size = CUDA_CHUNK if cuda else max(8, min(CHUNK, CPU_PIXELS // data.image_size**2))

    def features(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            return encoder.features(images.contiguous(memory_format=torch.channels_last) if cuda else images)

    with evaluating(encoder):
        return _in_shards(
            split,
            lambda shard: extract_features(
                features,
                _with_bar(eval_batches(shard, data, device=device, batch_size=batch_size, workers=workers), len(shard)),
            ),
        )


def _with_bar(batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """Yield the batches, with a progress bar on a terminal."""
    with tqdm(
        total=count, desc="embedding", unit=" images", disable=not sys.stderr.isatty(), leave=False, delay=2
    ) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def pixel_features(split: Split, workers: int) -> Float[Tensor, "N F"]:
    """Return the pixels of a split as features, in order, as ``raw_pixels`` does.

    Args:
        split: The images.
        workers: The number of processes that read image files.

    Raises:
        UserError: If an image file cannot be read.

    Example:
        >>> from selfsup_xbn.data import load_data
        >>> pixel_features(load_data("digits").test, workers=0).shape
        torch.Size([360, 64])
    """
    return _in_shards(split, lambda shard: raw_pixels(shard, workers=workers))


def _in_shards(split: Split, function: Callable[[Split], Tensor]) -> Tensor:
    """Return one row per sample, in order, where each process computes the rows of its shard."""
    if not 1 < world() <= len(split):
        return function(split)
    shard = shard_slice(len(split))
    return gather(function(split.subset(torch.arange(shard.start, shard.stop))), len(split))
