"""Makes a store: decode, crop, resize, write; in several processes, resumable, nothing dropped in silence."""

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from ..core.config import apply_overrides, read_yaml, validate
from ..core.errors import UserError
from .config import LOADING, DataConfig
from .decoding import BadImage, Shaping
from .depth import DoubtfulPixels
from .found import Found
from .labels import UNKNOWN
from .named import SETS, find
from .names import printable, unread_note
from .processes import in_processes
from .sets import open_sources, readable, shaping
from .sources import Source
from .splits import Split
from .store import (
    INDEX,
    NUMBER,
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
OURS = re.compile(r"\.?(train|validation|test)-\d{5}(\.codes)?\.safetensors(\..*)?|\.?(store|codes)\.json(\..*)?")
"""Names of files that a preparation makes, finished or not."""

Remark = tuple[str, str]
"""Name of an image, and what is to be said of it."""


@dataclass(frozen=True)
class Remarks:
    """Images that were left out, and images that were taken and may not be what was meant."""

    skipped: list[Remark]
    doubtful: list[Remark]


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
    with readable(path):
        if is_store(path):
            settings = read_index(path).settings
            fields |= {name: getattr(settings, name) for name in ("name", "size", "channels", "crop")}
        is_name = source in SETS and not path.exists()
    said = "name" if is_name else "path"
    if any(override.partition("=")[0] == said for override in overrides):
        raise UserError(f"{said}: is {source} already, the first word of the command; leave it out")
    return validate(DataConfig, apply_overrides({**fields, said: source}, overrides), "data")


def require_words_used(overrides: list[str], *, prepares: bool, describes: bool, codes: bool = False) -> None:
    """Raises UserError naming a field of the command line that has no effect on preparing, describing or neither.

    Those of a recipe are for training, too, and may be any. `codes`: those of the images are made.
    """
    used = set(DataConfig.model_fields) - LOADING if prepares or describes or codes else set()
    used |= ({"binarize"} if describes else set()) | ({"binarize", "flip", "batch", "workers"} if codes else set())
    doing = "preparing" if prepares else "making codes" if codes else "describing" if describes else "verifying"
    for override in overrides:
        field = override.partition("=")[0]
        if field in DataConfig.model_fields and field not in used:
            raise UserError(f"{field}: has no effect on {doing}; leave it out (found {override})")


def prepare(
    config: DataConfig, out: Path, *, processes: int | None = None, fatal: bool = False, progress: bool = True
) -> Index:
    """Prepares every split of the configured set into the folder `out`, and returns the store's index.

    A store that is finished and was made with the same settings of the same images is left as it is; an unfinished one
    is continued. Raises UserError: nothing to read, settings or images that differ, a field without effect, a foreign
    folder, a full disk, a bad image where `fatal`.
    """
    with readable(config.source):
        if is_store(config.source):
            raise UserError(f"{config.source}: is a prepared store already")
        if (out / INDEX).exists():
            return _same(out, config)
        found = find(config)
        sources = open_sources(config)
    _claim(out)
    settings = _settings(config, found)
    jobs = [job for split, source in sources.items() for job in _jobs(out, split, source, config, settings, fatal)]
    contents = _write_all(jobs, processes, progress)
    for split, part in contents.items():
        if not part.images:
            name, reason = part.skipped[0]
            raise UserError(f"data.path: no {split} image can be used, the first of them, {name}: {reason}")
    index = Index(
        settings=settings,
        levels=next(iter(sources.values())).levels,
        splits={split: part.model_copy(update=_facts(sources[split])) for split, part in contents.items()},
        unread=unread_note([*found.unread, *dict.fromkeys(n for source in sources.values() for n in source.unread)]),
    )
    with told(out / INDEX):
        _tidy(out, index)
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


def _facts(source: Source) -> dict[str, object]:
    """What the index says of a split's source."""
    return {"state": source.state(), "labelled": bool((source.labels() != UNKNOWN).any())}


def _settings(config: DataConfig, found: Found) -> Settings:
    return Settings(
        name=config.name,
        size=config.size,
        channels=config.channels,
        crop=config.crop,
        enlarge=config.enlarge,
        holdout=config.holdout if "holdout" in found.uses else None,
        lists=None if config.lists is None else str(config.lists),
        source=str(config.source.resolve()) if "path" in found.uses else None,
        encoding="raw" if config.size <= RAW_UP_TO else "webp",
        is_named=found.is_named,
    )


def _same(out: Path, config: DataConfig) -> Index:
    """The index of a finished store; raises UserError where it was made with other settings, or of other images."""
    index, asked = read_index(out), {**config.model_dump(mode="json"), "source": str(config.source.resolve())}
    for field in ("name", "size", "channels", "crop", "enlarge", "holdout", "lists", "source"):
        held = getattr(index.settings, field)
        if held != asked[field] and not (held is None and field not in config.given()):
            raise UserError(
                f"{out}: holds a store with {field} {held}, asked is {asked[field]}; remove it or choose another folder"
            )
    if not config.source.exists():  # what it was made of need not be there any more
        return index
    found, sources = find(config, fetch=False), open_sources(config, fetch=False)
    if len(sources) != len(index.splits):
        raise UserError(
            f"{out}: holds {', '.join(index.splits)}, but {config.source} has {', '.join(sources)} now; remove it, or "
            "choose another folder"
        )
    for split, part in index.splits.items():
        source, made_of = found.of(split), part.images + len(part.skipped)
        if len(source) != made_of or part.state not in ("", source.state()):
            now = f"{len(source)} now" if len(source) != made_of else "others now"
            raise UserError(
                f"{out}: was prepared from other images: {made_of} for {split}, {now}; remove it, or choose another "
                "folder"
            )
    return index


def _claim(out: Path) -> None:
    """Makes the folder; raises UserError where it is something else's. Removes what a killed process left half-done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        entries = list(out.iterdir())
    except OSError as error:
        raise UserError(f"{out}: can't be used as a folder: {error.strerror or error}") from error
    foreign = [entry.name for entry in entries if not OURS.fullmatch(entry.name)]
    if foreign:
        raise UserError(f"{out}: holds other things, as '{min(foreign)}'; choose a new or an empty folder")
    with told(out):
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
        made_of = pickle.dumps((part, part.state(), shape, square, settings.encoding))
        key = hashlib.blake2b(made_of, digest_size=16).hexdigest()
        path = out / f"{split}-{number:05d}.safetensors"
        yield Job(split, path, part, shape, square, settings.encoding, key, fatal)


def _tidy(out: Path, index: Index) -> None:
    """Removes shards of an earlier, unfinished preparation that are not part of this one."""
    kept = {shard.file for contents in index.splits.values() for shard in contents.shards}
    for path in out.glob(f"*{NUMBER}.safetensors"):
        if path.name not in kept:
            path.unlink()


# ------------------------------------------------------------------------------------------------------------ working


def _write_all(jobs: list[Job], processes: int | None, progress: bool) -> dict[Split, Contents]:
    """Writes all shards; what each split then holds."""
    written: dict[int, tuple[Shard, Remarks]] = {}
    total = sum(len(job.source) for job in jobs)
    with tqdm(total=total, desc="preparing", unit="image", disable=not progress) as bar:
        for place, result in in_processes(_write, jobs, processes):
            written[place] = result
            bar.update(len(jobs[place].source))
    contents = {}
    for split in dict.fromkeys(job.split for job in jobs):
        of_split = [written[place] for place, job in enumerate(jobs) if job.split == split]
        contents[split] = Contents(
            shards=tuple(shard for shard, _ in of_split),
            skipped=tuple(entry for _, remarks in of_split for entry in remarks.skipped),
            doubtful=tuple(entry for _, remarks in of_split for entry in remarks.doubtful),
        )
    return contents


def _write(job: Job) -> tuple[Shard, Remarks]:
    """Writes a shard, or finds it written; returns it, and what is to be said of its images."""
    done = _written(job)
    if done is None:
        records, remarks = _records(job)
        metadata = {"made": json.dumps({"key": job.key, **asdict(remarks)})}  # one entry: their order is random
        with told(job.path):
            write_shard(job.path, records, metadata)
        done = ShardFile(job.path)
    made = _made(done)
    remarks = Remarks(*([(name, reason) for name, reason in made.get(kind, [])] for kind in ("skipped", "doubtful")))
    if remarks.skipped and job.fatal:
        raise UserError(f"data.path: {remarks.skipped[0][0]}: {remarks.skipped[0][1]}")
    return Shard(file=job.path.name, images=len(done), checksum=checksum(job.path)), remarks


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


def _records(job: Job) -> tuple[list[Record], Remarks]:
    records, remarks, labels = [], Remarks([], []), job.source.labels()
    for i in range(len(job.source)):
        name = printable(job.source.name(i))
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", DoubtfulPixels)
            try:
                image = job.source.load(i)
                image = job.shaping.cut(image) if job.square else job.shaping.rectangle(image)
            except BadImage as error:
                remarks.skipped.append((name, str(error)))
                continue
        remarks.doubtful.extend((name, str(doubt.message)) for doubt in doubts)
        records.append(replace(encode(image, job.encoding), label=int(labels[i])))
    return records, remarks


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Says in one line that a file can't be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: can't be written: {error.strerror or error}; finished files are kept, run again to continue"
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
