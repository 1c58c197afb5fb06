"""Inverted bottlenecks of a trained model: a separable cell (spec §1) or the shift cell of a flow (spec §3).

Shapes: B images, C channels, H W space of x; O outputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.activations import ACTIVATIONS
from ..kernels.cpu.bottleneck import Kernel, Weights, available, packed
from ..kernels.gated_sum import Gate
from ..kernels.operations import operation
from .convolutions import Conv2d
from .squeeze_excite import SqueezeExcite


def _bottlenecks(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """A gated cell that enlarges, and a shift cell."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for elu, enlarge, gate_width in ((False, True, 4), (True, False, 0)):
        expand = Kernel(normal(24, 4, 1, 1) / 2, normal(24))
        spatial, project = Kernel(normal(24, 1, 5, 5) / 5, normal(24), 1, enlarge), Kernel(normal(4, 24, 1, 1) / 5)
        width = gate_width
        gate = (normal(width, 4), normal(width), normal(4, width), normal(4)) if width else ()
        made = packed(expand, spatial, project, elu=elu, gate=gate) if device.type == "cpu" and available() else None
        x = normal(2, 4, 6, 5).to(device, dtype)
        skip = normal(2, 4, *((12, 10) if enlarge else (6, 5))).to(device, dtype)
        expand, spatial, project = (_as(kernel, x) for kernel in (expand, spatial, project))
        yield x, skip, Weights(expand, spatial, project, elu, tuple(t.to(device) for t in gate), 0.1, made)


def _as(kernel: Kernel, x: Tensor) -> Kernel:
    """On the device and in the type of x."""
    return kernel._replace(weight=kernel.weight.to(x), bias=None if kernel.bias is None else kernel.bias.to(x))


@operation(_bottlenecks)
def bottleneck(x: Tensor, skip: Tensor, weights: Weights) -> Tensor:
    """skip + scale · gate(y) · y, with y = project(act'(spatial(act(expand(x))))), in the type of x.

    x (B, C, H, W), skip (B, O, H/stride, W/stride), twice that where the spatial kernel enlarges.
    """
    first, second = (ACTIVATIONS["elu"], ACTIVATIONS["elu_elu"]) if weights.elu else (F.silu, F.silu)
    y = _convolved(second(_convolved(first(_convolved(x, weights.expand)), weights.spatial)), weights.project)
    if not weights.gate:
        return (skip + weights.scale * y).to(x.dtype)
    squeeze, squeeze_bias, excite, excite_bias = weights.gate
    gate = Gate(squeeze, squeeze_bias, excite, excite_bias, weights.scale)
    return (skip + gate.of(y)[:, :, None, None] * y).to(x.dtype)


def _convolved(x: Tensor, kernel: Kernel) -> Tensor:
    if kernel.enlarge:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    groups = x.shape[1] // kernel.weight.shape[1]
    return F.conv2d(x, kernel.weight, kernel.bias, kernel.stride, kernel.weight.shape[2] // 2, 1, groups)


class Bottleneck(nn.Module):
    """`bottleneck` of trained convolutions; the gate is that of squeeze-and-excitation, or 1."""

    def __init__(
        self,
        expand: Conv2d,
        spatial: Conv2d,
        project: Conv2d,
        *,
        elu: bool = False,
        gate: SqueezeExcite | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.expand, self.spatial, self.project, self.gate = expand, spatial, project, gate
        self.elu, self.scale = elu, scale
        self.packed = packed(*self._kernels(), elu=elu, gate=self._gate()) if available() else None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, C, H, W), skip (B, O, H', W') -> (B, O, H', W'), in the type of x."""
        expand, spatial, project = self._kernels()
        weights = Weights(expand, spatial, project, self.elu, self._gate(), self.scale, self.packed)
        return bottleneck(x, skip, weights)

    def _kernels(self) -> tuple[Kernel, Kernel, Kernel]:
        return _kernel(self.expand), _kernel(self.spatial), _kernel(self.project)

    def _gate(self) -> tuple[Tensor, ...]:
        return () if self.gate is None else tuple(self.gate.parameters())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Packed weights belong to the machine that made them: they are made again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.packed = packed(*self._kernels(), elu=self.elu, gate=self._gate()) if available() else None


def _kernel(convolution: Conv2d) -> Kernel:
    stride, _, dilation, groups, enlarge = convolution.geometry
    weight = convolution.effective_weight()
    assert dilation == 1 and (groups == 1 or convolution.geometry.is_depthwise(weight))
    return Kernel(weight, convolution.bias, stride, enlarge)
