"""Where images lie before they are shaped: files of a folder, members of a zip.

Sources are picklable and cheap to send: what they open, they open where they are used. Arrays are in arrays.py, LMDBs
in databases.py.
"""

import hashlib
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from ..core.errors import UserError
from .decoding import BadImage, Decoded, Shaping, decode
from .images import Crop
from .labels import unknown
from .names import MAGIC, Listing, is_hidden, name_bytes, printable, suffix_of, with_slashes

Positions = Sequence[int] | np.ndarray


class Source(ABC):
    """Images of any size, by position."""

    levels: int = 255
    """A pixel's grey value in [0, 1] is its uint8 value over `levels`."""
    unread: Sequence[str] = ()
    """Names of files beside the images that may hold some, and are not read."""

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

    @abstractmethod
    def state(self) -> str:
        """Tells these images from others without decoding any: a digest of their names, lengths, checksums."""

    def labels(self) -> np.ndarray:
        """(N,) int64 classes of the images, −1 where unknown."""
        return unknown(len(self))

    @property
    def square(self) -> bool:
        """True where all images are known to be square: no crop can show another part of them."""
        return False

    def stacked(self) -> np.ndarray | None:
        """All images as one uint8 array, (N, H, W) or (N, H, W, 3), where they lie so; else None."""
        return None

    @property
    def whole(self) -> bool:
        """True where one image can't be read without reading them all."""
        return False

    def release(self) -> None:  # noqa: B027 - most keep nothing
        """Forgets what was read; it is read again when needed."""


def digest(lines: Iterable[str]) -> str:
    """Thirty-two digits that tell lines of text from others."""
    state = hashlib.blake2b(digest_size=16)
    for line in lines:
        state.update(name_bytes(line) + b"\n")
    return state.hexdigest()


LARGEST = 2**29
"""Bytes of an image's file; what is more is no image, or holds nothing but the same byte."""


def _require_modest(size: int) -> None:
    """Raises BadImage for a file of more than `LARGEST` bytes."""
    if size > LARGEST:
        raise BadImage(f"{size:,} bytes; a file of an image has at most {LARGEST:,}")


class FolderSource(Source):
    """Image files under a folder."""

    def __init__(
        self, root: Path, names: Sequence[str], unread: Sequence[str] = (), classes: np.ndarray | None = None
    ) -> None:
        """`classes`: (N,) int64, −1 where unknown."""
        self.root = root
        self.names = list(names)
        self.unread = unread
        self.classes = unknown(len(self.names)) if classes is None else classes

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> Image.Image:
        path = self.root / self.names[index]
        try:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):  # a pipe, or a device, may have no end
                raise BadImage("not a file")
            _require_modest(about.st_size)
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadImage(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
        return decode(data)

    def take(self, positions: Positions) -> Self:
        return type(self)(
            self.root, [self.names[i] for i in positions], self.unread, self.classes[np.asarray(positions)]
        )

    def labels(self) -> np.ndarray:
        return self.classes

    def state(self) -> str:
        return digest(f"{name} {_length(self.root / name)}" for name in self.names)


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def files_below(root: Path) -> Iterator[str]:
    """Names, relative to `root`, of all files under it at any depth, each folder once; hidden ones do not count.

    Raises OSError at a folder that can't be read: leaving it out would go unnoticed.
    """
    seen = set()

    def fail(error: OSError) -> None:
        raise error

    for folder, below, files in os.walk(root, followlinks=True, onerror=fail):
        here = Path(folder).resolve()
        if here in seen:  # reached before, through a link
            below.clear()
            continue
        seen.add(here)
        below.sort()  # which of two ways is taken to a folder must not depend on the file system
        below[:] = [name for name in below if not is_hidden(name)]
        within = Path(folder).relative_to(root).as_posix()
        yield from files if within == "." else (f"{within}/{file}" for file in files)


def folder_listing(root: Path) -> Listing:
    """The image files under a folder, and those that may be and are not read: by suffix, or without one by content."""
    names = list(files_below(root))
    listing = Listing.of(names)
    nameless = [
        name for name in names if not suffix_of(name) and not is_hidden(name) and _begins_like_an_image(root / name)
    ]
    return Listing(listing.images, sorted([*listing.unread, *nameless]))


def _begins_like_an_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(max(map(len, MAGIC))).startswith(MAGIC)
    except (OSError, ValueError):
        return False


class ZipSource(Source):
    """Image files in a zip, whose names are spelt with "/"; of two members of one name the later counts."""

    def __init__(
        self, path: Path, names: Sequence[str], unread: Sequence[str] = (), classes: np.ndarray | None = None
    ) -> None:
        """`classes`: (N,) int64, −1 where unknown."""
        self.path = path
        self.names = list(names)
        self.unread = unread
        self.classes = unknown(len(self.names)) if classes is None else classes

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> Image.Image:
        try:
            file, members = self._opened
            _require_modest(members[self.names[index]].file_size)
            data = file.read(members[self.names[index]])
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise BadImage(f"cannot be read from {self.path.name}: {error}") from error
        except KeyError as error:
            raise BadImage(f"is not in {self.path.name}") from error
        return decode(data)

    def take(self, positions: Positions) -> Self:
        return type(self)(
            self.path, [self.names[i] for i in positions], self.unread, self.classes[np.asarray(positions)]
        )

    def labels(self) -> np.ndarray:
        return self.classes

    def state(self) -> str:
        _, members = self._opened
        found = (members.get(name) for name in self.names)
        return digest(
            f"{name} {member.file_size} {member.CRC}" if member else f"{name} -1"
            for name, member in zip(self.names, found, strict=True)
        )

    @cached_property
    def _opened(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        file = zipfile.ZipFile(self.path)
        return file, {with_slashes(member.filename): member for member in file.infolist() if not member.is_dir()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}


def zip_members(path: Path) -> list[str]:
    """Names of all files in a zip, with "/" and each once. Raises UserError when it is none, or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            return list({with_slashes(member.filename): None for member in file.infolist() if not member.is_dir()})
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise UserError(f"data.path: {path} is damaged, or not a zip: {error}") from error


class Shaped(Decoded):
    """A source's images, shaped as they are read."""

    def __init__(self, source: Source, shaping: Shaping, movable: bool = False) -> None:
        self.source = source
        self.shaping = shaping
        self.levels = source.levels
        self.movable = movable
        self.shape = (shaping.channels, shaping.size, shaping.size)
        self.labels = torch.from_numpy(source.labels())

    def __len__(self) -> int:
        return len(self.source)

    def square(self, index: int, crop: Crop) -> Image.Image:
        return self.shaping.cut(self.source.load(index), crop)

    def name(self, index: int) -> str:
        return printable(self.source.name(index))
