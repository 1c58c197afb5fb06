"""The end of a residual cell: skip + 0.1 · SE(BN(x)) (spec §1; Hu et al. 2018).

Shapes: B batch, C channels, H W space; S hidden width of squeeze-and-excitation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..kernels.batch_norm import Norm, Statistics
from ..kernels.gated_sum import Gate
from ..kernels.operations import operation
from .normalisation import BatchNorm, batch_norm

SCALE = 0.1
"""Of the residual branch (spec §1)."""


def _gated(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Norm, Gate]]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    squeeze, excite = (torch.randn(shape, generator=generator).to(device, wide) for shape in ((4, 6), (6, 4)))
    weight, bias = (torch.randn(6, generator=generator).to(device, wide) for _ in range(2))
    skip, x = (1 + torch.randn(2, 6, 5, 4, generator=generator).to(device, dtype) for _ in range(2))
    gate = Gate(squeeze, squeeze[:, 0].clone(), excite, excite[:, 0].clone(), SCALE)
    yield skip, x, Norm(weight, bias, BatchNorm.eps, "identity", over_ranks=False), gate


@operation(lambda *place: ((skip, x, gate) for skip, x, _, gate in _gated(*place)))
def gated_sum(skip: Tensor, x: Tensor, gate: Gate) -> Tensor:
    """skip + 0.1 · gate(x) · x, (B, C, H, W) each; the gate is computed in float32 or more."""
    return skip + gate.of(x)[:, :, None, None] * x


@operation(_gated)
def batch_norm_gated_sum(skip: Tensor, x: Tensor, norm: Norm, gate: Gate) -> tuple[Tensor, Statistics]:
    """gated_sum(skip, batch_norm(x)), and the statistics of x."""
    y, statistics = batch_norm(x, norm)
    return gated_sum(skip, y, gate), statistics


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channel means; hidden width max(C // 16, 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, skip: Tensor, x: Tensor, norm: BatchNorm | None = None) -> Tensor:
        """skip + 0.1 · gate · norm(x), (B, C, H, W) each, in the wider type of both."""
        gate = Gate(self.squeeze.weight, self.squeeze.bias, self.excite.weight, self.excite.bias, SCALE)
        if norm is None or not norm.training:
            return gated_sum(skip, x if norm is None else norm(x), gate)
        y, statistics = batch_norm_gated_sum(skip, x, norm.norm, gate)
        norm.advance(statistics, x)
        return y
