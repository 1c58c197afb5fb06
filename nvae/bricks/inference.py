"""A trained model for evaluation and sampling: the same numbers with less work.

With fixed statistics a batch norm is one factor and one offset per channel. Before a 1×1 convolution or after any
convolution it is folded into that convolution's weight and bias; only one before an activation at a cell's start
remains. What a latent group's posterior takes of an image is computed once, however many the draws. On a CPU, separable
cells and shift cells are then bottlenecks (nvae/bricks/bottleneck.py).

Shapes: O outputs, I inputs of a group, k kernel side.
"""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.precision import in_float64
from ..kernels.convolution import Geometry
from ..kernels.cpu.bottleneck import available
from .bottleneck import Bottleneck
from .cells import Cell, RegularOp, SeparableOp
from .convolutions import Conv2d, EffectiveWeights
from .flows import ShiftCell
from .groups import LatentGroup
from .normalisation import BatchNorm
from .squeeze_excite import SCALE

Old = TypeVar("Old", bound=nn.Module)
ModelT = TypeVar("ModelT", bound=nn.Module)


@torch.no_grad()
def for_inference(model: ModelT) -> ModelT:
    """A copy of a model in eval mode, with the weights and statistics of now; the model itself where nothing folds.

    Its parameters no longer train.
    """
    if not any(isinstance(module, Cell | LatentGroup) for module in model.modules()):
        return model.eval()
    model = deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, Cell):
            _fold_cell(module)
    _replace(model, LatentGroup, FoldedGroup)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and available():
        _replace(model, Cell, BottleneckCell, BottleneckCell.fits, whole=(FoldedSeparableOp, ShiftCell))
        _replace(model, ShiftCell, BottleneckShiftCell)
    for name, value in list(vars(model).items()):
        if isinstance(value, EffectiveWeights):
            setattr(model, name, EffectiveWeights(model, besides=IN_CPP))
    return model.requires_grad_(False)


@torch.no_grad()
def for_tracing(model: ModelT) -> ModelT:
    """A copy of a model on the CPU in eval mode, of plain modules only: batch norms folded where they can be, every
    convolution with its effective weight as it is.

    Whoever traces it meets no operator of ours, as long as the process computes plainly. Its parameters do not train.
    """
    model = deepcopy(model).cpu().eval()
    for module in model.modules():
        if isinstance(module, Cell):
            _fold_cell(module)
    _replace(model, Conv2d, fixed)
    for name, value in list(vars(model).items()):
        if isinstance(value, EffectiveWeights):
            setattr(model, name, EffectiveWeights(nn.Module()))
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    return model.requires_grad_(False)


def _replace(
    module: nn.Module,
    kind: type[Old],
    make: Callable[[Old], nn.Module],
    fits: Callable[[Old], bool] = lambda old: True,
    whole: tuple[type[nn.Module], ...] = (),
) -> None:
    """Puts others in the place of a module's parts of a kind. What is inside those that are `whole` stays as it is."""
    for name, part in module.named_children():
        if isinstance(part, kind) and fits(part):
            setattr(module, name, make(part))
        elif not isinstance(part, whole):
            _replace(part, kind, make, fits, whole)


def _fold_cell(cell: Cell) -> None:
    ops = [_folded(op) if isinstance(op, SeparableOp) else op for op in cell.ops]
    for op, following in pairwise(ops):
        if isinstance(op, RegularOp) and isinstance(following, RegularOp) and following.norm is not None:
            op.convolution = fixed(op.convolution, after=following.norm)
            following.norm = None
    cell.ops = nn.ModuleList(ops)


class FoldedGroup(LatentGroup):
    """A latent group with P(tap + M(state)) as P(tap + M's bias), once an image, plus one convolution of the state."""

    def __init__(self, group: LatentGroup) -> None:
        nn.Module.__init__(self)
        self.is_first, self.is_vanilla = group.is_first, group.is_vanilla
        self.residual_posterior, self.latent_channels = group.residual_posterior, group.latent_channels
        for name, part in group.named_children():
            self.add_module(name, part)
        if not self.is_first:
            self.merged = composed(self.posterior, self.merge)

    def seen(self, features: Tensor) -> Tensor:
        """The posterior's raw parameters (B, 2L, h, w), but for what the state adds."""
        if self.is_first:
            return features
        assert self.merge.bias is not None
        return cast(Tensor, self.posterior(features + self.merge.bias[:, None, None]))

    def posterior_raws(self, tap: Tensor, state: Tensor, prior_raw: Tensor) -> list[Tensor]:
        """As the group's; the tap is that of `seen`."""
        if self.is_first:
            return super().posterior_raws(tap, state, prior_raw)
        raws = [self.merged(state), tap]
        return [prior_raw, *raws] if self.residual_posterior else raws


class BottleneckCell(nn.Module):
    """A folded cell of one depthwise-separable op."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.skip = cell.skip
        op = cast(FoldedSeparableOp, cell.ops[0])
        self.bottleneck = Bottleneck(op.expand, op.spatial, op.project, gate=cell.squeeze_excite, scale=SCALE)

    @staticmethod
    def fits(cell: Cell) -> bool:
        """Whether the folded cell is one."""
        op = cell.ops[0]
        return len(cell.ops) == 1 and isinstance(op, FoldedSeparableOp) and op.is_depthwise

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return cast(Tensor, self.bottleneck(x, self.skip(x)))


class BottleneckShiftCell(nn.Module):
    """A shift cell, whose result is what came in minus that of its three convolutions."""

    def __init__(self, cell: ShiftCell) -> None:
        super().__init__()
        self.cell = cell
        cell.expand, cell.spatial, cell.project = map(fixed, (cell.expand, cell.spatial, cell.project))
        self.bottleneck = Bottleneck(cell.expand, cell.spatial, cell.project, elu=True, scale=-1.0)

    def forward(self, z: Tensor) -> Tensor:
        """(B, L, h, w) -> (B, L, h, w), float32 or more."""
        return cast(Tensor, self.bottleneck(z, z))

    def inverse(self, z: Tensor) -> Tensor:
        """The input that `forward` maps to z."""
        return self.cell.inverse(z)


IN_CPP = (BottleneckCell, BottleneckShiftCell)
"""The parts of a folded model that hold their own weights for the C++ functions."""


class FoldedSeparableOp(nn.Module):
    """A `SeparableOp` of which three convolutions and two activations remain."""

    closing = None

    def __init__(self, expand: Conv2d, spatial: Conv2d, project: Conv2d) -> None:
        super().__init__()
        self.expand, self.spatial, self.project = expand, spatial, project

    @property
    def is_depthwise(self) -> bool:
        return self.spatial.geometry.is_depthwise(self.spatial.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = F.silu(self.expand(x), inplace=True)
        x = F.silu(self.spatial(x), inplace=True)
        return cast(Tensor, self.project(x))


def _folded(op: SeparableOp) -> FoldedSeparableOp:
    return FoldedSeparableOp(
        fixed(op.expand, before=op.norm, after=op.expand_norm),
        fixed(op.spatial, after=op.spatial_norm),
        fixed(op.project, after=op.project_norm),
    )


@torch.no_grad()
def fixed(convolution: Conv2d, *, before: BatchNorm | None = None, after: BatchNorm | None = None) -> Conv2d:
    """A plain convolution with bias that is after(convolution(before(x))), for batch norms in eval mode.

    Worked out in float64. `before` is for 1×1 kernels only: at borders, padding would be normalised too.
    """
    weight = in_float64(convolution.effective_weight())  # (O, I, k, k)
    bias = weight.new_zeros(weight.shape[0]) if convolution.bias is None else in_float64(convolution.bias)
    geometry = convolution.geometry
    if before is not None:
        assert weight.shape[2:] == (1, 1) and geometry.groups == 1
        gain, offset = _affine(before)
        bias = bias + weight[:, :, 0, 0] @ offset
        weight = weight * gain[:, None, None]
    if after is not None:
        gain, offset = _affine(after)
        bias = bias * gain + offset
        weight = weight * gain[:, None, None, None]
    return _plain(weight, bias, geometry, like=convolution)


@torch.no_grad()
def composed(outer: Conv2d, inner: Conv2d) -> Conv2d:
    """A plain convolution that is outer(inner(x)) but for what biases add; `inner` is 1×1. Worked out in float64."""
    weight, pointwise = in_float64(outer.effective_weight()), in_float64(inner.effective_weight())
    assert inner.geometry.is_pointwise(pointwise) and outer.geometry.groups == 1
    return _plain(torch.einsum("omhw,mi->oihw", weight, pointwise[:, :, 0, 0]), None, outer.geometry, like=outer)


def _plain(weight: Tensor, bias: Tensor | None, geometry: Geometry, *, like: Conv2d) -> Conv2d:
    """A convolution with this kernel (O, I, k, k) as it is, on the device and in the type of another."""
    convolution = Conv2d(
        weight.shape[1] * geometry.groups,
        weight.shape[0],
        weight.shape[2],
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
        bias=bias is not None,
        normalised=False,
        enlarge=geometry.enlarge,
    ).to(like.weight)
    convolution.weight.copy_(weight)
    if bias is not None:
        assert convolution.bias is not None
        convolution.bias.copy_(bias)
    return convolution.eval()


def _affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Factor and offset (C) of a batch norm in eval mode, in float64."""
    gain = in_float64(norm.weight) * torch.rsqrt(in_float64(norm.running_var) + norm.eps)
    return gain, in_float64(norm.bias) - in_float64(norm.running_mean) * gain
