"""Folders, zips and LMDBs: what counts as an image, and what is said of what can't be read."""

import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stand_ins import file_bytes, image_folder, noise, published_lmdb, smooth, write_lmdb, zipped

from nvae.core.errors import UserError
from nvae.data.arrays import ArrayFile, ArraySource, Joined
from nvae.data.databases import LmdbSource
from nvae.data.decoding import BadImage, Shaping
from nvae.data.images import BadImagesError, read_all
from nvae.data.sources import FolderSource, Shaped, Source, ZipSource, folder_listing, zip_members


def test_a_folder_is_searched_at_any_depth_and_in_one_order(tmp_path: Path) -> None:
    image_folder(tmp_path, ["b.png", "a/z.PNG", "a/b/c.jpeg", "d.webp", "notes.txt"])
    assert folder_listing(tmp_path).images == ["a/b/c.jpeg", "a/z.PNG", "b.png", "d.webp"]


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    image_folder(tmp_path, ["a.png", "._a.png", ".cache/b.png", "__MACOSX/a.png"])
    assert folder_listing(tmp_path).images == ["a.png"]


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    image_folder(tmp_path / "elsewhere", ["a.png"])
    image_folder(tmp_path / "set", ["b.png"])
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "set")
    assert folder_listing(tmp_path / "set").images == ["b.png", "link/a.png"]


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path, ["a.png", "locked/b.png"])
    scandir = os.scandir

    def refuse(path: str) -> Iterator[Any]:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        folder_listing(tmp_path)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    """Which nobody may ever write to."""
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadImage, match="not a file"):
        FolderSource(tmp_path, ["a.png"]).load(0)


def test_a_bomb_is_told_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(BadImage, match="1,073,741,824 bytes"):
        FolderSource(tmp_path, ["a.png"]).load(0)
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w", force_zip64=True) as member,
    ):
        for _ in range(33):
            member.write(bytes(2**24))
    with pytest.raises(BadImage, match="553,648,128 bytes"):
        ZipSource(tmp_path / "a.zip", ["a.png"]).load(0)


@pytest.mark.parametrize("shape", [(10**15, 8, 8, 3), (-1, 8, 8), (3, 8, 8, 3)])
def test_an_array_that_says_it_is_larger_than_its_file_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 8, 8, 3), np.uint8))
    header = (tmp_path / "a.npy").read_bytes()[10:128]
    changed = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes().replace(header, changed))
    with pytest.raises(UserError, match=r"a\.npy.*(bytes, not those of|has shape)"):
        ArrayFile(tmp_path / "a.npy")


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BadImage, match="cannot be read: Permission denied"):
        FolderSource(tmp_path, ["a.png"]).load(0)


def test_a_zip_reads_as_the_folder_it_holds(tmp_path: Path) -> None:
    names = ["set/a.png", "set/b/c.png"]
    root = image_folder(tmp_path / "files", names)
    path = zipped(tmp_path / "x.zip", {name: (root / name).read_bytes() for name in names})
    from_zip, from_folder = ZipSource(path, zip_members(path)), FolderSource(root, folder_listing(root).images)
    assert from_zip.names == from_folder.names
    for i in range(2):
        assert np.array_equal(np.asarray(from_zip.load(i)), np.asarray(from_folder.load(i)))


def test_a_truncated_zip_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.png": file_bytes(smooth(8, 8))})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"x\.zip is damaged, or not a zip"):
        zip_members(path)


def test_a_damaged_member_of_a_zip_is_a_bad_image(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.png": file_bytes(smooth(8, 8))})
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    with pytest.raises(BadImage, match=r"cannot be read from x\.zip: Bad CRC-32"):
        ZipSource(path, ["a.png"]).load(0)


def test_a_published_lmdb_of_raw_squares_keeps_their_pixels(tmp_path: Path) -> None:
    images = noise(12, 8, 8, 3)
    source = LmdbSource.open(published_lmdb(tmp_path / "train.lmdb", [image.tobytes() for image in images]))
    assert np.array_equal(np.stack([np.asarray(source.load(i)) for i in range(12)]), images)


def test_a_published_lmdb_of_image_files_is_decoded(tmp_path: Path) -> None:
    pictures = [smooth(20, 20, i) for i in range(3)]
    source = LmdbSource.open(published_lmdb(tmp_path / "train.lmdb", map(file_bytes, pictures)))
    assert [np.array_equal(source.load(i), p) for i, p in enumerate(pictures)] == [True] * 3


def test_a_single_image_file_whose_length_is_three_squares_is_still_a_file(tmp_path: Path) -> None:
    data = file_bytes(smooth(20, 20))
    side = next(side for side in range(10**3) if 3 * side**2 >= len(data))
    path = write_lmdb(tmp_path / "x.lmdb", {b"0": data + bytes(3 * side**2 - len(data))})
    assert LmdbSource.open(path).load(0).size == (20, 20)


def test_the_length_of_an_lmdb_is_its_number_of_entries(tmp_path: Path) -> None:
    """Key "10" sorts before "2": positions are numbers, not places in the file."""
    path = published_lmdb(tmp_path / "train.lmdb", [noise(4, 4, 3, seed=i).tobytes() for i in range(11)])
    source = LmdbSource.open(path)
    assert (len(source), source.name(10)) == (11, "train.lmdb/10")


def test_a_missing_key_of_an_lmdb_is_named(tmp_path: Path) -> None:
    values = {b"%d" % i: noise(4, 4, 3).tobytes() for i in (0, 1, 2, 4, 5)}
    images = Shaped(LmdbSource.open(write_lmdb(tmp_path / "train.lmdb", values)), Shaping(4, 3))
    with pytest.raises(BadImagesError, match=r"train\.lmdb/3: no such key in the LMDB"):
        read_all(images)


def test_an_odd_entry_of_a_raw_lmdb_is_a_bad_image(tmp_path: Path) -> None:
    values = [noise(4, 4, 3).tobytes()] * 40
    values[1] = b"short"  # not among the sixteen that are looked at first
    source = LmdbSource.open(published_lmdb(tmp_path / "train.lmdb", values))
    with pytest.raises(BadImage, match="5 bytes; other entries are raw RGB of 4×4 pixels"):
        source.load(1)


def test_a_folder_that_is_no_lmdb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.lmdb").mkdir()
    with pytest.raises(UserError, match=r"x\.lmdb cannot be opened as an LMDB"):
        LmdbSource.open(tmp_path / "x.lmdb")


def test_an_empty_lmdb_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an LMDB without entries"):
        LmdbSource.open(write_lmdb(tmp_path / "x.lmdb", {}))


def test_two_sources_share_an_lmdb(tmp_path: Path) -> None:
    path = published_lmdb(tmp_path / "train.lmdb", [noise(4, 4, 3).tobytes()] * 2)
    first, second = LmdbSource.open(path), LmdbSource.open(path)
    assert first.load(0).tobytes() == second.load(1).tobytes()


def test_sources_travel_to_other_processes_after_use(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "files", ["a.png"])
    archive = zipped(tmp_path / "x.zip", {"a.png": (root / "a.png").read_bytes()})
    database = write_lmdb(tmp_path / "x.lmdb", {b"a": (root / "a.png").read_bytes()})
    for source in (FolderSource(root, ["a.png"]), ZipSource(archive, ["a.png"]), LmdbSource.open(database)):
        before = source.load(0).tobytes()
        assert pickle.loads(pickle.dumps(source)).load(0).tobytes() == before


def test_every_bad_image_is_named_at_once(tmp_path: Path) -> None:
    image_folder(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").write_text("text")
    images = Shaped(FolderSource(tmp_path, folder_listing(tmp_path).images), Shaping(32, 3))
    with pytest.raises(BadImagesError) as caught:
        read_all(images)
    assert caught.value.problems == ["b.png: empty file", "c.png: not a PNG, JPEG, WebP, BMP, TIFF or GIF image"]
    assert "2 images can't be used" in str(caught.value)


def test_bad_images_are_found_among_many(tmp_path: Path) -> None:
    """Threads read 64 at a time."""
    names = [f"{i:03d}.png" for i in range(200)]
    image_folder(tmp_path, names, size=8)
    for bad in (names[3], names[150]):
        (tmp_path / bad).write_bytes(b"")
    with pytest.raises(BadImagesError) as caught:
        read_all(Shaped(FolderSource(tmp_path, names), Shaping(8, 3)))
    assert caught.value.problems == ["003.png: empty file", "150.png: empty file"]


# ------------------------------------------------------------------------------------------------- names, links, states


def test_a_member_that_stands_twice_in_a_zip_is_read_once_and_the_later(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for colour in ("red", "blue"):
            file.writestr("a.png", file_bytes(Image.new("RGB", (1, 1), colour)))
    assert zip_members(path) == ["a.png"]
    assert ZipSource(path, ["a.png"]).load(0).getpixel((0, 0)) == (0, 0, 255)


def test_a_member_with_backslashes_is_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"set\\a.png": file_bytes(smooth(8, 8))})
    assert ZipSource(path, zip_members(path)).load(0).size == (8, 8)


def test_a_file_whose_name_is_no_utf8_is_read_and_named_escaped(tmp_path: Path) -> None:
    image_folder(tmp_path, ["caf\udce9.png"], size=8)
    images = Shaped(FolderSource(tmp_path, folder_listing(tmp_path).images), Shaping(8, 3))
    assert (len(read_all(images)), images.name(0)) == (1, "caf\\xe9.png")


@pytest.mark.parametrize("turned", [False, True])
def test_which_of_two_ways_leads_to_a_folder_does_not_depend_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turned: bool
) -> None:
    image_folder(tmp_path, ["real/a.png"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    walk = os.walk

    def in_an_order(*args: Any, **options: Any) -> Iterator[Any]:
        for folder, below, files in walk(*args, **options):
            below.sort(reverse=turned)
            yield folder, below, files

    monkeypatch.setattr(os, "walk", in_an_order)
    assert folder_listing(tmp_path).images == ["link/a.png"]


def sources(tmp_path: Path, size: int) -> list[Source]:
    """The same names, and images of a side."""
    root = image_folder(tmp_path / f"files {size}", ["a.png", "b.png"], size=size)
    data = {name: (root / name).read_bytes() for name in ("a.png", "b.png")}
    pixels = noise(2, size, size, 3)
    np.save(tmp_path / f"{size}.npy", pixels)
    np.savez(tmp_path / f"{size}.npz", images=pixels)
    archive = zipped(tmp_path / f"{size}.zip", data)
    database = write_lmdb(tmp_path / f"{size}.lmdb", {name.encode(): value for name, value in data.items()})
    return [
        FolderSource(root, ["a.png", "b.png"]),
        ZipSource(archive, ["a.png", "b.png"]),
        LmdbSource.open(database),
        ArrayFile(tmp_path / f"{size}.npy"),
        ArrayFile(tmp_path / f"{size}.npz", "images"),
        ArraySource(pixels, "x"),
        Joined([ArraySource(pixels, "x")]),
    ]


def test_the_state_of_a_source_tells_its_images_from_others(tmp_path: Path) -> None:
    for one, other in zip(sources(tmp_path, 8), sources(tmp_path, 9), strict=True):
        assert one.state() == one.take([0, 1]).state()
        assert one.state() != other.state()
        assert one.state() != one.take([0]).state()
