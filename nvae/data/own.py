"""Anyone's own images: a folder, a zip, an array or an LMDB, with splits of its own or a hold-out."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ..core.errors import UserError
from .arrays import ArrayFile, array_names
from .config import DataConfig
from .sources import FolderSource, LmdbSource, Source, ZipSource, image_files, zipped_images
from .splits import Split, by_folder, choose, hold_out, list_files, listed, spelt, told_apart

KINDS = "a folder of PNG, JPEG or WebP files, a .zip of them, a .npy or .npz array, or an LMDB"


def own_images(path: Path, config: DataConfig, split: Split) -> Source:
    """The images of a split at a path. Raises UserError saying what was found there and what is read.

    Splits are those of `data.lists`; else sub-folders, files or arrays named train, validation and test; else list
    files beside the images; else a hold-out.
    """
    if not path.exists():
        raise UserError(f"data.path: {path} does not exist; it may be {KINDS}")
    if config.lists is not None:
        lists = list_files(config.lists)
        if not lists:
            raise UserError(f"data.lists: {config.lists} has no train.txt, validation.txt or test.txt")
        return _named(path, listed(lists, split))
    parts = _entries_by_split(path) if path.is_dir() else _members_by_split(path)
    if parts:
        return choose(parts, split, path)()
    lists = list_files(path)
    if lists:
        return _named(path, listed(lists, split))
    return hold_out(_all_of(path), config.holdout, split)


Opener = Callable[[], Source]


def _entries_by_split(path: Path) -> Mapping[Split, Opener]:
    """Splits that are entries of a folder: train/, validation.lmdb, test.zip, …"""
    entries = [e for e in sorted(path.iterdir()) if not e.name.startswith(".") and (e.is_dir() or e.suffix in READERS)]
    splits = [spelt(entry.stem) for entry in entries]
    found = {
        split: partial(_all_of, entry, within=path)
        for split, entry in zip(splits, entries, strict=True)
        if split is not None
    }
    return told_apart(found, others=None in splits)


def _members_by_split(path: Path) -> Mapping[Split, Opener]:
    """Splits inside one file: folders in a zip, arrays in an .npz."""
    if path.suffix == ".zip":
        folders = by_folder(zipped_images(path))
        return {split: partial(ZipSource, path, names) for split, names in folders.items()}
    if path.suffix == ".npz":
        named = ((spelt(key), key) for key in array_names(path))
        return {split: partial(ArrayFile, path, key) for split, key in named if split is not None}
    return {}


def _named(path: Path, names: list[str]) -> Source:
    if path.is_dir():
        return FolderSource(path, names)
    if path.suffix == ".zip":
        return ZipSource(path, names)
    raise UserError(f"data.lists: names of images mean something in a folder or a zip, and {path} is neither")


def _all_of(path: Path, within: Path | None = None) -> Source:
    """All images at a path; those of a folder are called by their place `within` another."""
    if path.is_dir() and not (path / "data.mdb").exists():
        prefix = "" if within is None else f"{path.relative_to(within).as_posix()}/"
        return _some(FolderSource(within or path, [prefix + name for name in image_files(path)]), path)
    if path.is_dir():
        return LmdbSource.open(path)
    if path.suffix not in READERS:
        raise UserError(f"data.path: {path} is not {KINDS}")
    return READERS[path.suffix](path)


def _some(source: Source, path: Path) -> Source:
    if not len(source):
        raise UserError(f"data.path: {path} has no images; looked for .png, .jpg, .jpeg and .webp files at any depth")
    return source


def _zip(path: Path) -> Source:
    return _some(ZipSource(path, zipped_images(path)), path)


def _npz(path: Path) -> Source:
    keys = array_names(path)
    usual = [key for key in keys if key in ("images", "data", "arr_0")]
    chosen = usual or keys
    if len(chosen) != 1:
        raise UserError(
            f"data.path: {path} holds the arrays {', '.join(keys) or '(none)'}; call the images 'images', or 'train' "
            "and 'test'"
        )
    return ArrayFile(path, chosen[0])


READERS: dict[str, Callable[[Path], Source]] = {
    ".zip": _zip,
    ".npy": ArrayFile,
    ".npz": _npz,
    ".lmdb": LmdbSource.open,
    ".mdb": LmdbSource.open,
}
