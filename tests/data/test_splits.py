"""Which images are for training and which for testing."""

from pathlib import Path

import numpy as np
import pytest
from stand_ins import image_folder, noise, published_lmdb, zipped

from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.own import own_images
from nvae.data.sources import FolderSource, Source
from nvae.data.splits import SPLITS, Split, hold_out

NAMES = [f"{i:03d}.png" for i in range(100)]


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def split(path: Path, which: Split, **fields: object) -> list[str]:
    return names(own_images(path, DataConfig(path=path, **fields)).of(which))  # type: ignore[arg-type]


def test_a_hold_out_takes_its_fraction_and_nothing_twice() -> None:
    whole = FolderSource(Path(), NAMES)
    train, test = names(hold_out(whole, 0.2, "train")), names(hold_out(whole, 0.2, "test"))
    assert len(test) == 20
    assert sorted(train + test) == NAMES


def test_a_hold_out_hardly_moves_when_images_are_added() -> None:
    before = set(names(hold_out(FolderSource(Path(), NAMES), 0.2, "test")))
    more = FolderSource(Path(), [*NAMES, *(f"new {i}.png" for i in range(10))])
    after = set(names(hold_out(more, 0.2, "test")))
    assert len(before - after) <= 4


def test_a_hold_out_leaves_at_least_one_image_on_either_side() -> None:
    pair = FolderSource(Path(), NAMES[:2])
    assert [len(hold_out(pair, fraction, "test")) for fraction in (0.01, 0.99)] == [1, 1]


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(UserError, match="one image alone"):
        hold_out(FolderSource(Path(), ["a.png"]), 0.1, "train")


@pytest.mark.parametrize("spelling", ["validation", "valid", "val", "dev", "Val"])
def test_subfolders_are_splits(tmp_path: Path, spelling: str) -> None:
    image_folder(tmp_path, ["train/a.png", "train/deep/b.png", f"{spelling}/c.png", "test/d.png"])
    found = {which: split(tmp_path, which) for which in SPLITS}
    assert found == {
        "train": ["train/a.png", "train/deep/b.png"],
        "validation": [f"{spelling}/c.png"],
        "test": ["test/d.png"],
    }


@pytest.mark.parametrize(("have", "want"), [("test", "validation"), ("validation", "test")])
def test_validation_and_test_stand_in_for_each_other(tmp_path: Path, have: str, want: Split) -> None:
    image_folder(tmp_path, ["train/a.png", f"{have}/b.png"])
    assert split(tmp_path, want) == [f"{have}/b.png"]


def test_training_images_never_stand_in(tmp_path: Path) -> None:
    image_folder(tmp_path, ["train/a.png"])
    with pytest.raises(UserError, match="has train, but no validation or test"):
        split(tmp_path, "test")


def test_pictures_of_trains_are_no_training_split(tmp_path: Path) -> None:
    image_folder(tmp_path, ["train/a.png", "car/b.png", "bus/c.png"])
    assert sorted(split(tmp_path, "train") + split(tmp_path, "test")) == ["bus/c.png", "car/b.png", "train/a.png"]


def test_the_files_of_a_folder_may_be_splits(tmp_path: Path) -> None:
    published_lmdb(tmp_path / "train.lmdb", [noise(4, 4, 3).tobytes()] * 3)
    published_lmdb(tmp_path / "validation.lmdb", [noise(4, 4, 3).tobytes()] * 2)
    assert (len(split(tmp_path, "train")), len(split(tmp_path, "test"))) == (3, 2)


def test_the_folders_in_a_zip_are_splits_below_a_common_one(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", dict.fromkeys(["set/train/a.png", "set/test/b.png", "set/readme.txt"], b""))
    assert (split(path, "train"), split(path, "validation")) == (["set/train/a.png"], ["set/test/b.png"])


def test_the_arrays_of_an_npz_are_splits(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train=noise(3, 4, 4), val=noise(2, 4, 4), train_labels=np.zeros(3))
    assert (len(split(tmp_path / "x.npz", "train")), len(split(tmp_path / "x.npz", "test"))) == (3, 2)


def test_an_npz_of_one_array_is_held_out_from(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", noise(10, 4, 4))
    assert (len(split(tmp_path / "x.npz", "train")), len(split(tmp_path / "x.npz", "test"))) == (9, 1)


def test_an_npz_of_unclear_arrays_says_how_to_name_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", first=noise(10, 4, 4), second=noise(10, 4, 4))
    with pytest.raises(UserError, match="holds the arrays first, second; call the images 'images'"):
        split(tmp_path / "x.npz", "train")


def test_list_files_beside_the_images_are_splits(tmp_path: Path) -> None:
    image_folder(tmp_path, ["a.png", "b/c.png", "d.png"])
    (tmp_path / "train.txt").write_text("b/c.png\n\n")
    (tmp_path / "test.txt").write_text("a.png\n")
    assert (split(tmp_path, "train"), split(tmp_path, "test")) == (["b/c.png"], ["a.png"])


def test_list_files_may_lie_elsewhere(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", dict.fromkeys(["a.png", "b.png"], b""))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("b.png\n")
    assert split(path, "train", lists=tmp_path / "lists") == ["b.png"]


def test_lists_that_share_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.png\nb.png\n")
    (tmp_path / "test.txt").write_text("b.png\n")
    with pytest.raises(UserError, match=r"share 1 images, as b\.png"):
        split(tmp_path, "test")


def test_a_list_that_names_an_image_twice_is_refused(tmp_path: Path) -> None:
    """It would count twice, in training or in a figure."""
    (tmp_path / "train.txt").write_text("a.png\nb.png\n.\\a.PNG\n")
    (tmp_path / "test.txt").write_text("c.png\n")
    with pytest.raises(UserError, match=r"^data\.lists: .*train\.txt names 1 images more than once, as a\.png$"):
        split(tmp_path, "train")


def test_a_list_in_windows_1252_names_images_in_utf8(tmp_path: Path) -> None:
    image_folder(tmp_path, ["é.png", "b.png"])
    (tmp_path / "train.txt").write_bytes("é.png\r\n".encode("cp1252"))
    (tmp_path / "test.txt").write_text("b.png")
    assert split(tmp_path, "train") == ["é.png"]


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(UserError, match=r"train\.txt names no images"):
        split(tmp_path, "train")


def test_a_folder_without_lists_is_refused_when_lists_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no train\.txt, validation\.txt or test\.txt"):
        split(tmp_path, "train", lists=tmp_path)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path / "missing", "missing does not exist; it may be a folder of PNG"),
        (lambda path: path, "has no images; looked for .png"),
        (lambda path: zipped(path / "x.zip", {"a.txt": b""}), r"x\.zip has no images"),
    ],
    ids=["missing", "empty folder", "zip without images"],
)
def test_a_path_without_images_says_what_was_looked_for(tmp_path: Path, make: object, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        split(make(tmp_path), "train")  # type: ignore[operator]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.tar is not a folder of PNG, JPEG, WebP, BMP, TIFF or GIF files"):
        split(tmp_path / "x.tar", "train")


# ----------------------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("b\\c.PNG\r\n", "utf-8"), ("./b/c.png\n", "utf-8"), ("b/c.png", "utf-8-sig"), ("b/c.png\n", "utf-16")],
    ids=["backslashes and capitals", "a dot", "a byte order mark", "two bytes a letter"],
)
def test_lists_of_other_systems_name_the_same_images(tmp_path: Path, text: str, encoding: str) -> None:
    image_folder(tmp_path, ["a.png", "b/c.png"])
    (tmp_path / "train.txt").write_bytes(text.encode(encoding))
    (tmp_path / "test.txt").write_text("a.png")
    assert split(tmp_path, "train") == ["b/c.png"]


def test_lists_that_share_an_image_under_two_spellings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a/b.png\n")
    (tmp_path / "TEST.TXT").write_text(".\\a\\b.PNG\n")
    with pytest.raises(UserError, match="share 1 images"):
        split(tmp_path, "test")


def test_a_list_names_members_of_a_zip_as_it_likes(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", dict.fromkeys(["set\\a.png", "set/b.png"], b""))
    (tmp_path / "train.txt").write_text("set/a.png\n.\\set\\b.png\n")
    assert split(path, "train", lists=tmp_path) == ["set/a.png", "set/b.png"]


def test_folders_in_a_zip_of_another_system_are_splits(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.ZIP", dict.fromkeys(["set\\train\\a.png", "set\\test\\b.png"], b""))
    assert (split(path, "train"), split(path, "test")) == (["set/train/a.png"], ["set/test/b.png"])


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    image_folder(tmp_path, ["train/a.png", "val/b.png", "validation/c.png"])
    with pytest.raises(UserError, match="both val and validation are validation images by their names"):
        split(tmp_path, "train")


def test_a_name_that_is_no_utf8_is_held_out_by_its_bytes() -> None:
    whole = FolderSource(Path(), [*NAMES, "caf\udce9.png"])
    assert sorted(names(hold_out(whole, 0.2, "train")) + names(hold_out(whole, 0.2, "test")))[-1] == "caf\udce9.png"


def test_a_hold_out_of_one_keeps_every_image(tmp_path: Path) -> None:
    image_folder(tmp_path, ["a.png"])
    assert split(tmp_path, "test", holdout=1) == split(tmp_path, "validation", holdout=1) == ["a.png"]
    with pytest.raises(UserError, match="has test, but no train"):
        split(tmp_path, "train", holdout=1)


def test_one_file_is_a_set_of_one_image(tmp_path: Path) -> None:
    image_folder(tmp_path, ["a.JPG"])
    assert split(tmp_path / "a.JPG", "test", holdout=1) == ["a.JPG"]


@pytest.mark.parametrize(
    ("train", "test"), [("x_train", "x_test"), ("X_train", "X_test"), ("train_images", "test_images")]
)
def test_arrays_of_keras_and_medmnist_are_splits(tmp_path: Path, train: str, test: str) -> None:
    labels = {"y_train": np.zeros(3), "test_labels": np.zeros(2)}
    np.savez(tmp_path / "x.NPZ", **{train: noise(3, 4, 4), test: noise(2, 4, 4)}, **labels)
    (path,) = tmp_path.iterdir()
    assert (len(split(path, "train")), len(split(path, "test"))) == (3, 2)


def test_labels_do_not_make_an_npz_of_one_array_unclear(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", faces=noise(10, 4, 4), labels=np.zeros(10))
    assert len(split(tmp_path / "x.npz", "train")) == 9


def test_one_image_as_an_array_is_told_from_many(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(32, 32, 3))
    with pytest.raises(UserError, match=r"has shape \(32, 32, 3\) \(this looks like one image"):
        split(tmp_path / "x.npy", "train")


# -------------------------------------------------------------------------------------------------------------- unread


def test_images_beside_the_splits_are_told(tmp_path: Path) -> None:
    image_folder(tmp_path, ["train/a.png", "test/b.png", "extra/c.png", "d.png"])
    found = own_images(tmp_path, DataConfig(path=tmp_path))
    assert sorted(found.unread) == ["d.png", "extra/c.png"]


def test_files_that_may_be_images_are_told_with_the_source(tmp_path: Path) -> None:
    image_folder(tmp_path, ["a.png", "b.png", "c.heic"])
    (tmp_path / "without").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "LICENSE").write_text("free")
    source = own_images(tmp_path, DataConfig(path=tmp_path)).of("train")
    assert list(source.unread) == ["c.heic", "without"]


def test_members_of_a_zip_beside_its_splits_are_told(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", dict.fromkeys(["train/a.png", "test/b.png", "c.png", "d.avif", "e.txt"], b""))
    assert own_images(path, DataConfig(path=path)).unread == ("c.png", "d.avif")
