"""Normal latents as integers on a grid, and the distributions of these.

The grid of a latent is even, centred at the prior's mean, with 2^b to 2^(b+1) steps to the prior's σ: steps are powers
of two, so that a latent's value is the same on every machine. An even grid, not one of equal mass under the prior: a
Normal on it is a distribution that the coder's library has, and both lose the same (the KL of two Normals that are
summed up over the same bins is at most their own). How fine b has to be depends on how narrow posteriors are beside
their priors; it is chosen for each channel of a group, since finer grids need more bits to begin with.

Channels whose posteriors are their priors say nothing of images. Their latents are drawn from the prior by random
numbers that both sides know: they cost nothing, and need nothing to begin with.

Shapes: B images, L latent channels, h w space of a group, N = L · h · w.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bricks.latents import Normal, kl_divergence
from .rounding import Rounding
from .stack import library

STEPS = 64
"""Of an octave of σ, and of a step of the grid for means: what distributions are rounded to."""
REACH = 16
"""How many σ of the prior the grid reaches to each side, at the least half of it."""
NUMBERS = 4
"""That a latent's two distributions are made of."""
FINEST, COARSEST = 12, -1
"""Allowed b."""
IDLE = 1e-4
"""Mean nats of a latent below which its channel says nothing."""
IDLE_BITS = 4
"""b of such a channel: it costs nothing."""
SEEN = 0.99
"""Share of a channel's latents whose posterior's σ is at least a step."""
_POWERS = np.array([float(Decimal(2) ** (Decimal(i) / STEPS)) for i in range(STEPS)])
"""2^(i/64), rounded correctly: the same everywhere."""


def power_of_two(exponents: np.ndarray) -> np.ndarray:
    """2^(e/64) of integers e, the same on every machine."""
    octaves, steps = np.divmod(exponents, STEPS)
    powers: np.ndarray = np.ldexp(_POWERS[steps], octaves.astype(np.int32))
    return powers


def bits_needed(posterior: Normal, prior: Normal) -> list[int | None]:
    """b of each channel, for posteriors like these: (B, L, h, w); None where it says nothing."""
    narrower = (prior.sigma / posterior.sigma).log2().movedim(1, 0).flatten(1)  # (L, B·h·w) octaves
    needed = torch.quantile(narrower[:, : 2**20].double(), SEEN, dim=1).ceil().clamp(COARSEST, FINEST)
    nats = kl_divergence(posterior, prior).mean((0, 2, 3))
    return [None if of_channel < IDLE else int(bits) for bits, of_channel in zip(needed, nats, strict=True)]


@dataclass(frozen=True)
class Coded:
    """Distributions of the integers of a group, (B, N) each, in steps of its grid from its centre."""

    mean: np.ndarray
    sigma: np.ndarray

    def of(self, image: int, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The parameters of one image's, those that (N,) says."""
        return self.mean[image, which], self.sigma[image, which]


class Grid:
    """Of a group of latents, from its prior."""

    def __init__(self, prior: Normal, bits: Sequence[int | None], rounding: Rounding, place: int) -> None:
        """`bits`: b of each of the L channels, None for those that say nothing."""
        self.shape = prior.mean.shape
        numbers = self.shape[1:].numel()
        steps_of = np.array([IDLE_BITS if b is None else b for b in bits])
        fine = np.repeat(steps_of, numbers // len(bits))[None]  # (1, N)
        self.tells = np.repeat(np.array([b is not None for b in bits]), numbers // len(bits))
        """(N,): which latents say something."""
        octaves, steps = np.divmod(rounding(STEPS * prior.sigma.log2(), place), STEPS)
        self.exponent = (octaves - fine).astype(np.int32)
        """(B, N): a step is 2^exponent."""
        mean = rounding(STEPS * self._in_steps(prior.mean), place + numbers)
        self.centre = (mean + STEPS // 2) // STEPS
        """(B, N), in steps from 0."""
        self.prior = Coded((mean - STEPS * self.centre) / STEPS, power_of_two(steps + STEPS * fine))
        self.place = place + 2 * numbers
        self.furthest = REACH * 2 ** max(int(steps_of.max()), 0)

    @property
    def model(self) -> Any:
        """Of the library: Normals summed up over the bins of the grid."""
        return library().model.QuantizedGaussian(-self.furthest, self.furthest)

    def posterior(self, q: Normal, rounding: Rounding) -> Coded:
        """Of q (B, L, h, w) in its place."""
        numbers = self.centre.shape[1]
        centred = self._in_steps(q.mean) - torch.from_numpy(self.centre.reshape(self.shape))
        mean = rounding(STEPS * centred.clamp(-self.furthest, self.furthest), self.place)
        sigma = self._in_steps(q.sigma).log2().clamp(-3, FINEST + 4)
        return Coded(mean / STEPS, power_of_two(rounding(STEPS * sigma, self.place + numbers)))

    def values(self, integers: np.ndarray) -> Tensor:
        """The latents (B, L, h, w) float64 of integers (B, N)."""
        return torch.from_numpy(np.ldexp((self.centre + integers).astype(np.float64), self.exponent)).reshape(
            self.shape
        )

    def _in_steps(self, x: Tensor) -> Tensor:
        """(B, L, h, w) divided by the steps, exactly."""
        return torch.ldexp(x.cpu(), torch.from_numpy(-self.exponent.reshape(self.shape)))
