"""The prepared store: a folder of shards and a `store.json` that is written last, so that half a store is none.

    store.json                  format, version, settings; of every split its shards, their lengths and checksums, and
                                the images that were left out, with reasons
    train-00000.safetensors     data (bytes,) uint8: the images one after another, lossless WebP or raw;
                                ends (n,) int64: where each ends; sizes (n, 2): height, width; crc (n,): its CRC-32;
                                labels (n,) int64: its class, −1 where unknown; older stores have none
                                seal (1,) int64: the CRC-32 of all but the data; older stores have none

Images are shaped already: shorter side `size`, and square unless the crop is random.

Shapes: n images of a shard, C channels, H W pixels.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.config import Config
from ..core.errors import UserError
from ..core.files import atomic_file
from .config import LOADING, DataConfig
from .decoding import DAMAGE, BadImage, Decoded, Shaping
from .images import Crop
from .labels import UNKNOWN, unknown
from .splits import Split, choose

FORMAT = "nvae-images"
VERSION = 1
INDEX = "store.json"
NUMBER = "-" + 5 * "[0-9]"
"""How the name of a file of images ends, as a pattern."""
Encoding = Literal["webp", "raw"]


class Settings(Config):
    """What decides the pixels of a store; a config that reads it must agree.

    Stores of earlier versions have a hold-out and a source whether or not these had an effect.
    """

    name: str
    size: int
    channels: Literal[1, 3]
    crop: Literal["centre", "random"]
    enlarge: bool
    holdout: float | None
    """None where the set has splits of its own."""
    lists: str | None
    source: str | None
    """None where the set lies nowhere."""
    encoding: Encoding
    is_named: bool | None = None
    """True where the images were read as the set `name` is given out; None in stores that do not say."""


class Shard(Config):
    """A file of images."""

    file: str = Field(pattern=r"^(train|validation|test)-\d{5,}\.safetensors$")
    images: int = Field(ge=0)
    checksum: str
    """BLAKE2b of the file."""


class Contents(Config):
    """A split."""

    shards: tuple[Shard, ...]
    skipped: tuple[tuple[str, str], ...]
    """(name, reason) of the images that were left out."""
    doubtful: tuple[tuple[str, str], ...] = ()
    """(name, reason) of images that were taken and may not be what was meant."""
    labelled: bool = False
    """True where the class of some image is known."""
    state: str = ""
    """A digest of the images that it was made of; "" in stores that do not say."""

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)


class Index(Config):
    """`store.json`."""

    format: str = FORMAT
    version: int = VERSION
    settings: Settings
    levels: int
    splits: dict[Split, Contents]
    unread: str = ""
    """What lay beside the images and was not read, in a line."""

    def lines(self) -> list[str]:
        """For people: how many images each split has, and which were left out, and why."""
        lines = []
        for split, contents in self.splits.items():
            lines.append(f"{split}: {contents.images:,} images, {len(contents.skipped)} left out")
            lines += [f"  {name}: {reason}" for name, reason in contents.skipped]
            lines += [f"  {name} was taken, but {reason}" for name, reason in contents.doubtful[:10]]
            if len(contents.doubtful) > 10:
                lines.append(f"  … and {len(contents.doubtful) - 10} more like these")
        return lines + [self.unread] * bool(self.unread)

    def all_held_out(self) -> bool:
        """True where the splits are a hold-out made in preparing: in stores that do not say, by their numbers."""
        if self.settings.is_named is not None:
            return self.settings.holdout is not None
        total = {split: part.images + len(part.skipped) for split, part in self.splits.items()}
        held = round((self.settings.holdout or 0) * sum(total.values()))
        return self.settings.name == "images" and set(total) == {"train", "test"} and total["test"] == max(held, 1)


# ------------------------------------------------------------------------------------------------------------ shards


@dataclass
class Record:
    """An image as a shard holds it."""

    data: bytes
    size: tuple[int, int]
    """Height and width."""
    label: int = UNKNOWN


def encode(image: Image.Image, encoding: Encoding) -> Record:
    """The record of an "L" or "RGB" image, without loss."""
    if encoding == "raw":
        return Record(image.tobytes(), (image.height, image.width))
    buffer = BytesIO()
    image.save(buffer, "WEBP", lossless=True, method=0, quality=50)
    return Record(buffer.getvalue(), (image.height, image.width))


def decode(record: Record, channels: int, encoding: Encoding) -> Image.Image:
    """The image of a record. Raises BadImage where it is damaged."""
    mode = "L" if channels == 1 else "RGB"
    try:
        if encoding == "raw":
            return Image.frombytes(mode, record.size[::-1], record.data)
        image = Image.open(BytesIO(record.data), formats=("WEBP",))
        image.load()
    except DAMAGE as error:
        raise BadImage(f"damaged: {error}") from error
    return image if mode == "RGB" else image.getchannel(0)


def write_shard(path: Path, records: Sequence[Record], metadata: dict[str, str]) -> None:
    """Writes a shard whole or not at all; raises OSError where it can't."""
    content = {
        "data": torch.frombuffer(bytearray(b"".join(record.data for record in records) or b"\0"), dtype=torch.uint8),
        "ends": torch.tensor(np.cumsum([len(record.data) for record in records]), dtype=torch.int64),
        "sizes": torch.tensor([record.size for record in records], dtype=torch.int32).reshape(-1, 2),
        "labels": torch.tensor([record.label for record in records], dtype=torch.int64),
        "crc": torch.tensor([zlib.crc32(record.data) for record in records], dtype=torch.int64),
    }
    content["seal"] = torch.tensor([_seal({name: table.numpy() for name, table in content.items()})])
    with atomic_file(path) as file:
        file.write(save(content, metadata=metadata))


def _seal(tables: Mapping[str, np.ndarray]) -> int:
    """The CRC-32 of what a shard says of its images."""
    seal = 0
    for name in ("ends", "sizes", "labels", "crc"):
        seal = zlib.crc32(np.ascontiguousarray(tables[name]).tobytes(), seal)
    return seal


class ShardFile:
    """An open shard."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where it is missing, truncated or something else."""
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="np"))
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self._data = self._file.get_slice("data")
            tables = {name: self._file.get_tensor(name) for name in self._file.keys() if name != "data"}  # noqa: SIM118
            if "seal" in tables and int(tables["seal"][0]) != _seal(tables):
                raise ValueError("what it says of its images is not as it was written")
            self._ends = np.concatenate([[0], tables["ends"]])
            self._sizes = tables["sizes"]
            self._crc = tables["crc"]
            self.labels: np.ndarray = tables["labels"] if "labels" in tables else unknown(len(self))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: missing, damaged or truncated; prepare the set again ({error})") from error

    def __len__(self) -> int:
        return len(self._sizes)

    def record(self, index: int) -> Record:
        """The image at `index`, encoded. Raises BadImage where it is damaged."""
        try:
            data: bytes = self._data[int(self._ends[index]) : int(self._ends[index + 1])].tobytes()
        except SafetensorError as error:
            raise BadImage(f"damaged: {error}") from error
        if zlib.crc32(data) != self._crc[index]:
            raise BadImage("damaged: its checksum differs")
        height, width = self._sizes[index].tolist()
        return Record(data, (height, width))


# ------------------------------------------------------------------------------------------------------------- store


def is_store(path: Path) -> bool:
    """True for the folder of a finished store. Raises UserError for one whose preparation was not finished."""
    if (path / INDEX).is_file():
        return True
    if path.is_dir() and any(path.glob(f"*{NUMBER}.safetensors")):
        raise UserError(f"data.path: {path} is a store whose preparation did not finish; run prepare_data.py again")
    return False


def read_index(path: Path) -> Index:
    """The index of a store. Raises UserError where it is damaged or of another version."""
    file = path / INDEX
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise UserError(
                f"{file}: is of format {content.get('format')} {content.get('version')}, read is {FORMAT} {VERSION}"
            )
        seal = content.pop("seal", None)
        if seal is not None and seal != _digest(content):
            raise UserError(f"{file}: damaged, it is not as it was written; prepare the set again")
        return Index.model_validate(content)
    except (OSError, ValidationError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: damaged, prepare the set again") from error


def write_index(path: Path, index: Index) -> None:
    with atomic_file(path / INDEX) as file:
        content = index.model_dump(mode="json")
        file.write(json.dumps({**content, "seal": _digest(content)}, indent=1, ensure_ascii=False).encode())


def _digest(content: Mapping[str, Any]) -> str:
    """The seal of an index: BLAKE2b of all else in it."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def checksum(path: Path) -> str:
    """BLAKE2b of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class Store(Decoded):
    """A split of a prepared store."""

    def __init__(self, path: Path, split: Split, config: DataConfig) -> None:
        """Raises UserError where the store does not hold what the config asks for."""
        index = read_index(path)
        _agree(path, index, config)
        whole = config.holdout == 1 and index.all_held_out() and split != "train"
        parts = list(index.splits.values()) if whole else [choose(index.splits, split, path)]
        self.path = path
        self.settings = index.settings
        self.levels = index.levels
        self.movable = config.crop == "random" and split == "train"
        self.shape = (config.channels, config.size, config.size)
        self.shaping = Shaping(config.size, config.channels)
        shards = [shard for part in parts for shard in part.shards]
        self.files = [shard.file for shard in shards]
        self.ends = np.cumsum([shard.images for shard in shards])
        self.is_labelled = any(part.labelled for part in parts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @cached_property
    def labels(self) -> Tensor:
        parts = [self._shard(number).labels for number in range(len(self.files))] if self.is_labelled else []
        return torch.from_numpy(np.concatenate(parts) if parts else unknown(len(self)))

    def square(self, index: int, crop: Crop) -> Image.Image:
        number, place = self._place(index)
        image = decode(self._shard(number).record(place), self.shape[0], self.settings.encoding)
        return self.shaping.square(image, crop)

    def name(self, index: int) -> str:
        number, place = self._place(index)
        return f"{self.path / self.files[number]}[{place}]"

    def _place(self, index: int) -> tuple[int, int]:
        """Which shard holds an image, and where."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, index - (int(self.ends[number - 1]) if number else 0)

    def _shard(self, number: int) -> ShardFile:
        if number not in self._open:
            self._open[number] = ShardFile(self.path / self.files[number])
        return self._open[number]

    @cached_property
    def _open(self) -> dict[int, ShardFile]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}


def _agree(path: Path, index: Index, config: DataConfig) -> None:
    """Raises UserError naming the first thing in which a store and a config differ.

    All that a config was given decides how a store is prepared, and can't be changed afterwards; except that a store
    of random crops shows its centres, too, and one with a hold-out all images of it.
    """
    held = {**index.settings.model_dump(), "path": config.path}
    given = set(config.given()) - LOADING | {"size", "channels"}
    asked = {field: getattr(config, field) for field in DataConfig.model_fields if field in given}
    if config.name != "images":
        asked["name"] = config.name
    if config.holdout == 1 and index.all_held_out():
        del asked["holdout"]
    asked.pop("crop", None)
    if config.crop == "random":
        asked["crop"] = config.crop
    if config.lists is not None:
        asked["lists"] = str(config.lists)
    for field, value in asked.items():
        if held[field] != value:
            raise UserError(
                f"data.{field}: is {value}, but the store {path} was prepared with {held[field]}; change it, or "
                "prepare again"
            )
