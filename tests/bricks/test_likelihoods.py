"""Likelihoods against closed forms, float64 and the sum over all levels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import logsumexp
from torch import Tensor

from nvae.bricks.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Likelihood,
    LikelihoodConfig,
    LogisticMixture,
    NormalLikelihood,
    SquaredError,
    highest_level,
    logistic_log_prob,
    quantise,
)

BITS = [1, 2, 3, 4, 5, 6, 7, 8]
SCALES = {"tiny": -30.0, "smallest": -7.0, "small": -5.0, "usual": -2.0, "large": 2.0, "huge": 60.0}


def config(**fields: Any) -> LikelihoodConfig:
    return LikelihoodConfig(**fields)


def levels(bits: int, grid: str = "stretched") -> Tensor:
    """All levels of a channel in [0, 1]."""
    return quantise(torch.arange(0, 256, 2 ** (8 - bits)) / 255, bits, grid)


def mixture_params(components: int, channels: int, *space: int, log_scale: float = -2.0, spread: float = 0.7) -> Tensor:
    """Random raw parameters (*space[:1], …) with log-scales around `log_scale` and means around ±spread."""
    fields = 3 if channels == 3 else 2
    batch, height, width = space
    logits = torch.randn(batch, components, height, width)
    rest = torch.randn(batch, channels, fields, components, height, width)
    rest[:, :, 0] *= spread
    rest[:, :, 1] += log_scale
    return torch.cat([logits, rest.reshape(batch, -1, height, width)], dim=1)


# ------------------------------------------------------------------------------------------------------- quantising


@pytest.mark.parametrize("bits", BITS)
def test_quantising_drops_the_low_bits_of_every_byte(bits: int) -> None:
    byte = torch.arange(256)
    expected = (byte >> (8 - bits)).double() / (2**bits - 1)
    assert torch.equal(quantise(byte / 255, bits), expected.float())


@pytest.mark.parametrize("bits", BITS)
def test_the_truncated_grid_keeps_the_value_of_the_high_bits(bits: int) -> None:
    byte = torch.arange(256)
    expected = (byte >> (8 - bits) << (8 - bits)).double() / 255
    torch.testing.assert_close(quantise(byte / 255, bits, "truncated").double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("grid", ["stretched", "truncated"])
@pytest.mark.parametrize("bits", BITS)
def test_quantising_twice_changes_nothing(bits: int, grid: str) -> None:
    once = quantise(torch.arange(256) / 255, bits, grid)
    assert torch.equal(quantise(once, bits, grid), once)


@pytest.mark.parametrize("bits", BITS)
def test_quantising_in_float64_gives_the_same_levels(bits: int) -> None:
    byte = torch.arange(256)
    assert torch.equal(quantise(byte.double() / 255, bits).float(), quantise(byte / 255, bits))


@pytest.mark.parametrize("kind", ["logistic_mixture", "normal"])
def test_the_likelihood_quantises_what_is_not(kind: str) -> None:
    c = config(kind=kind, bits=5, components=2)
    likelihood = LIKELIHOODS[kind](torch.randn(2, LIKELIHOODS[kind].params_per_pixel(c, 3), 4, 4), c, 3)
    x = torch.randint(256, (2, 3, 4, 4)) / 255
    assert torch.equal(likelihood.log_prob(x), likelihood.log_prob(quantise(x, 5)))


# ---------------------------------------------------------------------------------------- probabilities that sum to 1


@pytest.mark.parametrize("spread", [0.7, 30.0], ids=["means inside", "means far outside"])
@pytest.mark.parametrize("log_scale", SCALES.values(), ids=SCALES.keys())
@pytest.mark.parametrize("components", [1, 10])
@pytest.mark.parametrize(("bits", "grid"), [(8, "stretched"), (5, "stretched"), (5, "truncated"), (1, "stretched")])
def test_grey_levels_sum_to_one(bits: int, grid: str, components: int, log_scale: float, spread: float) -> None:
    x = levels(bits, grid)
    params = mixture_params(components, 1, 1, 1, 200, log_scale=log_scale, spread=spread)
    c = config(bits=bits, grid=grid, components=components)
    likelihood = LogisticMixture(params.expand(len(x), -1, -1, -1), c, 1)
    log_prob = likelihood._log_prob(x[:, None, None, None].expand(-1, 1, 1, 200))
    torch.testing.assert_close(log_prob.double().exp().sum(0), torch.ones(1, 1, 200).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("log_scale", [-30.0, -7.0, -2.0, 2.0])
@pytest.mark.parametrize("components", [1, 10])
def test_all_colours_of_5_bits_sum_to_one(components: int, log_scale: float) -> None:
    colours = torch.cartesian_prod(*[levels(5)] * 3).T.reshape(1, 3, 1, 32**3)
    params = mixture_params(components, 3, 1, 1, 1, log_scale=log_scale).expand(-1, -1, 1, 32**3)
    likelihood = LogisticMixture(params, config(bits=5, components=components), 3)
    assert float(likelihood._log_prob(colours).double().exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("log_scale", [-30.0, -7.0, -2.0, 2.0])
@pytest.mark.parametrize("colour", [0, 1, 2], ids=["R", "G", "B"])
@pytest.mark.parametrize("components", [1, 10])
@pytest.mark.parametrize("bits", [8, 5])
def test_levels_of_a_colour_sum_to_one_whatever_its_neighbours(
    bits: int, components: int, colour: int, log_scale: float
) -> None:
    """For each component, since the component is shared by the colours."""
    pixels, x = 100, levels(bits)
    neighbours = x[torch.randint(len(x), (1, 3, 1, pixels))]
    image = neighbours.repeat(len(x), 1, 1, 1)
    image[:, colour] = x[:, None, None]
    params = mixture_params(components, 3, 1, 1, pixels, log_scale=log_scale).expand(len(x), -1, -1, -1)
    likelihood = LogisticMixture(params, config(bits=bits, components=components), 3)
    scaled = (2 * image - 1).unsqueeze(2)
    means = likelihood._shifted_means(scaled)
    log_prob = logistic_log_prob(scaled, means, likelihood.log_scales, 2**bits - 1)[:, colour]
    total = log_prob.double().exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_the_published_edge_counts_bright_pixels_too_much() -> None:
    x = levels(8)[:, None, None, None]
    params = torch.tensor([0.0, 1.0, -3.0]).reshape(1, 3, 1, 1).expand(256, -1, -1, -1)  # logit, mean, log-scale

    def total(edge: str) -> float:
        return float(LogisticMixture(params, config(components=1, edge=edge), 1).log_prob(x).exp().sum())

    assert total("right") == pytest.approx(1, abs=1e-5)
    assert total("published") > 1.4


def test_the_published_edge_is_right_for_dark_pixels() -> None:
    x = levels(8)[:120, None, None, None]
    params = torch.tensor([0.0, -0.8, -2.0]).reshape(1, 3, 1, 1).expand(120, -1, -1, -1)
    right, published = (
        LogisticMixture(params, config(components=1, edge=edge), 1).log_prob(x) for edge in ("right", "published")
    )
    torch.testing.assert_close(right, published, rtol=2e-4, atol=2e-4)


# ------------------------------------------------------------------------------- the mixture against float64


def exact_log_prob(params: Tensor, image: Tensor, bits: int, components: int) -> np.ndarray[Any, Any]:
    """Nats per pixel (B, H, W) of an RGB image on the stretched grid, directly from spec §4 in float64."""
    p, v = params.double().numpy(), 2**bits - 1
    logits, rest = p[:, :components], p[:, components:]
    batch, _, height, width = p.shape
    rest = rest.reshape(batch, 3, 3, components, height, width)
    means, log_scales, c = rest[:, :, 0], np.maximum(rest[:, :, 1], -7), np.tanh(rest[:, :, 2])
    level = np.round(image.double().numpy() * v)[:, :, None]
    x = 2 * level / v - 1
    red, green = x[:, 0], x[:, 1]
    shifted = [means[:, 0], means[:, 1] + c[:, 0] * red, means[:, 2] + c[:, 1] * red + c[:, 2] * green]
    total = logits - logsumexp(logits, axis=1, keepdims=True)
    for colour, mean in enumerate(shifted):
        scale, k = np.exp(log_scales[:, colour]), level[:, colour]
        b = np.where(k == v, np.inf, (x[:, colour] + 1 / v - mean) / scale)
        a = np.where(k == 0, -np.inf, (x[:, colour] - 1 / v - mean) / scale)
        # σ(b) − σ(a) = σ(−a) − σ(−b), on the side where neither is near 1; log σ(u) = −log(1 + e^−u).
        near, far = np.where(a > 0, -a, b), np.where(a > 0, -b, a)
        near, far = -np.logaddexp(0, -near), -np.logaddexp(0, -far)
        total = total + near + np.log(-np.expm1(far - near))
    return np.asarray(logsumexp(total, axis=1))


@pytest.mark.parametrize("log_scale", [-7.0, -4.0, -1.0, 3.0])
@pytest.mark.parametrize("components", [1, 10])
@pytest.mark.parametrize("bits", [8, 5])
def test_the_mixture_agrees_with_float64(bits: int, components: int, log_scale: float) -> None:
    image = levels(bits)[torch.randint(2**bits, (2, 3, 6, 6))]
    image[:, :, 0, :2], image[:, :, 1, :2] = 0, 1
    params = mixture_params(components, 3, 2, 6, 6, log_scale=log_scale, spread=0.3)
    expected = exact_log_prob(params, image, bits, components)
    found = LogisticMixture(params, config(bits=bits, components=components), 3)._log_prob(image)
    torch.testing.assert_close(
        found[:, 0].double(), torch.from_numpy(expected), rtol=1e-5, atol=2e-4 if log_scale < -5 else 1e-5
    )


def test_coefficients_of_each_colour_act_where_they_should() -> None:
    """R's coefficient shifts G by R; G's shifts B by R; B's shifts B by G (spec §4)."""
    params = torch.zeros(1, 10, 1, 1)
    params[0, [3, 6, 9]] = torch.tensor([0.2, -0.5, 0.9])[:, None, None]
    c0, c1, c2 = torch.tanh(torch.tensor([0.2, -0.5, 0.9])).tolist()
    likelihood = LogisticMixture(params, config(components=1), 3)
    red, green = 0.4, -0.6
    means = likelihood._shifted_means(torch.tensor([red, green, 0.123]).reshape(1, 3, 1, 1, 1)).flatten()
    torch.testing.assert_close(means, torch.tensor([0.0, c0 * red, c1 * red + c2 * green]))


@pytest.mark.parametrize("raw", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("field", [1, 2], ids=["mean", "log-scale"])
def test_absurd_parameters_give_finite_values_and_gradients(field: int, raw: float) -> None:
    params = torch.zeros(256, 3, 1, 1)
    params[:, field] = raw
    params.requires_grad_()
    log_prob = LogisticMixture(params, config(components=1), 1).log_prob(levels(8)[:, None, None, None])
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    assert log_prob.isfinite().all()
    assert gradient.isfinite().all()


def test_one_bit_is_a_coin() -> None:
    """Two levels, the tails on both sides of 0: P(1) = σ(mean / scale)."""
    params = torch.tensor([0.0, 0.3, -1.0]).reshape(1, 3, 1, 1)
    likelihood = LogisticMixture(params, config(bits=1, components=1), 1)
    expected = math.log(1 / (1 + math.exp(-0.3 / math.exp(-1))))
    assert float(likelihood.log_prob(torch.ones(1, 1, 1, 1))) == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------- other closed forms


def test_bernoulli_is_that_of_torch() -> None:
    logits, x = torch.randn(3, 1, 5, 5) * 4, torch.bernoulli(torch.full((3, 1, 5, 5), 0.5))
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli(logits, config(kind="bernoulli"), 1).log_prob(x), expected)


def test_bernoulli_mean_is_the_probability() -> None:
    logits = torch.randn(3, 1, 5, 5)
    torch.testing.assert_close(Bernoulli(logits, config(kind="bernoulli"), 1).mean(), torch.sigmoid(logits))


def test_normal_is_that_of_torch_on_the_scale_from_minus_one_to_one() -> None:
    params, x = torch.randn(2, 6, 4, 4) * 3, torch.rand(2, 3, 4, 4)
    mean, sigma = 5 * torch.tanh(params[:, :3] / 5), torch.exp(5 * torch.tanh(params[:, 3:] / 5)) + 0.01
    expected = torch.distributions.Normal(mean, sigma).log_prob(2 * x - 1).sum((1, 2, 3))
    likelihood = NormalLikelihood(params, config(kind="normal"), 3)
    torch.testing.assert_close(likelihood.log_prob(x), expected)
    torch.testing.assert_close(likelihood.mean(), mean.clamp(-1, 1) / 2 + 0.5)


def test_only_the_normal_is_a_density() -> None:
    assert [kind.is_density for kind in (Bernoulli, LogisticMixture, NormalLikelihood)] == [False, False, True]


def test_a_squared_error_is_no_probability_and_its_distortion_the_sum_over_pixels_from_minus_one_to_one() -> None:
    assert [name for name, kind in LIKELIHOODS.items() if not kind.is_probability] == ["squared_error"]
    x, decoded = torch.rand(2, 3, 6, 6), torch.rand(2, 3, 6, 6)
    likelihood = SquaredError(2 * decoded - 1, config(kind="squared_error", border=1), 3)
    expected = 4 * (x - decoded)[:, :, 1:5, 1:5].square().sum((1, 2, 3))
    torch.testing.assert_close(-likelihood.log_prob(x), expected)
    torch.testing.assert_close(likelihood.mean(), decoded)
    assert torch.equal(likelihood.sample(), likelihood.mean())


def test_mean_of_the_rgb_mixture_is_that_of_the_spec() -> None:
    params = mixture_params(4, 3, 2, 3, 3)
    p = params.double()
    weights = torch.softmax(p[:, :4], 1)
    rest = p[:, 4:].reshape(2, 3, 3, 4, 3, 3)
    m = (weights[:, None] * rest[:, :, 0]).sum(2)
    c = (weights[:, None] * rest[:, :, 2].tanh()).sum(2)
    red = m[:, 0].clamp(-1, 1)
    green = (m[:, 1] + c[:, 0] * red).clamp(-1, 1)
    blue = (m[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
    found = LogisticMixture(params, config(components=4), 3).mean()
    torch.testing.assert_close(found.double(), torch.stack([red, green, blue], 1) / 2 + 0.5, rtol=0, atol=1e-6)


def test_mean_of_the_grey_mixture_is_that_of_the_components() -> None:
    params = torch.tensor([0.0, math.log(3), -0.4, 0.8, -2, -2]).reshape(1, 6, 1, 1)
    likelihood = LogisticMixture(params, config(components=2), 1)
    assert float(likelihood.mean()) == pytest.approx((0.25 * -0.4 + 0.75 * 0.8) / 2 + 0.5, rel=1e-6)


# ----------------------------------------------------------------------------------------------- border and precision

ANY = [
    pytest.param("bernoulli", 1, id="bernoulli"),
    pytest.param("logistic_mixture", 1, id="grey mixture"),
    pytest.param("logistic_mixture", 3, id="rgb mixture"),
    pytest.param("normal", 3, id="normal"),
]


def any_likelihood(kind: str, channels: int, dtype: torch.dtype = torch.float32, **fields: Any) -> Likelihood:
    c = config(kind=kind, components=2, **fields)
    return LIKELIHOODS[kind](
        torch.randn(2, LIKELIHOODS[kind].params_per_pixel(c, channels), 8, 8).to(dtype), c, channels
    )


@pytest.mark.parametrize(("kind", "channels"), ANY)
def test_the_border_does_not_count(kind: str, channels: int) -> None:
    whole = any_likelihood(kind, channels, border=2)
    cropped = LIKELIHOODS[kind](whole.params[:, :, 2:6, 2:6], config(kind=kind, components=2), channels)
    x = torch.randint(2, (2, channels, 8, 8)).float()
    torch.testing.assert_close(whole.log_prob(x), cropped.log_prob(x[:, :, 2:6, 2:6]))
    assert whole.dims == cropped.dims == channels * 16


@pytest.mark.parametrize(("kind", "channels"), ANY)
def test_values_are_float32_whatever_the_decoder_gives(kind: str, channels: int) -> None:
    x = torch.ones(2, channels, 8, 8, dtype=torch.bfloat16)
    likelihood = any_likelihood(kind, channels, torch.bfloat16)
    assert likelihood.log_prob(x).dtype == likelihood.mean().dtype == likelihood.sample().dtype == torch.float32
    assert any_likelihood(kind, channels, torch.float64).log_prob(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("kind", "channels"), ANY)
def test_the_values_of_float32_and_float64_agree(kind: str, channels: int) -> None:
    single = any_likelihood(kind, channels)
    double = LIKELIHOODS[kind](single.params.double(), single.config, channels)
    x = torch.randint(2, (2, channels, 8, 8))
    torch.testing.assert_close(single.log_prob(x.float()).double(), double.log_prob(x.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "channels"), ANY)
def test_gradients_agree_with_finite_differences(kind: str, channels: int) -> None:
    likelihood = any_likelihood(kind, channels, torch.float64)
    params, x = (
        likelihood.params[:1, :, :2, :2].clone().requires_grad_(),
        torch.randint(2, (1, channels, 2, 2)).double(),
    )
    assert torch.autograd.gradcheck(lambda p: LIKELIHOODS[kind](p, likelihood.config, channels).log_prob(x), params)


# ---------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "channels"), ANY)
def test_draws_are_images(kind: str, channels: int, temperature: float) -> None:
    draw = any_likelihood(kind, channels).sample(temperature)
    assert draw.shape == (2, channels, 8, 8)
    assert draw.min() >= 0
    assert draw.max() <= 1


@pytest.mark.parametrize(("kind", "channels"), ANY)
def test_given_numbers_decide_a_draw(kind: str, channels: int) -> None:
    likelihood = any_likelihood(kind, channels)
    uniform = torch.rand(likelihood.noise_shape)
    assert torch.equal(likelihood.sample(0.8, uniform), likelihood.sample(0.8, uniform))
    assert not torch.equal(likelihood.sample(0.8, uniform), likelihood.sample(0.8, 1 - uniform))


@pytest.mark.parametrize(("kind", "channels"), ANY)
def test_numbers_at_the_ends_of_the_interval_give_finite_draws(kind: str, channels: int) -> None:
    likelihood = any_likelihood(kind, channels)
    for value in (0.0, 1.0):
        assert likelihood.sample(1.0, torch.full(likelihood.noise_shape, value)).isfinite().all()


def test_bernoulli_draws_have_their_probability() -> None:
    logits = torch.tensor([-3.0, -1.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    likelihood = Bernoulli(logits.expand(20_000, -1, -1, -1), config(kind="bernoulli"), 1)
    for temperature in (1.0, 0.5):
        p = torch.sigmoid(logits.flatten() / temperature)
        error = (p * (1 - p) / 20_000).sqrt()
        assert ((likelihood.sample(temperature).mean((0, 1, 2)) - p).abs() < 4 * error).all()


def test_a_bernoulli_at_temperature_zero_is_its_likelier_value() -> None:
    logits = torch.tensor([-3.0, -1e-3, 1e-3, 2.0]).reshape(1, 1, 1, 4)
    draw = Bernoulli(logits, config(kind="bernoulli"), 1).sample(0.0)
    assert draw.flatten().tolist() == [0, 0, 1, 1]


def test_a_mixture_at_temperature_zero_is_the_mean_of_its_likeliest_component() -> None:
    params = torch.tensor([1.0, 3.0, 2.0, 0.1, -0.6, 0.9, 0, 0, 0]).reshape(1, 9, 1, 1)
    draw = LogisticMixture(params, config(components=3), 1).sample(0.0)
    assert float(draw) == pytest.approx(-0.6 / 2 + 0.5, rel=1e-6)


def test_a_normal_at_temperature_zero_is_its_mean() -> None:
    likelihood = any_likelihood("normal", 3)
    assert torch.equal(likelihood.sample(0.0), likelihood.mean())


def test_components_are_drawn_by_their_weights() -> None:
    """Three far and narrow components; at temperature t the weights are softmax(logits / t)."""
    logits, means = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([-0.8, 0.0, 0.8])
    params = torch.cat([logits, means, torch.full((3,), -7.0)]).reshape(1, 9, 1, 1).expand(1, 9, 1, 30_000)
    for temperature in (1.0, 0.5):
        draw = LogisticMixture(params, config(components=3), 1).sample(temperature).flatten()
        nearest = (2 * draw[:, None] - 1 - means).abs().argmin(1)
        found = torch.bincount(nearest, minlength=3) / 30_000
        p = torch.softmax(logits / temperature, 0)
        assert ((found - p).abs() < 4 * (p * (1 - p) / 30_000).sqrt()).all()


def test_a_component_is_drawn_by_the_inverse_of_its_distribution() -> None:
    """mean + temperature · scale · logit(u), with the shift by the colours already drawn (spec §4)."""
    params = mixture_params(1, 3, 1, 1, 7, log_scale=-2.0, spread=0.2)
    likelihood = LogisticMixture(params, config(components=1), 3)
    uniform = torch.rand(1, 4, 1, 7) * 0.8 + 0.1
    noise = 0.7 * torch.logit(uniform[:, 1:].double())
    p = params[:, 1:].reshape(1, 3, 3, 1, 7).double()
    mean, scale, c = p[:, :, 0], p[:, :, 1].clamp(min=-7).exp(), p[:, :, 2].tanh()
    red = (mean[:, 0] + scale[:, 0] * noise[:, 0]).clamp(-1, 1)
    green = (mean[:, 1] + c[:, 0] * red + scale[:, 1] * noise[:, 1]).clamp(-1, 1)
    blue = (mean[:, 2] + c[:, 1] * red + c[:, 2] * green + scale[:, 2] * noise[:, 2]).clamp(-1, 1)
    found = likelihood.sample(0.7, uniform)
    torch.testing.assert_close(found.double(), torch.stack([red, green, blue], 1) / 2 + 0.5, rtol=0, atol=1e-6)


def test_draws_of_a_mixture_fall_on_levels_as_often_as_the_likelihood_says() -> None:
    params = mixture_params(3, 1, 1, 1, 1, log_scale=-1.5)
    c = config(bits=2, components=3)
    x = levels(2)[:, None, None, None]
    p = LogisticMixture(params.expand(4, -1, -1, -1), c, 1).log_prob(x).exp()
    draws = LogisticMixture(params.expand(-1, -1, 1, 40_000), c, 1).sample()
    found = torch.bincount((draws * 3).round().long().flatten(), minlength=4) / 40_000
    assert ((found - p).abs() < 4 * (p * (1 - p) / 40_000).sqrt()).all()


def test_normal_draws_have_their_mean_and_deviation() -> None:
    params = torch.tensor([0.1, -0.2, 0.0, -2.0, -1.5, -2.5]).reshape(1, 6, 1, 1).expand(1, 6, 1, 20_000)
    likelihood = NormalLikelihood(params, config(kind="normal"), 3)
    draw = (2 * likelihood.sample(0.5) - 1).squeeze()
    sigma = 0.5 * likelihood.normal.sigma[0, :, 0, 0]
    assert ((draw.mean(1) - likelihood.normal.mean[0, :, 0, 0]).abs() < 4 * sigma / 20_000**0.5).all()
    torch.testing.assert_close(draw.std(1), sigma, rtol=0.03, atol=0)


# ----------------------------------------------------------------------------------------------------------- config


def test_a_bernoulli_keeps_eight_bits() -> None:
    with pytest.raises(ValidationError, match="leave bits at 8"):
        LikelihoodConfig(kind="bernoulli", bits=5)


@pytest.mark.parametrize(("kind", "channels", "expected"), [("bernoulli", 1, 1), ("normal", 3, 6)])
def test_parameters_per_pixel(kind: str, channels: int, expected: int) -> None:
    assert LIKELIHOODS[kind].params_per_pixel(config(kind=kind), channels) == expected


@pytest.mark.parametrize(("components", "channels", "expected"), [(10, 3, 100), (10, 1, 30), (1, 3, 10), (5, 1, 15)])
def test_parameters_per_pixel_of_the_mixture(components: int, channels: int, expected: int) -> None:
    assert LogisticMixture.params_per_pixel(config(components=components), channels) == expected


def test_the_highest_level_of_the_truncated_grid_keeps_its_value() -> None:
    assert highest_level(5, "truncated") == 248 / 255
    assert highest_level(8, "truncated") == highest_level(5, "stretched") == 1


@pytest.mark.parametrize(
    ("channels", "fields"), [(3, {}), (1, {"edge": "published", "bits": 5, "grid": "truncated"})], ids=["rgb", "grey"]
)
def test_without_gradients_the_mixture_is_the_same_in_one_pass(channels: int, fields: dict[str, Any]) -> None:
    components = 10 if channels == 3 else 30
    params = mixture_params(components, channels, 6, 32, 32)
    params = torch.cat([params] * math.ceil(2**19 / params.numel())).contiguous(memory_format=torch.channels_last)
    x = torch.rand(len(params), channels, 32, 32)
    likelihood = LogisticMixture(params, config(components=components, **fields), channels)
    expected = likelihood.log_prob(x)
    with torch.no_grad():
        torch.testing.assert_close(likelihood.log_prob(x), expected, rtol=1e-6, atol=0)
