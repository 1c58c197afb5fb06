"""From a config to images: the set by its name, prepared or as it was downloaded, in memory or not."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..core import distributed
from ..core.errors import UserError
from .config import DataConfig
from .decoding import Decoded, Shaping
from .found import Found, require_effect, without_idle_fields
from .images import Images, InMemory, read_all
from .named import CELEBA_BOX, Counts, counts_agree, counts_of, find
from .names import unread_note
from .sources import Shaped, Source
from .splits import Split
from .store import Store, is_store, read_index

DARK = 15
"""Images of 8 bits whose values never exceed this come out black."""


def open_images(config: DataConfig, split: Split) -> Images:
    """A split of the configured set: in memory where it fits `config.memory`, else read image by image.

    Every set has training images and others. A set with one other split shows it as `validation` and as `test`.
    Raises UserError naming the path and what to do, or a field that was given and has no effect.
    """
    images = open_unread(config, split)
    _warn_of_a_part(config, split, len(images))
    if images.movable or images.size_mib > config.memory:
        return images
    resident = _as_it_lies(images) or read_all(images, progress=distributed.rank() == 0)
    if resident.levels == 255 and int(resident.pixels.max()) <= DARK:
        _warn(f"{config.source}: no {split} image has a value above {DARK} of 255: all of them are nearly black")
    return resident


def open_unread(config: DataConfig, split: Split) -> Decoded:
    """A split of the configured set, its images read when they are asked for. Raises UserError."""
    with readable(config.source):
        if is_store(config.source):
            return Store(config.source, split, config)
        source = open_source(config, split)
    images = Shaped(source, shaping(config), movable=config.crop == "random" and split == "train")
    if source.whole and (images.movable or images.size_mib > config.memory):
        raise UserError(
            f"data.path: {config.source} is {images.size_mib:.0f} MiB, more than data.memory, and can't be read image "
            "by image; prepare it with scripts/prepare_data.py, or raise data.memory"
        )
    return images


def open_source(config: DataConfig, split: Split) -> Source:
    """The images of a split as they lie, unshaped; says what lies beside them and is not read."""
    found = find(config)
    source = found.of(split)
    require_used(config, found, source)
    note = unread_note([*found.unread, *source.unread])
    if note:
        _warn(f"{found.path}: {note}")
    return source


def open_sources(config: DataConfig, *, fetch: bool = True) -> dict[Split, Source]:
    """The splits that the configured set has itself."""
    found = find(config, fetch=fetch)
    sources = {split: found.of(split) for split in found.splits}
    for source in sources.values():
        require_used(config, found, source)
    return sources


def require_used(config: DataConfig, found: Found, source: Source) -> None:
    """Raises UserError naming a field that was given and has no effect on what was found."""
    require_effect(config, found.uses, found.layout)
    if "crop" in config.given() and config.crop == "random" and source.square:
        raise UserError(f"data.crop: random has no effect on {found.path}, whose images are square")


def own_splits(config: DataConfig) -> list[Split]:
    """The names of the splits that the configured set, or the store that it is, has itself."""
    with readable(config.source):
        return list(read_index(config.source).splits if is_store(config.source) else find(config).splits)


def in_effect(config: DataConfig) -> DataConfig:
    """The config without fields that have no effect on the set as it lies; as it is, where there is no set."""
    try:
        with readable(config.source):
            return config if is_store(config.source) else without_idle_fields(config, find(config, fetch=False).uses)
    except UserError:
        return config


def known_as(config: DataConfig, split: Split) -> str:
    """What figures of a split are called: by the set's name where its images are the set's, else `images`.

    They are, where all of the split was read as the set is given out, or as a store prepared from that.
    """
    with readable(config.source):
        if is_store(config.source):
            index = read_index(config.source)
            name, is_named = index.settings.name, index.settings.is_named is not False
            counts: Counts = {part: partial(int, contents.images) for part, contents in index.splits.items()}
        else:
            found = find(config)
            name, is_named = config.name, found.is_named
            counts = found.counts()
        return name if is_named and counts_agree(name, counts, split) else "images"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Says in one line that a set can't be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data.path: {error.filename or path} cannot be read: {error.strerror or error}") from error


def shaping(config: DataConfig) -> Shaping:
    """How the configured set's images become squares."""
    box = CELEBA_BOX if config.name == "celeba_64" else None
    return Shaping(config.size, config.channels, config.enlarge, box)


def _as_it_lies(images: Images) -> InMemory | None:
    """Images that are an array of the right size already, without shaping them one by one."""
    array = images.source.stacked() if isinstance(images, Shaped) else None
    if array is None:
        return None
    planes = array[:, None] if array.ndim == 3 else np.moveaxis(array, -1, 1)
    if planes.shape[1:] != images.shape:
        return None
    return InMemory(torch.from_numpy(np.array(planes, order="C")), images.levels, images.labels)


def _warn_of_a_part(config: DataConfig, split: Split, found: int) -> None:
    """Warns where a named set is not all there: figures on a part are not figures on the set."""
    expected = counts_of(config.name, split)
    if expected and found not in expected:
        _warn(
            f"{config.name}: {config.source} has {found} {split} images, the set has {expected[0]}; figures on "
            "a part of it are not comparable"
        )


def _warn(text: str) -> None:
    if distributed.rank() == 0:
        warnings.warn(text, stacklevel=4)
