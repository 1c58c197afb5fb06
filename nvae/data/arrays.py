"""Images that are arrays: .npy and .npz files of anyone, and the batches of down-sampled ImageNet.

Shapes: N images, C channels (1 or 3), H W pixels.
"""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from PIL import Image

from ..core.errors import UserError
from .labels import as_labels, unknown
from .sources import Positions, Source, digest

DAMAGE = (ValueError, OSError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for damaged files."""


class ArraySource(Source):
    """A uint8 array (N, H, W) or (N, H, W, 3) in memory."""

    def __init__(
        self,
        array: np.ndarray,
        label: str,
        levels: int = 255,
        numbers: Positions | None = None,
        classes: np.ndarray | None = None,
    ) -> None:
        """`label` is what images are called with their `numbers`; `classes`: (N,) int64, −1 where unknown."""
        assert array.dtype == np.uint8
        self.classes = unknown(len(array)) if classes is None else classes
        self.array = array
        self.label = label
        self.levels = levels
        self.numbers = np.arange(len(array)) if numbers is None else np.asarray(numbers)

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        return f"{self.label}[{self.numbers[index]}]"

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.array[index]))

    def take(self, positions: Positions) -> Self:
        chosen = np.asarray(positions)
        return type(self)(self.array[chosen], self.label, self.levels, self.numbers[chosen], self.classes[chosen])

    def labels(self) -> np.ndarray:
        return self.classes

    def stacked(self) -> np.ndarray:
        return self.array

    def state(self) -> str:
        return hashlib.blake2b(np.ascontiguousarray(self.array).data, digest_size=16).hexdigest()

    @property
    def square(self) -> bool:
        return bool(self.array.shape[1] == self.array.shape[2])


class ArrayFile(Source):
    """A uint8 array in a file: (N, H, W), with C last or second, or `planar`: (N, C·H·W), square. Some of its images.

    A .npy is mapped into memory and read where it is used; an array of an .npz is read whole.
    """

    def __init__(
        self,
        path: Path,
        key: str | None = None,
        planar: bool = False,
        numbers: Positions | None = None,
        label_key: str | None = None,
    ) -> None:
        """`label_key`: the array of their classes, in the same file; those of down-sampled ImageNet begin with 1."""
        self.path = path
        self.label_key = label_key
        self.key = key
        self.planar = planar
        shape, dtype, held = _header(path, key)
        _check(shape, dtype, planar, self._label)
        if math.prod(shape) != held:
            raise UserError(
                f"data.path: {self._label} is damaged, or not an array file: {held:,} bytes, not those of {shape}"
            )
        self.sides = _sides(shape, planar)
        self.total = shape[0]
        self.numbers = np.arange(shape[0]) if numbers is None else np.asarray(numbers)

    @property
    def _label(self) -> str:
        return f"{self.path}" if self.key is None else f"{self.path} ('{self.key}')"

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        inside = "" if self.key is None else f":{self.key}"
        return f"{self.path.name}{inside}[{self.numbers[index]}]"

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self._array[self.numbers[index]]))

    def take(self, positions: Positions) -> Self:
        return type(self)(self.path, self.key, self.planar, self.numbers[np.asarray(positions)], self.label_key)

    def labels(self) -> np.ndarray:
        if self.label_key is None:
            return unknown(len(self))
        with _damage_named(self.path), np.load(self.path) as archive:
            found = as_labels(archive[self.label_key], self.total, first=int(self.planar))
        return found[self.numbers]

    def stacked(self) -> np.ndarray:
        return self._array if len(self) == len(self._array) else self._array[self.numbers]

    @property
    def whole(self) -> bool:
        return self.key is not None

    @property
    def square(self) -> bool:
        return self.sides[0] == self.sides[1]

    def state(self) -> str:
        shape, dtype, _ = _header(self.path, self.key)
        return digest([f"{self.key} {shape} {dtype} {_checksum(self.path, self.key)}", str(self.numbers.tolist())])

    @cached_property
    def _array(self) -> np.ndarray:
        with _damage_named(self.path):
            if self.key is None:
                array = np.load(self.path, mmap_mode="r")
            else:
                with np.load(self.path) as archive:
                    array = archive[self.key]
        return _channels_last(array, self.planar)

    def release(self) -> None:
        self.__dict__.pop("_array", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_array"}


class Joined(Source):
    """Several sources as one; only the one in use keeps what it has read."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])
        self._used = 0

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - (int(self.ends[part - 1]) if part else 0)

    def name(self, index: int) -> str:
        part, place = self._find(index)
        return self.parts[part].name(place)

    def load(self, index: int) -> Image.Image:
        part, place = self._find(index)
        if part != self._used:
            self.parts[self._used].release()
            self._used = part
        return self.parts[part].load(place)

    def take(self, positions: Positions) -> Self:
        chosen = np.asarray(positions)
        of_part = np.searchsorted(self.ends, chosen, side="right")
        starts = np.concatenate([[0], self.ends[:-1]])
        return type(self)([self.parts[p].take(chosen[of_part == p] - starts[p]) for p in np.unique(of_part)])

    def stacked(self) -> np.ndarray | None:
        arrays = []
        for part in self.parts:
            array = part.stacked()
            if array is None:
                return None
            arrays.append(array)
            part.release()
        return np.concatenate(arrays)

    @property
    def whole(self) -> bool:
        return any(part.whole for part in self.parts)

    @property
    def square(self) -> bool:
        return all(part.square for part in self.parts)

    def labels(self) -> np.ndarray:
        return np.concatenate([part.labels() for part in self.parts])

    def state(self) -> str:
        return digest(part.state() for part in self.parts)


# ----------------------------------------------------------------------------------------------------------- reading


def array_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz. Raises UserError where it is damaged."""
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


@contextmanager
def _damage_named(path: Path) -> Any:
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"data.path: {path} is damaged, or not an array file of numpy: {error}") from error


def _header(path: Path, key: str | None) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of an array, and how many bytes it has, without reading it."""
    with _damage_named(path):
        if key is None:
            with path.open("rb") as file:
                return *_npy_header(file), path.stat().st_size - file.tell()
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            return *_npy_header(file), archive.getinfo(f"{key}.npy").file_size - file.tell()


def _checksum(path: Path, key: str | None) -> int:
    """The CRC-32 that an archive keeps of an array; of a .npy the length of the file, which can be large."""
    if key is None:
        return path.stat().st_size
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{key}.npy").CRC


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _check(shape: tuple[int, ...], dtype: np.dtype, planar: bool, label: str) -> None:
    if dtype != np.uint8:
        raise UserError(f"data.path: {label} holds {dtype}; an array of images is uint8, 0 to 255")
    if planar:
        fits = len(shape) == 2 and shape[1] == 3 * math.isqrt(shape[1] // 3) ** 2
    else:
        fits = (len(shape) == 3 and shape[2] not in (1, 3)) or (
            len(shape) == 4 and (shape[3] in (1, 3) or shape[1] in (1, 3))
        )
    if not fits or 0 in shape:
        one = " (this looks like one image: add a first axis)" if len(shape) == 3 and shape[2] in (1, 3) else ""
        raise UserError(
            f"data.path: {label} has shape {shape}{one}; an array of images is (images, height, width), with 1 or 3 "
            "channels last or second"
        )


def _sides(shape: tuple[int, ...], planar: bool) -> tuple[int, int]:
    """Height and width of the images of an array."""
    if planar:
        return (math.isqrt(shape[1] // 3),) * 2
    first = 2 if len(shape) == 4 and shape[3] not in (1, 3) else 1
    return shape[first], shape[first + 1]


def _channels_last(array: np.ndarray, planar: bool) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3), a view where it can be."""
    if planar:
        side = math.isqrt(array.shape[1] // 3)
        array = array.reshape(-1, 3, side, side)
    if array.ndim == 4 and array.shape[3] not in (1, 3):
        array = np.moveaxis(array, 1, -1)
    return array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
