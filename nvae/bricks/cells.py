"""Residual cells and the architecture table (spec §1; paper §3.1 and figure 3).

Shapes: B batch, C channels, H W space.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.activations import Activation
from ..kernels.batch_norm import Statistics
from .convolutions import Conv2d
from .normalisation import BatchNorm, recording, replaying
from .recomputation import Recomputable
from .resampling import DownSkip, UpSkip
from .squeeze_excite import SCALE, SqueezeExcite

Resampling = Literal["same", "down", "up"]


@dataclass(frozen=True)
class Regular:
    """[BN →] activation → 3×3 convolution. Dilation 2 sees 5×5."""

    activation: Activation = "swish"
    batch_norm: bool = True
    dilation: int = 1


@dataclass(frozen=True)
class Separable:
    """BN → 1×1 to E·C → BN → swish → K×K → BN → swish → 1×1 → BN. `groups` 0 is depthwise, else that many groups."""

    expansion: int = 6
    kernel_size: int = 5
    groups: int = 0


Op = Regular | Separable

BN_SWISH = Regular()
BN_SWISH5 = Regular(dilation=2)
BN_ELU = Regular(activation="elu")
ELU = Regular(activation="elu", batch_norm=False)


@dataclass(frozen=True)
class Architecture:
    """The ops of the cells in each of the four places of the network."""

    preprocess: tuple[Op, ...]
    encoder: tuple[Op, ...]
    decoder: tuple[Op, ...]
    postprocess: tuple[Op, ...]

    @property
    def starts_from_data(self) -> bool:
        """True where some op has neither batch norm nor a fixed start: the first images of a run set it."""
        places = (self.preprocess, self.encoder, self.decoder, self.postprocess)
        return any(isinstance(op, Regular) and not op.batch_norm for ops in places for op in ops)

    @staticmethod
    def mixed(*encoder: Op) -> "Architecture":
        """Regular cells bottom-up, depthwise-separable cells top-down: the paper's choice (table 3)."""
        return Architecture(encoder, encoder, (Separable(),), (Separable(expansion=3),))

    @staticmethod
    def uniform(*ops: Op) -> "Architecture":
        """The same ops everywhere."""
        return Architecture(ops, ops, ops, ops)

    @staticmethod
    def separable(tower: Separable, outside: Separable) -> "Architecture":
        """Depthwise-separable cells in both towers, others outside them."""
        return Architecture((outside,), (tower,), (tower,), (outside,))


ARCHITECTURES: dict[str, Architecture] = {
    "res_mbconv": Architecture.mixed(BN_SWISH, BN_SWISH),
    "res53_mbconv": Architecture.mixed(BN_SWISH5, BN_SWISH),
    "res35_mbconv": Architecture.mixed(BN_SWISH, BN_SWISH5),
    "res55_mbconv": Architecture.mixed(BN_SWISH5, BN_SWISH5),
    "res_elu": Architecture.uniform(ELU, ELU),
    "res_bnelu": Architecture.uniform(BN_ELU, BN_ELU),
    "res_bnswish": Architecture.uniform(BN_SWISH, BN_SWISH),
    "mbconv_sep": Architecture.separable(Separable(), outside=Separable(expansion=3)),
    "mbconv_sep11": Architecture.separable(Separable(kernel_size=11), outside=Separable(expansion=3)),
    "mbconv_res": Architecture((Separable(expansion=3),), (Separable(),), (BN_SWISH, BN_SWISH), (BN_SWISH, BN_SWISH)),
    "mbconv_den": Architecture.separable(Separable(), outside=Separable(expansion=3, groups=8)),
}


class RegularOp(nn.Module):
    """See `Regular`. Resamples between the activation and the convolution: nearest ×2 up, stride 2 down."""

    def __init__(self, op: Regular, in_channels: int, out_channels: int, resampling: Resampling) -> None:
        super().__init__()
        self.closing = None
        self.norm = BatchNorm(in_channels, op.activation) if op.batch_norm else None
        self.activation = op.activation
        stride = 2 if resampling == "down" else 1
        self.convolution = Conv2d(
            in_channels, out_channels, 3, stride=stride, dilation=op.dilation, enlarge=resampling == "up"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if self.norm is None:
            return cast(Tensor, self.convolution(x, self.activation))
        return self.norm.into(self.convolution, x)

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Data-dependent start without batch norm (spec §1, `res_elu`).

        Over the first batch x, that of all ranks, and its space, each channel's response has then mean 0 and an
        (unbiased) standard deviation of 1/5.
        """
        assert self.norm is None and self.convolution.bias is not None
        self.convolution.bias.zero_()
        self.convolution.log_gain.zero_()
        response = self.forward(x)
        mean = response.mean((0, 2, 3))
        var = response.sub(mean[:, None, None]).square().mean((0, 2, 3))
        count = response.numel() // response.shape[1]
        spread = 5 * (var * count / max(count - 1, 1)).sqrt() + 1e-5
        self.convolution.bias.copy_(-mean / spread)
        self.convolution.log_gain.copy_(-spread.log().reshape(-1, 1, 1, 1))


class SeparableOp(nn.Module):
    """See `Separable`. Resamples in the K×K convolution; convolutions are plain, without bias.

    The published network enlarges first. What comes before the K×K convolution works on single pixels, so that here
    it sees a quarter of them, with the same result.
    """

    def __init__(self, op: Separable, in_channels: int, out_channels: int, resampling: Resampling) -> None:
        super().__init__()
        hidden = op.expansion * in_channels
        self.up = resampling == "up"
        stride, copies = (2 if resampling == "down" else 1), (4 if self.up else 1)
        self.norm = BatchNorm(in_channels, copies=copies)
        self.expand = Conv2d(in_channels, hidden, bias=False, normalised=False)
        self.expand_norm = BatchNorm(hidden, "swish", copies=copies)
        self.spatial = Conv2d(
            hidden,
            hidden,
            op.kernel_size,
            stride=stride,
            groups=op.groups or hidden,
            bias=False,
            normalised=False,
            enlarge=self.up,
        )
        self.spatial_norm = BatchNorm(hidden, "swish")
        self.project = Conv2d(hidden, out_channels, bias=False, normalised=False)
        self.project_norm = BatchNorm(out_channels)

    @property
    def closing(self) -> BatchNorm:
        """The last batch norm, which the cell carries into the gate and the sum that follow."""
        return self.project_norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'), all but the closing batch norm."""
        x = self.norm.into(self.expand, x)
        x = self.expand_norm.into(self.spatial, x)
        return self.spatial_norm.into(self.project, x)


class Cell(Recomputable):
    """skip(x) + 0.1 · SE(ops(x)); "down" halves the space and doubles the channels, "up" the reverse (spec §1).

    With `recompute` the backward pass runs the cell again from its input instead of keeping what is inside.
    """

    def __init__(self, ops: tuple[Op, ...], channels: int, resampling: Resampling, squeeze_excite: bool) -> None:
        super().__init__()
        out_channels = {"same": channels, "down": 2 * channels, "up": channels // 2}[resampling]
        self.out_channels = out_channels
        self.skip: nn.Module = nn.Identity()
        if resampling != "same":
            self.skip = (DownSkip if resampling == "down" else UpSkip)(channels, out_channels)
        self.ops = nn.ModuleList(_ops(ops, channels, out_channels, resampling))
        self.squeeze_excite = SqueezeExcite(out_channels) if squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self._run(x)
        contexts = self._recomputation_contexts  # torch.compile takes it from here, not through another function
        out: Tensor = checkpoint(self._run, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return out

    def _run(self, x: Tensor) -> Tensor:
        residual, closing = x, None
        for op in cast("list[RegularOp | SeparableOp]", list(self.ops)):
            residual = op(residual if closing is None else closing(residual))
            closing = op.closing
        if self.squeeze_excite is not None:
            return cast(Tensor, self.squeeze_excite(self.skip(x), residual, closing))
        return torch.add(self.skip(x), residual if closing is None else closing(residual), alpha=SCALE)

    def _recomputation_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around the forward pass and its repetition, which sees the batch statistics of the forward pass."""
        norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        statistics: list[Statistics] = []
        return recording(norms, statistics), replaying(norms, statistics)


def _ops(ops: tuple[Op, ...], channels: int, out_channels: int, resampling: Resampling) -> Iterator[nn.Module]:
    """The ops in a chain; the first changes resolution and width."""
    for index, op in enumerate(ops):
        first = index == 0
        width, resample = (channels, resampling) if first else (out_channels, "same")
        if isinstance(op, Regular):
            yield RegularOp(op, width, out_channels, resample)
        else:
            yield SeparableOp(op, width, out_channels, resample)
