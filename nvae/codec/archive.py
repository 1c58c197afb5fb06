"""The file: an index, the bits of each chain of squares, and the index once more.

    "nvae.nvz1"   u32 length, u32 CRC of the index   index   bits of the chains   index   the same lengths   "nvae.nvz1"

Whatever is damaged, chains that are whole are found by either index and told by their own checksum. The index is JSON,
compressed by zlib; numbers are little-endian.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import UserError
from ..core.files import atomic_file
from .rounding import Corrections
from .tiles import grid_of

MAGIC = b"nvae.nvz1"
_FRAME = struct.Struct("<II")
LARGEST_INDEX, LONGEST = 2**30, 2**16
"""Bytes of an index once it is unpacked, and pixels of an image's side; more is no index."""


@dataclass(frozen=True)
class Entry:
    """An image of an archive."""

    name: str
    height: int
    width: int
    label: int = -1
    """Class that the model was told; −1 where none."""
    is_grey: bool = False
    """True where a colour model was given a grey image."""

    def squares(self, side: int) -> int:
        """How many it is cut into."""
        rows, columns = grid_of(self.height, self.width, side)
        return rows * columns


@dataclass(frozen=True)
class Part:
    """The bits of a chain."""

    length: int
    """Bytes."""
    checksum: int
    """CRC-32 of them."""
    begun: int
    """Of its bits, those that it began with."""


@dataclass(frozen=True)
class Index:
    """What an archive holds."""

    model: str
    """SHA-256 of the config and weights that made it."""
    family: str
    side: int
    colours: int
    levels: int
    """V: pixels are 0 to V."""
    chain: int
    """Squares of a chain; the last one may have fewer."""
    bits: list[list[int | None]] | None
    """b of the channels of the grids of latents (`codec/normals.py`)."""
    made_by: Mapping[str, str]
    """Versions of what decides the arithmetic, and a line about it."""
    images: list[Entry] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def squares(self) -> int:
        """Of all images, which chains hold one after the other."""
        return sum(entry.squares(self.side) for entry in self.images)

    def chain_lengths(self) -> list[int]:
        """Squares of each chain."""
        return [min(self.chain, self.squares - first) for first in range(0, self.squares, self.chain)]

    @property
    def body(self) -> int:
        """Bytes of all chains."""
        return sum(part.length for part in self.parts)

    @property
    def begun(self) -> int:
        """Bits that chains began with, in all."""
        return sum(part.begun for part in self.parts)

    @property
    def dims(self) -> int:
        """Numbers of all images."""
        return sum(entry.height * entry.width for entry in self.images) * self.colours


# ---------------------------------------------------------------------------------------------------------- of a chain


class Chain(NamedTuple):
    """What is kept of a chain."""

    words: np.ndarray
    """Of its stack, uint32."""
    noted: Sequence[Corrections]
    """Of each of its squares."""
    checksums: Sequence[int]
    """CRC-32 of the levels (C, S, S) of each of its squares."""

    def to_bytes(self) -> bytes:
        """Checksums, notes, words."""
        rows = [(square, place, is_odd) for square, notes in enumerate(self.noted) for place, is_odd in notes.items()]
        notes = np.array([len(rows), *(number for row in rows for number in row)], dtype="<u4")
        return b"".join(part.astype("<u4").tobytes() for part in (np.array(self.checksums), notes, self.words))

    @staticmethod
    def from_bytes(data: bytes, squares: int) -> "Chain":
        """The opposite. Raises ValueError for what is none."""
        numbers = np.frombuffer(data, "<u4").astype(np.uint32)
        checksums, (count,), rest = numbers[:squares], numbers[squares : squares + 1], numbers[squares + 1 :]
        noted: list[dict[int, bool]] = [{} for _ in range(squares)]
        for square, place, is_odd in rest[: 3 * int(count)].reshape(int(count), 3).tolist():
            if square >= squares:
                raise ValueError(f"a note of square {square} of {squares}")
            noted[square][place] = bool(is_odd)
        return Chain(rest[3 * int(count) :], noted, checksums.tolist())


# -------------------------------------------------------------------------------------------------------- of a file


def write_archive(path: Path, index: Index, chains: Sequence[bytes]) -> None:
    """Whole or not at all."""
    plain = json.dumps(_as_json(index), separators=(",", ":")).encode()
    packed = zlib.compress(plain, 9)
    frame = _FRAME.pack(len(packed), zlib.crc32(packed))
    with atomic_file(path) as file:
        file.write(MAGIC + frame + packed)
        for data in chains:
            file.write(data)
        file.write(packed + frame + MAGIC)


class Archive:
    """A file that was written, maybe damaged since."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for what is no archive, or whose two indexes are both damaged."""
        self.path = path
        with path.open("rb") as file:
            self._data = file.read()
        head = len(MAGIC) + _FRAME.size
        found = self._index_at_the_start(), self._index_at_the_end()
        index = found[0] or found[1]
        if index is None:
            if MAGIC not in (self._data[: len(MAGIC)], self._data[-len(MAGIC) :]):
                raise UserError(f"{path}: not an archive of nvae-compress")
            raise UserError(f"{path}: both copies of its index are damaged, so that no image can be found")
        self.index, packed = index
        self._first = head + len(packed)
        whole = 2 * self._first + self.index.body
        self._shift = len(self._data) - whole if found[0] is None else 0  # what is missing before the chains
        self.is_whole = None not in found and len(self._data) == whole
        """True where nothing is missing; chains may be damaged still."""

    def _index_at_the_start(self) -> tuple[Index, bytes] | None:
        head = len(MAGIC) + _FRAME.size
        if self._data[: len(MAGIC)] != MAGIC or len(self._data) < head:
            return None
        length, checksum = _FRAME.unpack_from(self._data, len(MAGIC))
        return _index_in(self._data[head : head + length], checksum)

    def _index_at_the_end(self) -> tuple[Index, bytes] | None:
        tail = len(self._data) - len(MAGIC) - _FRAME.size
        if tail < 0 or self._data[-len(MAGIC) :] != MAGIC:
            return None
        length, checksum = _FRAME.unpack_from(self._data, tail)
        return _index_in(self._data[max(tail - length, 0) : tail], checksum)

    def begins(self, number: int) -> int:
        """The place of a chain in the file; below 0 where it is missing."""
        return self._first + self._shift + sum(part.length for part in self.index.parts[:number])

    def chain(self, number: int) -> bytes | None:
        """The bits of a chain; None where they are damaged or missing."""
        start, part = self.begins(number), self.index.parts[number]
        data = self._data[max(start, 0) : start + part.length] if start >= 0 else b""
        return data if len(data) == part.length and zlib.crc32(data) == part.checksum else None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._data)


def _index_in(packed: bytes, checksum: int) -> tuple[Index, bytes] | None:
    if zlib.crc32(packed) != checksum:
        return None
    try:
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(packed, LARGEST_INDEX)
        return _from_json(json.loads(plain)), packed
    except (zlib.error, ValueError, LookupError, TypeError, AttributeError):
        return None


def _as_json(index: Index) -> dict[str, Any]:
    """Columns instead of rows: they compress better."""
    fields = {name: value for name, value in asdict(index).items() if name not in ("images", "parts")}
    images = {name: [getattr(entry, name) for entry in index.images] for name in Entry.__dataclass_fields__}
    parts = {name: [getattr(part, name) for part in index.parts] for name in Part.__dataclass_fields__}
    return {**fields, "images": images, "parts": parts}


def _from_json(data: dict[str, Any]) -> Index:
    images = [
        Entry(str(name), int(height), int(width), int(label), bool(is_grey))
        for name, height, width, label, is_grey in zip(
            *(data["images"][name] for name in Entry.__dataclass_fields__), strict=True
        )
    ]
    columns = (data["parts"][name] for name in Part.__dataclass_fields__)
    parts = [Part(int(length), int(checksum), int(begun)) for length, checksum, begun in zip(*columns, strict=True)]
    index = Index(**{**data, "images": images, "parts": parts})
    sides = [side for entry in images for side in (entry.height, entry.width)]
    if min((*sides, index.side, index.chain)) < 1 or max((*sides, index.side)) > LONGEST:
        raise ValueError("sizes that no image has")
    if len(parts) != len(index.chain_lengths()) or min((part.length for part in parts), default=1) < 1:
        raise ValueError("as many parts as chains")
    return index
