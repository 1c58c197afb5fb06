"""The store: what it holds, what it leaves out and says, and that half of one is none."""

import json
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_ins
import torch
from PIL import Image
from stand_ins import file_bytes, image_folder, noise

from nvae.core.errors import UserError
from nvae.data import preparation
from nvae.data.config import DataConfig
from nvae.data.images import fingerprint
from nvae.data.preparation import prepare, read_config, verify
from nvae.data.sets import open_images, open_unread
from nvae.data.splits import SPLITS, Split
from nvae.data.store import Index

from .test_decoding import BAD

NAMES = [f"{i:02d}.png" for i in range(20)]


def config(path: Path, **fields: Any) -> DataConfig:
    return DataConfig(path=path, **{"size": 16, **fields})


def prepared(source: Path, out: Path, **fields: Any) -> Index:
    return prepare(config(source, **fields), out, processes=1, progress=False)


def pixels(path: Path, split: Split = "train", **fields: Any) -> torch.Tensor:
    images = open_images(config(path, **fields), split)
    return images.read(range(len(images)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images", NAMES, size=40)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of 16×16 a shard."""
    monkeypatch.setattr(preparation, "SHARD_BYTES", 2 * 3 * 16**2)


@pytest.mark.parametrize("size", [16, 72], ids=["raw", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_store_holds_the_pixels_of_its_source(tmp_path: Path, size: int, channels: int) -> None:
    folder = image_folder(tmp_path / "images", NAMES[:5], size=100)
    fields = {"size": size, "channels": channels}
    prepared(folder, tmp_path / "store", **fields)
    for split in ("train", "test"):
        stored, direct = (pixels(path, split, **fields) for path in (tmp_path / "store", folder))  # type: ignore[arg-type]
        assert torch.equal(stored, direct)


def test_a_store_and_its_source_have_one_fingerprint(folder: Path, tmp_path: Path) -> None:
    prepared(folder, tmp_path / "store", crop="random")
    for split in SPLITS:
        stored, direct = (open_unread(config(path, crop="random"), split) for path in (tmp_path / "store", folder))
        assert fingerprint(stored, len(stored)) == fingerprint(direct, len(direct))


def test_large_images_are_stored_smaller_than_raw(tmp_path: Path) -> None:
    prepared(image_folder(tmp_path / "images", NAMES[:5], size=100), tmp_path / "store", size=72)
    assert sum(path.stat().st_size for path in (tmp_path / "store").iterdir()) < 5 * 3 * 72**2


@pytest.mark.usefixtures("small_shards")
def test_several_processes_write_what_one_writes(folder: Path, tmp_path: Path) -> None:
    one = prepared(folder, tmp_path / "one")
    several = prepare(config(folder), tmp_path / "several", processes=3, progress=False)
    assert one.splits == several.splits


@pytest.mark.usefixtures("small_shards")
def test_images_of_many_shards_are_read_in_order(folder: Path, tmp_path: Path) -> None:
    prepared(folder, tmp_path / "store")
    assert len(list((tmp_path / "store").glob("train-*.safetensors"))) == 9
    assert torch.equal(pixels(tmp_path / "store", memory=0), pixels(folder))


def test_a_store_keeps_levels_and_splits(tmp_path: Path) -> None:
    index = prepare(DataConfig(name="digits"), tmp_path / "store", processes=1, progress=False)
    assert (index.levels, {split: part.images for split, part in index.splits.items()}) == (
        16,
        {"train": 1500, "test": 297},
    )


def test_a_store_with_three_splits_keeps_them_apart(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", ["train/a.png", "val/a.png", "test/a.png"], size=16)
    index = prepared(folder, tmp_path / "store")
    assert set(index.splits) == {"train", "validation", "test"}


def test_equal_lengths_do_not_make_validation_the_test_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train=noise(3, 8, 8), val=noise(2, 8, 8, seed=1), test=noise(2, 8, 8, seed=2))
    index = prepared(tmp_path / "x.npz", tmp_path / "store", size=8, channels=1)
    assert set(index.splits) == {"train", "validation", "test"}


def test_imagenets_batches_become_a_store_that_is_read_image_by_image(tmp_path: Path) -> None:
    stand_ins.imagenet_npz(tmp_path / "npz", 32)
    fields = {"name": "imagenet_32", "size": 32}
    with pytest.warns(UserWarning, match="the set has 1281167"):
        direct = pixels(tmp_path / "npz", **fields)
    prepared(tmp_path / "npz", tmp_path / "store", **fields)
    assert torch.equal(pixels(tmp_path / "store", memory=0, size=32), direct)


def test_random_crops_are_cut_from_a_store_as_from_its_source(tmp_path: Path) -> None:
    stand_ins.lsun(tmp_path / "lsun", "tower")
    fields = {"name": "lsun_tower", "size": 128}
    prepared(tmp_path / "lsun", tmp_path / "store", **fields)
    crops = [(0.5, across) for across in (0.0, 0.25, 0.5, 0.75, 1.0)]
    with pytest.warns(UserWarning):
        store, source = (open_images(config(p, **fields), "train") for p in (tmp_path / "store", tmp_path / "lsun"))
    assert store.movable
    assert torch.equal(store.read(range(5), crops), source.read(range(5), crops))


# --------------------------------------------------------------------------------------------------------- bad images


@pytest.fixture
def with_bad(folder: Path) -> Path:
    """Twenty good images, and one of every kind of bad ones."""
    for kind, (make, _) in BAD.items():
        (folder / f"{kind}.png").write_bytes(make())
    (folder / "a pixel.png").write_bytes(file_bytes(Image.new("RGB", (1, 1))))
    return folder


def test_bad_images_are_left_out_and_listed_with_reasons(with_bad: Path, tmp_path: Path) -> None:
    index = prepared(with_bad, tmp_path / "store", holdout=0.5)
    listed = dict(entry for part in index.splits.values() for entry in part.skipped)
    assert set(listed) == {f"{kind}.png" for kind in [*BAD, "a pixel"]}
    assert all(reason in listed[f"{kind}.png"] for kind, (_, reason) in BAD.items())
    assert sum(part.images for part in index.splits.values()) == 20


def test_what_is_left_out_is_printed(with_bad: Path, tmp_path: Path) -> None:
    lines = "\n".join(prepared(with_bad, tmp_path / "store", holdout=0.5).lines())
    assert "  text.png: not a PNG, JPEG, WebP, BMP, TIFF or GIF image" in lines


def test_bad_images_are_fatal_on_request(with_bad: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: [\w ]+\.png: [^\n]+$"):
        prepare(config(with_bad, holdout=0.5), tmp_path / "store", processes=1, fatal=True, progress=False)
    assert not list((tmp_path / "store").glob("*.json"))


def test_what_a_fatal_run_wrote_is_nothing_half(with_bad: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        prepare(config(with_bad, holdout=0.5), tmp_path / "store", processes=1, fatal=True, progress=False)
    index = prepared(with_bad, tmp_path / "store", holdout=0.5)
    assert sum(part.images for part in index.splits.values()) == 20


def test_a_set_of_bad_images_alone_is_no_set(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", NAMES[:4], size=8)
    with pytest.raises(UserError, match=r"no train image can be used.* 8×8 pixels, smaller than size 16"):
        prepared(tmp_path / "images", tmp_path / "store")


# ------------------------------------------------------------------------------------------------ resuming, half stores


def test_a_finished_store_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    prepared(folder, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    prepared(folder, tmp_path / "store")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == before


def test_other_settings_do_not_overwrite_a_store(folder: Path, tmp_path: Path) -> None:
    prepared(folder, tmp_path / "store")
    with pytest.raises(UserError, match="holds a store with size 16, asked is 8"):
        prepared(folder, tmp_path / "store", size=8)


def test_a_folder_with_other_things_is_not_taken_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other things, as 'thesis\.tex'"):
        prepared(folder, tmp_path / "store")


KILLED = """
    import os, signal
    from pathlib import Path
    from nvae.data import preparation
    from nvae.data.config import DataConfig

    write, written = preparation.write_shard, []

    def write_three(path, *rest):
        if len(written) == 3:
            path.with_name(f".{path.name}.half").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        write(path, *rest)

    preparation.write_shard = write_three
    preparation.SHARD_BYTES = 2 * 3 * 16**2
    preparation.prepare(DataConfig(path=Path(@source), size=16), Path(@out), processes=1, progress=False)
"""


@pytest.mark.usefixtures("small_shards")
def test_a_killed_preparation_is_no_store_and_is_continued(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    script = textwrap.dedent(KILLED).replace("@source", repr(str(folder))).replace("@out", repr(str(store)))
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in store.glob("[!.]*")}
    assert len(finished) == 3
    with pytest.raises(UserError, match=r"preparation did not finish; run prepare_data\.py again"):
        open_images(config(store), "train")
    prepared(folder, store)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list(store.glob(".*"))
    assert torch.equal(pixels(store), pixels(folder))


@pytest.mark.usefixtures("small_shards")
def test_shards_of_other_images_are_not_continued(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise KeyboardInterrupt

    store = tmp_path / "store"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "write_index", never)
        prepared(folder, store)
    other = image_folder(tmp_path / "other", NAMES[5:12], size=30)
    prepared(other, store)
    assert torch.equal(pixels(store), pixels(other))
    assert len(list(store.glob("*.safetensors"))) == 4


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4000 bytes; for no longer than needed, because the test's own output may be a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_in_one_line(folder: Path, tmp_path: Path) -> None:
    told = r"^[^\n]*can't be written: File too large; finished files are kept[^\n]*$"
    with pytest.raises(UserError, match=told), full_disk():
        prepared(folder, tmp_path / "store")


def test_a_full_disk_leaves_nothing_half_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError), full_disk():
        prepared(folder, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- verifying


@pytest.fixture(params=[16, 72], ids=["raw", "webp"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = image_folder(tmp_path / "images", NAMES[:6], size=100)
    prepared(folder, tmp_path / "store", size=request.param)
    return tmp_path / "store"


def checked(store: Path) -> list[str]:
    return verify(store, processes=1, progress=False)


def test_a_whole_store_verifies(store: Path) -> None:
    assert checked(store) == []


def test_a_changed_byte_is_found_by_verifying_and_by_reading(store: Path) -> None:
    path = store / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # the images come last in the file
    path.write_bytes(content)
    assert len(checked(store)) == 1
    size = json.loads((store / "store.json").read_text())["settings"]["size"]
    with pytest.raises(UserError, match="train-00000"):
        pixels(store, size=size)


def test_a_truncated_shard_is_found(store: Path) -> None:
    path = store / "test-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged or truncated" in checked(store)[0]
    size = json.loads((store / "store.json").read_text())["settings"]["size"]
    with pytest.raises(UserError, match="test-00000"):
        pixels(store, "test", size=size)


def test_a_missing_shard_is_found(store: Path) -> None:
    (store / "test-00000.safetensors").unlink()
    assert "missing, damaged or truncated" in checked(store)[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "nvae-images", "version": 1}'])
def test_a_damaged_index_is_refused(store: Path, text: str) -> None:
    (store / "store.json").write_text(text)
    with pytest.raises(UserError, match=r"store\.json: damaged"):
        open_images(config(store), "train")


def test_a_store_of_another_version_is_refused(store: Path) -> None:
    (store / "store.json").write_text('{"format": "nvae-images", "version": 9}')
    with pytest.raises(UserError, match="is of format nvae-images 9, read is nvae-images 1"):
        open_images(config(store), "train")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"size": 8}, r"data\.size: is 8, but the store .* was prepared with 16"),
        ({"channels": 1}, r"data\.channels: is 1, .* with 3"),
        ({"crop": "random"}, r"data\.crop: is random, .* with centre"),
        ({"name": "celeba_64", "size": 16}, r"data\.name: is celeba_64, .* with images"),
    ],
    ids=["size", "channels", "crop", "name"],
)
def test_a_store_that_disagrees_with_the_config_says_in_what(
    folder: Path, tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    prepared(folder, tmp_path / "store")
    with pytest.raises(UserError, match=problem):
        open_images(config(tmp_path / "store", **fields), "train")


# -------------------------------------------------------------------------------------------------------- configuring


def test_a_source_is_a_path_or_the_name_of_a_set(tmp_path: Path) -> None:
    assert read_config("digits", []).name == "digits"
    assert read_config(str(tmp_path), ["size=16"]).source == tmp_path


def test_a_recipe_gives_its_data_section(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("data: {size: 24, channels: 1}\nmodel: {}\n")
    config = read_config(str(tmp_path), ["size=16"], tmp_path / "x.yaml")
    assert (config.size, config.channels) == (16, 1)


def test_a_store_brings_its_own_settings(store: Path) -> None:
    size = json.loads((store / "store.json").read_text())["settings"]["size"]
    assert read_config(str(store), []).size == size


def test_a_mistyped_field_is_named() -> None:
    with pytest.raises(UserError, match="siez: unknown field; did you mean 'size'"):
        read_config("digits", ["siez=3"])


# --------------------------------------------------------------------------------------------- what else was there


def test_images_added_to_a_prepared_source_are_noticed(folder: Path, tmp_path: Path) -> None:
    prepared(folder, tmp_path / "store")
    image_folder(folder, ["new.png"], size=40)
    with pytest.raises(UserError, match="was prepared from other images: 18 for train, 19 now"):
        prepared(folder, tmp_path / "store")


def test_an_image_exchanged_in_a_prepared_source_is_noticed(folder: Path, tmp_path: Path) -> None:
    prepared(folder, tmp_path / "store")
    image_folder(folder, [NAMES[3]], size=50)
    with pytest.raises(UserError, match=r"was prepared from other images: .* others now"):
        prepared(folder, tmp_path / "store")


def test_splits_added_to_a_prepared_source_are_noticed(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images", ["train/a.png", "test/b.png"])
    prepared(source, tmp_path / "store")
    image_folder(source, ["val/c.png"])
    with pytest.raises(UserError, match=r"holds train, test, but .* has train, validation, test now"):
        prepared(source, tmp_path / "store")


def test_a_prepared_source_need_not_be_there_any_more(folder: Path, tmp_path: Path) -> None:
    index = prepared(folder, tmp_path / "store")
    folder.rename(tmp_path / "away")
    assert prepared(folder, tmp_path / "store") == index


def test_a_store_of_before_is_read_and_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    prepared(folder, tmp_path / "store")
    path = tmp_path / "store" / "store.json"
    content = json.loads(path.read_text())
    del content["settings"]["is_named"], content["unread"], content["seal"]
    for part in content["splits"].values():
        del part["doubtful"], part["state"]
    path.write_text(json.dumps(content))
    assert torch.equal(pixels(tmp_path / "store"), pixels(folder))
    prepared(folder, tmp_path / "store")
    assert json.loads(path.read_text()) == content


def test_files_that_were_not_read_are_printed(folder: Path, tmp_path: Path) -> None:
    (folder / "photo.heic").write_bytes(b"")
    lines = prepared(folder, tmp_path / "store").lines()
    assert lines[-1].startswith("1 file that may hold images is not read: .heic 1 (as photo.heic)")


def test_images_that_may_not_be_what_was_meant_are_printed(folder: Path, tmp_path: Path) -> None:
    dark = Image.fromarray(np.full((40, 40), 4000, dtype=np.uint16))
    (folder / "twelve.png").write_bytes(file_bytes(dark))
    index = prepared(folder, tmp_path / "store", holdout=0.5)
    assert sum(part.images for part in index.splits.values()) == 21
    assert any("twelve.png was taken, but a 16-bit image has no value above 4095" in line for line in index.lines())


def test_a_name_that_is_no_utf8_is_listed_escaped(folder: Path, tmp_path: Path) -> None:
    (folder / "caf\udce9.png").write_bytes(b"")
    (folder / "b\udce9.png").write_bytes((folder / NAMES[0]).read_bytes())
    index = prepared(folder, tmp_path / "store", holdout=0.5)
    assert [name for part in index.splits.values() for name, _ in part.skipped] == ["caf\\xe9.png"]
    assert "caf\\\\xe9.png" in (tmp_path / "store" / "store.json").read_text()


def test_an_unreadable_source_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"data\.path: .* cannot be read: Permission denied"):
        prepared(folder, tmp_path / "store")
