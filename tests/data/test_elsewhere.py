"""What images at another path are: the set only where the set lies there, and all of them for testing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_ins
from stand_ins import image_folder, noise

from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.elsewhere import holds_training_images, images_at
from nvae.data.images import fingerprint
from nvae.data.named import COUNTS
from nvae.data.preparation import prepare
from nvae.data.sets import known_as, open_images
from nvae.data.store import Index, read_index, write_index

pytestmark = pytest.mark.filterwarnings("ignore:.*figures on a part of it are not comparable")
NAMES = [f"{i}.png" for i in range(20)]
CIFAR10 = DataConfig(name="cifar10", flip=True)


def everything_below(path: Path) -> set[Path]:
    return set(path.rglob("*"))


@pytest.mark.parametrize("name", ["cifar10", "mnist", "digits", "omniglot", "imagenet_32", "celeba_hq_256"])
def test_a_folder_of_ones_own_is_images_and_nothing_is_made_in_it(tmp_path: Path, name: Any) -> None:
    image_folder(tmp_path / "own", NAMES, size=256)
    before = everything_below(tmp_path)
    config = images_at(tmp_path / "own", DataConfig(name=name))
    assert (config.name, config.size, config.channels) == (
        "images",
        DataConfig(name=name).size,
        DataConfig(name=name).channels,
    )
    assert len(open_images(config, "test")) == 20
    assert known_as(config, "test") == "images"
    assert everything_below(tmp_path) == before


def test_a_file_is_a_subject(tmp_path: Path) -> None:
    image_folder(tmp_path, ["a.png"])
    assert len(open_images(images_at(tmp_path / "a.png", CIFAR10), "test")) == 1


def test_images_with_splits_of_their_own_keep_them(tmp_path: Path) -> None:
    image_folder(tmp_path, ["train/a.png", "train/b.png", "test/c.png"])
    assert len(open_images(images_at(tmp_path, CIFAR10), "test")) == 1


def test_a_download_elsewhere_is_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.cifar10(tmp_path, monkeypatch)
    assert images_at(tmp_path, CIFAR10) == CIFAR10.model_copy(update={"path": tmp_path})


def test_a_store_of_ones_own_images_is_measured_whole(tmp_path: Path) -> None:
    image_folder(tmp_path / "own", NAMES)
    prepare(DataConfig(path=tmp_path / "own"), tmp_path / "store", processes=1, progress=False)
    config = images_at(tmp_path / "store", CIFAR10)
    assert (len(open_images(config, "test")), known_as(config, "test")) == (20, "images")


def as_written_before(index: Index, **changes: Any) -> Index:
    """The index of a store that an earlier version made."""
    settings = index.settings.model_copy(update={"holdout": 0.1, "source": "/x", "is_named": None, **changes})
    splits = {split: part.model_copy(update={"state": ""}) for split, part in index.splits.items()}
    return index.model_copy(update={"settings": settings, "splits": splits})


def test_a_store_of_before_is_measured_whole_where_its_numbers_are_a_hold_outs(tmp_path: Path) -> None:
    image_folder(tmp_path / "own", NAMES)
    index = prepare(DataConfig(path=tmp_path / "own"), tmp_path / "store", processes=1, progress=False)
    write_index(tmp_path / "store", as_written_before(index))
    assert len(open_images(images_at(tmp_path / "store", CIFAR10), "test")) == 20


def test_a_store_of_a_set_is_the_set(tmp_path: Path) -> None:
    prepare(DataConfig(name="digits"), tmp_path / "store", processes=1, progress=False)
    config = images_at(tmp_path / "store", DataConfig(name="digits"))
    assert (len(open_images(config, "test")), known_as(config, "test")) == (297, "digits")


def test_a_store_of_before_of_a_set_is_the_set(tmp_path: Path) -> None:
    index = prepare(DataConfig(name="digits"), tmp_path / "store", processes=1, progress=False)
    write_index(tmp_path / "store", as_written_before(index))
    assert known_as(DataConfig(name="digits", path=tmp_path / "store"), "test") == "digits"


def test_a_path_that_is_not_there_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data: .*/x does not exist"):
        images_at(tmp_path / "x", CIFAR10)
    assert not (tmp_path / "x").exists()


def test_the_path_of_the_run_itself_is_split_as_in_training(tmp_path: Path) -> None:
    image_folder(tmp_path, NAMES)
    config = DataConfig(path=tmp_path)
    assert images_at(tmp_path, config) == config


def test_training_images_are_found_again_elsewhere(tmp_path: Path) -> None:
    for place in ("here", "there", "others"):
        image_folder(tmp_path / place, NAMES if place != "others" else NAMES[:19])
    run = DataConfig(path=tmp_path / "here", holdout=0.2)
    images = open_images(run, "train")
    trained_on = fingerprint(images, len(images))
    found = {place: images_at(tmp_path / place, run) for place in ("there", "others")}
    assert {place: holds_training_images(config, trained_on, 0.2) for place, config in found.items()} == {
        "there": True,
        "others": False,
    }


# --------------------------------------------------------------------------------------------------------------- names


def test_a_part_of_a_set_is_not_called_by_its_name(tmp_path: Path) -> None:
    stand_ins.mnist(tmp_path)
    assert known_as(DataConfig(name="mnist", path=tmp_path), "test") == "images"


def test_a_whole_set_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COUNTS, "mnist", {"train": (12,), "test": (6,)})
    stand_ins.mnist(tmp_path)
    assert known_as(DataConfig(name="mnist", path=tmp_path), "test") == "mnist"


def test_an_array_is_not_a_set_whatever_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COUNTS, "cifar10", {"train": (3,), "test": (2,)})
    np.savez(tmp_path / "x.npz", train=noise(3, 32, 32, 3), test=noise(2, 32, 32, 3))
    assert known_as(DataConfig(name="cifar10", path=tmp_path / "x.npz"), "test") == "images"


@pytest.mark.parametrize(("count", "name"), [(20, "celeba_hq_256"), (19, "images")])
def test_a_conversion_is_the_set_where_it_has_as_many_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, name: str
) -> None:
    monkeypatch.setitem(COUNTS, "celeba_hq_256", {"train": (18,), "test": (2,)})
    image_folder(tmp_path, NAMES[:count], size=256)
    assert images_at(tmp_path, DataConfig(name="celeba_hq_256")).name == name
    assert known_as(DataConfig(name="celeba_hq_256", path=tmp_path), "test") == name


def test_a_store_of_a_foreign_array_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train=noise(3, 32, 32, 3), test=noise(2, 32, 32, 3))
    config = DataConfig(name="cifar10", path=tmp_path / "x.npz")
    prepare(config, tmp_path / "store", processes=1, progress=False)
    assert read_index(tmp_path / "store").settings.is_named is False
    assert known_as(config.model_copy(update={"path": tmp_path / "store"}), "test") == "images"
