"""What the loader reads: one split of a set, uint8 images of one shape, by position.

Shapes: N images of a split, B images read at once, C channels, H W pixels.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from ..core.devices import sent
from ..core.errors import UserError

Crop = tuple[float, float]
"""Where a square is cut out of an oblong image: (down, across) in [0, 1] of the room there is."""
CENTRE: Crop = (0.5, 0.5)
CHECKED = 1000
"""How many images a fingerprint looks at."""


class BadImagesError(UserError):
    """Images that can't be used; `problems` has a line "name: reason" for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        shown = "\n".join(f"  {line}" for line in self.problems[:10])
        more = f"\n  and {len(self.problems) - 10} more" if len(self.problems) > 10 else ""
        count = "an image" if len(self.problems) == 1 else f"{len(self.problems)} images"
        super().__init__(
            f"data: {count} can't be used (remove, or prepare the set with scripts/prepare_data.py, which lists and "
            f"leaves out bad ones):\n{shown}{more}"
        )


class Images(ABC):
    """A split of a set. Picklable, so that loader processes can be started by `spawn`."""

    shape: tuple[int, int, int]
    """(C, H, W) of every image, before padding."""
    levels: int = 255
    """A pixel's grey value in [0, 1] is its uint8 value over `levels`."""
    movable: bool = False
    """True where oblong images leave room to choose the square that `read` cuts out."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def read_into(self, out: Tensor, indices: Sequence[int], crops: Sequence[Crop] | None = None) -> None:
        """Writes the images at `indices`, their squares cut out at `crops` (None: the centre), to out.

        That is (B, H, W, C) uint8, the order in which images are decoded. Raises BadImagesError naming every image of
        them that can't be read.
        """

    def read(self, indices: Sequence[int], crops: Sequence[Crop] | None = None) -> Tensor:
        """The images at `indices`, (B, C, H, W) uint8 in any order of memory; otherwise as `read_into`."""
        channels, height, width = self.shape
        out = torch.empty((len(indices), height, width, channels), dtype=torch.uint8)
        self.read_into(out, indices, crops)
        return out.permute(0, 3, 1, 2)

    @cached_property
    def labels(self) -> Tensor:
        """(N,) int64 classes, −1 where unknown; on the CPU."""
        return torch.full((len(self),), -1)

    @property
    def size_mib(self) -> float:
        """Size of all images in memory, MiB."""
        channels, height, width = self.shape
        return len(self) * channels * height * width / 2**20


class InMemory(Images):
    """Images that are one uint8 tensor (N, C, H, W)."""

    def __init__(self, pixels: Tensor, levels: int = 255, labels: Tensor | None = None) -> None:
        assert pixels.dtype == torch.uint8 and pixels.dim() == 4
        self.labels = torch.full((len(pixels),), -1) if labels is None else labels
        self.pixels = pixels
        self.levels = levels
        self.shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def read_into(self, out: Tensor, indices: Sequence[int], crops: Sequence[Crop] | None = None) -> None:
        out.copy_(self.read(indices).permute(0, 2, 3, 1))

    def read(self, indices: Sequence[int], crops: Sequence[Crop] | None = None) -> Tensor:
        return self.pixels[sent(torch.as_tensor(indices), self.pixels.device)]


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` positions spread evenly over `count`."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def fingerprint(images: Images, count: int) -> str:
    """Sixteen digits that tell the first `count` images from others, the same wherever and however they are kept.

    SHA-256 of `count`, of their shape and levels, and of the pixels of `CHECKED` of them, evenly spread (of all, where
    there are no more). Raises BadImagesError for those that can't be read.
    """
    digest = hashlib.sha256(repr((count, images.shape, images.levels)).encode())
    chosen = spread(count, CHECKED)
    for first in range(0, len(chosen), 64):
        digest.update(images.read(chosen[first : first + 64]).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_all(images: Images, progress: bool = False) -> InMemory:
    """All images of a split, read by as many threads as there are processors.

    Raises BadImagesError naming every image that can't be read. `progress` draws a bar when it takes long.
    """
    pixels = torch.empty((len(images), *images.shape), dtype=torch.uint8)
    spans = [range(first, min(first + 64, len(images))) for first in range(0, len(images), 64)]

    def read(span: range) -> list[str]:
        try:
            pixels[span.start : span.stop] = images.read(span)
        except BadImagesError as error:
            return error.problems
        return []

    bar = tqdm(total=len(images), desc="reading images", unit="image", delay=3, leave=False, disable=not progress)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        problems = read(spans[0])  # alone: it opens files that the threads then share
        for span, found in zip(spans[1:], pool.map(read, spans[1:]), strict=True):
            problems += found
            bar.update(len(span))
    if problems:
        raise BadImagesError(problems)
    return InMemory(pixels, images.levels, images.labels)
