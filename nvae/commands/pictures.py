"""What nvae-compress takes: images of any size as they lie, or a split of the run's own data as the model sees it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args

import numpy as np
import torch
from PIL import Image

from ..codec.compression import Picture
from ..core.errors import UserError
from ..data.config import DataConfig
from ..data.decoding import BadImage
from ..data.elsewhere import images_at
from ..data.loading import evaluation_batches
from ..data.sets import open_images, open_sources, own_splits
from ..data.sources import FolderSource, Source
from ..data.splits import Split
from ..data.store import is_store
from ..models.base import Family
from .subject import Subject

KEPT = ("1", "L", "P", "RGB")
"""Modes of image files of which nothing is lost: no transparency, no more than 8 bits."""


def pictures_of(subject: Subject, images: str, limit: int | None = None, seed: int = 0) -> list[Picture]:
    """Those at a path, or of the split that `images` names; the first `limit`. Raises UserError."""
    if (split := own_split(images)) is not None:
        return pictures_of_split(subject.model, subject.data, split, limit, seed)
    config = images_at(Path(images), subject.data)
    if is_store(config.source):
        parts = [pictures_of_split(subject.model, config, split, limit, seed) for split in splits_in(config)]
        return [picture for part in parts for picture in part][:limit]
    found: list[Picture] = []
    for split, source in open_sources(config).items():
        found += _pictures_in(subject, split, source, None if limit is None else limit - len(found))
    return found


def own_split(images: str) -> Split | None:
    """The split of the run's own data that a word names; None for what is a path."""
    return cast(Split, images) if images in get_args(Split) and not Path(images).exists() else None


def splits_in(config: DataConfig) -> list[Split]:
    """Those that have every image at a place once; where all are held out, the test split alone has them."""
    return ["test"] if config.holdout == 1 else own_splits(config)


def pictures_of_split(
    model: Family[Any], data: DataConfig, split: Split, limit: int | None = None, seed: int = 0
) -> list[Picture]:
    """The first `limit` images of a split, named by it and their number: as they are evaluated, binarised ones too."""
    likelihood = model.config.likelihood
    levels, border = likelihood.highest_level, likelihood.border
    cpu = torch.device("cpu")
    batches = evaluation_batches(open_images(data, split), data, batch=256, device=cpu, seed=seed, stop=limit)
    found = []
    for batch in batches:
        inside = batch.images[:, :, border : batch.images.shape[2] - border, border : batch.images.shape[3] - border]
        pixels = (inside * levels).round().to(torch.uint8).numpy()
        if not torch.equal(torch.from_numpy(pixels) / levels, inside):
            raise UserError(f"{split}: its images have more levels than the {levels + 1} that the model tells apart")
        classes = batch.labels.tolist() if model.config.classes else [-1] * len(pixels)
        found += [
            Picture(f"{split}-{place:06d}", image, label)
            for place, image, label in zip(batch.indices, pixels, classes, strict=True)
        ]
    return found


def _pictures_in(subject: Subject, split: Split, source: Source, limit: int | None) -> Iterator[Picture]:
    """Whole images of a source. Raises UserError for one that is damaged, or of which something would be lost."""
    labels = source.labels() if subject.model.config.classes else np.full(len(source), -1)
    for number in range(min(len(source), len(source) if limit is None else limit)):
        name = source.name(number)
        try:
            _require_nothing_lost(source, name)
            image = source.load(number)
        except BadImage as error:
            raise UserError(f"{name}: {error}") from None
        levels, is_grey = levels_of(subject, image, name)
        yield Picture(name, levels, int(labels[number]), is_grey)


def _require_nothing_lost(source: Source, name: str) -> None:
    """Raises UserError for a file with more in it than is read."""
    if not isinstance(source, FolderSource):
        return
    with Image.open(source.root / name) as image:
        if image.mode not in KEPT or "transparency" in image.info:
            raise UserError(f"{name}: has {image.mode} pixels; only 8 bits, grey or RGB, come back as they were")


def levels_of(subject: Subject, image: Image.Image, name: str) -> tuple[np.ndarray, bool]:
    """(C, H, W) levels of an image as the model takes them, and whether it is a grey one for a colour model.

    Raises UserError for an image that it does not take.
    """
    model = subject.model.config
    pixels = np.asarray(image)
    is_grey = pixels.ndim == 2
    if not is_grey and model.image_channels == 1:
        raise UserError(f"{name}: is in colour, the model takes grey images")
    planes = np.repeat(pixels[None], model.image_channels, axis=0) if is_grey else np.moveaxis(pixels, -1, 0)
    if model.likelihood.kind == "bernoulli":
        if not np.isin(planes, (0, 255)).all():
            raise UserError(f"{name}: has grey values, the model takes black and white ones, 0 and 255")
        planes = planes // 255
    return planes.astype(np.uint8), is_grey and model.image_channels > 1


def image_of(picture: Picture, levels: int) -> Image.Image:
    """The opposite: an image, "L" or "RGB"."""
    pixels = picture.levels.astype(np.uint8) * (255 // levels)
    if len(pixels) == 1 or picture.is_grey:
        return Image.fromarray(pixels[0])
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))


def picture_files(names: Sequence[str], folder: Path, source: Path) -> list[Path]:
    """The PNG of each image in a folder, by its name. `source`: what holds the names.

    Raises UserError for names that lead out of the folder, that two images have, or whose file is there.
    """
    stems = Counter(str(PurePosixPath(name).with_suffix("")) for name in names)
    files = []
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name or "\\" in name or "\0" in name:
            raise UserError(f"{source}: an image is named {name!r}, which leads out of the folder")
        stem = str(path.with_suffix(""))
        files.append(folder / (f"{stem}.png" if stems[stem] == 1 else f"{name}.png"))
    if len(set(files)) < len(files):
        raise UserError(f"{source}: two images have one name")
    for file in files:
        if file.exists():
            raise UserError(f"{file}: exists; name a folder without it")
    return files
