"""The discretised mixture of logistics without gradients, pixels as rows, for one pass over memory (spec §4).

Shapes: B images, C colours, H W space, P = B · H · W pixels, M mixture components.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from .activations import expm1
from .fusion import WORTH_SECONDS, fused
from .native import channels_last

FEW = 64
"""Pixels that its kernel is compared on."""


class Levels(Protocol):
    """Of the config of a likelihood, what this depends on."""

    components: int
    edge: str

    @property
    def levels(self) -> int:
        """V for V + 1 levels of a colour."""

    @property
    def highest(self) -> float:
        """The highest level on the [−1, 1] scale, where the lowest is −1."""


def log_prob(params: Tensor, x: Tensor, config: Levels, channels: int) -> Tensor:
    """Nats per pixel (B, 1, H, W) of images (B, C, H, W) from 0 to 1, C 1 or 3.

    params (B, 3M or 10M, H, W) as `LogisticMixture` has them.
    """
    if config.edge != "right" or torch.is_grad_enabled():
        return NotImplemented  # type: ignore[no-any-return]
    batch, _, height, width = x.shape
    nats = _of_pixels(_pixels(params), _pixels(x), config.components, config.levels, config.highest)
    return nats.reshape(batch, 1, height, width)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (P, C)."""
    return channels_last(x).permute(0, 2, 3, 1).flatten(0, 2)


def _few_pixels(params: Tensor, x: Tensor, *others: Any) -> tuple[Any, ...]:
    """Small arguments of `_of_pixels`."""
    return params[:FEW].clone(), x[:FEW].clone(), *others


@fused(dynamic=True, least=WORTH_SECONDS, small=_few_pixels)
def _of_pixels(params: Tensor, x: Tensor, components: int, levels: int, highest: float) -> Tensor:
    """Nats (P) of pixels x (P, C) from 0 to 1, params (P, 3M or 10M)."""
    colours, x = x.shape[1], 2 * x - 1
    logits = params[:, :components]
    of_colours = params[:, components:].reshape(len(params), colours, -1, components)  # (P, C, 3 or 2, M)
    joint = logits
    for colour in range(colours):
        mean, log_scale = of_colours[:, colour, 0], of_colours[:, colour, 1].clamp(min=-7)
        for earlier in range(colour):
            # G's mean shifts by coefficient 0 of R, B's by 1 of R and 2 of G. tanh c is 2 σ(2c) − 1, at half the cost.
            coefficient = 2 * torch.sigmoid(2 * of_colours[:, colour - 1 + earlier, 2]) - 1
            mean = mean + coefficient * x[:, earlier, None]
        joint = joint + _log_prob_of(x[:, colour, None], mean, log_scale, levels, highest)
    # Both sums in one: the compiled pass then writes what it sums to one place, and reads `logits` once.
    joint_sum, sum_of_weights = torch.stack([joint, logits], dim=1).logsumexp(2).unbind(1)
    return joint_sum - sum_of_weights


def _log_prob_of(x: Tensor, mean: Tensor, log_scale: Tensor, levels: int, highest: float) -> Tensor:
    """As `logistic_log_prob` of nvae/bricks/likelihoods.py, with a single logarithm.

    log σ(u) is min(u, 0) − log(1 + e^−|u|), so that log of σ(b) σ(−a) (1 − e^(a−b)) is min(b, 0) + min(−a, 0) +
    log of (1 − e^(a−b)) / (1 + e^−|b|) / (1 + e^−|a|). A tail leaves out the factors of the end that it does not have.
    """
    half = (highest + 1) / (2 * levels)  # half the width of a bin
    level = torch.round((x + 1) / (2 * half))
    lowest, topmost = level <= 0, level >= levels
    above, below = (2 * level + 1) * half - 1, (2 * level - 1) * half - 1
    inverse = torch.exp(-log_scale)
    b, minus_a = (above - mean) * inverse, (mean - below) * inverse
    linear = torch.where(topmost, 0.0, b.clamp(max=0)) + torch.where(lowest, 0.0, minus_a.clamp(max=0))
    upper = 1 + torch.where(topmost, 0.0, torch.exp(-b.abs()))
    lower = 1 + torch.where(lowest, 0.0, torch.exp(-minus_a.abs()))
    width = (2 * half * inverse).clamp(min=1e-37)  # b − a; an infinite scale stays finite
    between = torch.where(width < 1, -expm1(-width), 1 - torch.exp(-width))
    return linear + torch.log(torch.where(lowest | topmost, 1.0, between) / (upper * lower))
