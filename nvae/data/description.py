"""What a set looks like and how hard it is: counts, a contact sheet, bits/dim of trivial models.

Shapes: N images, C channels, H W pixels.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from ..core.errors import UserError
from ..core.files import atomic_file
from ..core.randomness import keyed_uniform
from .config import DataConfig
from .images import Images, spread
from .labels import UNKNOWN
from .sets import open_unread, own_splits
from .splits import Split

TRAIN_AND_TEST: tuple[Split, Split] = ("train", "test")
FITTED_ON = 20_000
"""Training images that the histogram is fitted on, at most."""
MEASURED_ON = 2_000
"""Test images that bits/dim are measured on, at most."""


@dataclass(frozen=True)
class Description:
    """A set in numbers."""

    counts: dict[Split, int]
    shape: tuple[int, int, int]
    uniform: float
    """Bits/dim where every value is as likely as any other."""
    histogram: float
    """Bits/dim of test images where every pixel has a histogram of its own, fitted on training images."""
    png: float
    """Bits/dim of test images as PNG files, headers included."""
    measured: int
    """Test images that the figures are means over."""
    classes: dict[Split, dict[int, int]] = field(default_factory=dict)
    """How many images of each split are of each class, −1 where that is unknown."""

    def lines(self) -> list[str]:
        """The description for people; nats are of a whole image."""
        channels, height, width = self.shape
        nats = channels * height * width * math.log(2)
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items())
        scale = {"uniform": self.uniform, "per-pixel histogram": self.histogram, "PNG": self.png}
        return [
            f"images    {counts}",
            f"size      {height}×{width}, {channels} channel{'s' * (channels > 1)}",
            *(
                f"classes   {split} {_counted(classes)}"
                for split, classes in self.classes.items()
                if {*classes} - {UNKNOWN}
            ),
            f"the scale against which results are read (over {self.measured:,} test images)",
            *(f"  {name:20} {bits:7.3f} bits/dim {bits * nats:10.1f} nats" for name, bits in scale.items()),
        ]


def _counted(classes: dict[int, int]) -> str:
    """Numbers of images by class, of the first twenty."""
    known = sorted((label, count) for label, count in classes.items() if label != UNKNOWN)
    shown = ", ".join(f"{label}: {count:,}" for label, count in known[:20])
    more = f", … {len(known)} classes" if len(known) > 20 else ""
    return shown + more + (f"; unknown: {classes[UNKNOWN]:,}" if UNKNOWN in classes else "")


def describe(config: DataConfig, sheet: Path, seed: int = 0) -> Description:
    """Describes the configured set and writes a contact sheet (PNG) of its training images. Raises UserError."""
    opened = {split: open_unread(config, split) for split in own_splits(config)}
    train, test = (opened[split] if split in opened else open_unread(config, split) for split in TRAIN_AND_TEST)
    try:
        write_sheet(train, sheet)
    except OSError as error:
        raise UserError(f"--describe: {sheet} cannot be written: {error.strerror or error}") from error
    highest = 1 if config.binarize else train.levels
    counts = histogram(_values(train, config.binarize, FITTED_ON, seed), highest)
    measured = torch.cat(list(_values(test, config.binarize, MEASURED_ON, seed)))
    return Description(
        counts={split: len(images) for split, images in opened.items()},
        shape=train.shape,
        uniform=math.log2(highest + 1),
        histogram=histogram_bits(counts, measured),
        png=png_bits(measured, binary=config.binarize),
        measured=len(measured),
        classes={split: dict(Counter(images.labels.tolist())) for split, images in opened.items()},
    )


def write_sheet(images: Images, path: Path, rows: int = 8) -> None:
    """Writes `rows` × `rows` images from all over a split as one PNG."""
    chosen = spread(len(images), rows * rows)
    grey = images.read(chosen).to(torch.float32) / images.levels
    zoom = max(1, 64 // images.shape[2])
    grid = make_grid(F.interpolate(grey, scale_factor=zoom), nrow=rows, pad_value=1.0)
    pixels = (255 * grid).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with atomic_file(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def histogram(batches: Iterator[Tensor], highest: int) -> Tensor:
    """How often each value 0 … `highest` occurs at each pixel of int64 images (B, C, H, W): (highest + 1, C·H·W)."""
    counts = torch.zeros(0)
    for batch in batches:
        values = batch.flatten(1)
        if not len(counts):
            counts = torch.zeros(highest + 1, values.shape[1], dtype=torch.int64)
        counts.scatter_add_(0, values, torch.ones_like(values))
    return counts


def histogram_bits(counts: Tensor, images: Tensor) -> float:
    """Bits/dim of int64 images (N, C, H, W) where value v of a pixel has probability (count + 1) / (Σ counts + V).

    `counts` (V, C·H·W); adding one makes values that never occurred in training possible (Laplace).
    """
    smoothed = (counts + 1).double()
    bits = -(smoothed / smoothed.sum(0)).log2()
    return float(bits.gather(0, images.flatten(1)).mean())


def png_bits(images: Tensor, binary: bool = False) -> float:
    """Bits/dim of int64 images (N, C, H, W) as optimised PNG files; `binary` ones have 1 bit a pixel."""
    total = 0
    for image in images.to(torch.uint8).permute(0, 2, 3, 1).numpy():
        buffer = BytesIO()
        plain = image[..., 0] if image.shape[2] == 1 else image
        picture = Image.fromarray(255 * plain).convert("1") if binary else Image.fromarray(np.ascontiguousarray(plain))
        picture.save(buffer, "PNG", optimize=True)
        total += 8 * buffer.tell()
    return total / images.numel()


def _values(images: Images, binarize: bool, limit: int, seed: int) -> Iterator[Tensor]:
    """Up to `limit` images from all over a split as int64 values, binarised as in evaluation where asked."""
    chosen = spread(len(images), limit)
    for first in range(0, len(chosen), 256):
        indices = chosen[first : first + 256]
        pixels = images.read(indices)
        if binarize:
            pixels = keyed_uniform(pixels.shape, indices, seed, "evaluation/0", "cpu") < pixels / images.levels
        yield pixels.to(torch.int64)
