"""Training, validation and test images of a set: by sub-folder, by list file, or a hold-out."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from ..core.errors import UserError
from .sources import Source

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SPELLINGS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
T = TypeVar("T")


def spelt(name: str) -> Split | None:
    """The split that a folder's, file's or array's name means, if any."""
    return next((split for split in SPLITS if name.lower() in SPELLINGS[split]), None)


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

    Adding or removing images therefore moves next to none of the others. At least one image is on either side;
    raises UserError where that is impossible.
    """
    if len(source) < 2:
        raise UserError("data.path: one image alone can't be split into training and test images")
    hashes = [hashlib.blake2b(source.name(i).encode(), digest_size=8).digest() for i in range(len(source))]
    held = min(max(1, round(fraction * len(source))), len(source) - 1)
    ranks = np.argsort(np.array(hashes), kind="stable")
    return source.take(np.sort(ranks[held:] if split == "train" else ranks[:held]))


def list_files(folder: Path) -> dict[Split, Path]:
    """The list files of a folder: train.txt, validation.txt, test.txt."""
    named = ((spelt(path.stem), path) for path in sorted(folder.glob("*.txt")))
    return {split: path for split, path in named if split is not None}


def listed(files: Mapping[Split, Path], wanted: Split) -> list[str]:
    """The names in the list file of a split, without blank lines.

    Raises UserError where the list can't be read, is empty, or names training images for testing.
    """
    path = choose(files, wanted, next(iter(files.values())).parent)
    names = _lines(path)
    if not names:
        raise UserError(f"data.lists: {path} names no images")
    shared = set(names) & set(_lines(files["train"])) if wanted != "train" and "train" in files else set()
    if shared:
        raise UserError(f"data.lists: {path} and {files['train']} share {len(shared)} images, as {min(shared)}")
    return names


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.lists: {path} cannot be read: {error}") from error


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
    return told_apart(found, others)
