"""The sets with a name (spec §8): each as its download lies on disk. All return a split's source.

torchvision downloads what it knows, with checksums. Where a licence means fetching by hand, the message says what to
put where. Folders made for the published code (`train.lmdb`, …) and other people's conversions are read as one's own
images are.
"""

import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from filelock import FileLock

from ..core.errors import UserError
from .arrays import ArrayFile, ArraySource, Joined
from .config import DataConfig
from .own import own_images
from .sources import FolderSource, LmdbSource, Source, ZipSource, image_files, zipped_images
from .splits import Split

CELEBA_BOX = (15, 40, 163, 188)
"""The square of an aligned CelebA image (178×218) that is shown: left, top, right, bottom (spec §8)."""
TORCHVISION_ERRORS = (RuntimeError, OSError, ValueError, AssertionError, EOFError, KeyError, pickle.UnpicklingError)
"""What torchvision raises for sets that are missing, damaged, or can't be downloaded."""

COUNTS: dict[str, dict[Split, tuple[int, ...]]] = {
    "mnist": {"train": (60_000,), "test": (10_000,)},
    "omniglot": {"train": (24_345,), "test": (8_070,)},
    "stacked_mnist": {"train": (60_000,), "test": (10_000,)},
    "cifar10": {"train": (50_000,), "test": (10_000,)},
    "imagenet_32": {"train": (1_281_167, 1_281_149), "test": (50_000, 49_999)},
    "imagenet_64": {"train": (1_281_167, 1_281_149), "test": (50_000, 49_999)},
    "celeba_64": {"train": (162_770,), "validation": (19_867,), "test": (19_962,)},
    "celeba_hq_256": {"train": (27_000,), "test": (3_000,)},
    "ffhq_256": {"train": (63_000,), "test": (7_000,)},
    "lsun_bedroom": {"train": (3_033_042,), "test": (300,)},
    "lsun_church": {"train": (126_227,), "test": (300,)},
    "lsun_tower": {"train": (708_264,), "test": (300,)},
}
"""Images of each split; two numbers where the set is given out in two versions."""


def digits(path: Path, config: DataConfig, split: Split) -> Source:
    """scikit-learn's embedded 8×8 digits, grey values v/16: 1500 for training, the other 297 for testing."""
    from sklearn.datasets import load_digits

    order = np.random.RandomState(0).permutation(1797)
    chosen = order[:1500] if split == "train" else order[1500:]
    return ArraySource(load_digits().images[chosen].astype(np.uint8), "digits", levels=16)


def mnist(path: Path, config: DataConfig, split: Split) -> Source:
    """MNIST (LeCun et al. 1998)."""
    dataset = _from_torchvision(torchvision.datasets.MNIST, path, train=split == "train")
    return ArraySource(dataset.data.numpy(), "mnist")


def stacked_mnist(path: Path, config: DataConfig, split: Split) -> Source:
    """Three MNIST digits as the colours of an image: colour c of image i is digit π_c(i), π_c fixed permutations.

    Read from `path`, or from where MNIST is by default.
    """
    where = path if path.exists() or config.path is not None else path.with_name("mnist")
    planes = mnist(where, config, split).stacked()
    assert planes is not None
    orders = [np.random.RandomState(colour).permutation(len(planes)) for colour in range(3)]
    return ArraySource(np.stack([planes[order] for order in orders], axis=-1), "stacked_mnist")


def omniglot(path: Path, config: DataConfig, split: Split) -> Source:
    """OMNIGLOT at 28×28, the chardata.mat of Burda et al. 2016: one image a column, itself column by column."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    file = path if path.suffix == ".mat" else path / "chardata.mat"
    if not file.exists():
        raise UserError(
            f"data.path: {file} does not exist; download it from "
            "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"
        )
    key = "data" if split == "train" else "testdata"
    try:
        grey = loadmat(file, variable_names=[key])[key].T.reshape(-1, 28, 28).swapaxes(1, 2)
    except (MatReadError, ValueError, TypeError, KeyError, OSError, NotImplementedError, zlib.error) as error:
        raise UserError(f"data.path: {file} is damaged, or not the chardata.mat of 28×28 OMNIGLOT: {error}") from error
    return ArraySource(np.rint(255 * grey).astype(np.uint8), "omniglot")


def cifar10(path: Path, config: DataConfig, split: Split) -> Source:
    """CIFAR-10 (Krizhevsky 2009)."""
    dataset = _from_torchvision(torchvision.datasets.CIFAR10, path, train=split == "train")
    return ArraySource(dataset.data, "cifar10")


def imagenet(path: Path, config: DataConfig, split: Split) -> Source:
    """Down-sampled ImageNet: the .npz batches of image-net.org, or the older folders train_32x32 and valid_32x32.

    The two were shrunk by different filters, and figures on one are not comparable with figures on the other.
    """
    folder = path / f"{'train' if split == 'train' else 'valid'}_{config.size}x{config.size}"
    if folder.is_dir():
        return FolderSource(folder, image_files(folder))
    pattern = "train_data_batch_*.npz" if split == "train" else "val_data.npz"
    batches = sorted(path.rglob(pattern), key=lambda file: (len(file.name), file.name))
    if batches:
        return Joined([ArrayFile(file, "data", planar=True) for file in batches])
    return _converted(
        path,
        config,
        split,
        f"log in at https://image-net.org/download-images.php, fetch the {config.size}×{config.size} npz files, and "
        f"unpack train_data_batch_1.npz … train_data_batch_10.npz and val_data.npz there",
    )


def celeba(path: Path, config: DataConfig, split: Split) -> Source:
    """CelebA's aligned images (Liu et al. 2015) with the official split; the crop is left to the shaping."""
    if (path / "train.lmdb").exists():
        return own_images(path, config, split)
    by_hand = (
        "download img_align_celeba.zip and list_eval_partition.txt from "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into it (the zip may stay packed)"
    )
    partition = _near(path, "list_eval_partition.txt")
    if partition is None:
        _from_torchvision(torchvision.datasets.CelebA, path, by_hand)
        partition = path / "celeba" / "list_eval_partition.txt"
    number = {"train": "0", "validation": "1", "test": "2"}[split]
    lines = (line.split() for line in partition.read_text().splitlines())
    names = [words[0] for words in lines if len(words) == 2 and words[1] == number]
    folder, archive = _near(path, "img_align_celeba"), _near(path, "img_align_celeba.zip")
    if folder is not None:
        return FolderSource(folder, names)
    if archive is not None:
        return ZipSource(archive, _inside(zipped_images(archive), names))
    raise UserError(f"data.path: {path} has no img_align_celeba folder or zip; {by_hand}")


def _near(path: Path, name: str) -> Path | None:
    """The file or folder called `name` in `path` or in a folder of it."""
    return next((found for pattern in (name, f"*/{name}") for found in path.glob(pattern)), None)


def _inside(members: list[str], names: list[str]) -> list[str]:
    """The members of a zip with the given file names; a name that is not there stays, and is reported when read."""
    places = {member.rsplit("/", 1)[-1]: member for member in members}
    return [places.get(name, name) for name in names]


def celeba_hq(path: Path, config: DataConfig, split: Split) -> Source:
    """CelebA-HQ (Karras et al. 2018): train and validation sub-folders or LMDBs, else a hold-out of a tenth."""
    return _converted(path, config, split, "put the 30 000 images, or train.lmdb and validation.lmdb, there")


def ffhq(path: Path, config: DataConfig, split: Split) -> Source:
    """FFHQ (Karras et al. 2019): train and validation sub-folders or LMDBs, else a hold-out of a tenth."""
    full = path / "images1024x1024"
    where = "download images1024x1024 from https://github.com/NVlabs/ffhq-dataset into it"
    return _converted(full if full.is_dir() else path, config, split, where)


def lsun(path: Path, config: DataConfig, split: Split) -> Source:
    """A category of LSUN (Yu et al. 2015), its LMDBs as they are given out."""
    category = {"lsun_bedroom": "bedroom", "lsun_church": "church_outdoor", "lsun_tower": "tower"}[config.name]
    folder = path / f"{category}_{'train' if split == 'train' else 'val'}_lmdb"
    if folder.is_dir():
        return LmdbSource.open(folder)
    return _converted(
        path,
        config,
        split,
        f"download {category}_train_lmdb.zip and {category}_val_lmdb.zip with https://github.com/fyu/lsun and unpack "
        f"them there",
    )


def _converted(path: Path, config: DataConfig, split: Split, by_hand: str) -> Source:
    """A set that someone converted; raises UserError saying what to fetch where there is nothing."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"data.path: {path} is {'empty' if path.exists() else 'missing'}; {by_hand}")
    return own_images(path, config, split)


def _from_torchvision(dataset: Callable[..., Any], path: Path, by_hand: str = "", **options: Any) -> Any:
    """A set of torchvision, downloaded first where it is missing, by one process at a time."""
    try:
        return dataset(path, download=False, **options)
    except TORCHVISION_ERRORS:
        pass
    try:
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / ".download.lock"):
            return dataset(path, download=True, **options)
    except TORCHVISION_ERRORS as error:
        reason = " ".join(str(error).split())
        advice = f"; {by_hand}" if by_hand else "; download it elsewhere and copy the folder"
        raise UserError(f"data.path: {path} has no (whole) set, and downloading failed ({reason}){advice}") from error


SETS: dict[str, Callable[[Path, DataConfig, Split], Source]] = {
    "digits": digits,
    "mnist": mnist,
    "omniglot": omniglot,
    "stacked_mnist": stacked_mnist,
    "cifar10": cifar10,
    "imagenet_32": imagenet,
    "imagenet_64": imagenet,
    "celeba_64": celeba,
    "celeba_hq_256": celeba_hq,
    "ffhq_256": ffhq,
    "lsun_bedroom": lsun,
    "lsun_church": lsun,
    "lsun_tower": lsun,
    "images": own_images,
}
"""How each set is read."""
