"""Images, archives, arrays, LMDBs and prepared stores with damage in their bytes."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from PIL import Image

from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.preparation import prepare as prepare_store
from nvae.data.sets import open_images

from .cases import Case, Result, Verdict
from .nastiness import damaged

COUNT, SIDE, LARGE = 12, 8, 72
FORMATS = ("png", "jpg", "webp", "bmp", "tiff", "gif")
STORES = ("raw", "webp")
KINDS = (*(f"folder-{form}" for form in FORMATS), "zip", "zip", "npz", "npz", "npy", "lmdb", *(STORES * 3), "labels")
"""Stores most often: they are what a long training reads."""
CHECKED = ("zip", "npz", "raw", "webp", "labels")
"""Kinds whose files hold checksums: what is read of them is what was written."""


def prepare(material: Path) -> None:
    """A few pictures, stored in every way."""
    draws = np.random.RandomState(0)
    pictures = [Image.fromarray(draws.randint(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(COUNT)]
    large = [picture.resize((LARGE, LARGE)) for picture in pictures]
    for form in FORMATS:
        _save(material / f"folder-{form}" / "set", pictures, form)
    _save(material / "large", large, "png")
    for kind in ("zip", "npz", "npy", "lmdb"):
        (material / kind).mkdir()
    with zipfile.ZipFile(material / "zip" / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((material / "folder-png" / "set").iterdir()):
            archive.write(file, file.name)
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    np.savez(material / "npz" / "set.npz", images=stacked)
    np.save(material / "npy" / "set.npy", stacked)
    with (
        lmdb.open(str(material / "lmdb" / "set.lmdb"), map_size=2**22) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number, file in enumerate(sorted((material / "folder-png" / "set").iterdir())):
            transaction.put(b"%d" % number, file.read_bytes())
    for kind, source, side in (("raw", "folder-png/set", SIDE), ("webp", "large", LARGE)):
        prepare_store(_config(material / source, side), material / kind / "set", processes=1, progress=False)
    _store_with_labels(material, pictures)
    for kind in dict.fromkeys(KINDS):
        images = open_images(_config_of(material, kind), "test")
        torch.save((images.read(range(len(images))), images.labels), material / f"{kind}.pt")


def _save(folder: Path, pictures: list[Image.Image], form: str) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        options = {"lossless": True} if form == "webp" else {}
        picture.save(folder / f"{number:02d}.{form}", **options)


def _store_with_labels(material: Path, pictures: list[Image.Image]) -> None:
    """A store whose images have classes, by the folders that they lie in."""
    _save(material / "classed" / "cats", pictures[::2], "png")
    _save(material / "classed" / "dogs", pictures[1::2], "png")
    prepare_store(_config(material / "classed", SIDE), material / "labels" / "set", processes=1, progress=False)


def _config(path: Path, side: int = SIDE) -> DataConfig:
    return DataConfig(path=path, size=side, channels=3, holdout=1.0, workers=0)


def _config_of(folder: Path, kind: str) -> DataConfig:
    (place,) = (folder / kind).iterdir()
    return _config(place, LARGE if kind == "webp" else SIDE)


def run(case: Case) -> Result:
    kind = case.random.choice(KINDS)
    shutil.copytree(case.material / kind, case.folder / kind)
    files = sorted(file for file in (case.folder / kind).rglob("*") if file.is_file() and "lock" not in file.name)
    file = case.random.choice(files)
    _damage(case, file)
    tried = f"{kind}: {file.name}"
    try:
        images = open_images(_config_of(case.folder, kind), "test")
        found = images.read(range(len(images))), images.labels
    except UserError as error:
        named = any(name in str(error) for name in (str(case.folder), file.name, "set."))
        return Result(Verdict.REFUSED if named else Verdict.BROKEN, f"{tried}: {str(error)[:300]}")
    wrong = _wrong(kind, found, torch.load(case.material / f"{kind}.pt"))
    return Result(Verdict.LET_IN if wrong else Verdict.RESOLVED, f"{tried}: {wrong}")


def _damage(case: Case, file: Path) -> None:
    """Bytes, or, in the index of a store, a value."""
    if file.name != "store.json" or case.random.random() < 0.5:
        file.write_bytes(damaged(case.random, file.read_bytes()))
        return
    text = file.read_text()
    digits = [place for place, letter in enumerate(text) if letter.isdigit()]
    place = case.random.choice(digits)
    file.write_text(text[:place] + case.random.choice("0123456789") + text[place + 1 :])
    json.loads(file.read_text())


def _wrong(kind: str, found: tuple[Any, Any], expected: tuple[Any, Any]) -> str:
    """What is not as it was written, where the file could tell."""
    (pixels, labels), (before, labels_before) = found, expected
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != before.shape[1:]:
        return f"images of {tuple(pixels.shape)}, {pixels.dtype}"
    if kind not in CHECKED:
        return ""
    if kind == "zip":  # a name in the directory of the archive may be lost, and its image with it
        known = {image.numpy().tobytes() for image in before}
        return "" if all(image.numpy().tobytes() in known for image in pixels.contiguous()) else "other pixels"
    if pixels.shape != before.shape or not torch.equal(pixels, before):
        return "other pixels"
    return "" if torch.equal(labels, labels_before) else "other labels"
