"""The skips against their formulas."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.bricks.resampling import DownSkip, UpSkip

# ------------------------------------------------------------------------------------------------------------ skips


def test_a_skip_down_reads_four_phases_in_order() -> None:
    """Quarters of the outputs at (row, column) phases (0,0), (1,1), (0,1), (1,0); each a strided 1×1 convolution."""
    skip, x = DownSkip(4, 10), torch.randn(2, 4, 6, 8)
    activated = x * torch.sigmoid(x)
    parts = []
    for convolution, (row, column) in zip(skip.convolutions, [(0, 0), (1, 1), (0, 1), (1, 0)], strict=True):
        shifted = activated[:, :, row:, column:]
        parts.append(F.conv2d(shifted, convolution.effective_weight(), convolution.bias, stride=2))
    assert [part.shape[1] for part in parts] == [2, 2, 2, 4], "the last takes the remainder"
    torch.testing.assert_close(skip(x), torch.cat(parts, 1))


def test_a_skip_up_is_bilinear_with_aligned_corners() -> None:
    skip, x = UpSkip(4, 2), torch.randn(1, 4, 3, 5)

    def interpolation(size: int) -> Tensor:
        """(2·size, size): the weights of linear interpolation at j·(size − 1)/(2·size − 1)."""
        position = torch.arange(2 * size) * (size - 1) / (2 * size - 1)
        return (1 - (position[:, None] - torch.arange(size)).abs()).clamp(min=0)

    doubled = torch.einsum("ih,jw,bchw->bcij", interpolation(3), interpolation(5), x)
    expected = torch.einsum("oc,bcij->boij", skip.convolution.effective_weight().flatten(1), doubled)
    assert skip.convolution.bias is None
    torch.testing.assert_close(skip(x), expected)
