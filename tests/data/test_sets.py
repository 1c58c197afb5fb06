"""Every set by its name, read from a stand-in laid out as its download."""

import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import stand_ins
import torch
from PIL import Image
from stand_ins import file_bytes, image_folder, noise, published_lmdb, smooth

from nvae.core.errors import UserError
from nvae.data.config import DataConfig, SetName
from nvae.data.images import Images, InMemory, fingerprint
from nvae.data.named import SETS
from nvae.data.sets import open_images
from nvae.data.sources import Shaped
from nvae.data.splits import Split


@pytest.fixture(autouse=True)
def small_sets_are_expected() -> Iterator[None]:
    """A stand-in is not the whole set, and a warning says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*figures on a part of it are not comparable")
        yield


def opened(split: Split, **fields: Any) -> Images:
    return open_images(DataConfig(**fields), split)


def whole(images: Images) -> torch.Tensor:
    return images.read(range(len(images)))


def test_every_name_is_read_by_something() -> None:
    assert set(SETS) == set(get_args(SetName))


def test_digits_are_the_embedded_ones_with_seventeen_levels() -> None:
    from sklearn.datasets import load_digits

    order = np.random.RandomState(0).permutation(1797)
    train, test = (opened(split, name="digits") for split in ("train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test), train.levels, train.shape) == (1500, 297, 16, (1, 8, 8))
    assert np.array_equal(whole(test)[:, 0], load_digits().images[order[1500:]])


def test_mnist_is_read_as_torchvision_leaves_it(tmp_path: Path) -> None:
    stand_ins.mnist(tmp_path)
    assert np.array_equal(whole(opened("train", name="mnist", path=tmp_path))[:, 0], noise(12, 28, 28, seed=0))
    assert np.array_equal(whole(opened("test", name="mnist", path=tmp_path))[:, 0], noise(6, 28, 28, seed=1))


def test_mnist_that_cannot_be_downloaded_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading\n no network")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    with pytest.raises(UserError, match=r"has no \(whole\) set, and downloading failed \(Error downloading no network"):
        opened("train", name="mnist", path=tmp_path)


def test_stacked_mnist_has_a_digit_in_each_colour(tmp_path: Path) -> None:
    stand_ins.mnist(tmp_path)
    digits = [digit.tobytes() for digit in noise(12, 28, 28, seed=0)]
    for colour in whole(opened("train", name="stacked_mnist", path=tmp_path)).unbind(1):
        assert sorted(plane.numpy().tobytes() for plane in colour) == sorted(digits)


def test_stacked_mnist_pairs_digits_the_same_every_time_and_not_with_themselves(tmp_path: Path) -> None:
    stand_ins.mnist(tmp_path)
    first, second = (whole(opened("train", name="stacked_mnist", path=tmp_path)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 1])
    assert not torch.equal(first[:, 1], first[:, 2])


def test_omniglot_columns_are_read_down_first(tmp_path: Path) -> None:
    stand_ins.omniglot(tmp_path)
    assert np.array_equal(whole(opened("train", name="omniglot", path=tmp_path))[:, 0], noise(10, 28, 28, seed=0))
    assert len(opened("test", name="omniglot", path=tmp_path)) == 4


def test_a_missing_omniglot_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chardata\.mat does not exist; download it from https://"):
        opened("train", name="omniglot", path=tmp_path)


def test_a_damaged_omniglot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chardata.mat").write_text("text")
    with pytest.raises(UserError, match=r"chardata\.mat is damaged, or not"):
        opened("train", name="omniglot", path=tmp_path)


def test_cifar10_is_read_as_torchvision_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.cifar10(tmp_path, monkeypatch)
    train = whole(opened("train", name="cifar10", path=tmp_path))
    assert train.shape == (20, 3, 32, 32)
    assert np.array_equal(train[4:8], noise(4, 3072, seed=1).reshape(4, 3, 32, 32))
    assert len(opened("test", name="cifar10", path=tmp_path)) == 4


@pytest.mark.parametrize("size", [32, 64])
def test_imagenets_npz_batches_are_read_in_the_order_of_their_numbers(tmp_path: Path, size: int) -> None:
    stand_ins.imagenet_npz(tmp_path, size)
    train = whole(opened("train", name=f"imagenet_{size}", path=tmp_path))
    assert train.shape == (33, 3, size, size)
    assert np.array_equal(train[-3:], noise(3, 3 * size**2, seed=10).reshape(3, 3, size, size))
    assert len(opened("validation", name=f"imagenet_{size}", path=tmp_path)) == 3


def test_imagenets_older_folders_are_read(tmp_path: Path) -> None:
    image_folder(tmp_path, ["train_32x32/1.png", "train_32x32/2.png", "valid_32x32/1.png"])
    assert [len(opened(s, name="imagenet_32", path=tmp_path)) for s in ("train", "test")] == [2, 1]  # type: ignore[arg-type]


def test_packed_batches_beyond_memory_ask_for_preparation(tmp_path: Path) -> None:
    stand_ins.imagenet_npz(tmp_path, 32)
    with pytest.raises(UserError, match=r"can't be read image by image; prepare it with scripts/prepare_data\.py"):
        opened("train", name="imagenet_32", path=tmp_path, memory=0)


@pytest.mark.parametrize("pack", [False, True], ids=["unpacked", "packed"])
def test_celeba_has_the_official_splits_and_the_crop_of_the_spec(tmp_path: Path, pack: bool) -> None:
    stand_ins.celeba(tmp_path, pack)
    counts = [len(opened(s, name="celeba_64", path=tmp_path)) for s in ("train", "validation", "test")]  # type: ignore[arg-type]
    assert counts == [4, 2, 2]
    jpeg = Image.open(BytesIO(file_bytes(smooth(218, 178, 6), "JPEG", quality=95)))
    reference = np.asarray(jpeg.crop((15, 40, 163, 188)).resize((64, 64), Image.Resampling.BILINEAR))
    test = whole(opened("test", name="celeba_64", path=tmp_path))
    assert np.array_equal(test[0], reference.transpose(2, 0, 1))


def test_a_celeba_image_that_is_listed_and_missing_is_named(tmp_path: Path) -> None:
    stand_ins.celeba(tmp_path)
    (tmp_path / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
    with pytest.raises(UserError, match=r"000002\.jpg: cannot be read: No such file"):
        opened("train", name="celeba_64", path=tmp_path)


def test_celeba_that_cannot_be_downloaded_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quota(*_: object, **__: object) -> None:
        raise RuntimeError("the daily quota is exceeded")

    monkeypatch.setattr("torchvision.datasets.CelebA.download", quota)
    with pytest.raises(UserError, match=r"quota is exceeded\); download img_align_celeba\.zip and list_eval_partition"):
        opened("train", name="celeba_64", path=tmp_path)


def test_celeba_of_the_published_code_is_cropped_too(tmp_path: Path) -> None:
    for part, count in {"train": 3, "validation": 2, "test": 1}.items():
        pictures = (file_bytes(smooth(218, 178, i), "JPEG") for i in range(count))
        published_lmdb(tmp_path / f"{part}.lmdb", pictures)
    counts = [len(opened(s, name="celeba_64", path=tmp_path)) for s in ("train", "validation", "test")]  # type: ignore[arg-type]
    assert counts == [3, 2, 1]
    assert opened("test", name="celeba_64", path=tmp_path).shape == (3, 64, 64)


@pytest.mark.parametrize("name", ["celeba_hq_256", "ffhq_256"])
def test_the_published_codes_raw_lmdbs_are_read_as_they_are(tmp_path: Path, name: Any) -> None:
    published_lmdb(tmp_path / "train.lmdb", (noise(256, 256, 3, seed=i).tobytes() for i in range(3)))
    published_lmdb(tmp_path / "validation.lmdb", (noise(256, 256, 3, seed=i).tobytes() for i in range(2)))
    assert np.array_equal(
        whole(opened("train", name=name, path=tmp_path))[2], noise(256, 256, 3, seed=2).transpose(2, 0, 1)
    )
    assert len(opened("test", name=name, path=tmp_path)) == 2


@pytest.mark.parametrize("size", [32, 64])
def test_imagenet_of_the_published_code_is_read_as_it_is(tmp_path: Path, size: int) -> None:
    published_lmdb(tmp_path / "train.lmdb", (noise(size, size, 3, seed=i).tobytes() for i in range(3)))
    published_lmdb(tmp_path / "validation.lmdb", (noise(size, size, 3, seed=i).tobytes() for i in range(2)))
    images = whole(opened("train", name=f"imagenet_{size}", path=tmp_path))
    assert np.array_equal(images[1], noise(size, size, 3, seed=1).transpose(2, 0, 1))


def test_ffhq_takes_the_full_images_and_not_their_thumbnails(tmp_path: Path) -> None:
    image_folder(tmp_path / "images1024x1024", [f"00000/{i:05d}.png" for i in range(10)], size=256)
    image_folder(tmp_path / "thumbnails128x128", [f"00000/{i:05d}.png" for i in range(10)], size=128)
    assert [len(opened(s, name="ffhq_256", path=tmp_path)) for s in ("train", "test")] == [9, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["imagenet_32", "celeba_hq_256", "ffhq_256", "lsun_bedroom"])
def test_a_missing_set_says_what_to_put_where(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UserError, match=rf"data\.path: {tmp_path}/x is missing; .*there|into it"):
        opened("train", name=name, path=tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "category"), [("lsun_bedroom", "bedroom"), ("lsun_church", "church_outdoor"), ("lsun_tower", "tower")]
)
def test_lsuns_lmdbs_are_read_as_they_are_given_out(tmp_path: Path, name: Any, category: str) -> None:
    stand_ins.lsun(tmp_path, category)
    assert [len(opened(s, name=name, path=tmp_path)) for s in ("train", "test")] == [5, 3]  # type: ignore[arg-type]


def test_lsun_is_cropped_at_random_in_training_and_at_the_centre_in_evaluation(tmp_path: Path) -> None:
    stand_ins.lsun(tmp_path, "tower")
    train, test = (opened(s, name="lsun_tower", path=tmp_path) for s in ("train", "test"))  # type: ignore[arg-type]
    assert (train.movable, test.movable) == (True, False)
    top, bottom = (train.read([4], [(0.5, across)]) for across in (0.0, 1.0))
    assert not torch.equal(top, bottom)


def test_part_of_a_named_set_is_warned_about(tmp_path: Path) -> None:
    stand_ins.mnist(tmp_path)
    with pytest.warns(UserWarning, match="has 12 train images, the set has 60000"):
        opened("train", name="mnist", path=tmp_path)


def test_a_named_set_may_be_someones_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "subset.npz", train=noise(3, 32, 32, 3), test=noise(2, 32, 32, 3))
    assert len(opened("train", name="cifar10", path=tmp_path / "subset.npz")) == 3


# --------------------------------------------------------------------------------------------------- one's own images


def test_a_path_alone_is_enough(tmp_path: Path) -> None:
    image_folder(tmp_path, [f"{i}.png" for i in range(10)], size=40)
    assert opened("train", path=tmp_path).shape == (3, 32, 32)


def test_sets_within_memory_are_read_at_once(tmp_path: Path) -> None:
    image_folder(tmp_path, [f"{i}.png" for i in range(10)])
    assert isinstance(opened("train", path=tmp_path, memory=1), InMemory)
    assert isinstance(opened("train", path=tmp_path, memory=0), Shaped)


def test_reading_at_once_and_one_by_one_give_the_same(tmp_path: Path) -> None:
    image_folder(tmp_path, [f"{i}.png" for i in range(150)], size=40)
    resident, lazy = (opened("train", path=tmp_path, memory=memory) for memory in (9, 0))
    assert torch.equal(whole(resident), whole(lazy))


def test_an_array_of_the_right_size_is_taken_as_it_lies(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(20, 8, 8, 3))
    images = opened("train", path=tmp_path / "x.npy", size=8)
    lazy = opened("train", path=tmp_path / "x.npy", size=8, memory=0)
    assert torch.equal(whole(images), whole(lazy))


def test_a_fingerprint_is_of_the_images_and_not_of_how_they_are_kept(tmp_path: Path) -> None:
    pixels = noise(1500, 8, 8, 3)
    np.save(tmp_path / "x.npy", pixels)
    resident = opened("train", path=tmp_path / "x.npy", size=8)
    lazy = opened("train", path=tmp_path / "x.npy", size=8, memory=0)
    count = len(resident)
    assert fingerprint(resident, count) == fingerprint(lazy, count) and len(fingerprint(lazy, count)) == 16


def test_a_fingerprint_sees_each_of_a_thousand_images_and_how_many_there_are() -> None:
    pixels = torch.from_numpy(noise(1001, 1, 4, 4))
    found = fingerprint(InMemory(pixels), 1000)
    assert fingerprint(InMemory(pixels, levels=16), 1000) != found != fingerprint(InMemory(pixels), 999)
    for place in (0, 500, 999, 1000):
        other = pixels.clone()
        other[place] += 1
        assert (fingerprint(InMemory(other), 1000) == found) == (place == 1000)


def test_an_array_of_another_size_is_resized(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(20, 16, 24, 3))
    assert opened("train", path=tmp_path / "x.npy", size=8).shape == (3, 8, 8)


def test_colour_may_be_read_as_grey_and_grey_as_colour(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(20, 8, 8))
    colour = whole(opened("train", path=tmp_path / "x.npy", size=8, channels=3))
    grey = whole(opened("train", path=tmp_path / "x.npy", size=8, channels=1))
    assert torch.equal(colour, grey.expand(-1, 3, -1, -1))


def test_an_unreadable_path_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(UserError, match=rf"data\.path: {tmp_path} cannot be read: Permission denied"):
        opened("train", path=tmp_path)


# -------------------------------------------------------------------------------------------------------- the config


def test_a_name_brings_its_size_and_channels() -> None:
    config = DataConfig(name="mnist")
    assert (config.size, config.channels) == (28, 1)


def test_a_set_of_one_size_is_not_read_at_another() -> None:
    with pytest.raises(ValueError, match="mnist is 28×28 with 1 channel, found size 32"):
        DataConfig(name="mnist", size=32)


def test_a_set_is_looked_for_below_data_by_default() -> None:
    assert DataConfig(name="ffhq_256").source == Path("data/ffhq_256")


def test_colour_is_not_binarised() -> None:
    with pytest.raises(ValueError, match="only one-channel images can be binarised"):
        DataConfig(binarize=True)
