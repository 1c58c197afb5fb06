"""Batch norm with its activation, and batch norm carried through a convolution (spec §1; paper §3.4).

Shapes: B batch, C channels, H W space.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.distributed import all_mean, world_size
from ..core.precision import at_least_float32
from ..kernels.activations import ACTIVATIONS, Activation
from ..kernels.batch_norm import Norm, Statistics
from ..kernels.convolution import Geometry
from ..kernels.operations import operation
from .convolutions import Conv2d, convolution


def _norms(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Norm]]:
    """Inputs far from 0 with a norm each, of one process."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    for activation in ("swish", "identity", "elu"):
        x = 2 + torch.randn(2, 6, 5, 4, generator=generator)
        weight, bias = (torch.randn(6, generator=generator).to(device, wide) for _ in range(2))
        yield x.to(device, dtype), Norm(weight, bias, BatchNorm.eps, activation, over_ranks=False)


@operation(_norms)
def batch_norm(x: Tensor, norm: Norm) -> tuple[Tensor, Statistics]:
    """act(γ (x − mean)/√(var + ε) + β), (B, C, H, W), and mean and biased variance over B, H, W and ranks, (2, C)."""
    if norm.over_ranks and world_size() > 1:
        mean = all_mean(x.mean((0, 2, 3)))
        var = all_mean((x - mean[:, None, None]).square().mean((0, 2, 3)))
        y = (x - mean[:, None, None]) * torch.rsqrt(var + norm.eps)[:, None, None]
        y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    else:
        y, mean, scale = torch.native_batch_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
        var = scale.pow(-2) - norm.eps
    return ACTIVATIONS[norm.activation](y), at_least_float32(torch.stack([mean, var]).detach())


def _fixed_norms(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, norm in _norms(device, dtype):
        yield x, norm, 2 + norm.weight, norm.bias.square() + 0.5


@operation(_fixed_norms)
def batch_norm_fixed(x: Tensor, norm: Norm, mean: Tensor, var: Tensor) -> Tensor:
    """act(γ (x − mean)/√(var + ε) + β) with a given mean and variance (C), (B, C, H, W)."""
    return ACTIVATIONS[norm.activation](F.batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps))


def _norms_before_kernels(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)
    for x, norm in _norms(device, dtype):
        kernel = torch.randn(4, 6, 3, 3, generator=generator).to(device, dtype)
        yield x, norm, kernel, kernel[:, 0, 0, 0].clone(), Geometry(padding=1)


@operation(_norms_before_kernels)
def batch_norm_convolution(
    x: Tensor, norm: Norm, kernel: Tensor, kernel_bias: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Statistics]:
    """convolution(batch_norm(x)), (B, O, h, w), and the statistics of x."""
    y, statistics = batch_norm(x, norm)
    return convolution(y, kernel, kernel_bias, geometry), statistics


class BatchNorm(nn.Module):
    """Batch norm (eps 1e-5, momentum 0.05, statistics over all ranks), then an activation.

    The running variance is the unbiased one. `copies`: how many equal pixels of the published network each pixel
    stands for, where enlarging comes later here than there; only the unbiased variance depends on it.
    """

    eps, momentum = 1e-5, 0.05
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, activation: Activation = "identity", *, copies: int = 1) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.copies = copies
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self._statistics: Statistics | None = None
        self._replaying = False
        self._count = 0
        self._alone = False
        self._waiting = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in the type of the input; statistics in float32."""
        if not self.training:
            return batch_norm_fixed(x, self.norm, self.running_mean, self.running_var)
        y, statistics = batch_norm(x, self.norm)
        self.advance(statistics, x)
        return y

    def into(self, following: Conv2d, x: Tensor) -> Tensor:
        """following(self(x)), keeping only x for the backward pass: (B, C, H, W) -> (B, O, H', W')."""
        if not self.training:
            return following(self(x))  # type: ignore[no-any-return]
        kernel, bias, geometry = following.effective_weight(), following.effective_bias(), following.geometry
        y, statistics = batch_norm_convolution(x, self.norm, kernel, bias, geometry)
        self.advance(statistics, x)
        return y

    @property
    def norm(self) -> Norm:
        """What operations take; with the recorded statistics within `replaying`."""
        recorded = self._statistics if self._replaying else None
        return Norm(self.weight, self.bias, self.eps, self.activation, not self._alone, recorded)

    @torch.no_grad()
    def advance(self, statistics: Statistics, x: Tensor) -> None:
        """Takes those of x (B, C, H, W) into the running statistics, unless they are replayed."""
        if self._replaying:
            return
        self._statistics = statistics
        self._count = x.numel() // x.shape[1] * self.copies * (1 if self._alone else world_size())
        if not self._waiting:
            advance_all([self])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_statistics": None}


@torch.no_grad()
def advance_all(modules: Sequence[BatchNorm]) -> None:
    """Takes what each batch norm has measured last into its running statistics: a few calls for all of them."""
    if not modules:
        return
    means, variances = zip(*(cast(Tensor, module._statistics).unbind() for module in modules), strict=True)
    unbiased = [module._count / max(module._count - 1, 1) for module in modules]
    momentum = 1.0 if modules[0]._alone else BatchNorm.momentum
    torch._foreach_lerp_([module.running_mean for module in modules], means, momentum)
    torch._foreach_lerp_([module.running_var for module in modules], torch._foreach_mul(variances, unbiased), momentum)
    torch._foreach_add_([module.num_batches_tracked for module in modules], 1)


@contextmanager
def advancing_together(modules: list[BatchNorm]) -> Iterator[None]:
    """Within, running statistics stay as they are; at the end those that were measured advance in one go."""
    for module in modules:
        module._waiting, module._statistics = True, None
    try:
        yield
    finally:
        for module in modules:
            module._waiting = False
    advance_all([module for module in modules if module._statistics is not None])


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
