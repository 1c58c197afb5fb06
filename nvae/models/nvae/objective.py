"""The training objective and the bounds (spec §5 and §7; paper §3.3 and appendix A).

Shapes: B batch, G latent groups (top-down), K importance samples.
"""

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ...core.config import Config
from ...core.devices import sent
from ...core.distributed import all_mean

Number = float | Tensor
"""One of the host's, or a 0-d tensor, which the host does not read."""


class ObjectiveConfig(Config):
    kl_warmup: float = Field(0.3, ge=0, le=1)
    """Fraction of training over which the KL coefficient grows from `kl_min` to 1 (spec §5)."""
    kl_constant: float = Field(0.0001, ge=0, le=1)
    """Fraction of training at the start during which the KL coefficient stays at `kl_min`."""
    kl_min: float = Field(0.0001, gt=0, le=1)
    """Smallest KL coefficient."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the KL in the loss (β of Higgins et al. 2017), times its warm-up. 1: the negative ELBO. 0: an
    autoencoder, where σ shrinks until codes are all but points, and samples from the prior resemble nothing."""
    kl_balance: bool = True
    """Balance the KL of the groups while the coefficient is below 1 (paper appendix A)."""
    importance_samples: int = Field(1, ge=1, le=1000)
    """Draws of the latents of an image in each update, K. From 2 on, once the KL has its full weight, the bound of K
    importance samples is trained (Burda et al. 2016), as evaluation gives it."""
    spectral: float = Field(1e-2, ge=0)
    """Weight λ of the penalties (spectral norms and batch-norm scales), per nat of the loss."""
    spectral_start: float | None = Field(None, gt=0)
    """λ at the start of the KL warm-up, annealed geometrically to `spectral`; none: λ is fixed."""

    def idle(self) -> dict[str, str]:
        during = ("kl_constant", "kl_min", "kl_balance", "spectral_start")
        found = {} if self.kl_warmup else dict.fromkeys(during, "there is no kl_warmup")
        return found if self.spectral else {"spectral_start": "there are no penalties", **found}


def kl_coefficient(progress: Number, config: ObjectiveConfig) -> Number:
    """clip((p − p₀)/w, min, 1) at the fraction p of training done, w the warm-up and p₀ the constant part (spec §5)."""
    if config.kl_warmup == 0:
        return progress * 0 + 1
    coefficient = (progress - config.kl_constant) / config.kl_warmup
    if isinstance(coefficient, Tensor):
        return coefficient.clamp(config.kl_min, 1.0)
    return min(max(coefficient, config.kl_min), 1.0)


def spectral_weight(coefficient: Number, config: ObjectiveConfig) -> Number:
    """λ at a KL coefficient c: exp((1−c)·ln λ₀ + c·ln λ), or λ when it is fixed (spec §5)."""
    if config.spectral_start is None or config.spectral == 0:
        return coefficient * 0 + config.spectral
    log = (1 - coefficient) * math.log(config.spectral_start) + coefficient * math.log(config.spectral)
    return log.exp() if isinstance(log, Tensor) else math.exp(log)


def balance_factors(scales: Sequence[int], device: torch.device) -> Tensor:
    """α of each group (G,): (2^s)²/n_s over the smallest such; s its scale (0 smallest) of n_s groups (spec §5)."""
    alphas = torch.tensor([4.0**s / scales.count(s) for s in scales])
    return sent(alphas / alphas.min(), device)


def balance_weights(kl: Tensor, factors: Tensor) -> Tensor:
    """Weights (G,) of the groups' KL (B, G): ∝ k_i/α_i · Σk with mean 1, not differentiated.

    k_i is the mean of |KL_i| over the batch and ranks, plus 0.01.
    """
    size = all_mean(kl.detach().abs().mean(0)) + 0.01
    weights = size / factors * size.sum()
    return weights / weights.mean()


def balanced_kl(kl: Tensor, coefficient: Number, weights: Tensor | None) -> Tensor:
    """coefficient · Σ_g w_g KL_g, (B,) nats, from KL (B, G); without weights, or from coefficient 1 on, a plain sum."""
    if weights is not None:
        kl = kl * in_warm_up(weights, coefficient)
    return coefficient * kl.sum(1)


def in_warm_up(weights: Tensor, coefficient: Number) -> Tensor:
    """The weights while the coefficient is below 1, then ones."""
    below = coefficient < 1
    if isinstance(below, Tensor):
        return torch.where(below, weights, 1.0)
    return weights if below else torch.ones_like(weights)
