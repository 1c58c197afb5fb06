"""The contract: labels, what a run begins with, and what a family may leave out."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kinds import TWO_BLOCKS
from linear_gaussian import linear_gaussian
from torch import Tensor
from toy_family import Toy, ToyConfig

from nvae.core.config import validate
from nvae.core.errors import UserError
from nvae.models.base import Family, FirstBatch, FirstImages
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE
from nvae.models.vdvae.config import VDVAEConfig
from nvae.models.vdvae.model import VDVAE
from nvae.models.vqvae.config import VQVAEConfig


@pytest.fixture(params=["nvae", "vdvae", "toy"])
def model(request: pytest.FixtureRequest, tiny_config: Callable[..., NVAEConfig]) -> Family[Any]:
    made: dict[str, Callable[[], Family[Any]]] = {
        "nvae": lambda: NVAE(tiny_config()),
        "vdvae": lambda: VDVAE(validate(VDVAEConfig, TWO_BLOCKS, "test")),
        "toy": lambda: Toy(ToyConfig(image_size=8)),
    }
    return made[request.param]()


# ----------------------------------------------------------------------------------------------------------- labels


def test_labels_are_refused_by_a_model_without_classes(model: Family[Any]) -> None:
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, -1])
    for call in (
        lambda: model.encode(x, labels),
        lambda: model(x, labels=labels),
        lambda: model.sample(2, labels=labels),
    ):
        with pytest.raises(UserError, match=rf"labels: this {type(model).__name__} takes none"):
            call()


def test_classes_are_refused_by_a_family_that_takes_no_labels() -> None:
    with pytest.raises(UserError, match="classes: codes know no classes"):
        validate(VQVAEConfig, {"classes": 10}, "test")


def test_guidance_is_refused_by_a_family_that_has_none(model: Family[Any]) -> None:
    model.set_guidance(0)
    with pytest.raises(UserError, match=rf"guidance: {type(model).__name__} has none.*; found 2, allowed is 0"):
        model.set_guidance(2)


def test_labels_are_as_many_as_images() -> None:
    model = Toy(ToyConfig(image_size=8, classes=10))
    model.encode(torch.rand(2, 3, 8, 8), torch.tensor([3, -1]))
    with pytest.raises(UserError, match=r"labels: 2 images take \(2,\), found \(3,\)"):
        model.encode(torch.rand(2, 3, 8, 8), torch.tensor([3, 4, 5]))


def test_a_family_without_classes_need_not_know_of_labels() -> None:
    linear_gaussian()(torch.rand(2, 3, 4, 4))  # its `encode` takes images alone


# ------------------------------------------------------------------------------------------------- the first images


def batches(sizes: list[int], drawn: list[int]) -> Iterator[FirstBatch]:
    """Of these sizes, their images numbered; `drawn` tells which were asked for."""
    first = 0
    for number, size in enumerate(sizes):
        drawn.append(number)
        images = torch.arange(first, first + size, dtype=torch.float32)[:, None, None, None]
        yield FirstBatch(images, torch.full((size,), -1), lambda: [])
        first += size


def numbers(images: Iterator[Tensor]) -> list[int]:
    return [int(number) for batch in images for number in batch.flatten()]


@pytest.mark.parametrize(("limit", "expected"), [(4, 4), (5, 5), (8, 8), (100, 10)])
def test_the_first_images_are_limited_to_so_many_and_to_an_epoch(limit: int, expected: int) -> None:
    drawn: list[int] = []
    first = FirstImages(batches([4, 4, 4, 4], drawn), epoch_size=10, seed=0)
    assert numbers(first.images(limit)) == list(range(expected))
    assert drawn == list(range(-(-expected // 4))), "no more is read than is needed"


# ------------------------------------------------------------------------------------------------- what may be left out


def test_a_family_says_what_it_does_not_offer() -> None:
    model = linear_gaussian()
    assert list(model.parts()) == []
    with pytest.raises(UserError, match="LinearGaussian: its groups cannot be stepped through one by one"):
        model.top_down(n=1)
    with pytest.raises(UserError, match=r"train\.recompute: LinearGaussian offers none, found 'cells'"):
        model.set_recomputation("cells")


def test_latents_have_the_shapes_of_their_noise(model: Family[Any]) -> None:
    with torch.no_grad():
        output = model.eval()(torch.rand(2, 3, 8, 8))
    assert [z.shape for z in output.z] == [torch.Size(shape) for shape in model.latent_shapes(2)]
    assert all(z.is_floating_point() == (model.latent_kind == "normal") for z in output.z)
    assert (output.prior != []) == (model.latent_kind == "normal")
