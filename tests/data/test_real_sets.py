"""The real images of ../shared/data, each through its own path."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SHARED

from nvae.data.config import DataConfig
from nvae.data.description import describe
from nvae.data.loading import TrainingStream, evaluation_batches
from nvae.data.preparation import prepare, verify
from nvae.data.sets import open_images

DATA = SHARED / "data"
CPU = torch.device("cpu")

pytestmark = pytest.mark.shared


def config(path: str, **fields: Any) -> DataConfig:
    return DataConfig(path=DATA / path, **fields)


def test_mnist_is_whole() -> None:
    mnist = config("mnist", name="mnist")
    assert [len(open_images(mnist, split)) for split in ("train", "test")] == [60_000, 10_000]  # type: ignore[arg-type]


def test_an_epoch_of_mnist_shows_its_mean_grey_value() -> None:
    """0.1307, the constant that every MNIST example normalises with; padding and binarisation keep the sum."""
    mnist = config("mnist", name="mnist", padding=2, binarize=True, batch=1000)
    stream = TrainingStream(open_images(mnist, "train"), mnist, seed=0, device=CPU)
    total = sum(float(batch.images.double().sum()) for batch in islice(stream.batches(0), 60))
    assert total / (60_000 * 28 * 28) == pytest.approx(0.1307, abs=1e-4)


def test_the_pixel_histogram_of_binarised_mnist_costs_207_nats(tmp_path: Path) -> None:
    """About 206.8 nats, a Bernoulli of its own for every pixel, beside 543.4 for a fair coin."""
    found = describe(config("mnist", name="mnist", binarize=True), tmp_path / "sheet.png")
    assert found.histogram * 784 * 0.6931472 == pytest.approx(206.8, abs=1)


def test_omniglot_is_read() -> None:
    omniglot = config("omniglot", name="omniglot", binarize=True)
    images = open_images(omniglot, "test")
    batches = evaluation_batches(images, omniglot, batch=1000, device=CPU, seed=0)
    assert (len(images), sum(len(batch.images) for batch in batches)) == (8070, 8070)


def test_the_cifar10_subset_is_read_by_its_split_names() -> None:
    subset = config("cifar10_subset.npz", flip=True)
    assert [len(open_images(subset, split)) for split in ("train", "test")] == [4660, 932]  # type: ignore[arg-type]
    batch = next(TrainingStream(open_images(subset, "train"), subset, seed=0, device=CPU).batches(100))
    assert batch.images.shape == (32, 3, 32, 32)


def test_photographs_are_prepared_verified_and_read(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"size": 128, "memory": 0}
    photographs = config("kodak", **fields)
    index = prepare(photographs, tmp_path / "store", processes=1, progress=False)
    assert {split: part.images for split, part in index.splits.items()} == {"train": 22, "test": 2}
    assert verify(tmp_path / "store", processes=1, progress=False) == []
    stored, direct = (
        open_images(DataConfig(path=path, **fields), "train") for path in (tmp_path / "store", DATA / "kodak")
    )
    assert torch.equal(stored.read(range(22)), direct.read(range(22)))


def test_photographs_are_loaded_with_random_crops() -> None:
    photographs = config("kodak", size=128, crop="random", workers=1, batch=4)
    stream = TrainingStream(open_images(photographs, "train"), photographs, seed=0, device=CPU)
    assert [batch.images.shape for batch in islice(stream.batches(0), 7)] == [(4, 3, 128, 128)] * 7
