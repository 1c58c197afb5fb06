"""Anyone's own images: a folder, a file, a zip, an array or an LMDB, with splits of its own or a hold-out."""

import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..core.errors import UserError
from .arrays import ArrayFile, array_names
from .config import DataConfig
from .databases import LmdbSource
from .decoding import KINDS
from .found import SHAPED, Found, Opener
from .labels import by_folder_name, class_folders, first_folders, is_label_name, label_array
from .names import SUFFIXES, Listing, as_spelt_in, is_hidden, is_image_name, may_hold_images, suffix_of, unread_note
from .sources import FolderSource, Source, ZipSource, files_below, folder_listing, zip_members
from .splits import Split, by_folder, by_split, hold_out, list_files, listed, spelt, spelt_array, told_apart

CLASSED = ("images", "imagenet_32", "imagenet_64")
"""Sets whose sub-folders may be classes."""
PLACES = f"a folder of {KINDS} files, such a file, a .zip of them, a .npy or .npz array, or an LMDB"


def own_images(path: Path, config: DataConfig) -> Found:
    """The images at a path. Raises UserError saying what was found there and what is read.

    Splits are those of `data.lists`; else sub-folders, files or arrays named train, validation and test; else list
    files beside the images; else a hold-out.
    """
    if not path.exists():
        raise UserError(f"data.path: {path} does not exist; it may be {PLACES}")
    if config.lists is not None:
        lists = list_files(config.lists.expanduser())
        if not lists:
            raise UserError(f"data.lists: {config.lists} has no train.txt, validation.txt or test.txt")
        return Found(path, _listed(path, lists), SHAPED | {"lists"}, "images whose splits are listed")
    parts, beside = _entries_by_split(path, config) if path.is_dir() else _members_by_split(path)
    if parts:
        return Found(path, parts, SHAPED, "images with splits of their own", unread=tuple(beside))
    lists = list_files(path)
    if lists:
        return Found(path, _listed(path, lists), SHAPED, "images with lists of their splits beside them")
    classes = _classes([path], config)
    splits: tuple[Split, ...] = ("test",) if config.holdout == 1 else ("train", "test")
    held_out: dict[Split, Opener] = {
        split: partial(_held_out, path, classes, config.holdout, split) for split in splits
    }
    return Found(path, held_out, SHAPED | {"holdout"}, "images without splits of their own")


def _held_out(path: Path, classes: Sequence[str], fraction: float, split: Split) -> Source:
    return hold_out(_all_of(path, classes), fraction, split)


def _classes(folders: Iterable[Path], config: DataConfig) -> list[str]:
    """The classes that sub-folders are; none for sets whose sub-folders hold a thousand images each, or the like."""
    return class_folders(folders) if config.name in CLASSED else []


# --------------------------------------------------------------------------------------------------- splits of its own


def _entries_by_split(path: Path, config: DataConfig) -> tuple[Mapping[Split, Opener], list[str]]:
    """Splits that are entries of a folder: train/, validation.lmdb, test.zip, …; and what lies beside them unread."""
    entries = [entry for entry in sorted(path.iterdir()) if not is_hidden(entry.name)]
    readable = [entry for entry in entries if entry.is_dir() or suffix_of(entry.name) in READERS]
    splits = {entry: spelt(entry.stem) for entry in readable}
    if not told_apart(dict.fromkeys(split for split in splits.values() if split), others=None in splits.values()):
        return {}, []
    parts = by_split((entry.name, split, entry) for entry, split in splits.items())
    unread = []
    for entry in entries:
        if entry.is_dir() and not splits[entry]:
            unread += [f"{entry.name}/{name}" for name in files_below(entry) if is_image_name(name)]
        elif entry.is_file() and not splits.get(entry) and (is_image_name(entry.name) or may_hold_images(entry.name)):
            unread.append(entry.name)
    classes = _classes(parts.values(), config)
    return {split: partial(_all_of, entry, classes, within=path) for split, entry in parts.items()}, unread


def _members_by_split(path: Path) -> tuple[Mapping[Split, Opener], list[str]]:
    """Splits inside one file, folders in a zip, arrays in an .npz; and the members beside them that are not read."""
    if suffix_of(path.name) == ".zip":
        listing = Listing.of(zip_members(path))
        folders = by_folder(listing.images)
        unread = sorted({*listing.unread, *listing.images}.difference(*folders.values())) if folders else []
        inside = {split: _below_the_split(names) for split, names in folders.items()}
        classes = first_folders(name for names in inside.values() for name in names)
        return {
            split: partial(ZipSource, path, names, classes=by_folder_name(inside[split], classes))
            for split, names in folders.items()
        }, unread
    if suffix_of(path.name) == ".npz":
        keys = array_names(path)
        arrays = by_split((key, None if is_label_name(key) else spelt_array(key), key) for key in keys)
        return {
            split: partial(ArrayFile, path, key, label_key=label_array(key, keys)) for split, key in arrays.items()
        }, []
    return {}, []


def _below_the_split(names: Sequence[str]) -> list[str]:
    """Names without the folder that is their split and those above it."""
    parts = [name.split("/") for name in names]
    return ["/".join(part[next(i for i, word in enumerate(part) if spelt(word)) + 1 :]) for part in parts]


def _listed(path: Path, lists: Mapping[Split, Path]) -> dict[Split, Opener]:
    """The images that list files name."""
    return {split: partial(_named, path, lists, split) for split in lists}


def _named(path: Path, lists: Mapping[Split, Path], split: Split) -> Source:
    """The images that a list names, as the folder or zip spells them."""
    names = [posixpath.normpath(name) for name in listed(lists, split)]
    if path.is_dir():
        is_exact = all((path / name).is_file() for name in names)
        names = names if is_exact else as_spelt_in(names, files_below(path))
        return FolderSource(path, names, classes=by_folder_name(names, class_folders([path])))
    if suffix_of(path.name) == ".zip":
        members = zip_members(path)
        names = as_spelt_in(names, members)
        return ZipSource(path, names, classes=by_folder_name(names, first_folders(filter(is_image_name, members))))
    raise UserError(f"data.lists: names of images mean something in a folder or a zip, and {path} is neither")


# ----------------------------------------------------------------------------------------------------- all of a place


def _all_of(path: Path, classes: Sequence[str] = (), within: Path | None = None) -> Source:
    """All images at a path; those of a folder are called by their place `within` another."""
    if path.is_dir() and not (path / "data.mdb").exists():
        prefix = "" if within is None else f"{path.relative_to(within).as_posix()}/"
        listing = folder_listing(path)
        names, unread = ([prefix + name for name in found] for found in (listing.images, listing.unread))
        return _some(FolderSource(within or path, names, unread, by_folder_name(listing.images, classes)), path)
    if path.is_dir():
        return LmdbSource.open(path)
    if is_image_name(path.name):
        return FolderSource(path.parent, [path.name])
    if suffix_of(path.name) not in READERS:
        raise UserError(f"data.path: {path} is not {PLACES}")
    return READERS[suffix_of(path.name)](path)


def _some(source: Source, path: Path) -> Source:
    if not len(source):
        unread = unread_note(source.unread) or f"looked for {', '.join(SUFFIXES)} files at any depth"
        raise UserError(f"data.path: {path} has no images; {unread}")
    return source


def _zip(path: Path) -> Source:
    listing = Listing.of(zip_members(path))
    classes = by_folder_name(listing.images, first_folders(listing.images))
    return _some(ZipSource(path, listing.images, listing.unread, classes), path)


def _npz(path: Path) -> Source:
    keys = array_names(path)
    usual = [key for key in keys if key in ("images", "data", "arr_0", "x")]
    chosen = usual or [key for key in keys if not is_label_name(key)]
    if len(chosen) != 1:
        raise UserError(
            f"data.path: {path} holds the arrays {', '.join(keys) or '(none)'}; call the images 'images', or 'train' "
            "and 'test'"
        )
    return ArrayFile(path, chosen[0], label_key=label_array(chosen[0], keys))


READERS: dict[str, Callable[[Path], Source]] = {
    ".zip": _zip,
    ".npy": ArrayFile,
    ".npz": _npz,
    ".lmdb": LmdbSource.open,
    ".mdb": LmdbSource.open,
}


def is_file_of_images(path: Path) -> bool:
    """True for one file that holds images, or is one: those of anyone, whatever set they are said to be."""
    return path.is_file() and (suffix_of(path.name) in READERS or is_image_name(path.name))
