"""Training, validation and test images of a set: by sub-folder, by list file, or a hold-out."""

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from ..core.errors import UserError
from .names import name_bytes, printable, spelling_key
from .sources import Source

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SPELLINGS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
T = TypeVar("T")


def spelt(name: str) -> Split | None:
    """The split that a folder's, file's or array's name means, if any."""
    return next((split for split in SPLITS if name.lower() in SPELLINGS[split]), None)


def spelt_array(name: str) -> Split | None:
    """The split that an array of images is, by its name in an .npz: `train`, Keras' `x_train`, MedMNIST's `val_images`.

    None for others, and for labels: `y_train`, `val_labels`.
    """
    word = name.lower()
    for start in ("x_", "images_", "data_"):
        word = word.removeprefix(start)
    for end in ("_x", "_images", "_data"):
        word = word.removesuffix(end)
    return spelt(word)


def by_split(named: Iterable[tuple[str, Split | None, T]]) -> dict[Split, T]:
    """(name, split, thing) by split, without those of none. Raises UserError where two claim one split."""
    found: dict[Split, tuple[str, T]] = {}
    for name, split, thing in named:
        if split is None:
            continue
        if split in found:
            raise UserError(
                f"data.path: both {printable(found[split][0])} and {printable(name)} are {split} images by their "
                "names; rename or remove one"
            )
        found[split] = (name, thing)
    return {split: found[split][1] for split in SPLITS if split in found}


def told_apart(found: Mapping[Split, T], others: bool) -> Mapping[Split, T]:
    """`found` where it is a set's splits; empty where it is not.

    A folder called "train" among `others` may as well hold pictures of trains; "train" with "test" does not.
    """
    return found if not others or ("train" in found and len(found) > 1) else {}


def choose(available: Mapping[Split, T], wanted: Split, where: Path) -> T:
    """What a set has for the wanted split. Where it lacks validation or test, one stands in for the other.

    Raises UserError where there is neither, or no training split.
    """
    stand_in: dict[Split, Split] = {"validation": "test", "test": "validation"}
    for split in (wanted, stand_in.get(wanted, wanted)):
        if split in available:
            return available[split]
    missing = "train" if wanted == "train" else "validation or test"
    raise UserError(f"data.path: {where} has {', '.join(available)}, but no {missing}")


def hold_out(source: Source, fraction: float, split: Split) -> Source:
    """The images of a split where a set has none: those whose names hash lowest are held out for testing.

    Adding or removing images therefore moves next to none of the others. At least one image is on either side, but
    for a `fraction` of 1, which holds out all; raises UserError where that is impossible.
    """
    if fraction == 1:
        return source
    if len(source) < 2:
        raise UserError("data.path: one image alone can't be split into training and test images")
    hashes = [hashlib.blake2b(name_bytes(source.name(i)), digest_size=8).digest() for i in range(len(source))]
    held = min(max(1, round(fraction * len(source))), len(source) - 1)
    ranks = np.argsort(np.array(hashes), kind="stable")
    return source.take(np.sort(ranks[held:] if split == "train" else ranks[:held]))


def list_files(folder: Path) -> dict[Split, Path]:
    """The list files of a folder: train.txt, validation.txt, test.txt. Raises UserError where two are of one split."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return by_split((file.name, spelt(file.stem), file) for file in files if file.suffix.lower() == ".txt")


def listed(files: Mapping[Split, Path], wanted: Split) -> list[str]:
    """The names in the list file of a split, without blank lines.

    Raises UserError where the list can't be read, is empty, or names images twice or training images for testing.
    """
    path = choose(files, wanted, next(iter(files.values())).parent)
    names = _lines(path)
    if not names:
        raise UserError(f"data.lists: {path} names no images")
    twice = [name for name, count in Counter(map(spelling_key, names)).items() if count > 1]
    if twice:
        raise UserError(f"data.lists: {path} names {len(twice)} images more than once, as {printable(min(twice))}")
    if wanted != "train" and "train" in files:
        trained_on = set(map(spelling_key, _lines(files["train"])))
        shared = [name for name in names if spelling_key(name) in trained_on]
        if shared:
            raise UserError(
                f"data.lists: {path} and {files['train']} share {len(shared)} images, as {printable(min(shared))}"
            )
    return names


def _lines(path: Path) -> list[str]:
    """Lines that are not blank; names of a file system that is not in UTF-8 keep their bytes."""
    try:
        data = path.read_bytes()
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16") if wide else data.decode("utf-8-sig", "surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.lists: {path} cannot be read: {error}") from error
    return [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]


def by_folder(names: Sequence[str]) -> Mapping[Split, list[str]]:
    """Names by the split that their first folder means, below a folder common to all; empty where none does."""
    parts = [name.split("/") for name in names]
    while parts and len({p[0] for p in parts}) == 1 and len(parts[0]) > 1 and spelt(parts[0][0]) is None:
        parts = [p[1:] for p in parts]
    found: dict[Split, list[str]] = {}
    others = False
    for name, inside in zip(names, parts, strict=True):
        split = spelt(inside[0]) if len(inside) > 1 else None
        if split is None:
            others = True
        else:
            found.setdefault(split, []).append(name)
    return told_apart({split: found[split] for split in SPLITS if split in found}, others)
