"""Archives, folders and images that climb out of their place, or grow when they are read."""

import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nvae.checkpoints.loading import load_model
from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.preparation import prepare as prepare_store
from nvae.data.sets import open_images

from .asking import ask, refusal
from .cases import Case, Result, Verdict

BOMB = 5 * 2**28
"""Bytes of zeros that a bomb becomes."""
CLIMBING = (
    "../../evil.png",
    "/tmp/evil.png",
    "..\\..\\evil.png",
    "C:\\evil.png",
    "a/../../../evil.png",
    "//x/evil.png",
)


def prepare(material: Path) -> None:
    """A picture, a store, and zeros packed tightly."""
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    (material / "pictures").mkdir()
    for number in range(3):
        picture.save(material / "pictures" / f"{number}.png")
    prepare_store(_config(material / "pictures"), material / "store", processes=1, progress=False)
    with (
        zipfile.ZipFile(material / "zeros.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("bomb.png", "w", force_zip64=True) as member,
    ):
        for _ in range(BOMB // 2**24):
            member.write(bytes(2**24))


def _config(path: Path) -> DataConfig:
    return DataConfig(path=path, size=8, channels=3, holdout=1.0, workers=0)


def _read(path: Path) -> int:
    images = open_images(_config(path), "test")
    images.read(range(len(images)))
    return len(images)


def _judged(load: Callable[[], object], names: tuple[str, ...], tried: str) -> Result:
    """Read, or refused by a line that names the file."""
    try:
        load()
    except UserError as error:
        named = any(name in str(error) for name in names)
        return Result(Verdict.REFUSED if named else Verdict.BROKEN, f"{tried}: {str(error)[:300]}")
    return Result(Verdict.RESOLVED, tried)


def zip_that_climbs(case: Case) -> Result:
    """Members whose names lead elsewhere: they are read where they are, and nothing is unpacked."""
    path, data = case.folder / "set.zip", (case.material / "pictures" / "0.png").read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name in case.random.sample(CLIMBING, 3):
            archive.writestr(name, data)
    if case.random.random() < 0.5:
        return refusal_or_done(case, path)
    return _judged(lambda: _read(path), (str(path),), "climbing zip")


def refusal_or_done(case: Case, path: Path) -> Result:
    """Such a zip prepared into a store."""
    answer = ask("prepare", path, case.folder / "store", "size=8", "holdout=1", "--processes", "1")
    if answer.code == 0:
        return Result(Verdict.RESOLVED, "climbing zip, prepared")
    return refusal(answer, ["set.zip", "store"], "climbing zip, prepared")


def folder_of_links(case: Case) -> Result:
    """Links in circles, out of the folder, to devices; pipes that nobody writes to."""
    folder = case.folder / "set"
    shutil.copytree(case.material / "pictures", folder)
    kind = case.random.choice(("circle", "root", "password", "zero", "pipe", "broken", "named folder"))
    place = folder / "x.png"
    targets = {"circle": folder, "root": "/proc/self", "password": "/etc/passwd", "zero": "/dev/zero", "broken": "/no"}
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "named folder":
        place.mkdir()
    else:
        (folder / "down" if kind in ("circle", "root") else place).symlink_to(targets[kind])
    return _judged(lambda: _read(folder), ("x.png", "set", "/proc"), kind)


def store_that_climbs(case: Case) -> Result:
    """An index whose shards lie elsewhere."""
    folder = case.folder / "inside" / "store"
    shutil.copytree(case.material / "store", folder)
    index = json.loads((folder / "store.json").read_text())
    shard = index["splits"]["test"]["shards"][0]
    outside = case.folder / "outside.safetensors"
    (folder / shard["file"]).rename(outside)
    shard["file"] = case.random.choice(("../../outside.safetensors", str(outside), "x/../../../outside.safetensors"))
    (folder / "store.json").write_text(json.dumps(index))
    result = _judged(lambda: _read(folder), ("store",), "climbing store")
    return Result(Verdict.LET_IN, result.note) if result.verdict is Verdict.RESOLVED else result


def huge_header(case: Case) -> Result:
    """Small files that say they are images of 50 000 × 50 000 pixels, or more."""
    form = case.random.choice(("png", "bmp", "gif", "tiff", "webp", "jpg"))
    folder = case.folder / "set"
    folder.mkdir()
    side = case.random.choice((50_000, 60_000, 65_535))
    (folder / f"x.{form}").write_bytes(_huge(form, side))
    return _judged(lambda: _read(folder), (f"x.{form}",), f"{form} of {side}²")


def _huge(form: str, side: int) -> bytes:
    if form == "png":
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, (b"IHDR", b"IDAT", b"IEND"), (header, _zeros(), b"")))
    if form == "bmp":
        info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info + bytes(100)
    if form == "gif":
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", side, side, 0, 0, 0)
            + b","
            + struct.pack("<HHHHB", 0, 0, side, side, 0)
            + b"\x02\x02\x4c\x01\x00;"
        )
    if form == "tiff":
        tags = (
            (256, 4, side),
            (257, 4, side),
            (258, 3, 8),
            (259, 3, 1),
            (262, 3, 1),
            (273, 4, 8),
            (278, 4, side),
            (279, 4, 9),
        )
        entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
        return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)
    if form == "webp":
        canvas = struct.pack("<I", side - 1)[:3]
        body = (
            b"WEBPVP8X"
            + struct.pack("<I", 10)
            + bytes(4)
            + canvas
            + canvas
            + b"VP8L"
            + struct.pack("<I", 8)
            + b"\x2f"
            + bytes(7)
        )
        return b"RIFF" + struct.pack("<I", len(body)) + body
    frame = struct.pack(">BHHB", 8, side, side, 3) + b"\x01\x11\x00\x02\x11\x00\x03\x11\x00"
    return (
        b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xda\x00\x02" + bytes(50) + b"\xff\xd9"
    )


def _zeros() -> bytes:
    return zlib.compress(bytes(10**6))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text_bomb(case: Case) -> Result:
    """A PNG whose description, or colour profile, is hundreds of megabytes of nothing."""
    folder = case.folder / "set"
    shutil.copytree(case.material / "pictures", folder)
    data = (folder / "0.png").read_bytes()
    packed = zlib.compress(bytes(200 * 2**20), 1)
    kind = case.random.choice((b"zTXt", b"iCCP", b"iTXt"))
    text = b"x\0\0" + packed if kind != b"iTXt" else b"x\0\x01\0\0\0" + packed
    (folder / "0.png").write_bytes(data[:33] + _chunk(kind, text) + data[33:])
    return _judged(lambda: _read(folder), ("0.png",), kind.decode())


def zip_bomb(case: Case) -> Result:
    """A zip of a few megabytes with an image of gigabytes, which may say that it is small."""
    path = case.folder / "set.zip"
    shutil.copy(case.material / "zeros.zip", path)
    with zipfile.ZipFile(path, "a") as archive:
        for file in (case.material / "pictures").iterdir():
            archive.write(file, file.name)
    return _judged(lambda: _read(path), ("bomb.png",), "zip bomb")


def array_bomb(case: Case) -> Result:
    """Arrays that say they are larger than any memory."""
    path = case.folder / case.random.choice(("set.npy", "set.npz"))
    shape = case.random.choice(((10**9, 8, 8, 3), (10**15, 8, 8, 3), (2**62, 8, 8), (-1, 8, 8, 3), (10**7, 8, 8, 3)))
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(1000)
    if path.suffix == ".npy":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", data)
    return _judged(lambda: _read(path), (str(path), "memory"), f"{path.suffix} of {shape}")


def checkpoint_bomb(case: Case) -> Result:
    """An archive of PyTorch's whose tensors are packed zeros, or that says it is large."""
    path = case.folder / "bomb.pt"
    torch.save({"model": {"x": torch.zeros(10)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = [(part.filename, archive.read(part)) for part in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in parts:
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
                for _ in range(40 if "/data/" in name else 0):
                    member.write(bytes(2**24))
    result = _judged(lambda: load_model(path), (str(path),), "checkpoint bomb")
    return Result(Verdict.LET_IN, result.note) if result.verdict is Verdict.RESOLVED else result


ATTACKS = (
    zip_that_climbs,
    folder_of_links,
    folder_of_links,
    store_that_climbs,
    huge_header,
    huge_header,
    text_bomb,
    zip_bomb,
    array_bomb,
    checkpoint_bomb,
)
