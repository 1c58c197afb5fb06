"""Every kind of model: images come back, at the cost of the bound, however the other machine computes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_codecs import MODELS, bits_spent, images_for, kept, tiny_nvae
from torch import Tensor, nn
from toy_family import Toy, ToyConfig

from nvae.codec.coders import BitsBack, Coder, coder_of, exactly
from nvae.codec.stack import WORD_BITS, Stack
from nvae.core.errors import UserError
from nvae.models.base import Family

CHAINS, LONG = 3, 2


def coder_for(model: Family[Any]) -> Coder:
    side = model.config.image_size - 2 * model.config.likelihood.border
    return coder_of(model, seen=np.zeros((2, model.config.image_channels, side, side), dtype=np.int64))


def pushed(coder: Coder, images: np.ndarray) -> tuple[list[Stack], list[Any]]:
    """Images (LONG, CHAINS, C, S, S) on new stacks, and what was noted."""
    stacks = [Stack.new(f"{seed}", coder.start_words) for seed in range(images.shape[1])]
    return stacks, [coder.push(stacks, batch, numbers_of(place, stacks)) for place, batch in enumerate(images)]


def popped(coder: Coder, stacks: list[Stack], noted: list[Any]) -> np.ndarray:
    places = reversed(range(len(noted)))
    return np.stack([coder.pop(stacks, noted[place], numbers_of(place, stacks)) for place in places][::-1])


def numbers_of(place: int, stacks: list[Stack]) -> list[int]:
    """Of the images at a place of some chains."""
    return [100 * place + chain for chain in range(len(stacks))]


def batches_for(coder: Coder) -> np.ndarray:
    return images_for(coder, CHAINS * LONG).reshape(LONG, CHAINS, coder.colours, coder.size, coder.size)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Family[Any]:
    return MODELS[request.param]()


def test_images_come_back_from_what_is_kept(model: Family[Any]) -> None:
    coder = coder_for(model)
    images = batches_for(coder)
    stacks, noted = pushed(coder, images)
    np.testing.assert_array_equal(popped(coder, kept(stacks), noted), images)


def test_they_cost_the_bound(model: Family[Any]) -> None:
    coder = coder_for(model)
    with exactly():
        drawn = coder.model.sample(64).sample()
        border, end = coder.border, coder.border + coder.size
        images = (drawn[:, :, border:end, border:end] * coder.levels).round().long().numpy()
        output = coder.model(coder.seen(images))
    bound = (output.reconstruction + output.kl.sum(1)).sum().item() / math.log(2)
    assert bits_spent(pushed(coder, images.reshape(8, 8, *images.shape[1:]))[0]) == pytest.approx(
        bound, rel=0.02, abs=8 * WORD_BITS
    )


def disturbed(coder: Coder, size: float) -> Coder:
    """One whose network computes a little otherwise."""

    def shift(_: nn.Module, inputs: Any, output: Any) -> Any:
        return output * (1 + size) if isinstance(output, Tensor) and output.is_floating_point() else output

    for module in coder.model.modules():
        if not list(module.children()):
            module.register_forward_hook(shift)
    return coder


def test_a_machine_that_differs_in_the_last_bits_gives_the_same_images(model: Family[Any]) -> None:
    coder = coder_for(model)
    images = batches_for(coder)
    stacks, noted = pushed(coder, images)
    np.testing.assert_array_equal(popped(disturbed(coder, 1e-13), kept(stacks), noted), images)


def test_one_that_differs_much_does_not() -> None:
    coder = coder_for(tiny_nvae())
    images = batches_for(coder)
    stacks, noted = pushed(coder, images)
    assert (popped(disturbed(coder, 1e-2), kept(stacks), noted) != images).any()


def test_the_batch_does_not_matter(model: Family[Any]) -> None:
    coder = coder_for(model)
    images = batches_for(coder)
    stacks, noted = pushed(coder, images)
    for chain, stack in enumerate(kept(stacks)):
        for place in reversed(range(LONG)):
            (alone,) = coder.pop([stack], [noted[place][chain]], [100 * place + chain])
            np.testing.assert_array_equal(alone, images[place, chain])


def test_classes_are_told_to_the_model() -> None:
    coder = coder_for(tiny_nvae(classes=3))
    images, labels = images_for(coder, 2), torch.tensor([2, 0])
    stacks = [Stack.new(f"{seed}", coder.start_words) for seed in range(2)]
    noted = coder.push(stacks, images, [0, 1], labels)
    np.testing.assert_array_equal(coder.pop(kept(stacks), noted, [0, 1], labels), images)
    assert (coder.pop(kept(stacks), noted, [0, 1], labels.flip(0)) != images).any()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny_nvae(flows=1), "flows"),
        (lambda: Toy(ToyConfig(image_size=8, image_channels=1, likelihood={"kind": "bernoulli"})), "no codes"),  # type: ignore[arg-type]
    ],
)
def test_models_that_cannot_are_refused(make: Callable[[], Family[Any]], reason: str) -> None:
    model = make()
    with pytest.raises(UserError, match=reason):
        pushed(coder_for(model), np.zeros((1, 1, 1, 8, 8), dtype=np.int64))


def test_grids_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="other latents"):
        BitsBack(tiny_nvae(), bits=[[1, 1]])
