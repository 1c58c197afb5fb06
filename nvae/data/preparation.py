"""Makes a store: decode, crop, resize, write; in several processes, resumable, nothing dropped in silence."""

import hashlib
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from ..core.config import apply_overrides, read_yaml, validate
from ..core.errors import UserError
from .config import DataConfig
from .decoding import BadImage, Shaping
from .named import SETS
from .processes import in_processes
from .sets import open_sources, shaping
from .sources import Source
from .splits import Split
from .store import (
    INDEX,
    Contents,
    Encoding,
    Index,
    Record,
    Settings,
    Shard,
    ShardFile,
    checksum,
    decode,
    encode,
    is_store,
    read_index,
    write_index,
    write_shard,
)

SHARD_BYTES = 64 * 2**20
"""Decoded size of the images of a shard: what a killed preparation loses per process."""
RAW_UP_TO = 64
"""Images up to this size are stored raw: they are read faster, and compress badly one by one."""
OURS = re.compile(r"\.?(train|validation|test)-\d{5}\.safetensors(\..*)?|\.?store\.json(\..*)?")
"""Names of files that a preparation makes, finished or not."""

Skipped = tuple[str, str]
"""Name of an image that was left out, and the reason."""


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    split: Split
    path: Path
    source: Source
    shaping: Shaping
    square: bool
    """Cut squares out of the centre; False keeps oblong images for random crops."""
    encoding: Encoding
    key: str
    """A hash of where the images lie and of all that decides their pixels."""
    fatal: bool
    """Bad images end the preparation instead of being left out."""


def read_config(source: str, overrides: list[str], file: Path | None = None) -> DataConfig:
    """The data section for a source: of a YAML, of the store that `source` is, or the defaults; then the overrides.

    `source` is a path, or a set's name, whose path is then as configured. Raises UserError.
    """
    section = read_yaml(file).get("data") or {} if file is not None else {}
    if not isinstance(section, dict):
        raise UserError(f"{file}: data is a section, found {section!r}")
    fields: dict[str, Any] = dict(section)
    path = Path(source)
    if is_store(path):
        settings = read_index(path).settings
        fields |= {name: getattr(settings, name) for name in ("name", "size", "channels", "crop")}
    if source in SETS and not path.exists():
        fields["name"] = source
    else:
        fields["path"] = source
    return validate(DataConfig, apply_overrides(fields, overrides), "data")


def prepare(
    config: DataConfig, out: Path, *, processes: int | None = None, fatal: bool = False, progress: bool = True
) -> Index:
    """Prepares every split of the configured set into the folder `out`, and returns the store's index.

    A store that is finished and was made with the same settings is left as it is; an unfinished one is continued.
    Raises UserError: nothing to read, settings that differ, a foreign folder, a full disk, a bad image where `fatal`.
    """
    if is_store(config.source):
        raise UserError(f"{config.source}: is a prepared store already")
    settings = _settings(config)
    if (out / INDEX).exists():
        return _same_settings(out, settings)
    _claim(out)
    sources = open_sources(config)
    jobs = [job for split, source in sources.items() for job in _jobs(out, split, source, config, settings, fatal)]
    index = Index(settings=settings, levels=sources["train"].levels, splits=_write_all(jobs, processes, progress))
    for split, contents in index.splits.items():
        if not contents.images:
            name, reason = contents.skipped[0]
            raise UserError(f"data.path: no {split} image can be used, the first of them, {name}: {reason}")
    _tidy(out, index)
    with _told(out / INDEX):
        write_index(out, index)
    return index


def verify(store: Path, *, processes: int | None = None, progress: bool = True) -> list[str]:
    """Reads every file and every image of a store again; returns a line for each that is damaged."""
    index = read_index(store)
    checks = [(store, index.settings, shard) for contents in index.splits.values() for shard in contents.shards]
    total = sum(contents.images for contents in index.splits.values())
    damaged: list[str] = []
    with tqdm(total=total, desc="verifying", unit="image", disable=not progress) as bar:
        for place, lines in in_processes(_damage, checks, processes):
            damaged += lines
            bar.update(checks[place][2].images)
    return sorted(damaged)


# ----------------------------------------------------------------------------------------------------------- planning


def _settings(config: DataConfig) -> Settings:
    return Settings(
        name=config.name,
        size=config.size,
        channels=config.channels,
        crop=config.crop,
        enlarge=config.enlarge,
        holdout=config.holdout,
        lists=None if config.lists is None else str(config.lists),
        source=str(config.source.resolve()),
        encoding="raw" if config.size <= RAW_UP_TO else "webp",
    )


def _same_settings(out: Path, settings: Settings) -> Index:
    """The index of a finished store; raises UserError where it was made with other settings."""
    index = read_index(out)
    for field in Settings.model_fields:
        held, asked = getattr(index.settings, field), getattr(settings, field)
        if held != asked:
            raise UserError(
                f"{out}: holds a store with {field} {held}, asked is {asked}; remove it or choose another folder"
            )
    return index


def _claim(out: Path) -> None:
    """Makes the folder; raises UserError where it is something else's. Removes what a killed process left half-done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        entries = list(out.iterdir())
    except OSError as error:
        raise UserError(f"{out}: can't be used as a folder: {error.strerror}") from error
    foreign = [entry.name for entry in entries if not OURS.fullmatch(entry.name)]
    if foreign:
        raise UserError(f"{out}: holds other things, as '{min(foreign)}'; choose a new or an empty folder")
    for entry in entries:
        if entry.name.startswith("."):
            entry.unlink()


def _jobs(
    out: Path, split: Split, source: Source, config: DataConfig, settings: Settings, fatal: bool
) -> Iterator[Job]:
    shape, square = shaping(config), config.crop == "centre" or split != "train"
    count = max(1, SHARD_BYTES // (config.channels * config.size**2))
    for number, first in enumerate(range(0, len(source), count)):
        part = source.take(range(first, min(first + count, len(source))))
        made_of = pickle.dumps((part, shape, square, settings.encoding))
        key = hashlib.blake2b(made_of, digest_size=16).hexdigest()
        path = out / f"{split}-{number:05d}.safetensors"
        yield Job(split, path, part, shape, square, settings.encoding, key, fatal)


def _tidy(out: Path, index: Index) -> None:
    """Removes shards of an earlier, unfinished preparation that are not part of this one."""
    kept = {shard.file for contents in index.splits.values() for shard in contents.shards}
    for path in out.glob("*.safetensors"):
        if path.name not in kept:
            path.unlink()


# ------------------------------------------------------------------------------------------------------------ working


def _write_all(jobs: list[Job], processes: int | None, progress: bool) -> dict[Split, Contents]:
    """Writes all shards; what each split then holds."""
    written: dict[int, tuple[Shard, list[Skipped]]] = {}
    total = sum(len(job.source) for job in jobs)
    with tqdm(total=total, desc="preparing", unit="image", disable=not progress) as bar:
        for place, result in in_processes(_write, jobs, processes):
            written[place] = result
            bar.update(len(jobs[place].source))
    contents = {}
    for split in dict.fromkeys(job.split for job in jobs):
        of_split = [written[place] for place, job in enumerate(jobs) if job.split == split]
        shards = tuple(shard for shard, _ in of_split)
        contents[split] = Contents(shards=shards, skipped=tuple(entry for _, bad in of_split for entry in bad))
    return contents


def _write(job: Job) -> tuple[Shard, list[Skipped]]:
    """Writes a shard, or finds it written; returns it, and the images left out."""
    done = _written(job)
    if done is None:
        records, skipped = _records(job)
        metadata = {"made": json.dumps({"key": job.key, "skipped": skipped})}  # one entry: their order is random
        with _told(job.path):
            write_shard(job.path, records, metadata)
        done = ShardFile(job.path)
    skipped = [(name, reason) for name, reason in _made(done)["skipped"]]
    if skipped and job.fatal:
        raise UserError(f"data.path: {skipped[0][0]}: {skipped[0][1]}")
    return Shard(file=job.path.name, images=len(done), checksum=checksum(job.path)), skipped


def _written(job: Job) -> ShardFile | None:
    """The shard that an earlier run wrote, if it is whole and made of the same."""
    if not job.path.exists():
        return None
    try:
        shard = ShardFile(job.path)
    except UserError:
        return None
    return shard if _made(shard).get("key") == job.key else None


def _made(shard: ShardFile) -> dict[str, Any]:
    """How a shard was made: its job's key, and the images that were skipped."""
    return cast(dict[str, Any], json.loads(shard.metadata.get("made", "{}")))


def _records(job: Job) -> tuple[list[Record], list[Skipped]]:
    records, skipped = [], []
    for i in range(len(job.source)):
        try:
            image = job.shaping.rectangle(job.source.load(i))
        except BadImage as error:
            skipped.append((job.source.name(i), str(error)))
            continue
        records.append(encode(job.shaping.square(image) if job.square else image, job.encoding))
    return records, skipped


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Says in one line that a file can't be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: can't be written: {error.strerror}; finished files are kept, run again to continue"
        ) from error


def _damage(check: tuple[Path, Settings, Shard]) -> list[str]:
    """A line for each thing that is wrong with a shard."""
    store, settings, shard = check
    path = store / shard.file
    try:
        file = ShardFile(path)
    except UserError as error:
        return [str(error)]
    lines = []
    for i in range(len(file)):
        try:
            decode(file.record(i), settings.channels, settings.encoding)
        except BadImage as error:
            lines.append(f"{path}[{i}]: {error}")
    if not lines and checksum(path) != shard.checksum:
        lines.append(f"{path}: damaged: its checksum differs")
    return lines
