"""Layers around the convolutions: batch norm with its activation, squeeze-and-excitation, resampling skips (spec §1).

Shapes: B batch, C channels, H W space.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .convolutions import Conv2d
from .distributed import all_mean, world_size

Activation = Literal["identity", "swish", "elu"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "swish": F.silu,
    "elu": F.elu,
}
ACTIVATION_GRADIENTS: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda grad, u: grad,
    "swish": torch.ops.aten.silu_backward.default,
    "elu": lambda grad, u: torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, False, u),
}

Statistics = tuple[Tensor, Tensor]
"""Mean and biased variance of a batch, (C,) each."""


class BatchNorm(nn.Module):
    """Batch norm (eps 1e-5, momentum 0.05, statistics over all ranks), then an activation.

    With `recompute` the backward pass makes both again from the input, the only activation that is kept (paper §3.4).
    The running variance is the unbiased one.
    """

    eps, momentum = 1e-5, 0.05
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, activation: Activation = "identity") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.recompute = False
        self._statistics: Statistics | None = None
        self._replaying = False
        self._alone = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in the type of the input; statistics in float32."""
        if not self.training:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return ACTIVATIONS[self.activation](y)
        if not self._replaying:
            self._statistics = self._measure(x)
        assert self._statistics is not None
        mean, var = self._statistics
        fused = self.activation if self.recompute else "identity"
        y = cast(Tensor, _BatchNorm.apply(x, self.weight, self.bias, mean, var, self.eps, fused))
        return y if self.recompute else ACTIVATIONS[self.activation](y)

    @torch.no_grad()
    def _measure(self, x: Tensor) -> Statistics:
        """Mean and biased variance (C,) over B, H, W and ranks; advances the running statistics."""
        var, mean = torch.var_mean(x.float() if x.dtype.itemsize < 4 else x, dim=(0, 2, 3), correction=0)
        ranks, momentum = (1, 1.0) if self._alone else (world_size(), self.momentum)
        if ranks > 1:
            # One collective; float64 because var = E[x²] − E[x]² cancels.
            mean64, var64 = mean.double(), var.double()
            moments = all_mean(torch.stack([mean64, var64 + mean64.square()]))
            moments[1] -= moments[0].square()
            mean, var = moments.to(mean.dtype).unbind()
        count = x.numel() // x.shape[1] * ranks
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (count / max(count - 1, 1)), momentum)
        self.num_batches_tracked.add_(1)
        return mean, var

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_statistics": None}


@contextmanager
def recording(modules: list[BatchNorm], statistics: list[Statistics]) -> Iterator[None]:
    """Leaves in `statistics` what each batch norm has measured within."""
    yield
    statistics.extend(module._statistics for module in modules if module._statistics is not None)


@contextmanager
def replaying(modules: list[BatchNorm], statistics: list[Statistics]) -> Iterator[None]:
    """Within, batch norms use recorded `statistics`: nothing advances, no collective is repeated."""
    for module, recorded in zip(modules, statistics, strict=True):
        module._statistics = recorded
        module._replaying = True
    try:
        yield
    finally:
        for module in modules:
            module._replaying = False


@contextmanager
def measuring(modules: list[BatchNorm]) -> Iterator[None]:
    """Within, running statistics are those of the last pass of this rank alone, no average over passes and ranks."""
    for module in modules:
        module._alone = True
    try:
        yield
    finally:
        for module in modules:
            module._alone = False


class _BatchNorm(torch.autograd.Function):
    """act(γ (x − mean)/sqrt(var + eps) + β), with mean and var those of x over B, H, W and ranks. Keeps only x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, activation: Activation
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps, ctx.activation = eps, activation
        return ACTIVATIONS[activation](F.batch_norm(x, mean, var, weight, bias, eps=eps))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        grad = grads[0]
        if ctx.activation != "identity":
            y = F.batch_norm(x, mean, var, weight, bias, eps=ctx.eps)
            grad = ACTIVATION_GRADIENTS[ctx.activation](grad, y)
        shape = (1, -1, 1, 1)
        scale = torch.rsqrt(var + ctx.eps)
        grad = grad.to(mean.dtype)
        normalised = (x - mean.reshape(shape)) * scale.reshape(shape)
        # (2, C): the gradients of β and γ from this rank; their mean over ranks is what x's gradient needs.
        sums = torch.stack([grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))])
        means = all_mean(sums) / (x.numel() // x.shape[1])
        centred = grad - means[0].reshape(shape) - normalised * means[1].reshape(shape)
        grad_x = centred * (weight * scale).reshape(shape)
        return grad_x.to(x.dtype), sums[1], sums[0], None, None, None, None


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channel means (Hu et al. 2018); hidden width max(C // 16, 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))  # (B, C)
        return x * gate[:, :, None, None]


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
        """(B, C, H, W) -> (B, C', 2H, 2W)."""
        return cast(Tensor, self.convolution(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)))
