"""What the loader reads: one split of a set, uint8 images of one shape, by position.

Shapes: B images read at once, C channels, H W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


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
    def read(self, indices: Sequence[int], crops: Sequence[tuple[float, float]] | None = None) -> Tensor:
        """The images at `indices`, (B, C, H, W) uint8. Raises UserError naming an image that can't be read.

        `crops`, B times (down, across) in [0, 1], place the square in an oblong image; none: the centre.
        """

    @property
    def size_mib(self) -> float:
        """Size of all images in memory, MiB."""
        channels, height, width = self.shape
        return len(self) * channels * height * width / 2**20


class InMemory(Images):
    """Images that are one uint8 tensor (N, C, H, W)."""

    def __init__(self, pixels: Tensor, levels: int = 255) -> None:
        assert pixels.dtype == torch.uint8 and pixels.dim() == 4
        self.pixels = pixels
        self.levels = levels
        self.shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def read(self, indices: Sequence[int], crops: Sequence[tuple[float, float]] | None = None) -> Tensor:
        return self.pixels[torch.as_tensor(indices, device=self.pixels.device)]
