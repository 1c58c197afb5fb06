"""The mixture of logistics without gradients against its formula in float64."""

import pytest
import torch
from torch import Tensor

from nvae.bricks.likelihoods import Grid, LikelihoodConfig, LogisticMixture, MixtureEdge, highest_level, quantise
from nvae.kernels import mixture


def nats(config: LikelihoodConfig, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Per pixel, without gradients in float32, and by the formula in float64."""
    likelihood = LogisticMixture(params, config, x.shape[1])
    wide = LogisticMixture(params.double(), config, x.shape[1])
    with torch.no_grad():
        return likelihood._log_prob(x), wide.log_prob_of_pixels(x.double())


@pytest.mark.parametrize(("bits", "grid"), [(8, "stretched"), (5, "stretched"), (5, "truncated"), (1, "stretched")])
@pytest.mark.parametrize(("colours", "components"), [(3, 10), (1, 10), (3, 1), (3, 17), (1, 32)])
def test_it_is_the_formula(bits: int, grid: Grid, colours: int, components: int) -> None:
    config = LikelihoodConfig(bits=bits, grid=grid, components=components)
    x = quantise(torch.randint(0, 256, (3, colours, 7, 5)) / 255, bits, grid)
    x[0], x[1] = 0, highest_level(bits, grid)
    params = 2 * torch.randn(3, LogisticMixture.params_per_pixel(config, colours), 7, 5)
    found, expected = nats(config, params, x)
    # Scales reach down to e^-7, so that a rounding of means is a thousand times as large in their units.
    assert float(((found - expected) / expected.abs().clamp(min=1)).abs().max()) <= 1e-5


@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
def test_extreme_parameters_stay_finite(size: float) -> None:
    config = LikelihoodConfig()
    params = size * torch.randn(2, 100, 4, 4)
    found, expected = nats(config, params, torch.randint(0, 256, (2, 3, 4, 4)) / 255)
    assert bool(found.isfinite().all())
    assert float(((found - expected) / expected.abs().clamp(min=1)).abs().max()) <= 1e-4


def test_levels_sum_to_one() -> None:
    config = LikelihoodConfig(components=3)
    params = torch.randn(1, 9, 1, 1).expand(256, 9, 1, 1)
    found, _ = nats(config, params, torch.arange(256).reshape(256, 1, 1, 1) / 255)
    assert float(found.double().exp().sum()) == pytest.approx(1, abs=1e-6)


def test_what_is_not_a_number_stays_visible() -> None:
    for channel in (0, 10, 20, 30):
        params = torch.randn(1, 100, 1, 1)
        params[0, channel] = torch.nan
        found, _ = nats(LikelihoodConfig(), params, torch.full((1, 3, 1, 1), 0.5))
        assert bool(found.isnan().all()), channel


def test_only_without_gradients_and_with_right_edges() -> None:
    params, x = torch.randn(1, 100, 2, 2), torch.rand(1, 3, 2, 2)

    def computes(edge: MixtureEdge) -> bool:
        return mixture.log_prob(params, x, LikelihoodConfig(edge=edge), 3) is not NotImplemented

    assert not computes("right")
    with torch.no_grad():
        assert computes("right") and not computes("published")
