"""Normal latents in a pass over memory each way: parameters and densities, with their gradients (spec §3; paper Eq. 2).

Only arguments are kept. Shapes: B batch, L latent channels, h w space of a group.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.precision import at_least_float32
from .fusion import fused, is_worth_a_pass

Pair = tuple[Tensor, Tensor]
"""Mean and sigma of a Normal."""


def bounded_normal(raws: tuple[Tensor, ...], temperature: float) -> Pair:
    """Mean soft(m) and sigma (exp(soft(l)) + 0.01) · temperature of the sum of raw parameters (B, 2L, h, w)."""
    if len(raws) > 2 or any(len(raw) != len(raws[0]) for raw in raws) or not is_worth_a_pass(raws[0]):
        return NotImplemented  # type: ignore[no-any-return]
    first, second = (*raws, None)[:2]
    return cast(Pair, _Bounded.apply(first, second, temperature))


def log_sigma_normal(raw: Tensor, temperature: float) -> Pair:
    """Mean m and sigma exp(l) · temperature of raw parameters (B, 2L, h, w)."""
    if not is_worth_a_pass(raw):
        return NotImplemented  # type: ignore[no-any-return]
    return cast(Pair, _OfLogSigma.apply(raw, temperature))


def score_terms(q: Pair, p: Pair, drawn: Tensor, z: Tensor, closed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """KL (B, L) of q from p, log density (B,) of `drawn` under q and of z under p, in nats."""
    if any(tensor.shape != z.shape for tensor in (*q, *p, drawn)) or not is_worth_a_pass(z):
        return NotImplemented  # type: ignore[no-any-return]
    return cast(tuple[Tensor, Tensor, Tensor], _Scored.apply(*q, *p, drawn, None if z is drawn else z, closed))


# ------------------------------------------------------------------------------------------------- through autograd


class _Bounded(torch.autograd.Function):
    """`bounded_normal` of one or two raw parameters."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor | None, temperature: float) -> Pair:
        ctx.save_for_backward(first, second)
        ctx.temperature = temperature
        return _bounded(first, second, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        mean_grad, sigma_grad = grads
        raw_grad = _bounded_gradient(first, second, mean_grad, sigma_grad, ctx.temperature)
        return raw_grad.to(first.dtype), None if second is None else raw_grad.to(second.dtype), None


class _OfLogSigma(torch.autograd.Function):
    """`log_sigma_normal`."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, temperature: float) -> Pair:
        mean, sigma = _of_log_sigma(raw, temperature)
        ctx.save_for_backward(sigma)
        ctx.dtype = raw.dtype
        return mean, sigma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mean_grad, sigma_grad = grads
        return _log_sigma_gradient(mean_grad, sigma_grad, *ctx.saved_tensors).to(ctx.dtype), None


class _Scored(torch.autograd.Function):
    """`score_terms`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_mean: Tensor,
        q_sigma: Tensor,
        p_mean: Tensor,
        p_sigma: Tensor,
        drawn: Tensor,
        z: Tensor | None,
        closed: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z: None where it is what was drawn."""
        ctx.save_for_backward(q_mean, q_sigma, p_mean, p_sigma, drawn, z)
        ctx.closed = closed
        return _scored(q_mean, q_sigma, p_mean, p_sigma, drawn, z, closed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_mean, q_sigma, p_mean, p_sigma, drawn, z = ctx.saved_tensors
        by_kl, by_q, by_p = grads
        found = _score_gradients(q_mean, q_sigma, p_mean, p_sigma, drawn, z, by_kl, by_q, by_p, ctx.closed)
        return (*found, None) if z is not None else (*found, None, None)


# ------------------------------------------------------------------------------------------------ passes over memory


@fused(dynamic=True, few=True)
def _bounded(first: Tensor, second: Tensor | None, temperature: float) -> Pair:
    mean, log_sigma = _soft(first, second)
    return mean, (log_sigma.exp() + 0.01) * temperature


@fused(dynamic=True, few=True)
def _bounded_gradient(
    first: Tensor, second: Tensor | None, mean_grad: Tensor, sigma_grad: Tensor, temperature: float
) -> Tensor:
    """Of the sum of raw parameters, (B, 2L, h, w)."""
    mean, log_sigma = _soft(first, second)
    through_mean = mean_grad * (1 - (mean / 5).square())
    through_sigma = sigma_grad * temperature * log_sigma.exp() * (1 - (log_sigma / 5).square())
    return torch.cat([through_mean, through_sigma], dim=1)


def _soft(first: Tensor, second: Tensor | None) -> Pair:
    """Mean and log sigma, 5·tanh(u/5) of the halves of the sum."""
    raw = at_least_float32(first) if second is None else at_least_float32(first) + at_least_float32(second)
    mean, log_sigma = (5 * torch.tanh(raw / 5)).chunk(2, dim=1)
    return mean, log_sigma


@fused(dynamic=True, few=True)
def _of_log_sigma(raw: Tensor, temperature: float) -> Pair:
    mean, log_sigma = at_least_float32(raw).chunk(2, dim=1)
    return mean.clone(), log_sigma.exp() * temperature


@fused(dynamic=True, few=True)
def _log_sigma_gradient(mean_grad: Tensor, sigma_grad: Tensor, sigma: Tensor) -> Tensor:
    """Of raw parameters, (B, 2L, h, w)."""
    return torch.cat([mean_grad, sigma_grad * sigma], dim=1)


@fused(dynamic=True, few=True)
def _scored(
    q_mean: Tensor, q_sigma: Tensor, p_mean: Tensor, p_sigma: Tensor, drawn: Tensor, z: Tensor | None, closed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    log_q, log_p = _log_prob(q_mean, q_sigma, drawn), _log_prob(p_mean, p_sigma, drawn if z is None else z)
    divergence = log_q - log_p
    if closed:
        ratio = q_sigma / p_sigma
        divergence = 0.5 * (((q_mean - p_mean) / p_sigma).square() + ratio.square()) - 0.5 - ratio.log()
    return divergence.sum((2, 3)), log_q.sum((1, 2, 3)), log_p.sum((1, 2, 3))


def _log_prob(mean: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    return -0.5 * ((z - mean) / sigma).square() - 0.5 * math.log(2 * math.pi) - sigma.log()


@fused(dynamic=True, few=True)
def _score_gradients(
    q_mean: Tensor,
    q_sigma: Tensor,
    p_mean: Tensor,
    p_sigma: Tensor,
    drawn: Tensor,
    z: Tensor | None,
    by_kl: Tensor,
    by_q: Tensor,
    by_p: Tensor,
    closed: bool,
) -> tuple[Tensor, ...]:
    """Of both means and sigmas, of `drawn`, and of z if it is another, from those of the KL (B, L) and the log
    densities (B,)."""
    by_kl, by_q, by_p = by_kl[:, :, None, None], by_q[:, None, None, None], by_p[:, None, None, None]
    if not closed:
        by_q, by_p = by_q + by_kl, by_p - by_kl
    q_noise, p_noise = (drawn - q_mean) / q_sigma, ((drawn if z is None else z) - p_mean) / p_sigma
    q_mean_grad, p_mean_grad = by_q * q_noise / q_sigma, by_p * p_noise / p_sigma
    q_sigma_grad, p_sigma_grad = by_q * (q_noise.square() - 1) / q_sigma, by_p * (p_noise.square() - 1) / p_sigma
    drawn_grad, z_grad = -q_mean_grad, -p_mean_grad
    if closed:
        shift, ratio = (q_mean - p_mean) / p_sigma, q_sigma / p_sigma
        q_mean_grad, p_mean_grad = q_mean_grad + by_kl * shift / p_sigma, p_mean_grad - by_kl * shift / p_sigma
        q_sigma_grad = q_sigma_grad + by_kl * (ratio / p_sigma - 1 / q_sigma)
        p_sigma_grad = p_sigma_grad - by_kl * (shift.square() + ratio.square() - 1) / p_sigma
    of_parameters = q_mean_grad, q_sigma_grad, p_mean_grad, p_sigma_grad
    return (*of_parameters, drawn_grad + z_grad) if z is None else (*of_parameters, drawn_grad, z_grad)
