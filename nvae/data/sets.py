"""Every set by its name, and anyone's own images."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torchvision

from ..config import UserError
from .config import DataConfig
from .decoding import Shaping
from .images import Images, InMemory
from .sources import ArraySource, FolderSource, Part, Shaped, Source

Split = Literal["train", "validation", "test"]


def open_images(config: DataConfig, split: Split) -> Images:
    """A split of the configured set: in memory where it fits `config.memory`, else read image by image.

    Every set has training images and others. A set with one other split shows it as `validation` and as `test`.
    Raises UserError naming the path and what to do.
    """
    source = SETS[config.name](config, split)
    shaping = Shaping(config.size, config.channels, config.enlarge)
    if isinstance(source, ArraySource) and source.array.shape[1:3] == (config.size, config.size):
        return InMemory(source.pixels(), source.levels)
    images = Shaped(source, shaping, movable=config.crop == "random" and split == "train")
    if images.size_mib <= config.memory and not images.movable:
        return InMemory(images.read(range(len(images))), images.levels)
    return images


def digits(config: DataConfig, split: Split) -> Source:
    """scikit-learn's 8×8 digits, grey values v/16: 1500 for training, 297 for testing."""
    from sklearn.datasets import load_digits

    order = np.random.RandomState(0).permutation(1797)
    chosen = order[:1500] if split == "train" else order[1500:]
    return ArraySource(load_digits().images[chosen].astype(np.uint8), "digits", levels=16)


def mnist(config: DataConfig, split: Split) -> Source:
    """MNIST, 60 000 for training, 10 000 for testing, from torchvision."""
    try:
        dataset = torchvision.datasets.MNIST(config.source, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{config.source}: MNIST is not there and can't be downloaded: {error}") from error
    return ArraySource(dataset.data.numpy(), "mnist")


def images(config: DataConfig, split: Split) -> Source:
    """A folder of images or an array, split by a hold-out."""
    path = config.source
    if path.is_dir():
        source: Source = FolderSource.of(path)
    elif path.suffix == ".npy":
        source = ArraySource(np.load(path), str(path))
    elif path.suffix == ".npz":
        return ArraySource(np.load(path)[split if split == "train" else "test"], str(path))
    else:
        raise UserError(f"data.path: {path} is neither a folder, a .npy nor a .npz file")
    if not len(source):
        raise UserError(f"data.path: {path} has no images (looked for png, jpg, webp)")
    held = max(1, round(config.holdout * len(source)))
    order = np.random.RandomState(0).permutation(len(source))
    return Part(source, np.sort(order[held:] if split == "train" else order[:held]))


SETS: dict[str, Callable[[DataConfig, Split], Source]] = {"digits": digits, "mnist": mnist, "images": images}
