"""Distributions of pixels as integers: those of the likelihood, and the same on every machine."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch

from nvae.bricks.likelihoods import Bernoulli, LikelihoodConfig, LogisticMixture
from nvae.codec.pixels import (
    TABLE_BITS,
    TABLE_ONE,
    MixturePixels,
    exponentials,
    mixed,
    pixels_of,
    sigmoid,
    sigmoids,
    told,
)
from nvae.codec.rounding import Rounding
from nvae.codec.stack import Stack
from nvae.core.errors import UserError

SIDE = 6


def mixture(colours: int, spread: float = 1.0, border: int = 0, components: int = 3) -> LogisticMixture:
    config = LikelihoodConfig(components=components, border=border)
    channels = LogisticMixture.params_per_pixel(config, colours)
    params = spread * torch.randn(2, channels, SIDE, SIDE, dtype=torch.float64)
    params[:, components:] -= 0.5
    return LogisticMixture(params, config, colours)


def nats_of(likelihood: LogisticMixture, levels: np.ndarray) -> np.ndarray:
    """(B, P) of levels (B, C, P) under the likelihood."""
    x = torch.from_numpy(levels).reshape(len(levels), -1, SIDE, SIDE) / 255
    return -likelihood.log_prob_of_pixels(x).flatten(1).numpy()


# ------------------------------------------------------------------------------------------------------------ tables


def test_the_table_is_the_logistic_function() -> None:
    u = np.arange(-25 << TABLE_BITS, 25 << TABLE_BITS, 97)
    wanted = torch.sigmoid(torch.from_numpy(u).double() / 2**TABLE_BITS).clamp(2e-9, 1 - 2e-9).numpy()
    np.testing.assert_allclose(sigmoid(u) / TABLE_ONE, wanted, atol=1e-9)


def test_the_table_never_falls_and_never_ends_at_certainty() -> None:
    assert (np.diff(sigmoids()) >= 0).all()
    assert 0 < sigmoids()[0] < sigmoids()[-1] < TABLE_ONE


def test_the_table_is_the_same_everywhere() -> None:
    digest = hashlib.sha256(sigmoids().astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "6ad4a558da97cbac"


def test_exponentials_are_those_of_the_table() -> None:
    x = np.arange(-500, 1)
    np.testing.assert_allclose(exponentials(x, 64) / 2**16, np.exp(x / 64), atol=2**-15)


# ----------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_probabilities_of_a_mixture_are_the_likelihoods(colours: int, spread: float) -> None:
    likelihood = mixture(colours, spread)
    pixels = MixturePixels(likelihood, Rounding(2), 0)
    levels = (255 * likelihood.sample()).round().long().flatten(2).numpy()
    coded = np.zeros((2, SIDE**2))
    for b in range(2):
        weights = pixels.weights[b]
        for colour in range(colours):
            of_components = pixels.components(b, colour, levels[b])
            table = mixed(weights, of_components)
            assert (table >= 0).all()
            weights = told(weights, of_components, levels[b, colour])
            share = table[np.arange(SIDE**2), levels[b, colour]] / table.sum(1)
            coded[b] -= np.log(np.maximum(share, 2.0**-24))
    wanted = nats_of(likelihood, levels)
    np.testing.assert_allclose(coded.mean(), wanted.mean(), rtol=0.01)


def test_the_divergence_from_the_likelihood_is_a_thousandth_of_a_nat() -> None:
    likelihood = mixture(1)
    pixels = MixturePixels(likelihood, Rounding(2), 0)
    levels = np.tile(np.arange(256)[:, None, None, None], (1, 2, 1, SIDE**2))
    wanted = np.exp(-np.stack([nats_of(likelihood, of_level) for of_level in levels], axis=-1))  # (2, P, 256)
    for b in range(2):
        table = mixed(pixels.weights[b], pixels.components(b, 0, levels[0, 0]))
        coded = (table + table.sum() * 2.0**-40) / table.sum(1, keepdims=True)
        divergence = (wanted[b] * np.log(wanted[b].clip(1e-300) / coded.clip(2.0**-24))).sum(1)
        assert divergence.mean() < 1e-3


@pytest.mark.parametrize("colours", [1, 3])
def test_pixels_of_a_mixture_come_back(colours: int) -> None:
    pixels = pixels_of(mixture(colours, spread=2.0, border=1), Rounding(2), 0)
    levels = np.random.default_rng(0).integers(0, 256, (colours, (SIDE - 2) ** 2))
    stack = Stack.new("0", 10)
    pixels.push(stack, 1, levels)
    np.testing.assert_array_equal(pixels.pop(stack, 1), levels)


def test_extreme_parameters_are_coded() -> None:
    params = torch.zeros(1, 30, 1, 2, dtype=torch.float64)
    params[:, 3:] = torch.tensor([-1e6, 1e6], dtype=torch.float64)
    params[:, 0] = 1e6
    pixels = pixels_of(LogisticMixture(params, LikelihoodConfig(components=3), 3), Rounding(1), 0)
    levels = np.array([[0, 255], [255, 0], [17, 1]])
    stack = Stack.new("0", 10)
    pixels.push(stack, 0, levels)
    np.testing.assert_array_equal(pixels.pop(stack, 0), levels)


# ----------------------------------------------------------------------------------------------------------- bernoulli


def test_binary_pixels_cost_their_likelihood_and_come_back() -> None:
    likelihood = Bernoulli(2 * torch.randn(1, 1, 64, 64, dtype=torch.float64), LikelihoodConfig(kind="bernoulli"), 1)
    pixels = pixels_of(likelihood, Rounding(1), 0)
    x = torch.bernoulli(torch.sigmoid(likelihood.params))
    stack = Stack.new("0", 10)
    before = stack.bits
    levels = x.long().reshape(1, -1).numpy()
    pixels.push(stack, 0, levels)
    assert stack.bits - before == pytest.approx(-likelihood.log_prob(x).item() / math.log(2), rel=1e-3)
    np.testing.assert_array_equal(pixels.pop(stack, 0), levels)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"kind": "normal"}, "no probability"), ({"bits": 5}, "5 of the 8")],
)
def test_likelihoods_that_would_lose_something_are_refused(changes: dict[str, Any], reason: str) -> None:
    from tiny_codecs import COLOUR, tiny_nvae

    from nvae.codec.coders import coder_of

    with pytest.raises(UserError, match=reason):
        coder_of(tiny_nvae(**{**COLOUR, "likelihood": changes}))
