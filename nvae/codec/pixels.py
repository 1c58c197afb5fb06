"""Distributions of pixels as integers: Bernoulli, and the mixture of logistics (spec §4).

The mixture's parameters are rounded, and from there on everything is integers: a logistic's σ comes from a table, so
that the probabilities of all levels are the same on every machine.

Shapes: B images, C colours, P pixels inside the border, M mixture components, V + 1 levels.
"""

import math
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import numpy as np

from ..bricks.likelihoods import Bernoulli, Likelihood, LogisticMixture
from ..core.errors import UserError
from .rounding import Rounding
from .stack import Stack, library

TABLE_BITS, TABLE_END, TABLE_ONE = 13, 20, 2**30
"""The table of σ(u): u in steps of 2^−13, from −20 to 20, values in units of 2^−30."""
WEIGHT_ONE = 2**20
"""Of a component's weight; times 2^30 it is exact in float64."""
LOGIT_STEPS, MEAN_STEPS, COEFFICIENT_STEPS = 64, 256, 4096
"""Of a logit, a level's width, and the coefficients of colours: what parameters are rounded to."""
SCALE_STEPS = 32
"""Of an octave of a logistic's scale."""
FURTHEST = 2.0**12
"""Levels beyond which a component's mean and scale do not matter."""
_GUARD = 96
"""Bits behind the point while the table is made."""


@cache
def sigmoids() -> np.ndarray:
    """σ(u) · 2^30 of the table's places, int64, from 2^−20 or so up: by integers, so the same on every machine.

    e^h = Σ h^k / k! for the step h, and each next exponential by one product.
    """
    one, ratio, term, k = 1 << _GUARD, 0, 1 << _GUARD, 0
    while term:
        ratio, k = ratio + term, k + 1
        term = (term >> TABLE_BITS) // k
    upper, exponential = [], one  # from u = 0 up: σ = e^u / (1 + e^u)
    for _ in range((TABLE_END << TABLE_BITS) + 1):
        upper.append((exponential * TABLE_ONE + ((one + exponential) >> 1)) // (one + exponential))
        exponential = exponential * ratio >> _GUARD
    half = np.array(upper, dtype=np.int64)
    return np.concatenate([TABLE_ONE - half[:0:-1], half])


def sigmoid(u: np.ndarray) -> np.ndarray:
    """σ · 2^30 of u in steps of 2^−13, both int64; ends of the table beyond it."""
    end = TABLE_END << TABLE_BITS
    values: np.ndarray = sigmoids()[np.clip(u, -end, end) + end]
    return values


class Pixels(ABC):
    """The distributions of a batch's pixels."""

    @abstractmethod
    def push(self, stack: Stack, image: int, levels: np.ndarray) -> None:
        """The levels (C, P) of one image."""

    @abstractmethod
    def pop(self, stack: Stack, image: int) -> np.ndarray:
        """Those of one image, (C, P) int64."""


class BinaryPixels(Pixels):
    """Of a Bernoulli likelihood."""

    def __init__(self, likelihood: Bernoulli, rounding: Rounding, place: int) -> None:
        logits = likelihood.visible(likelihood.params).clamp(-TABLE_END, TABLE_END)
        self.colours = logits.shape[1]
        u = rounding(LOGIT_STEPS * logits, place) * (2**TABLE_BITS // LOGIT_STEPS)
        self.probabilities = sigmoid(u) / TABLE_ONE  # exact

    @property
    def _model(self) -> Any:
        return library().model.Bernoulli(perfect=False)

    def push(self, stack: Stack, image: int, levels: np.ndarray) -> None:
        """Levels 0 and 1."""
        stack.push(levels.reshape(-1), self._model, self.probabilities[image])

    def pop(self, stack: Stack, image: int) -> np.ndarray:
        """Levels 0 and 1."""
        return stack.pop(self._model, self.probabilities[image]).astype(np.int64).reshape(self.colours, -1)


class MixturePixels(Pixels):
    """Of a mixture of logistics, its probabilities those that sum to 1, whatever the edge of its bins."""

    def __init__(self, likelihood: LogisticMixture, rounding: Rounding, place: int) -> None:
        config, self.colours = likelihood.config, likelihood.channels
        self.levels = config.levels
        width = (config.highest + 1) / self.levels  # of a level, on the [−1, 1] scale
        octave = SCALE_STEPS / math.log(2)
        parts = [
            (likelihood.logits - likelihood.logits.amax(1, keepdim=True)).clamp(-TABLE_END, 0) * LOGIT_STEPS,
            ((likelihood.means + 1) / width).clamp(-FURTHEST, FURTHEST) * MEAN_STEPS,
            (likelihood.log_scales - math.log(width)).clamp(max=math.log(FURTHEST)) * octave,
        ]
        if likelihood.coefficients is not None:
            parts.append(likelihood.coefficients * COEFFICIENT_STEPS)
        integers = []
        for part in parts:
            rows = likelihood.visible(part.flatten(1, -3))  # (B, M or C·M, h, w)
            integers.append(rounding(rows, place).reshape(*rows.shape[:2], -1))
            place += integers[-1][0].size
        m = config.components
        self.weights = _softmax(integers[0])  # (B, M, P)
        self.means, self.scales, *coefficients = (part.reshape(len(part), self.colours, m, -1) for part in integers[1:])
        self.coefficients = coefficients[0] if coefficients else None  # (B, 3, M, P)
        self.middle = round(MEAN_STEPS / width)
        """0 on the [−1, 1] scale, in steps of means."""

    @property
    def _model(self) -> Any:
        return library().model.Categorical(perfect=False)

    def push(self, stack: Stack, image: int, levels: np.ndarray) -> None:
        """Blue first: red, on which the others depend, is popped first."""
        tables, weights = [], self.weights[image]
        for colour in range(self.colours):
            of_components = self.components(image, colour, levels)
            tables.append(mixed(weights, of_components))
            weights = told(weights, of_components, levels[colour])
        for colour in reversed(range(self.colours)):
            stack.push(levels[colour], self._model, tables[colour])

    def pop(self, stack: Stack, image: int) -> np.ndarray:
        """Red, then green given red, then blue given both."""
        levels, weights = np.zeros((self.colours, self.weights.shape[2]), dtype=np.int64), self.weights[image]
        for colour in range(self.colours):
            of_components = self.components(image, colour, levels)
            levels[colour] = stack.pop(self._model, mixed(weights, of_components))
            weights = told(weights, of_components, levels[colour])
        return levels

    def components(self, image: int, colour: int, levels: np.ndarray) -> np.ndarray:
        """(M, P, V + 1) · 2^30 of a colour's levels under each component, given those (C, P) of earlier colours."""
        mean = self.means[image, colour]  # (M, P)
        for earlier in range(colour):
            assert self.coefficients is not None
            coefficient = self.coefficients[image, colour - 1 + earlier]  # G's of R is 0, B's of R is 1, of G is 2
            mean = mean + (coefficient * (levels[earlier] * MEAN_STEPS - self.middle)) // COEFFICIENT_STEPS
        inverse = _inverse_scales()[self.scales[image, colour] - _SMALLEST]  # (M, P)
        edges = MEAN_STEPS * np.arange(self.levels) + MEAN_STEPS // 2  # above levels 0 … V − 1
        below = np.zeros((*mean.shape, self.levels + 2), dtype=np.int64)
        below[..., 1:-1] = sigmoid(((edges - mean[..., None]) * inverse[..., None]) >> _INVERSE_SHIFT)
        below[..., -1] = TABLE_ONE
        between: np.ndarray = np.diff(below, axis=2)
        return between


def mixed(weights: np.ndarray, of_components: np.ndarray) -> np.ndarray:
    """(P, V + 1), in proportion, of (M, P, V + 1) under components of weights (M, P): integers, as float64."""
    counts: np.ndarray = np.einsum("mp,mpv->pv", weights, of_components)
    return counts.astype(np.float64)


def told(weights: np.ndarray, of_components: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The weights (M, P) once the levels (P,) of a colour are known: components that foresaw them weigh more.

    Where none did they stay as they were.
    """
    share = np.take_along_axis(of_components, levels[None, :, None], axis=2)[:, :, 0]  # (M, P)
    share = np.where(share.any(0), share, 1)
    joint = (weights * share) >> 20  # below 2^31, so that it may be a numerator
    joint = np.where(joint.any(0), joint, weights)
    shared: np.ndarray = joint * WEIGHT_ONE // joint.sum(0)
    return shared


_SMALLEST = -256
"""Steps of the smallest scale: e^−7 on the [−1, 1] scale of 8 bits is 0.12 levels, 3.1 octaves below one."""
_INVERSE_SHIFT = 15
"""From steps of means (2^8) times inverse scales (2^20) to the table's (2^13)."""


@cache
def _inverse_scales() -> np.ndarray:
    """2^20 over scales from 2^(−256/32) levels to FURTHEST, by integers."""
    root = _root_of_two()
    steps = range(_SMALLEST, int(math.log2(FURTHEST)) * SCALE_STEPS + 1)
    found = []
    for step in steps:
        octaves, rest = divmod(-step, SCALE_STEPS)
        value = 1 << _GUARD
        for _ in range(rest):
            value = value * root >> _GUARD
        found.append((value << 20 + octaves if octaves >= -20 else value >> -octaves - 20) >> _GUARD)
    return np.array(found, dtype=np.int64)


def _root_of_two() -> int:
    """2^(1/32) · 2^96."""
    value = 2 << _GUARD
    for _ in range(int(math.log2(SCALE_STEPS))):
        value = math.isqrt(value << _GUARD)
    return value


def exponentials(x: np.ndarray, steps: int) -> np.ndarray:
    """e^x · 2^16 of x ≤ 0 in so many steps, both int64, as e^x = σ(x) / σ(−x)."""
    odds = sigmoid(x * (2**TABLE_BITS // steps))
    values: np.ndarray = (odds << 16) // (TABLE_ONE - odds)
    return values


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Weights (B, M, P) in units of 2^−20 of logits (B, M, P), both int64, the largest 0."""
    parts = exponentials(logits, LOGIT_STEPS)
    weights: np.ndarray = parts * WEIGHT_ONE // parts.sum(1, keepdims=True)
    return weights


CODERS: dict[type[Likelihood], Any] = {Bernoulli: BinaryPixels, LogisticMixture: MixturePixels}


def pixels_of(likelihood: Likelihood, rounding: Rounding, place: int) -> Pixels:
    """The distributions of a batch's pixels. Their numbers begin at `place`."""
    pixels: Pixels = CODERS[type(likelihood)](likelihood, rounding, place)
    return pixels


def require_probabilities(kind: str, bits: int) -> None:
    """Raises UserError for a likelihood of which no level has a probability, or not every one of 8 bits."""
    if kind not in ("bernoulli", "logistic_mixture"):
        raise UserError(f"compression: the likelihood is {kind}, which gives pixels no probability")
    if bits != 8:
        raise UserError(f"compression: the model knows {bits} of the 8 bits of a pixel, the others would be lost")
