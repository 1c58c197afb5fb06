"""Classifiers of images, the classes they are trained on, and what is kept by them."""

from pathlib import Path

import pytest
import torch

from nvae.core.errors import UserError
from nvae.evaluation.classification import (
    Classifier,
    ClassifierConfig,
    LabelledImages,
    in_proportion,
    likeliest,
    load_classifier,
    save_classifier,
    scores,
    train_classifier,
)

CPU = torch.device("cpu")
SHORT = ClassifierConfig(passes=1, updates=100, batch=16, channels=4, lr=1e-2)


def stripes(count: int, *, size: int = 8, noise: float = 0.2, seed: int = 0) -> LabelledImages:
    """Of class 0 with bright rows, of class 1 with bright columns."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    rows = (torch.arange(size) % 2).float().expand(size, size)
    images = torch.where(labels[:, None, None] == 1, rows, rows.T)
    flipped = torch.rand(images.shape, generator=random) < noise
    return LabelledImages(torch.where(flipped, 1 - images, images)[:, None].mul(255).byte(), labels)


def train(found: LabelledImages, seed: int = 0, **options: bool) -> Classifier:
    return train_classifier(found, 2, SHORT, seed=seed, device=CPU, **options)


# ------------------------------------------------------------------------------------------------------- classifiers


def test_a_classifier_learns_what_tells_classes_apart() -> None:
    assert train(stripes(64)).accuracy(stripes(100, seed=1)) > 0.95


def test_a_seed_is_a_classifier() -> None:
    torch.manual_seed(1)
    first = train(stripes(64)).state_dict()
    torch.manual_seed(2)
    again, other = train(stripes(64)).state_dict(), train(stripes(64), seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_training_one_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(stripes(16))
    assert torch.equal(torch.rand(3), expected)


def test_mirrored_images_teach_both_sides() -> None:
    """Class 1 is bright on the left only; a classifier that saw it mirrored knows it on the right."""
    images = torch.zeros(32, 1, 8, 8, dtype=torch.uint8)
    images[1::2, :, :, :4] = 255
    found = LabelledImages(images, torch.arange(32) % 2)
    mirrored = LabelledImages(images.flip(3), found.labels)
    assert train(found, flip=True).accuracy(mirrored) == 1


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 8, 32])
def test_two_layers_take_images_of_any_size(side: int) -> None:
    model = Classifier((3, side, side), 5, SHORT)
    assert model(torch.zeros(2, 3, side, side, dtype=torch.uint8)).shape == (2, 5)


@pytest.mark.parametrize("channels", [1, 3])
def test_larger_images_take_a_resnet(channels: int) -> None:
    model = Classifier((channels, 33, 33), 5, SHORT)
    assert model(torch.zeros(2, channels, 33, 33, dtype=torch.uint8)).shape == (2, 5)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 995 * 513


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"trained on images of \(1, 8, 8\), found \(3, 8, 8\)"):
        Classifier((1, 8, 8), 2, SHORT).probabilities(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_a_saved_classifier_says_the_same(tmp_path: Path) -> None:
    model, found = train(stripes(32)), stripes(10, seed=1)
    save_classifier(tmp_path / "x" / "c.safetensors", model, {"content": "abc"})
    again, about = load_classifier(tmp_path / "x" / "c.safetensors", CPU)
    assert about == {"content": "abc"}
    assert torch.equal(again.probabilities(found.images), model.probabilities(found.images))


def test_a_file_that_is_no_classifier_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"c\.safetensors: not a classifier"):
        load_classifier(tmp_path / "c.safetensors", CPU)


# ------------------------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize("count", [1, 5, 10, 37, 100])
def test_drawn_classes_have_the_proportions_of_the_labels(count: int) -> None:
    labels = torch.tensor([0] * 20 + [2] * 50 + [1] * 30)[torch.randperm(100)]
    drawn = labels[in_proportion(labels, count)].bincount(minlength=3)
    assert int(drawn.sum()) == count
    for found, share in zip(drawn.tolist(), (0.2, 0.3, 0.5), strict=True):
        assert abs(found - share * count) <= 1


def test_as_many_places_as_labels_are_every_place_once() -> None:
    labels = torch.randint(5, (37,))
    assert in_proportion(labels, 37).sort().values.tolist() == list(range(37))


def test_the_likeliest_of_each_class_are_kept() -> None:
    own = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.5, 0.5])
    classes = torch.tensor([0, 1, 0, 1, 0, 1])
    assert likeliest(own, classes, 2).tolist() == [1, 2, 4, 5]
    assert likeliest(own, classes, 1).tolist() == [1, 2]


# ------------------------------------------------------------------------------------------------------------- scores


def test_samples_of_the_wrong_class_cost_accuracy_and_agreement() -> None:
    real, test = stripes(64), stripes(100, seed=1)
    right, wrong = stripes(64, seed=2), LabelledImages(real.images, 1 - real.labels)
    for drawn, expected in ((right, 1.0), (wrong, 0.0)):
        sets = {"real images": real, "samples": drawn}
        found = scores({name: train(images) for name, images in sets.items()}, sets, test)
        assert found["accuracy"]["real images"] > 0.95
        assert abs(found["accuracy"]["samples"] - expected) < 0.05
        assert abs(found["agreement"] - expected) < 0.05
        assert found["training_images"] == {"real images": 64, "samples": 64} and found["test_images"] == 100


def test_agreement_is_told_by_class_too() -> None:
    """A fourth of the samples was drawn as class 1, but is of class 0."""
    real = stripes(64, noise=0)
    drawn = LabelledImages(real.images, torch.where(torch.arange(64) % 4 == 0, 1, real.labels))
    model = train(real)
    found = scores({"real images": model, "samples": model}, {"real images": real, "samples": drawn}, real)
    assert found["agreement"] == pytest.approx(3 / 4)
    assert found["agreement_by_class"] == {"0": 1, "1": pytest.approx(2 / 3)}
