"""The plain mode: the same network and numbers without any of our reuse, as the yardstick of every speed figure.

NCHW, PyTorch's own operators and their gradients, each convolution normalises its weight at every call, batch norm,
activation and convolution one after the other, enlarging before everything else as in the published network.

Shapes: B batch, C channels, H W space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bricks.cells import SeparableOp
from ..bricks.convolutions import Conv2d
from ..bricks.flows import ShiftCell
from ..bricks.normalisation import BatchNorm
from ..bricks.resampling import UpSkip
from ..bricks.squeeze_excite import SCALE, SqueezeExcite
from ..kernels.activations import ACTIVATIONS, Activation
from ..models.base import Metrics, Output
from ..models.nvae.model import NVAE


def make_plain(model: NVAE) -> NVAE:
    """Lets the model compute plainly from now on; returns it."""
    model.__class__ = PlainNVAE
    for module in model.modules():
        if kind := _PLAIN.get(type(module)):
            module.__class__ = kind
    return model


class PlainNVAE(NVAE):
    """See `make_plain`."""

    def loss(self, output: Output, progress: float) -> tuple[Tensor, Metrics]:
        """The spectral term makes the effective weights once more."""
        self.weights.clear()
        self.weights.refresh()
        return super().loss(output, progress)


class PlainConv2d(Conv2d):
    """See `make_plain`."""

    def forward(self, x: Tensor, activation: Activation = "identity") -> Tensor:
        """(B, C, H, W) -> (B, O, H', W')."""
        x = ACTIVATIONS[activation](x.contiguous())
        if self.geometry.enlarge:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        self._effective = None
        stride, padding, dilation, groups, _ = self.geometry
        return F.conv2d(x, self.effective_weight(), self.bias, stride, padding, dilation, groups)


class PlainBatchNorm(BatchNorm):
    """See `make_plain`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.training:
            self.num_batches_tracked.add_(1)
        running = (self.running_mean, self.running_var)
        y = F.batch_norm(x, *running, self.weight, self.bias, self.training, self.momentum, self.eps)
        return ACTIVATIONS[self.activation](y)

    def into(self, convolution: Conv2d, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W')."""
        y: Tensor = convolution(self(x))
        return y


class PlainSeparableOp(SeparableOp):
    """Enlarges first: the expansion sees four times the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            self.spatial.geometry = self.spatial.geometry._replace(enlarge=False)
        return super().forward(x)


class PlainSqueezeExcite(SqueezeExcite):
    """See `make_plain`."""

    def forward(self, skip: Tensor, x: Tensor, norm: BatchNorm | None = None) -> Tensor:
        """(B, C, H, W) three times."""
        x = x if norm is None else norm(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return skip + SCALE * (x * gate[:, :, None, None])


class PlainShiftCell(ShiftCell):
    """Multiplies with the masked zeros, too."""

    def _expanded(self, z: Tensor) -> Tensor:
        y: Tensor = self.expand(z)
        return y


class PlainUpSkip(UpSkip):
    """Enlarges first, too."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W)."""
        y: Tensor = self.convolution(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
        return y


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    Conv2d: PlainConv2d,
    BatchNorm: PlainBatchNorm,
    SeparableOp: PlainSeparableOp,
    SqueezeExcite: PlainSqueezeExcite,
    ShiftCell: PlainShiftCell,
    UpSkip: PlainUpSkip,
}
