"""LMDBs of images, as LSUN and the published code have them."""

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import lmdb
from PIL import Image

from ..core.errors import UserError
from .decoding import BadImage, decode
from .sources import Positions, Source

FILES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF")
"""How image files begin in LMDBs."""


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

    def state(self) -> str:
        lengths = hashlib.blake2b(digest_size=16)
        try:
            with _environment(self.path).begin(buffers=True) as transaction:
                for key in self.keys:
                    value = transaction.get(key)
                    lengths.update(key + b" %d " % (-1 if value is None else len(value)))
        except lmdb.Error as error:
            raise UserError(f"data.path: {self.path} is damaged: {error}") from error
        return lengths.hexdigest()

    @property
    def square(self) -> bool:
        return self.side is not None


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
    is_file = all(value.startswith(FILES) for value in sample)
    return side if len(sample[0]) == 3 * side**2 and not is_file else None
