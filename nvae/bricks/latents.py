"""Latent variables: bounded Normals, the residual posterior, KL (spec §3; paper §3.2, Eq. 2).

Everything here is computed in at least float32. Shapes: B batch, L latent channels, h w space of a group.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.precision import at_least_float32
from ..kernels.operations import operation


def soft_clamp(u: Tensor) -> Tensor:
    """5·tanh(u/5): the identity near 0, never beyond ±5 (spec §3)."""
    return 5 * torch.tanh(u / 5)


class Normal(NamedTuple):
    """Independent Normals; mean and sigma are (B, L, h, w)."""

    mean: Tensor
    sigma: Tensor

    @staticmethod
    def from_raw(raw: Tensor, temperature: float = 1.0) -> "Normal":
        """From raw parameters (B, 2L, h, w): mean soft(m), sigma (exp(soft(l)) + 0.01) · temperature (spec §3)."""
        mean, log_sigma = soft_clamp(at_least_float32(raw)).chunk(2, dim=1)
        return Normal(mean, (log_sigma.exp() + 0.01) * temperature)

    @staticmethod
    def from_sum(raws: Sequence[Tensor], temperature: float = 1.0) -> "Normal":
        """From raw parameters (B, 2L, h, w) that are summed; those of fewer images count again for the next ones."""
        return Normal(*bounded_normal(tuple(raws), temperature))

    @staticmethod
    def from_log_sigma(raw: Tensor, temperature: float = 1.0) -> "Normal":
        """From (B, 2L, h, w): mean m and sigma exp(l) · temperature, both unbounded (spec_vdvae, Decoder)."""
        return Normal(*log_sigma_normal(raw, temperature))

    def draw(self, noise: Tensor) -> Tensor:
        """μ + σ·ε for standard-normal noise (B, L, h, w)."""
        return self.mean + self.sigma * noise

    def noise_of(self, z: Tensor) -> Tensor:
        """The ε for which `draw` gives z."""
        return (z - self.mean) / self.sigma

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of each element in nats, (B, L, h, w)."""
        return -0.5 * self.noise_of(z).square() - 0.5 * math.log(2 * math.pi) - self.sigma.log()


def kl_divergence(q: Normal, p: Normal) -> Tensor:
    """KL(q ‖ p) of each element in nats: ½(((μq−μp)/σp)² + (σq/σp)²) − ½ − log(σq/σp) (spec §3; paper Eq. 2)."""
    ratio = q.sigma / p.sigma
    return 0.5 * (((q.mean - p.mean) / p.sigma).square() + ratio.square()) - 0.5 - ratio.log()


class Score(NamedTuple):
    """What a draw costs, in nats."""

    channel_kl: Tensor
    """(B, L)."""
    log_q: Tensor
    """(B,)."""
    log_p: Tensor
    """(B,)."""


def score(q: Normal, p: Normal, drawn: Tensor, z: Tensor, *, closed: bool) -> Score:
    """Of a draw from q, which a flow without log-determinant has made z, under p (spec §3).

    KL is in `closed` form, where there is no flow, or else log q − log p at the draw.
    """
    return Score(*score_terms(q, p, drawn, z, closed))


def _draws(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    means, sigmas = (torch.randn(4, 2, 3, 4, 5, generator=generator).to(device, wide) for _ in range(2))
    q, p = (Normal(mean, sigma.abs() + 0.1) for mean, sigma in zip(means[:2], sigmas[:2], strict=True))
    for closed in (True, False):
        yield q, p, means[2], means[3], closed


@operation(_draws)
def score_terms(q: Normal, p: Normal, drawn: Tensor, z: Tensor, closed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of `score`: KL (B, L), log q and log p (B,), in nats."""
    log_q, log_p = q.log_prob(drawn), p.log_prob(z)
    divergence = kl_divergence(q, p) if closed else log_q - log_p
    return divergence.sum((2, 3)), log_q.sum((1, 2, 3)), log_p.sum((1, 2, 3))


class Draw(NamedTuple):
    """What one group of Normal latents makes of a batch, and of the decoder's state."""

    state: Tensor
    """(B, C, h, w), with z in it."""
    z: Tensor
    """(B, L, h, w)."""
    score: Score
    posterior: Normal
    """Before its flow."""
    prior: Normal


def sum_with_each(x: Tensor, y: Tensor) -> Tensor:
    """x (K·B, C, h, w) of K draws of B images, plus y (B, C, h, w) of the images: (K·B, C, h, w)."""
    if x.shape[0] == y.shape[0]:  # len() would make a constant of it where a program is traced
        return x + y
    return (torch.unflatten(x, 0, (-1, y.shape[0])) + y).flatten(0, 1)


def _log_sigmas(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(4, 6, 4, 5, generator=generator).to(device, dtype)
    yield raw, 1.0
    yield raw, 0.7


@operation(_log_sigmas)
def log_sigma_normal(raw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean and sigma of `Normal.from_log_sigma`, float32 or more."""
    mean, log_sigma = at_least_float32(raw).chunk(2, dim=1)
    return mean, log_sigma.exp() * temperature


def _raws(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    first, second = (3 * torch.randn(4, 6, 4, 5, generator=generator).to(device, dtype) for _ in range(2))
    yield (first,), 1.0
    yield (first, second, second[:2]), 0.7


@operation(_raws)
def bounded_normal(raws: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, Tensor]:
    """Mean and sigma of `Normal.from_sum`, float32 or more."""
    total, *others = map(at_least_float32, raws)
    for raw in others:
        total = sum_with_each(total, raw)
    return Normal.from_raw(total, temperature)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """log mean_k exp of log importance weights (K, B), in nats: (B,) (Burda et al. 2016, Eq. 8; spec §7)."""
    return torch.logsumexp(log_weights, dim=0) - math.log(log_weights.shape[0])
