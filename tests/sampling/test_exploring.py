"""What a page to play with a model shows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_codecs import MODELS, tiny_nvae

from nvae.core.errors import UserError
from nvae.core.randomness import keyed_normal
from nvae.data.config import DataConfig
from nvae.models.base import Family
from nvae.sampling.exploring import as_taken, prefixes, redrawn, samples_of_draws
from nvae.sampling.images import pixels_of
from nvae.sampling.latent_space import decode, reconstruct

CPU = torch.device("cpu")
GREY, BINARY = DataConfig(name="images", size=8, channels=1), DataConfig(name="digits", binarize=True)


@pytest.fixture
def model() -> Family[Any]:
    return tiny_nvae(scales=2, adaptive_groups=True)


def test_one_group_is_drawn_again_or_all() -> None:
    assert redrawn([0, 3, 0], 1) == [0, 4, 0]
    assert redrawn([0, 3, 0]) == [1, 4, 1]


def test_another_draw_of_a_group_leaves_the_noise_of_the_others(model: Family[Any]) -> None:
    shapes = model.latent_shapes(4)
    noise = [
        keyed_normal([shape], range(4), 5, f"explore/{draw}/{group}", "cpu")[0]
        for group, (draw, shape) in enumerate(zip([0, 2, 0], shapes, strict=True))
    ]
    wanted = pixels_of(model.sample(4, 0.8, noise), range(4))
    torch.testing.assert_close(samples_of_draws(model, [0, 2, 0], 4, 0.8, seed=5), wanted)


def test_groups_of_one_shape_are_drawn_apart(model: Family[Any]) -> None:
    noise: list[list[torch.Tensor]] = []
    sample = model.sample
    model.sample = lambda n, t, given, **more: noise.append(given) or sample(n, t, given, **more)  # type: ignore
    samples_of_draws(model, [0, 0, 0], 2)
    assert noise[0][1].shape == noise[0][2].shape and not torch.equal(noise[0][1], noise[0][2])


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_every_family_is_played_with(make: Callable[[], Family[Any]]) -> None:
    model = make()
    groups, size = len(model.latent_shapes(1)), model.config.visible_size
    images = samples_of_draws(model, [0] * groups, 3, 0.7)
    assert images.shape == (3, model.config.image_channels, size, size)
    x = torch.zeros(1, model.config.image_channels, model.config.image_size, model.config.image_size)
    assert prefixes(model, x, [0, groups]).shape == (3, 1, model.config.image_channels, size, size)


def test_samples_of_a_class_are_of_it() -> None:
    model = tiny_nvae(classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    of_class = [samples_of_draws(model, [0, 0], 2, label=label) for label in (0, 1, None)]
    assert not torch.equal(of_class[0], of_class[1]) and not torch.equal(of_class[0], of_class[2])


def test_prefixes_begin_with_the_image_and_end_with_its_reconstruction(model: Family[Any]) -> None:
    x = torch.bernoulli(torch.rand(1, 1, 8, 8))
    frames = prefixes(model, x, [0, 2, 3], 0.5, seed=4)
    assert torch.equal(frames[0], x)
    torch.testing.assert_close(frames[1], decode(model, [], count=1, temperature=0.5, seed=4))
    torch.testing.assert_close(frames[2], reconstruct(model, x, groups=2, temperature=0.5, seed=4))
    torch.testing.assert_close(frames[3], reconstruct(model, x, seed=4))


def test_more_groups_than_there_are_are_refused(model: Family[Any]) -> None:
    with pytest.raises(UserError, match="the model has 3 latent groups, found 4"):
        prefixes(model, torch.zeros(1, 1, 8, 8), [4])


def test_an_image_of_the_right_size_is_taken_as_it_is() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    found = as_taken(Image.fromarray(pixels), GREY, CPU)
    assert torch.equal(found[0, 0], torch.from_numpy(pixels) / torch.tensor(255.0))


@pytest.mark.parametrize("shape", [(3, 5), (40, 31), (8, 9, 3), (20, 20, 4)])
def test_an_image_of_any_size_and_kind_is_taken(shape: tuple[int, ...]) -> None:
    image = Image.fromarray(np.full(shape, 255, dtype=np.uint8))
    found = as_taken(image, GREY.model_copy(update={"padding": 2}), CPU)
    assert found.shape == (1, 1, 12, 12)
    assert bool((found[:, :, 2:-2, 2:-2] == 1).all()) and float(found.sum()) == 64


def test_colours_stay() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    found = as_taken(red, GREY.model_copy(update={"channels": 3}), CPU)
    assert found[0, :, 3, 3].tolist() == [1, 0, 0]


def test_an_image_is_binarised_where_those_of_the_set_are() -> None:
    grey = Image.new("L", (8, 8), 128)
    first, again, other = (as_taken(grey, BINARY, CPU, seed=seed) for seed in (0, 0, 1))
    assert set(first.unique().tolist()) == {0, 1}
    assert torch.equal(first, again) and not torch.equal(first, other)
