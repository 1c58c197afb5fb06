"""Classes, from each kind of source to the batch."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_ins
import torch
from stand_ins import file_bytes, image_folder, noise, published_lmdb, smooth, zipped

from nvae.data.config import DataConfig
from nvae.data.labels import label_array
from nvae.data.loading import TrainingStream, evaluation_batches
from nvae.data.preparation import prepare
from nvae.data.sets import open_images
from nvae.data.splits import Split

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*figures on a part of it are not comparable")
PETS = ["train/cat/0.png", "train/dog/0.png", "train/dog/1.png", "test/bird/0.png", "test/dog/2.png"]


def labels(split: Split, **fields: Any) -> list[int]:
    found: list[int] = open_images(DataConfig(**fields), split).labels.tolist()
    return found


def test_the_digits_have_theirs() -> None:
    from sklearn.datasets import load_digits

    order = np.random.RandomState(0).permutation(1797)
    assert labels("test", name="digits") == load_digits().target[order[1500:]].tolist()


def test_mnists_are_read(tmp_path: Path) -> None:
    stand_ins.mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:8] + bytes(range(10)) + bytes([3, 1]))
    assert labels("train", name="mnist", path=tmp_path) == [*range(10), 3, 1]


def test_three_stacked_digits_spell_a_number(tmp_path: Path) -> None:
    stand_ins.mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:8] + bytes(range(10)) + bytes([3, 1]))
    digits = np.array([*range(10), 3, 1])
    orders = [np.random.RandomState(colour).permutation(12) for colour in range(3)]
    spelt = [100 * digits[orders[0][i]] + 10 * digits[orders[1][i]] + digits[orders[2][i]] for i in range(12)]
    assert labels("train", name="stacked_mnist", path=tmp_path) == spelt


def test_cifar10s_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.cifar10(tmp_path, monkeypatch)
    assert labels("test", name="cifar10", path=tmp_path) == [0] * 4


def test_imagenets_begin_with_one_in_its_files_and_with_zero_here(tmp_path: Path) -> None:
    stand_ins.imagenet_npz(tmp_path, 32)
    assert labels("validation", name="imagenet_32", path=tmp_path) == [0] * 3


def test_sub_folders_are_classes_the_same_in_every_split(tmp_path: Path) -> None:
    image_folder(tmp_path, PETS)
    found = {split: labels(split, path=tmp_path) for split in ("train", "test")}  # type: ignore[arg-type]
    assert found == {"train": [1, 2, 2], "test": [0, 2]}


def test_sub_folders_of_a_zip_are_classes_too(tmp_path: Path) -> None:
    picture = file_bytes(smooth(32, 32))
    path = zipped(tmp_path / "x.zip", {f"pets/{name}": picture for name in PETS})
    found = {split: labels(split, path=path) for split in ("train", "test")}  # type: ignore[arg-type]
    assert found == {"train": [1, 2, 2], "test": [0, 2]}


def test_classes_follow_their_images_through_a_hold_out(tmp_path: Path) -> None:
    image_folder(tmp_path, [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(10)])
    images = open_images(DataConfig(path=tmp_path, holdout=0.3, memory=0), "test")
    kinds = ["cat", "dog"]
    assert [images.name(i).split("/")[0] for i in range(6)] == [kinds[k] for k in images.labels.tolist()]  # type: ignore[attr-defined]


def test_listed_images_are_of_their_folders(tmp_path: Path) -> None:
    image_folder(tmp_path, ["cat/a.png", "dog/b.png", "dog/c.png"])
    (tmp_path / "train.txt").write_text("dog/b.png\ncat/a.png")
    (tmp_path / "test.txt").write_text("dog/c.png")
    assert labels("train", path=tmp_path) == [1, 0]


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["all/a.png", "all/b.png"]], ids=["none", "a single folder"])
def test_without_two_folders_there_are_no_classes(tmp_path: Path, names: list[str]) -> None:
    image_folder(tmp_path, names)
    assert labels("test", path=tmp_path, holdout=1) == [-1, -1]


def test_an_image_outside_the_classes_is_of_none(tmp_path: Path) -> None:
    image_folder(tmp_path, ["a.png", "cat/b.png", "dog/c.png"])
    assert labels("test", path=tmp_path, holdout=1) == [-1, 0, 1]


def test_folders_of_a_thousand_faces_are_no_classes(tmp_path: Path) -> None:
    image_folder(tmp_path, [f"0{i // 5}000/{i}.png" for i in range(10)], size=256)
    assert set(labels("train", name="ffhq_256", path=tmp_path)) == {-1}


@pytest.mark.parametrize(
    ("images", "named", "found"),
    [
        ("images", "labels", [2, 0, 1]),
        ("arr_0", "y", [2, 0, 1]),
        ("data", "targets", [2, 0, 1]),
        ("images", "other", [-1] * 3),
    ],
)
def test_an_array_beside_the_images_names_their_classes(
    tmp_path: Path, images: str, named: str, found: list[int]
) -> None:
    np.savez(tmp_path / "x.npz", **{images: noise(3, 32, 32), named: np.array([[2], [0], [1]])})
    assert labels("test", path=tmp_path / "x.npz", holdout=1) == found


@pytest.mark.parametrize(
    "odd", [np.zeros(4, dtype=int), np.zeros(3), np.zeros((3, 2), dtype=int), np.array([-1, 0, 1])]
)
def test_an_array_that_is_no_classes_says_nothing(tmp_path: Path, odd: Any) -> None:
    np.savez(tmp_path / "x.npz", images=noise(3, 32, 32), labels=odd)
    assert labels("test", path=tmp_path / "x.npz", holdout=1) == [-1] * 3


@pytest.mark.parametrize(
    ("images", "named"), [("x_train", "y_train"), ("train_images", "train_labels"), ("train", "train_labels")]
)
def test_arrays_of_one_split_belong_together(images: str, named: str) -> None:
    assert label_array(images, ["y_test", "test_labels", images, named]) == named


def test_an_lmdb_has_none(tmp_path: Path) -> None:
    published_lmdb(tmp_path / "x.lmdb", [noise(32, 32, 3, seed=i).tobytes() for i in range(4)])
    assert labels("test", path=tmp_path / "x.lmdb", holdout=1) == [-1] * 4


# ------------------------------------------------------------------------------------------------------ to the batches


@pytest.mark.parametrize("memory", [2048, 0], ids=["in memory", "read one by one"])
def test_a_store_keeps_them_where_images_are_left_out(tmp_path: Path, memory: int) -> None:
    image_folder(tmp_path / "images", [*PETS, "train/cat/9.png"])
    (tmp_path / "images" / "train" / "cat" / "0.png").write_bytes(b"")
    prepare(DataConfig(path=tmp_path / "images", size=16), tmp_path / "store", processes=1, progress=False)
    assert labels("train", path=tmp_path / "store", size=16, memory=memory) == [1, 2, 2]


def test_a_store_of_before_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvae.data import store

    save = store.save
    monkeypatch.setattr(
        store,
        "save",
        lambda content, **rest: save({k: v for k, v in content.items() if k not in ("labels", "seal")}, **rest),
    )
    image_folder(tmp_path / "images", PETS)
    prepare(DataConfig(path=tmp_path / "images", size=16), tmp_path / "store", processes=1, progress=False)
    assert labels("train", path=tmp_path / "store", size=16) == [-1] * 3


@pytest.mark.parametrize("memory", [2048, 0], ids=["in memory", "read one by one"])
def test_batches_carry_the_classes_of_their_images(tmp_path: Path, memory: int) -> None:
    pixels = np.zeros((7, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0] = 20 * np.arange(7)
    np.save(tmp_path / "x.npy", pixels)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(7))
    config = DataConfig(path=tmp_path / "x.npz", size=8, channels=1, batch=2, holdout=0.3)
    prepare(config, tmp_path / "store", processes=1, progress=False)
    config = config.model_copy(update={"path": tmp_path / "store", "memory": memory, "workers": 0})
    train, test = (open_images(config, split) for split in ("train", "test"))  # type: ignore[arg-type]
    shown = [*islice(TrainingStream(train, config, seed=0, device=CPU).batches(0), 5)]
    shown += evaluation_batches(test, config, batch=2, device=CPU, seed=0)
    for batch in shown:
        assert batch.labels.dtype == torch.int64
        assert torch.equal((255 * batch.images[:, 0, 0, 0] / 20).round().long(), batch.labels)
