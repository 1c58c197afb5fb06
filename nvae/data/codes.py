"""Codes of a prepared store's images, made once by the first stage of a VQ-VAE (`coding.py`) and kept beside them.

    codes.json                       what made them, and of each split its files; written last, so that half are none
    train-00000.codes.safetensors    codes (n, V, S) uint16: the maps of an image, top-down, each in raster order;
                                     crc (n,) int64: its CRC-32

Shapes: n images of a shard, B images read at once, L levels, K codes, S the codes of an image over all its maps; V is 2
where mirror images have codes of their own, after those of the images as they are, else 1.
"""

import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.config import Config
from ..core.errors import UserError
from ..core.files import atomic_file
from .config import DataConfig
from .splits import Split
from .store import Store, checksum, is_store, read_index

FORMAT = "nvae-codes"
VERSION = 1
CODES = "codes.json"
MOST = 2**16
"""Codes that uint16 tells apart."""


class CodeShard(Config):
    """A file of codes."""

    file: str
    images: int
    checksum: str
    """BLAKE2b of the file."""
    of: str
    """That of the file of images."""


class Coding(Config):
    """What made the codes, and of what."""

    made_by: str
    """The run or checkpoint, as it was named."""
    first_stage: str
    """Digits that tell the weights that decide codes from others: `Family.coding`."""
    codes: int
    """In a level's codebook, K."""
    maps: tuple[tuple[int, int], ...]
    """Height and width of each level's map, top-down."""
    padding: int
    """Pixels of zeros that were added at each side of an image."""
    mirrored: bool
    """Whether mirror images have codes of their own, for training with flips."""

    @property
    def sizes(self) -> list[int]:
        """Codes of each map."""
        return [height * width for height, width in self.maps]


class CodeIndex(Config):
    """`codes.json`."""

    format: str = FORMAT
    version: int = VERSION
    coding: Coding
    name: str
    """The set that the images are of."""
    splits: dict[Split, tuple[CodeShard, ...]]


# ------------------------------------------------------------------------------------------------------------- shards


def code_file(file: str) -> str:
    """The file of the codes of a file of images."""
    return file.removesuffix(".safetensors") + ".codes.safetensors"


def write_code_shard(path: Path, codes: np.ndarray, key: str) -> None:
    """Writes codes (n, V, S) uint16 whole or not at all; `key` says what they were made of, and by. Raises OSError."""
    crc = torch.tensor([zlib.crc32(row.tobytes()) for row in codes], dtype=torch.int64)
    with atomic_file(path) as file:
        file.write(save({"codes": torch.from_numpy(codes), "crc": crc}, metadata={"key": key}))


class CodeShardFile:
    """An open file of codes."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where it is missing, truncated or something else."""
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="np"))
            self.key: str = (self._file.metadata() or {}).get("key", "")
            self._codes = self._file.get_slice("codes")
            self._crc = self._file.get_tensor("crc")
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: missing, damaged or truncated; make the codes again ({error})") from error

    def __len__(self) -> int:
        return len(self._crc)

    def row(self, index: int) -> np.ndarray:
        """The codes (V, S) uint16 of the image at `index`. Raises UserError where they are damaged."""
        codes: np.ndarray = self._codes[index]
        if zlib.crc32(np.ascontiguousarray(codes).tobytes()) != self._crc[index]:
            raise UserError(f"{self.path}[{index}]: damaged: its checksum differs; make the codes again")
        return codes


# -------------------------------------------------------------------------------------------------------------- index


def has_codes(store: Path) -> bool:
    """True for a store whose codes are all there."""
    return (store / CODES).is_file()


def read_code_index(store: Path) -> CodeIndex:
    """The index of a store's codes. Raises UserError where there is none, or one that is damaged."""
    path = store / CODES
    if not path.is_file():
        raise UserError(f"{store}: keeps no codes; scripts/prepare_data.py {store} --codes RUN makes them")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise UserError(
                f"{path}: is of format {content.get('format')} {content.get('version')}, read is {FORMAT} {VERSION}"
            )
        return CodeIndex.model_validate(content)
    except (OSError, ValidationError, json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, remove it and make the codes again") from error


def write_code_index(store: Path, index: CodeIndex) -> None:
    with atomic_file(store / CODES) as file:
        file.write(index.model_dump_json(indent=1).encode())


def damaged_codes(store: Path) -> Iterator[str]:
    """Reads all codes of a store; a line for each file that is not as it was written, or not of the store's images."""
    index, images = read_code_index(store), read_index(store)
    made_of = {shard.file: shard.checksum for part in images.splits.values() for shard in part.shards}
    for shard in (shard for shards in index.splits.values() for shard in shards):
        path = store / shard.file
        if not path.is_file() or checksum(path) != shard.checksum:
            yield f"{path}: missing or damaged: its checksum differs"
        elif shard.of not in made_of.values():
            yield f"{path}: made of images that the store does not hold"


def code_lines(store: Path) -> list[str]:
    """For people: what made a store's codes, and how each split uses those of each level."""
    index = read_code_index(store)
    coding = index.coding
    mirrored = ", mirror images too" if coding.mirrored else ""
    lines = [f"codes     of {index.name}, made by {coding.made_by} ({coding.first_stage}){mirrored}"]
    for split, shards in index.splits.items():
        counts = _counts(store, shards, coding)
        for level, (used, (height, width)) in enumerate(zip(counts, coding.maps, strict=True)):
            p = used[used > 0] / used.sum()
            lines.append(
                f"  {split} level {level}, {height}×{width}: {len(p)} of {coding.codes} in use, "
                f"perplexity {np.exp(-(p * np.log(p)).sum()):.1f}"
            )
    return lines


def _counts(store: Path, shards: tuple[CodeShard, ...], coding: Coding) -> np.ndarray:
    """How often each code of each level was chosen, (L, K), mirror images left out."""
    counts = np.zeros((len(coding.maps), coding.codes), dtype=np.int64)
    ends = np.cumsum(coding.sizes)[:-1]
    for shard in shards:
        file = CodeShardFile(store / shard.file)
        for number in range(len(file)):
            for level, part in enumerate(np.split(file.row(number)[0], ends)):
                counts[level] += np.bincount(part, minlength=coding.codes)
    return counts


# ------------------------------------------------------------------------------------------------------------ reading


class StoredCodes:
    """The codes of a split, in the order of its images."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        """Raises UserError where the store keeps none, or none of the images as the config has them seen."""
        if not is_store(config.source):
            raise UserError(f"data.stored_codes: data.path {config.source} is no prepared store")
        index = read_code_index(config.source)
        self.path, self.coding = config.source, index.coding
        _require_as_seen(self.path, self.coding, config)
        store, images = Store(self.path, split, config), read_index(self.path)
        made = {shard.file: shard for shards in index.splits.values() for shard in shards}
        made_of = {shard.file: shard.checksum for part in images.splits.values() for shard in part.shards}
        self.files = [code_file(file) for file in store.files]
        self.ends = store.ends
        for file in store.files:
            shard = made.get(code_file(file))
            if shard is None or shard.of != made_of[file]:
                raise UserError(
                    f"data.stored_codes: the codes in {self.path} are of other images than {file}; remove {CODES} and "
                    "make them again"
                )

    def require_made_by(self, first_stage: str) -> None:
        """Raises UserError where they are the codes of another first stage than a model's (`Family.coding`)."""
        if self.coding.first_stage != first_stage:
            raise UserError(
                f"data.stored_codes: {self.path} keeps the codes of {self.coding.made_by} "
                f"({self.coding.first_stage}), but the model is built on another first stage ({first_stage})"
            )

    def read(self, positions: Sequence[int], mirrored: Collection[int] = ()) -> Tensor:
        """The codes (B, S) int64, on the CPU, of the images at `positions`; of mirror images in the `mirrored` rows."""
        rows, mirror = [], set(mirrored)
        for row, position in enumerate(positions):
            number = int(np.searchsorted(self.ends, position, side="right"))
            first = int(self.ends[number - 1]) if number else 0
            rows.append(self._shard(number).row(position - first)[int(row in mirror)])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _shard(self, number: int) -> CodeShardFile:
        if number not in self._open:
            self._open[number] = CodeShardFile(self.path / self.files[number])
        return self._open[number]

    @cached_property
    def _open(self) -> dict[int, CodeShardFile]:
        return {}


def _require_as_seen(path: Path, coding: Coding, config: DataConfig) -> None:
    """Raises UserError where training sees other images than the codes are of."""
    if config.padding != coding.padding:
        raise UserError(f"data.padding: is {config.padding}, but the codes in {path} are with {coding.padding}")
    if config.flip and not coding.mirrored:
        raise UserError(f"data.flip: is true, but {path} keeps no codes of mirror images; make them with flip=true")
    if config.crop == "random":
        raise UserError("data.crop: random shows another square in each epoch, stored codes are of one; take centre")
