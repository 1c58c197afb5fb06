"""Makes a store: decode, crop, resize, write; in several processes, resumable, nothing dropped in silence."""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ..config import UserError, apply_overrides, read_yaml, validate
from .config import DataConfig
from .decoding import BadImage, Shaping
from .fetching import processes_context
from .named import SETS
from .sets import open_source, own_splits, shaping
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
    encode,
    is_store,
    read_index,
    write_index,
    write_shard,
)

SHARD_MIB = 64
"""Decoded size of the images of a shard: what a killed preparation loses per process."""
RAW_UP_TO = 64
"""Images up to this size are stored raw: they are read faster, and compress badly one by one."""
OURS = re.compile(r"\.?(train|validation|test)-\d{5}\.safetensors(\..*)?|\.?store\.json(\..*)?")
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    path: Path
    source: Source
    shaping: Shaping
    square: bool
    """Cut squares out of the centre; False keeps oblong images for random crops."""
    encoding: Encoding
    fatal: bool
    """Stop at the first bad image instead of leaving it out."""


def read_config(source: str, overrides: list[str], file: Path | None = None) -> DataConfig:
    """The data section for a source: of a YAML, of the store that `source` is, or the defaults; then the overrides.

    `source` is a path, or a set's name, whose path is then as configured. Raises UserError.
    """
    fields: dict[str, Any] = read_yaml(file).get("data", {}) if file is not None else {}
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
    settings = _settings(config)
    if _finished(out, settings):
        return read_index(out)
    _claim(out)
    sources = {split: open_source(config, split) for split in own_splits(config)}
    jobs = {split: _jobs(out, split, source, config, settings, fatal) for split, source in sources.items()}
    contents = _write_all(jobs, processes, progress)
    levels = next(iter(sources.values())).levels
    index = Index(settings=settings, levels=levels, splits=contents)
    if not all(split.images for split in contents.values()):
        raise UserError(f"{out}: no image can be used; {_reasons(index)}")
    _tidy(out, index)
    write_index(out, index)
    return index


def verify(store: Path, *, processes: int | None = None, progress: bool = True) -> list[str]:
    """Reads every file and every image of a store again; returns a line for each that is damaged."""
    index = read_index(store)
    settings = index.settings
    checks = [
        (_damage, (store / shard.file, shard, settings.channels, settings.encoding))
        for contents in index.splits.values()
        for shard in contents.shards
    ]
    total = sum(contents.images for contents in index.splits.values())
    with tqdm(total=total, desc="verifying", unit="image", disable=not progress) as bar:
        damaged: list[str] = []
        for place, lines in _in_processes(checks, processes):
            damaged += lines
            bar.update(checks[place][1][1].images)
    return sorted(damaged)


def _reasons(index: Index) -> str:
    skipped = [entry for contents in index.splits.values() for entry in contents.skipped]
    return f"{len(skipped)} are bad, the first {skipped[0][0]}: {skipped[0][1]}" if skipped else "there is none"


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


def _finished(out: Path, settings: Settings) -> bool:
    if not (out / INDEX).exists():
        return False
    held = read_index(out).settings
    for field in Settings.model_fields:
        if getattr(held, field) != getattr(settings, field):
            raise UserError(
                f"{out}: holds a store with {field} {getattr(held, field)}, asked is {getattr(settings, field)}; "
                "remove it or choose another folder"
            )
    return True


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


def _jobs(out: Path, split: Split, source: Source, config: DataConfig, settings: Settings, fatal: bool) -> list[Job]:
    count = max(1, SHARD_MIB * 2**20 // (config.channels * config.size**2))
    square = config.crop == "centre" or split != "train"
    return [
        Job(
            out / f"{split}-{first // count:05d}.safetensors",
            source.take(range(first, min(first + count, len(source)))),
            shaping(config),
            square,
            settings.encoding,
            fatal,
        )
        for first in range(0, len(source), count)
    ]


def _tidy(out: Path, index: Index) -> None:
    """Removes shards of an earlier, unfinished preparation that are not part of this one."""
    kept = {shard.file for contents in index.splits.values() for shard in contents.shards}
    for path in out.glob("*.safetensors"):
        if path.name not in kept:
            path.unlink()


# ------------------------------------------------------------------------------------------------------------ working


def _write_all(jobs: dict[Split, list[Job]], processes: int | None, progress: bool) -> dict[Split, Contents]:
    flat = [(split, job) for split, of_split in jobs.items() for job in of_split]
    shards: dict[int, Shard] = {}
    skipped: dict[int, list[tuple[str, str]]] = {}
    with tqdm(
        total=sum(len(job.source) for _, job in flat), desc="preparing", unit="image", disable=not progress
    ) as bar:
        for place, (shard, bad) in _in_processes([(_write, (job,)) for _, job in flat], processes):
            shards[place], skipped[place] = shard, bad
            bar.update(len(flat[place][1].source))
    return {
        split: Contents(
            shards=tuple(shards[i] for i, (of, _) in enumerate(flat) if of == split),
            skipped=tuple(entry for i, (of, _) in enumerate(flat) if of == split for entry in skipped[i]),
        )
        for split in jobs
    }


def _in_processes(
    calls: Sequence[tuple[Callable[..., T], tuple[object, ...]]], processes: int | None
) -> Iterator[tuple[int, T]]:
    """(place, result) of each call as it is finished, in `processes` processes (None: one a processor)."""
    count = min(processes or os.cpu_count() or 1, len(calls))
    if count <= 1:
        yield from ((place, call(*arguments)) for place, (call, arguments) in enumerate(calls))
        return
    with ProcessPoolExecutor(count, mp_context=processes_context()) as pool:
        futures: dict[Future[T], int] = {pool.submit(call, *given): i for i, (call, given) in enumerate(calls)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process was killed, by a lack of memory perhaps; run again with fewer --processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write(job: Job) -> tuple[Shard, list[tuple[str, str]]]:
    """Writes a shard, or finds it written; returns it, and (name, reason) of the images left out."""
    key = _key(job)
    done = _written(job.path, key)
    if done is None:
        records, skipped = _records(job)
        metadata = {"key": key, "skipped": json.dumps(skipped)}
        try:
            write_shard(job.path, records, metadata)
        except OSError as error:
            raise UserError(
                f"{job.path}: can't be written: {error.strerror}; finished files are kept, run again to continue"
            ) from error
        done = ShardFile(job.path)
    skipped = [(name, reason) for name, reason in json.loads(done.metadata["skipped"])]
    if skipped and job.fatal:
        raise UserError(f"data.path: {skipped[0][0]}: {skipped[0][1]}")
    return Shard(file=job.path.name, images=len(done), checksum=checksum(job.path)), skipped


def _key(job: Job) -> str:
    """A hash of what a shard is made of: where its images lie and all that decides their pixels."""
    content = pickle.dumps((job.source, job.shaping, job.square, job.encoding))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _written(path: Path, key: str) -> ShardFile | None:
    """The shard that an earlier run wrote, if it is whole and made of the same."""
    if not path.exists():
        return None
    try:
        shard = ShardFile(path)
    except UserError:
        return None
    return shard if shard.metadata.get("key") == key else None


def _records(job: Job) -> tuple[list[Record], list[tuple[str, str]]]:
    records, skipped = [], []
    for i in range(len(job.source)):
        try:
            image = job.shaping.rectangle(job.source.load(i))
            records.append(encode(job.shaping.square(image) if job.square else image, job.encoding))
        except BadImage as error:
            skipped.append((job.source.name(i), str(error)))
            if job.fatal:
                break
    return records, skipped


def _damage(path: Path, shard: Shard, channels: int, encoding: Encoding) -> list[str]:
    """A line for each thing that is wrong with a shard."""
    try:
        file = ShardFile(path)
    except UserError as error:
        return [str(error)]
    lines = []
    for i in range(len(file)):
        try:
            file.image(i, channels, encoding).load()
        except BadImage as error:
            lines.append(f"{path}[{i}]: {error}")
    if not lines and checksum(path) != shard.checksum:
        lines.append(f"{path}: damaged: its checksum differs")
    return lines
