"""Where images lie before they are shaped: files of a folder, members of a zip, entries of an LMDB.

Sources are picklable and cheap to send: what they open, they open where they are used. Arrays are in arrays.py.
"""

import math
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import lmdb
import numpy as np
from PIL import Image

from ..core.errors import UserError
from .decoding import SUFFIXES, BadImage, Decoded, Shaping, decode
from .images import Crop

Positions = Sequence[int] | np.ndarray


class Source(ABC):
    """Images of any size, by position."""

    levels: int = 255
    """A pixel's grey value in [0, 1] is its uint8 value over `levels`."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, bad ones included."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages, lists and the hold-out call the image at `index`; the same wherever the set lies."""

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """The image at `index`, "L" or "RGB". Raises BadImage."""

    @abstractmethod
    def take(self, positions: Positions) -> Self:
        """A source of the images at `positions` (ascending) alone."""

    def stacked(self) -> np.ndarray | None:
        """All images as one uint8 array, (N, H, W) or (N, H, W, 3), where they lie so; else None."""
        return None

    @property
    def whole(self) -> bool:
        """True where one image can't be read without reading them all."""
        return False

    def release(self) -> None:  # noqa: B027 - most keep nothing
        """Forgets what was read; it is read again when needed."""


class FolderSource(Source):
    """Image files under a folder."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = list(names)

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

    def take(self, positions: Positions) -> Self:
        return type(self)(self.root, [self.names[i] for i in positions])


def image_files(root: Path) -> list[str]:
    """Names, relative to `root` and sorted, of the image files under it at any depth; hidden ones do not count.

    Raises OSError at a folder that can't be read: leaving it out would go unnoticed.
    """
    names: list[str] = []
    seen = set()

    def fail(error: OSError) -> None:
        raise error

    for folder, below, files in os.walk(root, followlinks=True, onerror=fail):
        here = Path(folder).resolve()
        if here in seen:  # reached before, through a link
            below.clear()
            continue
        seen.add(here)
        within = Path(folder).relative_to(root).as_posix()
        names += files if within == "." else [f"{within}/{file}" for file in files]
    return sorted(filter(is_image_name, names))


def is_image_name(name: str) -> bool:
    """True for the name of a PNG, JPEG or WebP file outside hidden folders and __MACOSX."""
    parts = name.split("/")
    return name.lower().endswith(SUFFIXES) and not any(p.startswith(".") or p == "__MACOSX" for p in parts)


class ZipSource(Source):
    """Image files in a zip."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> Image.Image:
        try:
            data = self._file.read(self.names[index])
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise BadImage(f"cannot be read from {self.path.name}: {error}") from error
        except KeyError as error:
            raise BadImage(f"is not in {self.path.name}") from error
        return decode(data)

    def take(self, positions: Positions) -> Self:
        return type(self)(self.path, [self.names[i] for i in positions])

    @cached_property
    def _file(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "names": self.names}


def zipped_images(path: Path) -> list[str]:
    """Names of the image files in a zip, sorted. Raises UserError when it is none, or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            return sorted(filter(is_image_name, file.namelist()))
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"data.path: {path} is damaged, or not a zip: {error}") from error


class LmdbSource(Source):
    """Entries of an LMDB: image files (LSUN; CelebA 64 of the published code), or raw RGB squares (its other sets).

    The published code's keys are the decimal positions as ASCII, and the length is the number of entries (spec §8);
    any other keys are taken in their own order.
    """

    def __init__(self, path: Path, keys: Sequence[bytes], side: int | None) -> None:
        self.path = path
        self.keys = keys
        self.side = side

    @classmethod
    def open(cls, path: Path) -> Self:
        """All entries of an LMDB. Raises UserError when it is none, or empty."""
        path = path.resolve()
        try:
            with _environment(path).begin() as transaction:
                count = transaction.stat()["entries"]
                keys: Sequence[bytes] = [b"%d" % i for i in range(count)]
                if count and transaction.get(b"0") is None:
                    keys = list(transaction.cursor().iternext(values=False))
                sample = [transaction.get(keys[i * (count - 1) // 15]) for i in range(16)] if count else []
        except lmdb.Error as error:
            raise UserError(f"data.path: {path} is damaged: {error}") from error
        if not count:
            raise UserError(f"data.path: {path} is an LMDB without entries")
        return cls(path, keys, _raw_side([value for value in sample if value is not None]))

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        return f"{self.path.name}/{self.keys[index].decode(errors='replace')}"

    def load(self, index: int) -> Image.Image:
        try:
            with _environment(self.path).begin() as transaction:
                data = transaction.get(self.keys[index])
        except lmdb.Error as error:
            raise BadImage(f"cannot be read: {error}") from error
        if data is None:
            raise BadImage("no such key in the LMDB")
        if self.side is None:
            return decode(data)
        if len(data) != 3 * self.side**2:
            raise BadImage(f"{len(data)} bytes; other entries are raw RGB of {self.side}×{self.side} pixels")
        return Image.frombytes("RGB", (self.side, self.side), data)

    def take(self, positions: Positions) -> Self:
        return type(self)(self.path, [self.keys[i] for i in positions], self.side)


@cache
def _environment(path: Path) -> Any:
    """The open LMDB at a path: the library allows one in a process."""
    try:
        return lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"data.path: {path} cannot be opened as an LMDB: {error}") from error


def _raw_side(sample: Sequence[bytes]) -> int | None:
    """The side of raw RGB squares if all values are that, None if they are image files.

    Both are told apart by their lengths: files differ in length, squares do not.
    """
    lengths = {len(value) for value in sample}
    if len(lengths) != 1:
        return None
    side = math.isqrt(lengths.pop() // 3)
    is_file = all(value.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF")) for value in sample)
    return side if len(sample[0]) == 3 * side**2 and not is_file else None


class Shaped(Decoded):
    """A source's images, shaped as they are read."""

    def __init__(self, source: Source, shaping: Shaping, movable: bool = False) -> None:
        self.source = source
        self.shaping = shaping
        self.levels = source.levels
        self.movable = movable
        self.shape = (shaping.channels, shaping.size, shaping.size)

    def __len__(self) -> int:
        return len(self.source)

    def square(self, index: int, crop: Crop) -> Image.Image:
        return self.shaping.square(self.shaping.rectangle(self.source.load(index)), crop)

    def name(self, index: int) -> str:
        return self.source.name(index)
