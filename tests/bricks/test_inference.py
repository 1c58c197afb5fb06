"""The model for inference against the one it was made of: the same numbers, without batch norms."""

from collections.abc import Callable

import pytest
import torch
from kinds import KINDS
from torch import nn

from nvae.bricks.cells import ARCHITECTURES
from nvae.bricks.convolutions import Conv2d
from nvae.bricks.inference import fixed
from nvae.bricks.normalisation import BatchNorm
from nvae.models.nvae.config import NVAEConfig
from nvae.models.nvae.model import NVAE


def trained(config: NVAEConfig) -> NVAE:
    """A model whose batch norms have met something, and whose scales and offsets are not those of the start."""
    model = NVAE(config).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(4, config.image_channels, config.image_size, config.image_size))
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model.eval()


def assert_the_same(model: NVAE, folded: NVAE) -> None:
    config = model.config
    images = torch.rand(3, config.image_channels, config.image_size, config.image_size)
    noise = [torch.randn(shape) for shape in model.latent_shapes(3)]
    with torch.no_grad():
        ours, theirs = folded(images, noise), model(images, noise)
        for a, b in ((ours.likelihood.params, theirs.likelihood.params), (ours.log_weight, theirs.log_weight)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        a, b = (each.sample(3, 0.7, noise).params for each in (folded, model))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_says_the_same_for_inference(tiny_config: Callable[..., NVAEConfig], kind: str) -> None:
    model = trained(tiny_config(**KINDS[kind]))
    assert_the_same(model, model.for_inference())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_says_the_same_for_inference(
    tiny_config: Callable[..., NVAEConfig], architecture: str
) -> None:
    channels = 8 if architecture == "mbconv_den" else 4
    model = trained(
        tiny_config(
            architecture=architecture,
            scales=2,
            encoder_cells=2,
            encoder_channels=channels,
            decoder_channels=channels,
        )
    )
    assert_the_same(model, model.for_inference())


def test_only_the_batch_norms_at_the_start_of_regular_cells_remain(tiny_config: Callable[..., NVAEConfig]) -> None:
    model = NVAE(tiny_config(scales=2, preprocess_cells=2)).eval()
    count = {each: sum(isinstance(m, BatchNorm) for m in each.modules()) for each in (model, model.for_inference())}
    regular = 2 + 4 + 1  # pre-processing, one a group, the one between the scales
    separable = 3 + 1 + 1  # all groups but the first, the one between the scales, post-processing
    assert list(count.values()) == [2 * regular + 4 * separable, regular]


def test_the_model_itself_stays_as_it_was_and_trains_on(tiny_config: Callable[..., NVAEConfig]) -> None:
    model = trained(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = model.train().for_inference()
    assert model.training
    assert not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.loss(model(torch.rand(2, 3, 8, 8)), 1.0)[0].backward()


@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 4}, {"enlarge": True}], ids=str)
def test_a_batch_norm_after_a_convolution_becomes_part_of_it(geometry: dict[str, int]) -> None:
    convolution, norm = Conv2d(4, 8, 3, **geometry), BatchNorm(8).eval()  # type: ignore[arg-type]
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fixed(convolution, after=norm)(x), norm(convolution(x)), rtol=1e-5, atol=1e-5)
