"""Inverse-autoregressive flow cells (Kingma et al. 2016; spec §3; paper §3.2).

Elements of z are ordered by row, then column, then channel at one pixel. A shift never sees its own element nor any
later one, so the Jacobian is triangular with unit diagonal and the log-determinant is 0.

Shapes: B batch, L latent channels, h w space; 6L hidden channels, six per latent channel.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolutions import Conv2d
from .recomputation import Recomputable

EXPANSION = 6


def earlier_pixels(size: int, mirrored: bool) -> Tensor:
    """(size, size) mask of the pixels before the centre, row by row; rotated by 180° when mirrored."""
    flat = torch.arange(size * size) < size * size // 2
    mask = flat.reshape(size, size).float()
    return mask.flip(0, 1) if mirrored else mask


def causal_mask(pixels: Tensor, at_centre: Tensor) -> Tensor:
    """(O, I, k, k): the pixel mask everywhere, and at the centre the connections `at_centre` (O, I)."""
    centre = pixels.shape[0] // 2
    mask = pixels.expand(*at_centre.shape, *pixels.shape).clone()
    mask[:, :, centre, centre] = at_centre.float()
    return mask


class ShiftCell(nn.Module):
    """z ← z − m(z), with m three masked convolutions of which the first is strict (spec §3)."""

    def __init__(self, channels: int, mirrored: bool) -> None:
        super().__init__()
        hidden = EXPANSION * channels
        owner = torch.arange(hidden) // EXPANSION  # the latent channel that a hidden channel belongs to
        before = owner[:, None] > torch.arange(channels)  # (6L, L), strict
        upto = torch.arange(channels)[:, None] >= owner  # (L, 6L), not strict
        here = torch.ones(hidden, 1)
        strict = causal_mask(earlier_pixels(3, mirrored), before)
        depthwise = causal_mask(earlier_pixels(5, mirrored), here)
        self.expand = Conv2d(channels, hidden, 3, bias=False, mask=strict)
        self.spatial = Conv2d(hidden, hidden, 5, groups=hidden, bias=False, mask=depthwise)
        self.project = Conv2d(hidden, channels, mask=upto.float()[:, :, None, None], initial_gain=0.1)
        self.mirrored = mirrored

    def shift(self, z: Tensor) -> Tensor:
        """m(z), (B, L, h, w) -> (B, L, h, w)."""
        hidden = self.spatial(self._expanded(z), "elu")
        # ELU twice: the published weights were trained with it.
        return cast(Tensor, self.project(hidden, "elu_elu"))

    def _expanded(self, z: Tensor) -> Tensor:
        """The strict convolution by the two rows of its kernel that see anything."""
        top = 0 if self.mirrored else 1
        kernel = self.expand.effective_weight()[:, :, 1 - top : 3 - top]
        return F.conv2d(F.pad(z, (1, 1, top, 1 - top)), kernel)

    def forward(self, z: Tensor) -> Tensor:
        """(B, L, h, w) -> (B, L, h, w), float32 or more."""
        return z - self.shift(z).to(z.dtype)

    def inverse(self, z: Tensor, tolerance: float = 1e-6) -> Tensor:
        """The input that `forward` maps to z, by fixed-point iteration.

        Exact after as many rounds as there are elements, since each round settles at least one more; stops as soon
        as nothing moves by more than `tolerance`.
        """
        x = z
        for _ in range(z[0].numel()):
            previous, x = x, z + self.shift(x).to(z.dtype)
            if (x - previous).abs().max() <= tolerance:
                break
        return x


class FlowCell(Recomputable):
    """Two shift cells; the second looks the other way in space (spec §3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.forwards = ShiftCell(channels, mirrored=False)
        self.backwards = ShiftCell(channels, mirrored=True)

    def forward(self, z: Tensor) -> Tensor:
        """(B, L, h, w) -> (B, L, h, w); the log-determinant is 0."""
        return self.run(self._both, z)

    def _both(self, z: Tensor) -> Tensor:
        result: Tensor = self.backwards(self.forwards(z))
        return result

    def inverse(self, z: Tensor) -> Tensor:
        """The input that `forward` maps to z."""
        return self.forwards.inverse(self.backwards.inverse(z))
