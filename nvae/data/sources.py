"""Where images lie before they are shaped: files of a folder, members of a zip, rows of an array.

Shapes: N images, C channels, H W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import UserError
from .decoding import SUFFIXES, BadImage, Shaping, decode
from .images import Images


class Source(ABC):
    """Images of any size, by position. Picklable: it opens its files where it is used."""

    levels: int = 255

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, bad ones included."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages and lists call the image at `index`."""

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """The image at `index`, "L" or "RGB". Raises BadImage."""


class ArraySource(Source):
    """A uint8 array (N, H, W) or (N, H, W, C)."""

    def __init__(self, array: np.ndarray, path: str, levels: int = 255) -> None:
        self.array = array
        self.path = path
        self.levels = levels

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.array[index]))

    def pixels(self) -> Tensor:
        """All images, (N, C, H, W)."""
        array = self.array[:, None] if self.array.ndim == 3 else np.moveaxis(self.array, -1, 1)
        return torch.from_numpy(np.ascontiguousarray(array))


class FolderSource(Source):
    """Image files under a folder."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = list(names)

    @classmethod
    def of(cls, root: Path) -> "FolderSource":
        """All PNG, JPEG and WebP files under `root`, at any depth, sorted by name."""
        found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        return cls(root, sorted(path.relative_to(root).as_posix() for path in found))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> Image.Image:
        try:
            data = (self.root / self.names[index]).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        return decode(data)


class Part(Source):
    """Some images of another source, in the order of `positions`."""

    def __init__(self, whole: Source, positions: "np.ndarray | Sequence[int]") -> None:
        self.whole = whole
        self.positions = np.asarray(positions, dtype=np.int64)
        self.levels = whole.levels

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        return self.whole.name(int(self.positions[index]))

    def load(self, index: int) -> Image.Image:
        return self.whole.load(int(self.positions[index]))


class Shaped(Images):
    """A source's images, shaped as they are read."""

    def __init__(self, source: Source, shaping: Shaping, movable: bool = False) -> None:
        self.source = source
        self.shaping = shaping
        self.levels = source.levels
        self.movable = movable
        self.shape = (shaping.channels, shaping.size, shaping.size)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int], crops: Sequence[tuple[float, float]] | None = None) -> Tensor:
        places = crops or [(0.5, 0.5)] * len(indices)
        out = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        for row, index, place in zip(out, indices, places, strict=True):
            try:
                row.copy_(self.shaping.square(self.shaping.rectangle(self.source.load(index)), place))
            except BadImage as error:
                raise UserError(f"{self.source.name(index)}: {error}") from error
        return out
