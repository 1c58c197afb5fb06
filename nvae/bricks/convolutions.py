"""Convolutions and the effective (normalised, masked) weights they use (spec §1; Salimans & Kingma 2016).

A convolution stores raw parameters; what it multiplies with is its *effective* weight. `EffectiveWeights` makes the
effective weights of a whole model in one pass per step, batched by shape, hands each convolution its own, and keeps
the batches for the spectral regulariser. In evaluation they are made once and reused until a parameter changes.

Shapes: B batch, C channels, H W space; O outputs, R = C/groups · kh · kw of a kernel; N convolutions of one shape.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.distributed import is_distributed
from ..kernels.activations import ACTIVATIONS, Activation
from ..kernels.convolution import Geometry, for_autocast
from ..kernels.operations import operation


def _matrices(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Two of three rows, of which one has nothing but zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 5, generator=generator)
    weight[1, 2] = 0
    yield weight.to(device, dtype), torch.randn(2, 3, 1, generator=generator).to(device, dtype)


@operation(_matrices)
def weight_norm(weight: Tensor, log_gain: Tensor) -> Tensor:
    """exp(g) · v / (‖v‖₂ + 1e-5), the norm over the last axis (spec §1). weight (…, O, R), log_gain (…, O, 1)."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return log_gain.exp() * weight / (norm + 1e-5)


def _convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """A convolution of each kind: dense, dilated and strided, 1×1, depthwise on an enlarged input."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = normal(2, 6, 8, 6)
    yield x, normal(4, 6, 3, 3), normal(4), Geometry(padding=1), "elu"
    yield x, normal(4, 6, 3, 3), normal(4), Geometry(stride=2, padding=2, dilation=2), "swish"
    yield x, normal(8, 6, 1, 1), None, Geometry(), "gelu"
    yield x, normal(6, 1, 5, 5), normal(6), Geometry(padding=2, groups=6, enlarge=True), "elu_elu"
    yield x, normal(6, 1, 3, 3), None, Geometry(stride=2, padding=1, groups=6), "identity"


@operation(_convolutions)
def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: Activation = "identity"
) -> Tensor:
    """The convolution of act(x): (B, C, H, W), weight (O, C/groups, kh, kw), bias (O) -> (B, O, h, w)."""
    x = ACTIVATIONS[activation](x)
    if geometry.enlarge:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


# ------------------------------------------------------------------------------------------------------- the module


class Conv2d(nn.Module):
    """A convolution that keeps H and W at stride 1 (odd kernel, zero padding), weight-normalised unless told otherwise.

    `mask` (broadcastable to the kernel) removes connections; the norm is taken of what remains. `initial_gain` scales
    the starting output of a weight-normalised convolution. `enlarge` reads the input enlarged ×2 (nearest).
    """

    mask: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        normalised: bool = True,
        mask: Tensor | None = None,
        initial_gain: float = 1.0,
        enlarge: bool = False,
    ) -> None:
        super().__init__()
        assert kernel_size % 2 == 1
        self.geometry = Geometry(stride, kernel_size // 2 * dilation, dilation, groups, enlarge)
        self.normalised = normalised
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.register_buffer("mask", None if mask is None else mask.expand(self.weight.shape).clone(), persistent=False)
        self._initialise_like_torch()
        if normalised:
            norm = self.masked_matrix().norm(dim=1).reshape(-1, 1, 1, 1)
            self.log_gain = nn.Parameter((norm + 1e-2).log().detach() + math.log(initial_gain))
        self._effective: Tensor | None = None
        self._cast_bias: Tensor | None = None

    def _initialise_like_torch(self) -> None:
        """PyTorch's own Conv2d start: uniform in ± 1/sqrt(R) for the kernel and the bias."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def masked_matrix(self) -> Tensor:
        """The raw kernel without masked connections, (O, R)."""
        weight = self.weight if self.mask is None else self.weight * self.mask
        return weight.flatten(1)

    def effective_weight(self) -> Tensor:
        """The kernel (O, C/groups, kh, kw) this convolution multiplies with."""
        if self._effective is not None:
            return self._effective
        matrix = self.masked_matrix()
        if self.normalised:
            matrix = weight_norm(matrix, self.log_gain.flatten(1))
        return matrix.reshape(self.weight.shape)

    def effective_bias(self) -> Tensor | None:
        """The bias (O) it adds, in autocast's type where that was made for all convolutions at once."""
        return self.bias if self._cast_bias is None else self._cast_bias

    def forward(self, x: Tensor, activation: Activation = "identity") -> Tensor:
        """The convolution of act(x): (B, C, H, W) -> (B, O, H/stride, W/stride), twice that with `enlarge`.

        Only x is kept for the backward pass.
        """
        return convolution(x, self.effective_weight(), self.effective_bias(), self.geometry, activation)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry parameters only: what is effective belongs to one graph."""
        return {**self.__dict__, "_effective": None, "_cast_bias": None}

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, {self.geometry}"


class EffectiveWeights:
    """The effective weights of all convolutions of a model, made in one pass and shared by all who need them.

    The N convolutions of one kernel shape are in `convolutions` under the key of that shape. Convolutions inside a
    module of the kinds `besides` look after themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        besides: tuple[type[nn.Module], ...] = (),
        stages: Sequence[Sequence[nn.Module]] = (),
    ) -> None:
        """`stages`: all convolutions, as parts of the model, in the order in which a pass gets to them (`begin`)."""
        self.convolutions = _by_shape(_convolutions_in(model, besides))
        self.stages = [_by_shape(_convolutions_in(nn.ModuleList(parts), besides)) for parts in stages]
        self._matrices: dict[str, Tensor] = {}
        self._parts: dict[str, list[tuple[list[Conv2d], Tensor]]] = {}  # of matrices, where there are stages
        self._ahead: list[dict[str, list[Conv2d]]] = []
        self._made_for: tuple[Any, ...] | None = None

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Kernel shape -> (N, O, R), float32, with gradient; in the order of `convolutions`.

        R runs over (kh, kw, C/groups): kernels are channels-last without a copy.
        """
        assert not self._ahead
        for key, parts in self._parts.items():
            rows = {c: row for convolutions, matrix in parts for c, row in zip(convolutions, matrix, strict=True)}
            whole = len(parts) == 1
            self._matrices[key] = parts[0][1] if whole else torch.stack([rows[c] for c in self.convolutions[key]])
        self._parts = {}
        return self._matrices

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(N, O) of each batch of matrices."""
        return {key: (len(group), group[0].weight.shape[0]) for key, group in self.convolutions.items()}

    def refresh(self) -> None:
        """Makes the effective weights anew; without gradients only if a parameter has changed since the last time."""
        state = None if torch.is_grad_enabled() else self._state()
        if state is not None and state == self._made_for:
            return
        self._made_for, self._ahead, self._parts = state, [], {}
        for key, convolutions in self.convolutions.items():
            self._matrices[key] = self._made(convolutions)

    def begin(self) -> None:
        """`refresh`, stage by stage where ranks exchange gradients: those of a stage are then complete, and on their
        way, as soon as the backward pass has left it. To be followed by `reach`."""
        if not (self.stages and is_distributed() and torch.is_grad_enabled()):
            return self.refresh()
        self.clear()
        self._ahead = list(self.stages)
        self.reach(0)

    def reach(self, stage: int) -> None:
        """Makes the weights up to those of a stage, if the pass began so."""
        while self._ahead and len(self._ahead) >= len(self.stages) - stage:
            for key, convolutions in self._ahead.pop(0).items():
                self._parts.setdefault(key, []).append((convolutions, self._made(convolutions)))

    def clear(self) -> None:
        """Forgets them: each convolution makes its own at every use, until the next refresh."""
        self._matrices, self._parts, self._ahead, self._made_for = {}, {}, [], None
        for convolution in self._all():
            convolution._effective = convolution._cast_bias = None

    def _made(self, convolutions: list[Conv2d]) -> Tensor:
        """The matrices (N, O, R) of convolutions of one shape, each of which is given its own."""
        matrix = self._stack(convolutions)
        used = for_autocast(matrix)
        outputs, inputs, *size = convolutions[0].weight.shape
        kernels = used.reshape(-1, outputs, *size, inputs).permute(0, 1, 4, 2, 3)
        for convolution, kernel in zip(convolutions, kernels.unbind(), strict=True):
            convolution._effective = kernel
        self._cast_biases([convolution for convolution in convolutions if convolution.bias is not None])
        return matrix

    @staticmethod
    def _cast_biases(convolutions: list[Conv2d]) -> None:
        """Casts the biases of convolutions of one shape where autocast is on, which would cast each at its use."""
        biases: list[Tensor] = [convolution.bias for convolution in convolutions if convolution.bias is not None]
        if not biases or not torch.is_autocast_enabled(biases[0].device.type):
            cast: Iterable[Tensor | None] = [None] * len(convolutions)
        else:
            cast = for_autocast(torch.stack(biases)).unbind()
        for convolution, bias in zip(convolutions, cast, strict=True):
            convolution._cast_bias = bias

    @staticmethod
    def _stack(convolutions: list[Conv2d]) -> Tensor:
        matrix = _rows(torch.stack([convolution.weight for convolution in convolutions]))  # (N, O, R)
        if convolutions[0].mask is not None:
            matrix = matrix * _rows(torch.stack([c.mask for c in convolutions if c.mask is not None]))
        if convolutions[0].normalised:
            gains = torch.stack([convolution.log_gain for convolution in convolutions]).flatten(2)  # (N, O, 1)
            matrix = weight_norm(matrix, gains)
        return matrix

    def _all(self) -> Iterable[Conv2d]:
        return (convolution for group in self.convolutions.values() for convolution in group)

    def _state(self) -> tuple[Any, ...]:
        """What the effective weights depend on: each parameter's place and version, and autocast's type."""
        parameters = [p for c in self._all() for p in (c.weight, getattr(c, "log_gain", None), c.bias) if p is not None]
        if not parameters:
            return ()
        kind = parameters[0].device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (precision, *((parameter.data_ptr(), parameter._version) for parameter in parameters))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": {}, "_parts": {}, "_ahead": [], "_made_for": None}


def _by_shape(convolutions: Iterable[Conv2d]) -> dict[str, list[Conv2d]]:
    """By the shape and the kind of their kernels."""
    found: dict[str, list[Conv2d]] = {}
    for convolution in convolutions:
        kind = ("n" if convolution.normalised else "p") + ("" if convolution.mask is None else "m")
        found.setdefault("x".join(map(str, convolution.weight.shape)) + kind, []).append(convolution)
    return found


def _convolutions_in(module: nn.Module, besides: tuple[type[nn.Module], ...]) -> Iterator[Conv2d]:
    for part in module.children():
        if isinstance(part, Conv2d):
            yield part
        elif not isinstance(part, besides):
            yield from _convolutions_in(part, besides)


def _rows(kernels: Tensor) -> Tensor:
    """(N, O, C/groups, kh, kw) -> (N, O, kh · kw · C/groups)."""
    return kernels.permute(0, 1, 3, 4, 2).flatten(2)
