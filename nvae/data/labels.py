"""Which class an image is of, where its source says so: by its folder, or by an array beside the images.

Classes are numbered from 0; N images.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .names import is_hidden

UNKNOWN = -1
WORDS = frozenset({"y", "label", "labels", "target", "targets"})
"""What an array that names classes is called, by one word of its name: y_train, test_labels."""


def unknown(count: int) -> np.ndarray:
    """(N,) int64 that says nothing."""
    return np.full(count, UNKNOWN, dtype=np.int64)


def class_folders(folders: Iterable[Path]) -> list[str]:
    """The names of the sub-folders that classes are, those of all splits; none where there are fewer than two."""
    inside = (entry for folder in folders if folder.is_dir() for entry in folder.iterdir())
    names = {entry.name for entry in inside if entry.is_dir() and not is_hidden(entry.name)}
    return sorted(names) if len(names) > 1 else []


def first_folders(names: Iterable[str]) -> list[str]:
    """As `class_folders`, of the names of files."""
    found = {name.split("/", 1)[0] for name in names if "/" in name}
    return sorted(found) if len(found) > 1 else []


def by_folder_name(names: Sequence[str], classes: Sequence[str]) -> np.ndarray | None:
    """(N,) int64 of names: the place of their first folder among the classes; None where there are no classes."""
    if not classes:
        return None
    places = {name: place for place, name in enumerate(classes)}
    return np.array([places.get(name.split("/", 1)[0], UNKNOWN) for name in names], dtype=np.int64)


def is_label_name(name: str) -> bool:
    """True for arrays of an .npz that name classes: labels, y, y_train, train_labels, …"""
    return not WORDS.isdisjoint(name.lower().split("_"))


def label_array(key: str, keys: Sequence[str]) -> str | None:
    """The array that names the classes of the images called `key`: what is left of both names is the same.

    `y_train` goes with `x_train`, `val_labels` with `val_images`, `labels` with images that are no split.
    """
    split = _without(key, {"x", "images", "data", "arr", "0"})
    return next((other for other in keys if is_label_name(other) and _without(other, WORDS) == split), None)


def _without(name: str, words: Iterable[str]) -> tuple[str, ...]:
    return tuple(word for word in name.lower().split("_") if word not in set(words))


def as_labels(array: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """(N,) int64 of an array that numbers classes from `first` on; unknown where it is anything else."""
    flat = array.reshape(-1)
    if flat.shape != (count,) or not np.issubdtype(flat.dtype, np.integer) or (count and int(flat.min()) < first):
        return unknown(count)
    return flat.astype(np.int64) - first
