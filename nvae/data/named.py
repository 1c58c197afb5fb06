"""The sets with a name (spec §8): each as its download lies on disk.

torchvision downloads what it knows, with checksums. Where a licence means fetching by hand, the message says what to
put where. Folders made for the published code (`train.lmdb`, …) and other people's conversions are read as one's own
images are.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from ..core.errors import UserError
from .arrays import ArrayFile, ArraySource, Joined, array_names
from .config import DataConfig
from .databases import LmdbSource
from .downloads import from_torchvision, is_free
from .found import FIXED, SHAPED, Found, Opener
from .labels import as_labels, label_array
from .names import as_spelt_in
from .own import is_file_of_images, own_images
from .sources import FolderSource, Source, ZipSource, folder_listing, zip_members
from .splits import Split

CELEBA_BOX = (15, 40, 163, 188)
"""The square of an aligned CelebA image (178×218) that is shown: left, top, right, bottom (spec §8)."""

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

Splits = dict[Split, Opener]
Counts = Mapping[Split, Callable[[], int]]
"""How many images each split has, counted when asked."""


def counts_of(name: str, split: Split) -> tuple[int, ...]:
    """How many images a split of a set has; none where that is not known."""
    counts = COUNTS.get(name, {})
    return counts.get(split) or counts.get("test" if split == "validation" else split) or ()


# ---------------------------------------------------------------------------------------------------------- each set


def digits(path: Path, config: DataConfig) -> Splits:
    """scikit-learn's embedded 8×8 digits, grey values v/16: 1500 for training, the other 297 for testing."""
    return {"train": partial(_digits, slice(1500)), "test": partial(_digits, slice(1500, None))}


def _digits(chosen: slice) -> Source:
    from sklearn.datasets import load_digits

    order = np.random.RandomState(0).permutation(1797)[chosen]
    found = load_digits()
    classes = found.target[order].astype(np.int64)
    return ArraySource(found.images[order].astype(np.uint8), "digits", levels=16, classes=classes)


def mnist(path: Path, config: DataConfig) -> Splits | None:
    """MNIST (LeCun et al. 1998), as torchvision leaves it."""
    if not (path / "MNIST").is_dir():
        return None
    return {"train": partial(_mnist, path, True), "test": partial(_mnist, path, False)}


def _mnist(path: Path, train: bool) -> ArraySource:
    found = from_torchvision(torchvision.datasets.MNIST, path, train=train)
    return ArraySource(found.data.numpy(), "mnist", classes=as_labels(found.targets.numpy(), len(found.data)))


def stacked_mnist(path: Path, config: DataConfig) -> Splits | None:
    """Three MNIST digits as the colours of an image: colour c of image i is digit π_c(i), π_c fixed permutations.

    Its class is the number that the three digits spell.
    """
    if not (path / "MNIST").is_dir():
        return None
    return {"train": partial(_stacked_mnist, path, True), "test": partial(_stacked_mnist, path, False)}


def _stacked_mnist(path: Path, train: bool) -> Source:
    digits = _mnist(path, train)
    planes, classes = digits.stacked(), digits.labels()
    orders = [np.random.RandomState(colour).permutation(len(planes)) for colour in range(3)]
    spelt = sum(classes[order] * 10**place for order, place in zip(orders, (2, 1, 0), strict=True))
    images = np.stack([planes[order] for order in orders], axis=-1)
    return ArraySource(images, "stacked_mnist", classes=np.asarray(spelt))


def omniglot(path: Path, config: DataConfig) -> Splits | None:
    """OMNIGLOT at 28×28, the chardata.mat of Burda et al. 2016: one image a column, itself column by column."""
    file = path if path.suffix.lower() == ".mat" else path / "chardata.mat"
    if not file.is_file():
        return None
    return {"train": partial(_omniglot, file, "data"), "test": partial(_omniglot, file, "testdata")}


def _omniglot(file: Path, key: str) -> Source:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        grey = loadmat(file, variable_names=[key])[key].T.reshape(-1, 28, 28).swapaxes(1, 2)
    except (MatReadError, ValueError, TypeError, KeyError, OSError, NotImplementedError, zlib.error) as error:
        raise UserError(f"data.path: {file} is damaged, or not the chardata.mat of 28×28 OMNIGLOT: {error}") from error
    return ArraySource(np.rint(255 * grey).astype(np.uint8), "omniglot")


def cifar10(path: Path, config: DataConfig) -> Splits | None:
    """CIFAR-10 (Krizhevsky 2009), as torchvision leaves it."""
    if not any((path / mark).exists() for mark in ("cifar-10-batches-py", "cifar-10-python.tar.gz")):
        return None
    return {"train": partial(_cifar10, path, True), "test": partial(_cifar10, path, False)}


def _cifar10(path: Path, train: bool) -> Source:
    found = from_torchvision(torchvision.datasets.CIFAR10, path, train=train)
    return ArraySource(found.data, "cifar10", classes=as_labels(np.asarray(found.targets), len(found.data)))


def imagenet(path: Path, config: DataConfig) -> Splits | None:
    """Down-sampled ImageNet: the .npz batches of image-net.org, or the older folders train_32x32 and valid_32x32.

    The two were shrunk by different filters, and figures on one are not comparable with figures on the other.
    """
    found: Splits = {}
    parts: tuple[tuple[Split, str, str], ...] = (
        ("train", "train", "train_data_batch_*.npz"),
        ("validation", "valid", "val_data.npz"),
    )
    for split, word, pattern in parts:
        folder = path / f"{word}_{config.size}x{config.size}"
        if folder.is_dir():
            found[split] = partial(_folder, folder)
        elif batches := sorted(path.rglob(pattern), key=lambda file: (len(file.name), file.name, str(file))):
            found[split] = partial(_batches, batches, config.size)
    return found or None


def _folder(folder: Path) -> Source:
    listing = folder_listing(folder)
    return FolderSource(folder, listing.images, listing.unread)


def _batches(files: list[Path], size: int) -> Source:
    """The batches of one size: those of 32×32 and of 64×64 may lie beside each other under the same names."""
    named = ((file, label_array("data", array_names(file))) for file in files)
    parts = [ArrayFile(file, "data", planar=True, label_key=labels) for file, labels in named]
    fitting = [part for part in parts if part.sides == (size, size)]
    if not fitting:
        raise UserError(f"data.path: {files[0]} holds images of {parts[0].sides[0]} pixels a side, asked is {size}")
    return Joined(fitting)


def celeba(path: Path, config: DataConfig) -> Splits | None:
    """CelebA's aligned images (Liu et al. 2015) with the official split; the crop is left to the shaping."""
    if (path / "train.lmdb").exists():
        return dict(own_images(path, config.usual()).splits)
    partition = _near(path, "list_eval_partition.txt")
    if partition is None or not (_near(path, "img_align_celeba") or _near(path, "img_align_celeba.zip")):
        return None
    numbers: dict[Split, str] = {"train": "0", "validation": "1", "test": "2"}
    return {split: partial(_celeba, path, partition, number) for split, number in numbers.items()}


def _celeba(path: Path, partition: Path, number: str) -> Source:
    try:
        lines = [line.split() for line in partition.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {partition} is damaged: {error}") from error
    names = [words[0] for words in lines if len(words) == 2 and words[1] == number]
    folder, archive = _near(path, "img_align_celeba"), _near(path, "img_align_celeba.zip")
    if folder is not None:
        return FolderSource(folder, names)
    assert archive is not None
    return ZipSource(archive, _inside(zip_members(archive), names))


def _near(path: Path, name: str) -> Path | None:
    """The file or folder called `name` in `path` or in a folder of it."""
    return next((found for pattern in (name, f"*/{name}") for found in sorted(path.glob(pattern))), None)


def _inside(members: list[str], names: list[str]) -> list[str]:
    """The members of a zip with the given file names; a name that is not there stays, and is reported when read."""
    places = {member.rsplit("/", 1)[-1]: member for member in members}
    return [places.get(name, name) for name in as_spelt_in(names, places)]


def lsun(category: str, path: Path, config: DataConfig) -> Splits | None:
    """A category of LSUN (Yu et al. 2015), its LMDBs as they are given out."""
    parts: dict[Split, Path] = {
        "train": path / f"{category}_train_lmdb",
        "validation": path / f"{category}_val_lmdb",
    }
    return {split: partial(LmdbSource.open, part) for split, part in parts.items() if part.is_dir()} or None


# ------------------------------------------------------------------------------------------------------------ finding


@dataclass(frozen=True)
class NamedSet:
    """How a set is found, and what is said where it is not."""

    read: Callable[[Path, DataConfig], Splits | None]
    """The splits of the set at a path as it is given out; None where the path does not hold it."""
    advice: str = ""
    """What was looked for, and where to fetch it."""
    uses: frozenset[str] = FIXED
    dataset: Callable[..., Any] | None = None
    """Of torchvision, which downloads it."""
    marks: tuple[str, ...] = ()
    """Files and folders that a download makes."""
    convertible: bool = False
    """Other people's conversions, and the published code's, are read as one's own images are."""
    inside: str = ""
    """The folder of a conversion that holds the images, where there is one of that name."""


def _by_hand(path: Path, config: DataConfig) -> None:
    """CelebA-HQ (Karras et al. 2018) and FFHQ (Karras et al. 2019): whoever has the images, has a conversion."""


_MNIST = "looked for MNIST/raw/train-images-idx3-ubyte and the other three files"
_IMAGENET = NamedSet(
    imagenet,
    "log in at https://image-net.org/download-images.php, fetch the npz files of this size, and unpack "
    "train_data_batch_1.npz … train_data_batch_10.npz and val_data.npz there",
    convertible=True,
)


def _lsun(category: str) -> NamedSet:
    return NamedSet(
        partial(lsun, category),
        f"download {category}_train_lmdb.zip and {category}_val_lmdb.zip with https://github.com/fyu/lsun and unpack "
        "them there",
        SHAPED,
        convertible=True,
    )


SETS: dict[str, NamedSet | None] = {
    "digits": NamedSet(digits, uses=FIXED - {"path"}),
    "mnist": NamedSet(mnist, _MNIST, dataset=torchvision.datasets.MNIST, marks=("MNIST",)),
    "omniglot": NamedSet(
        omniglot,
        "chardata.mat does not exist; download it from "
        "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat",
    ),
    "stacked_mnist": NamedSet(stacked_mnist, _MNIST, dataset=torchvision.datasets.MNIST, marks=("MNIST",)),
    "cifar10": NamedSet(
        cifar10,
        "looked for cifar-10-batches-py/data_batch_1 and its like",
        dataset=torchvision.datasets.CIFAR10,
        marks=("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ),
    "imagenet_32": _IMAGENET,
    "imagenet_64": _IMAGENET,
    "celeba_64": NamedSet(
        celeba,
        "download img_align_celeba.zip and list_eval_partition.txt from "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into it (the zip may stay packed)",
        SHAPED - {"crop"},
        dataset=torchvision.datasets.CelebA,
        marks=("celeba",),
    ),
    "celeba_hq_256": NamedSet(
        _by_hand, "put the 30 000 images, or train.lmdb and validation.lmdb, there", convertible=True
    ),
    "ffhq_256": NamedSet(
        _by_hand,
        "download images1024x1024 from https://github.com/NVlabs/ffhq-dataset into it",
        convertible=True,
        inside="images1024x1024",
    ),
    "lsun_bedroom": _lsun("bedroom"),
    "lsun_church": _lsun("church_outdoor"),
    "lsun_tower": _lsun("tower"),
    "images": None,
}
"""How each set is found; `images` are anyone's."""


def find(config: DataConfig, *, fetch: bool = True) -> Found:
    """The configured set where it lies, downloaded first where that is possible and `fetch` allows it.

    Nothing is made in a folder that holds something else. Raises UserError saying what was looked for, OSError.
    """
    named, path = SETS[config.name], config.source
    if named is None or is_file_of_images(path):
        return own_images(path, config)
    if config.name == "stacked_mnist" and config.path is None and not path.exists():
        path = path.with_name("mnist")
    splits = named.read(path, config)
    if splits is None and named.convertible and path.exists() and (not path.is_dir() or any(path.iterdir())):
        full = path / named.inside
        return replace(own_images(full if full.is_dir() else path, config), is_named=True, is_converted=True)
    if splits is None and named.dataset is not None and fetch and is_free(path, named.marks):
        from_torchvision(named.dataset, path, named.advice if named.uses != FIXED else "")
        splits = named.read(path, config)
    if splits is None:
        raise UserError(_missing(config.name, named, path))
    return Found(path, splits, named.uses, config.name, is_named=True)


def counts_agree(name: str, counts: Counts, split: Split | None = None) -> bool:
    """True where a split has as many images as that of a set; of a conversion, which may be anything, every split."""
    named = SETS[name]
    looked_at = [part for part in counts if part == split or (named is not None and named.convertible)]
    looked_at = looked_at or [part for part in counts if part != "train"]  # one that stands in for the split
    return all(not (known := counts_of(name, part)) or counts[part]() in known for part in looked_at)


def _missing(name: str, named: NamedSet, path: Path) -> str:
    """What is said of a path that does not hold a set."""
    if not path.exists():
        return f"data.path: {path} is missing; {named.advice}"
    if path.is_dir() and not any(path.iterdir()):
        return f"data.path: {path} is empty; {named.advice}"
    near = [place for place in (path.parent, *_folders(path)) if any((place / mark).exists() for mark in named.marks)]
    hint = f"; it is in {near[0]}" if near else "; images of your own are data.name=images"
    return f"data.path: {path} does not hold {name}: {named.advice}{hint}"


def _folders(path: Path) -> list[Path]:
    return [entry for entry in sorted(path.iterdir()) if entry.is_dir()] if path.is_dir() else []
