"""Resampling skips of residual cells (spec §1).

Shapes: B batch, C channels, H W space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolutions import Conv2d


class DownSkip(nn.Module):
    """Halves H and W: swish, then four 1×1 convolutions, one per phase of the 2×2 grid, concatenated (spec §1)."""

    phases = ((0, 0), (1, 1), (0, 1), (1, 0))

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        widths = [quarter, quarter, quarter, out_channels - 3 * quarter]
        self.convolutions = nn.ModuleList(Conv2d(in_channels, width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/2, W/2)."""
        x = F.silu(x)
        parts = zip(self.convolutions, self.phases, strict=True)
        return torch.cat([convolution(x[:, :, i::2, j::2]) for convolution, (i, j) in parts], dim=1)


class UpSkip(nn.Module):
    """Doubles H and W: bilinear with aligned corners, then a 1×1 convolution without bias (spec §1)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = Conv2d(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W). The convolution comes first: it commutes, on a quarter of the pixels."""
        return F.interpolate(self.convolution(x), scale_factor=2, mode="bilinear", align_corners=True)
