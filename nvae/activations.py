"""Activations, each with its slope for backward passes that compute both again from the input (spec §1)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
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
    inner, inner_slope = _elu(u)
    y, slope = _elu(inner)
    return y, slope * inner_slope


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
