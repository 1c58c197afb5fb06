"""From a config to images: the set by its name, prepared or as it was downloaded, in memory or not."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import torch

from ..core import distributed
from ..core.errors import UserError
from .config import DataConfig
from .decoding import Shaping
from .images import Images, InMemory, read_all
from .named import CELEBA_BOX, COUNTS, SETS
from .own import READERS, own_images
from .sources import Shaped, Source
from .splits import SPLITS, Split
from .store import Store, is_store, read_index


def open_images(config: DataConfig, split: Split) -> Images:
    """A split of the configured set: in memory where it fits `config.memory`, else read image by image.

    Every set has training images and others. A set with one other split shows it as `validation` and as `test`.
    Raises UserError naming the path and what to do.
    """
    images = open_unread(config, split)
    _count(config, split, len(images))
    if images.movable or images.size_mib > config.memory:
        return images
    return _as_it_lies(images) or read_all(images, progress=distributed.rank() == 0)


def open_unread(config: DataConfig, split: Split) -> Images:
    """A split of the configured set, its images read when they are asked for. Raises UserError."""
    try:
        if is_store(config.source):
            return Store(config.source, split, config)
        source = open_source(config, split)
    except OSError as error:
        path = error.filename or config.source
        raise UserError(f"data.path: {path} cannot be read: {error.strerror or error}") from error
    images = Shaped(source, shaping(config), movable=config.crop == "random" and split == "train")
    if source.whole and (images.movable or images.size_mib > config.memory):
        raise UserError(
            f"data.path: {config.source} is {images.size_mib:.0f} MiB, more than data.memory, and can't be read image "
            "by image; prepare it with scripts/prepare_data.py, or raise data.memory"
        )
    return images


def open_sources(config: DataConfig) -> dict[Split, Source]:
    """The splits that the configured set has itself: not `validation` where that is the test split standing in."""
    sources = {split: open_source(config, split) for split in SPLITS}
    if pickle.dumps(sources["validation"]) == pickle.dumps(sources["test"]):
        del sources["validation"]
    return sources


def own_splits(config: DataConfig) -> list[Split]:
    """The names of the splits that the configured set, or the store that it is, has itself."""
    return list(read_index(config.source).splits if is_store(config.source) else open_sources(config))


def open_source(config: DataConfig, split: Split) -> Source:
    """The images of a split as they lie, unshaped."""
    path = config.source
    is_own = path.is_file() and path.suffix in READERS
    return (own_images if is_own else SETS[config.name])(path, config, split)


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
    return InMemory(torch.from_numpy(np.array(planes, order="C")), images.levels)


def _count(config: DataConfig, split: Split, found: int) -> None:
    """Warns where a named set is not all there: figures on a part are not figures on the set."""
    counts = COUNTS.get(config.name, {})
    expected = counts.get(split) or counts.get("test" if split == "validation" else split)
    if expected and found not in expected and distributed.rank() == 0:
        warnings.warn(
            f"{config.name}: {Path(config.source)} has {found} {split} images, the set has {expected[0]}; figures on "
            "a part of it are not comparable",
            stacklevel=3,
        )
