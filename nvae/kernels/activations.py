"""Activations, each with its slope for backward passes that compute both again from the input (spec §1)."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

Activation = Literal["identity", "swish", "elu", "elu_elu", "gelu"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "swish": F.silu,
    "elu": F.elu,
    "elu_elu": lambda u: F.elu(F.elu(u)),
    "gelu": F.gelu,
}
"""`elu_elu` is ELU twice, as in the flow cells (spec §3)."""


def in_a_pass(activation: Activation, u: Tensor) -> Tensor:
    """The activation, written for a compiled pass: ELU by exp, which costs half of expm1; it errs by 1e-7 at most."""
    return with_slope(activation, u)[0] if activation in ("elu", "elu_elu") else ACTIVATIONS[activation](u)


def with_slope(activation: Activation, u: Tensor) -> tuple[Tensor, Tensor]:
    """The activation of u and its derivative there."""
    return _WITH_SLOPE[activation](u)


def _swish(u: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(u)
    y = u * gate
    return y, gate + y * (1 - gate)


def _elu(u: Tensor) -> tuple[Tensor, Tensor]:
    slope = u.clamp(max=0).exp()
    return u.clamp(min=0) + (slope - 1), slope


def _elu_elu(u: Tensor) -> tuple[Tensor, Tensor]:
    inner_slope = u.clamp(max=0).exp()
    below = expm1(inner_slope - 1)  # at inputs from −1 to 0
    return u.clamp(min=0) + below, (below + 1) * inner_slope


EXPM1_QUOTIENT: tuple[float, ...] = tuple(
    Chebyshev.interpolate(lambda v: np.expm1(v) / v, 6, domain=[-1, 0]).convert(kind=Polynomial).coef.tolist()
)
"""(eᵛ − 1)/v on [−1, 0] as a polynomial in v, lowest power first; it errs by less than 1e-8."""


def expm1(v: Tensor) -> Tensor:
    """eᵛ − 1 for v in [−1, 0]: a polynomial takes a third of the time of an exponential of an exponential."""
    if v.dtype == torch.float64:
        return torch.expm1(v)
    quotient = v * EXPM1_QUOTIENT[-1] + EXPM1_QUOTIENT[-2]
    for coefficient in EXPM1_QUOTIENT[-3::-1]:
        quotient = quotient * v + coefficient
    return quotient * v


def _gelu(u: Tensor) -> tuple[Tensor, Tensor]:
    below = 0.5 * (1 + torch.erf(u * math.sqrt(0.5)))  # P(Normal < u)
    return u * below, below + u * torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)


_WITH_SLOPE: dict[Activation, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "identity": lambda u: (u, torch.ones_like(u)),
    "swish": _swish,
    "elu": _elu,
    "elu_elu": _elu_elu,
    "gelu": _gelu,
}
