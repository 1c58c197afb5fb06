"""Latents of many images in one file, .safetensors or .npz, that need not fit into memory on its way in or out.

    z/00, z/01, …           (N, L, h, w) of each group, top-down: float32 or float16; codes are unsigned integers
    mean/00, … scale/00, …  μ and σ of their posteriors, where asked for
    labels                  (N,) int64 classes, −1 where unknown; only where some are known
    names                   of the images: (N,) text in an .npz, else (N, W) uint8, UTF-8 padded with zeros
    metadata                text by name: the header's of a .safetensors, else an array that holds it as JSON

Shapes: N images, L latent channels and h w space of a group, W bytes of the longest name.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from ..core.errors import UserError

FORMAT, VERSION = "nvae-latents", "1"
ENDINGS = (".safetensors", ".npz")
TYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "uint32": "U32", "uint16": "U16", "uint8": "U8"}
"""What numbers are, by numpy and by safetensors."""
DAMAGE = (SafetensorError, zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError, EOFError, OSError)
"""What reading a damaged file raises."""


@dataclass(frozen=True)
class Column:
    """An array of a file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]
    """Its rows, some at a time."""


def column(name: str, array: np.ndarray) -> Column:
    """Of an array in memory."""
    return Column(name, array.dtype, array.shape, lambda: [array])


def name_column(names: Sequence[str], ending: str) -> Column:
    """The names as a file with that ending has them."""
    if ending == ".npz":
        return column("names", np.array(names))
    encoded = np.array([name.encode() for name in names])
    return column("names", encoded.view(np.uint8).reshape(len(names), -1))


def names_in(array: np.ndarray) -> list[str]:
    """The opposite, of either kind. Raises ValueError for what are no names."""
    if (array.dtype.kind, array.ndim) not in (("U", 1), ("u", 2)):
        raise ValueError(f"names are text, or rows of uint8, found {array.dtype} of shape {array.shape}")
    if array.ndim == 2:
        array = np.char.decode(np.ascontiguousarray(array).view(f"S{array.shape[1]}")[:, 0], "utf-8")
    return [str(name) for name in array.tolist()]


def latent_name(kind: str, group: int) -> str:
    """`z/00`: that of a group's array."""
    return f"{kind}/{group:02d}"


# ------------------------------------------------------------------------------------------------------------ writing


def write_file(file: IO[bytes], ending: str, metadata: Mapping[str, str], columns: Sequence[Column]) -> None:
    """Writes arrays, one part of one of them in memory at a time; the same bytes every time."""
    write = _write_npz if ending == ".npz" else _write_safetensors
    write(file, metadata, columns)


def _write_safetensors(file: IO[bytes], metadata: Mapping[str, str], columns: Sequence[Column]) -> None:
    """Wide numbers come first, so that all of them are aligned."""
    columns = sorted(columns, key=lambda column: -column.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for each in columns:
        begin, end = end, end + math.prod(each.shape) * each.dtype.itemsize
        header[each.name] = {"dtype": TYPES[each.dtype.name], "shape": each.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for each in columns:
        for part in each.parts():
            file.write(_bytes(part, each.dtype))


def _write_npz(file: IO[bytes], metadata: Mapping[str, str], columns: Sequence[Column]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for each in [*columns, column("metadata", np.array(json.dumps(dict(metadata))))]:
            dtype = each.dtype.newbyteorder("<")
            about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": each.shape}
            member = zipfile.ZipInfo(f"{each.name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as inside:
                np.lib.format.write_array_header_1_0(inside, about)
                for part in each.parts():
                    inside.write(_bytes(part, each.dtype))


def _bytes(part: np.ndarray, dtype: np.dtype[Any]) -> bytes:
    return part.astype(dtype.newbyteorder("<"), order="C", copy=False).tobytes()


# ------------------------------------------------------------------------------------------------------------ reading


class LatentFile:
    """A file of latents, perhaps changed since it was written; read some images at a time."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for what is none, or damaged, and OSError for what cannot be opened."""
        self.path = path
        with path.open("rb") as file:
            kind = _Npz if file.read(4) == b"PK\3\4" else _Safetensors
        with damage_named(path):
            self._arrays = kind(path)
            self.metadata = self._arrays.metadata
            self._groups = sorted(name for name in self._arrays.shapes if name.startswith("z/"))
        self._require_of_one_mind()
        with damage_named(path):
            self.names = names_in(self._whole("names"))
        self.labels = self._whole("labels").astype(np.int64) if "labels" in self._arrays.shapes else None
        """(N,) classes, −1 where unknown; None where all are."""

    def _require_of_one_mind(self) -> None:
        """Raises UserError for a file that is none of latents, or whose arrays do not go together."""
        shapes, found = self._arrays.shapes, (self.metadata.get("format"), self.metadata.get("version"))
        if found != (FORMAT, VERSION):
            raise UserError(f"{self.path}: not of nvae-encode: its metadata are not of {FORMAT}, version {VERSION}")
        if self._groups != [latent_name("z", group) for group in range(len(self._groups))]:
            raise UserError(f"{self.path}: holds {', '.join(self._groups)}; groups are held from z/00 on without a gap")
        if not shapes.get("names"):
            raise UserError(f"{self.path}: has no names")
        for name in [*self._groups, *(["labels"] if "labels" in shapes else [])]:
            if shapes[name][:1] != shapes["names"][:1]:
                raise UserError(f"{self.path}: {name} is of shape {shapes[name]}, names are {shapes['names'][0]}")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """(L, h, w) of each group that it holds, top-down."""
        return [self._arrays.shapes[name][1:] for name in self._groups]

    def rows(self, first: int, last: int) -> list[np.ndarray]:
        """Each group's latents (n, L, h, w) of the images from `first` up to `last`. Raises UserError for damage."""
        with damage_named(self.path):
            return [self._arrays.rows(name, first, last) for name in self._groups]

    def _whole(self, name: str) -> np.ndarray:
        with damage_named(self.path):
            return self._arrays.rows(name, 0, self._arrays.shapes[name][0])


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Makes what reading a damaged file raises a UserError that names it."""
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{path}: damaged, or not a file of latents: {error}") from error


class _Safetensors:
    """The arrays of a .safetensors."""

    def __init__(self, path: Path) -> None:
        self._file = cast(Any, safe_open(path, framework="np"))
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.offset_keys()}

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        found: np.ndarray = self._file.get_slice(name)[first:last]
        return found


class _Npz:
    """The arrays of an .npz, packed or not; rows are read one after the other."""

    def __init__(self, path: Path) -> None:
        archive = zipfile.ZipFile(path)
        self._members = {name.removesuffix(".npy"): _Member(archive.open(name)) for name in archive.namelist()}
        self.shapes = {name: member.shape for name, member in self._members.items() if name != "metadata"}
        about = self._members["metadata"].everything() if "metadata" in self._members else np.array("{}")
        self.metadata: dict[str, str] = dict(json.loads(about.item()))

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        return self._members[name].rows(first, last)


class _Member:
    """An array of an .npz."""

    def __init__(self, stream: IO[bytes]) -> None:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, is_fortran, self.dtype = read(stream)
        if self.dtype.hasobject or (is_fortran and len(self.shape) > 1):
            raise ValueError("an array of objects, or in Fortran's order")
        self._stream, self._begin = stream, stream.tell()

    def rows(self, first: int, last: int) -> np.ndarray:
        return self._read(first * math.prod(self.shape[1:]), (last - first, *self.shape[1:]))

    def everything(self) -> np.ndarray:
        return self._read(0, self.shape)

    def _read(self, skipped: int, shape: tuple[int, ...]) -> np.ndarray:
        self._stream.seek(self._begin + skipped * self.dtype.itemsize)
        data = self._stream.read(math.prod(shape) * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype).reshape(shape)
