"""Trained models on a CPU: convolutions and latents in C++ (nvae/kernels/cpu/bottleneck.cpp).

`Bottleneck` is wide in the middle, and never in memory there. Both the separable cells (spec §1) and the shift cells of
flows (spec §3) are one convolution to many channels, a depthwise one and a 1×1 convolution to few, with activations
between, added to what came in. `Convolution` is a single one with the activation before it.

Taps of a kernel that are zero, as masks leave them, cost nothing. A depthwise kernel that reads its input enlarged ×2
becomes four smaller ones, one for each phase of the output.

Arithmetic is float32, whatever the type of x. Where bfloat16 is asked for (as the type of x, or by autocast) and the
processor has float16 (AVX512-FP16), products are formed in float16, which rounds eight times finer than bfloat16 and is
twice as fast as float32; what leaves its range is computed again in float32. See nvae/kernels/cpu/vectors.h.

Shapes: B images, C channels, H W space of x; E hidden channels, O outputs; k kernel side, P phases, T taps; L latent
channels, h w space of a group.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.activations import Activation
from ..kernels.fusion import Precompiled
from ..kernels.native import addresses, channels_last, library, made_from, structure
from ..kernels.watching import watched
from .convolutions import Conv2d
from .squeeze_excite import SqueezeExcite

SOURCE = Path(__file__).parents[1] / "kernels" / "cpu" / "bottleneck.cpp"
PADDING = {torch.float32: 16, torch.float16: 32}
"""Outputs of kernels are padded with zeros to a multiple of this, whatever the width of the processor's vectors."""
MOST_PADDING = 32
"""What all arithmetics share is padded to a multiple of this: biases, and the hidden channels that are summed over."""
WIDEST_TILE = 48
"""Most hidden channels that are in memory at once, in float32; in float16 twice as many of half the size."""
SCRATCH = 2**20
"""Bytes that a strip of rows may take besides weights: half of a processor's second cache."""
IN_CONVOLUTIONS: tuple[Activation, ...] = ("identity", "elu", "swish")
"""Activations that `Convolution` applies on the way in, as the C++ function numbers them."""
LEAST_ROWS = 4
"""Of a strip, where there are fewer images than processors: its neighbours read the rows at its edges, too."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the library can be had."""
    return library(SOURCE) is not None


def takes(x: Tensor) -> bool:
    """Whether the library does: float32 or bfloat16, on a CPU, without gradients."""
    types = (torch.float32, torch.bfloat16)
    return x.device.type == "cpu" and x.dtype in types and not torch.is_grad_enabled() and available()


def _wants_bfloat16(x: Tensor) -> bool:
    on = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return on or x.dtype == torch.bfloat16


def _is_compiled(x: Tensor) -> bool:
    """Where somebody traces or watches, functions must be operators."""
    return torch.compiler.is_compiling() or watched(x)


class _Packed(Precompiled):
    """Kernels as matrices (depth, channels), in the order that this processor's library reads them in.

    `in_float16` is empty where the processor has no float16, or where it would not do for these kernels.
    """

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        super().__init__()
        self.made_for = _made()._name
        self.in_float32 = [_packed(matrix, torch.float32) for matrix in matrices]
        self.in_float16: list[Tensor] = []
        if _made().has_float16() and all(map(_suits_float16, matrices)):
            self.in_float16 = [_packed(matrix, torch.float16) for matrix in matrices]

    def kernels(self, x: Tensor) -> list[Tensor]:
        """In float32 and, where they are for x, in float16."""
        return [*self.in_float32, *self.in_float16] if _wants_bfloat16(x) else self.in_float32

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.made_for != _made()._name:
            raise ValueError("a model for inference belongs to the machine that made it; make it again from the model")


# ---------------------------------------------------------------------------------------------------------- modules


class Convolution(_Packed):
    """A trained convolution at stride 1, without groups.

    PyTorch's own is used for other activations than `IN_CONVOLUTIONS`, and for bfloat16 on processors that multiply
    matrices of it.
    """

    def __init__(self, convolution: Conv2d) -> None:
        kernel, at = _taps(_kernel(convolution)[None], convolution.geometry.dilation)  # (1, T, O, C), (T, 2)
        super().__init__([kernel[0].transpose(1, 2).flatten(0, 1)])
        self.convolution = convolution
        self.constants = [_bias(convolution), at]
        self.sizes = [kernel.shape[2], len(at), _reach(at)]
        self.multiplies_bfloat16 = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()

    @property
    def bias(self) -> Tensor | None:
        """(O)."""
        return self.convolution.bias

    @staticmethod
    def fits(convolution: Conv2d) -> bool:
        """Whether it is such a convolution."""
        stride, _, _, groups, enlarge = convolution.geometry
        return stride == groups == 1 and not enlarge

    def forward(self, x: Tensor, activation: Activation = "identity", *, other: Tensor | None = None) -> Tensor:
        """The convolution of act(x): (B, C, H, W) -> (B, O, H, W), in the type of x.

        With another tensor (B, C', H, W), that of both side by side: their channels are the convolution's.
        """
        better_in_torch = _wants_bfloat16(x) and self.multiplies_bfloat16  # several times float32's rate
        if activation not in IN_CONVOLUTIONS or better_in_torch or not takes(x):
            both = x if other is None else torch.cat([x, other.to(x.dtype)], dim=1)
            return cast(Tensor, self.convolution(both, activation))
        function = convolution_operator if _is_compiled(x) else _convolution
        out: Tensor = function(
            x, other, self.kernels(x), self.constants, [*self.sizes, IN_CONVOLUTIONS.index(activation)]
        )
        return out


class Bottleneck(_Packed):
    """skip + scale · gate(y) · y, with y = project(act'(spatial(act(expand(x))))), for trained convolutions.

    `elu`: act is ELU and act' ELU twice, else both are swish. The gate is that of squeeze-and-excitation, or 1.
    """

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
        assert project.geometry.is_pointwise(project.weight) and spatial.geometry.is_depthwise(spatial.weight)
        assert Convolution.fits(expand)
        spatial_kernel, enlarge = _kernel(spatial), spatial.geometry.enlarge
        phases = _phases(spatial_kernel) if enlarge else spatial_kernel[None]  # (P, E, 1, k, k)
        expanding, expand_at = _taps(_kernel(expand)[None], expand.geometry.dilation)  # (1, T, E, C), (T, 2)
        convolving, spatial_at = _taps(phases)  # (P, T, E, 1), (T, 2)
        projecting = _widened(_kernel(project).flatten(1).t(), MOST_PADDING)  # (E, O)
        super().__init__(
            [
                expanding[0].transpose(1, 2).flatten(0, 1),
                convolving.flatten(2).flatten(0, 1),
                projecting,
            ]
        )
        self.scale = scale
        self.constants = [*map(_bias, (expand, spatial, project)), expand_at, spatial_at]
        if gate is not None:
            self.constants += [parameter.detach().cpu().float().clone() for parameter in gate.parameters()]
        self.sizes = [
            *project.weight.shape[1::-1],
            spatial.geometry.stride,
            2 if enlarge else 1,
            len(expand_at),
            _reach(expand_at),
            len(spatial_at),
            _reach(spatial_at),
            int(elu),
            0 if gate is None else gate.squeeze.out_features,
        ]

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, C, H, W), which `takes` must allow, skip (B, O, H', W') -> (B, O, H', W'), in the type of x."""
        function = bottleneck_operator if _is_compiled(x) else _bottleneck
        out: Tensor = function(x, skip.to(x.dtype), self.kernels(x), self.constants, self.sizes, self.scale)
        return out


# ---------------------------------------------------------------------------------------------------------- weights


def _kernel(convolution: Conv2d) -> Tensor:
    """(O, C/groups, k, k), float64."""
    return convolution.effective_weight().detach().double().cpu()


def _bias(convolution: Conv2d) -> Tensor:
    bias = convolution.weight.new_zeros(len(convolution.weight)) if convolution.bias is None else convolution.bias
    return _widened(bias.detach().float().cpu(), MOST_PADDING)


def _widened(matrix: Tensor, multiple: int) -> Tensor:
    """With zeros after the first axis."""
    missing = -len(matrix) % multiple
    return torch.cat([matrix, matrix.new_zeros(missing, *matrix.shape[1:])])


def _suits_float16(matrix: Tensor) -> bool:
    """Whether rounding a kernel to float16 moves it no further than rounding to bfloat16 may."""
    return float((matrix.half().double() - matrix).norm()) <= 2**-9 * float(matrix.norm())


def _packed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(depth, channels) in the order that the C++ functions read it in."""
    matrix = _widened(matrix.t(), PADDING[dtype]).t().float().contiguous()
    packed = torch.empty(matrix.shape, dtype=dtype)
    depth, channels = (ctypes.c_int64(size) for size in matrix.shape)
    pack = _made().pack if dtype == torch.float32 else _made().pack_float16
    pack(ctypes.c_void_p(matrix.data_ptr()), depth, channels, ctypes.c_void_p(packed.data_ptr()))
    return packed


def _phases(kernel: Tensor) -> Tensor:
    """(E, 1, k, k) on an enlarged input as (4, E, 1, k', k') on the input itself, one for each phase (row, column).

    Output row 2h + a sees enlarged row 2h + a + i, which is row h + floor((a + i)/2) of the input.
    """
    size = kernel.shape[-1]
    reach = (size // 2 + 1) // 2
    sums = kernel.new_zeros(2, 2 * reach + 1, size)
    for phase in range(2):
        for i in range(size):
            sums[phase, (phase + i - size // 2) // 2 + reach, i] = 1
    return torch.einsum("api,bqj,ecij->abecpq", sums, sums, kernel).flatten(0, 1)


def _taps(kernels: Tensor, dilation: int = 1) -> tuple[Tensor, Tensor]:
    """Of (P, O, C, k, k) those taps that are not zero everywhere: (P, T, O, C), and their offsets (T, 2) in pixels."""
    at = kernels.ne(0).any(2).any(1).any(0).nonzero().contiguous()
    return kernels[..., at[:, 0], at[:, 1]].permute(0, 3, 1, 2), (at - kernels.shape[-1] // 2) * dilation


def _reach(at: Tensor) -> int:
    """The largest |offset|."""
    return int(at.abs().max()) if len(at) else 0


# --------------------------------------------------------------------------------------------------- the C++ functions


def _made() -> ctypes.CDLL:
    return made_from(SOURCE)


_ConvolutionStruct = structure(
    "Convolution",
    "images height width inputs other_inputs outputs taps reach activation bfloat16 float16 strips threads",
    "",
    "weight weight16 bias at x other out",
)
_BottleneckStruct = structure(
    "Bottleneck",
    "images height width inputs hidden outputs stride enlarge expand_taps expand_reach spatial_taps spatial_reach "
    "elu squeezed bfloat16 float16 strips threads",
    "scale",
    "expand expand16 spatial spatial16 project project16 expand_bias spatial_bias project_bias expand_at spatial_at "
    "squeeze squeeze_bias excite excite_bias x skip out y sums",
)


def _strips(images: int, rows: int, row_bytes: int, reach: int, threads: int) -> int:
    """Into how many an image is cut: each fits the cache, and no processor is without one."""
    fitting = max(SCRATCH // max(row_bytes, 1) - 2 * reach, LEAST_ROWS)
    return max(-(-rows // fitting), min(-(-threads // max(images, 1)), rows // LEAST_ROWS), 1)


def _interleaved(kernels: Sequence[Tensor], count: int) -> list[Tensor | None]:
    """Of `count` kernels each in float32 and, if it is there, in float16."""
    in_float16: Sequence[Tensor | None] = kernels[count:] or [None] * count
    return [kernel for pair in zip(kernels[:count], in_float16, strict=True) for kernel in pair]


def _convolution(
    x: Tensor, other: Tensor | None, kernels: Sequence[Tensor], constants: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    x = channels_last(x)
    images, inputs, height, width = x.shape
    outputs, taps, reach, _ = sizes
    more = 0
    if other is not None:
        other, more = channels_last(other.to(x.dtype)), other.shape[1]
        assert other.shape == (images, more, height, width)
    assert len(kernels[0]) == taps * (inputs + more)
    threads = torch.get_num_threads()
    out = _empty_for(x, outputs, x.dtype)
    types = (int(x.dtype == torch.bfloat16), int(len(kernels) > 1))
    strips = _strips(images, height, 4 * (width + 2 * reach) * (inputs + more), reach, threads)
    integers = (images, height, width, inputs, more, *sizes, *types, strips, threads)
    pointers = addresses(*_interleaved(kernels, 1), *constants, x, other, out)
    _made().convolution(ctypes.byref(_ConvolutionStruct(*integers, *pointers)))
    return out


def _bottleneck(
    x: Tensor, skip: Tensor, kernels: Sequence[Tensor], constants: Sequence[Tensor], sizes: Sequence[int], scale: float
) -> Tensor:
    x, skip = channels_last(x), channels_last(skip)
    images, inputs, height, width = x.shape
    _, outputs, stride, enlarge, expand_taps, expand_reach, _, spatial_reach, _, squeezed = sizes
    rows, columns = -(-height // stride), -(-width // stride)
    assert len(kernels[0]) == expand_taps * inputs
    assert skip.shape == (images, outputs, rows * enlarge, columns * enlarge)
    threads = torch.get_num_threads()
    out = _empty_for(skip, outputs, skip.dtype)
    types = (int(x.dtype == torch.bfloat16), int(len(kernels) > 3))
    row_bytes = 4 * ((width + 2 * expand_reach) * inputs + (width + 2 * spatial_reach) * WIDEST_TILE) * stride
    strips = _strips(images, rows, row_bytes, expand_reach + spatial_reach, threads)
    integers = (images, height, width, inputs, *sizes, *types, strips, threads)
    gate = constants[5:] if squeezed else [None] * 4
    y = sums = None
    if strips > 1 and squeezed:  # the gate waits for all strips of an image
        padded = -(-outputs // MOST_PADDING) * MOST_PADDING
        y = out.new_empty(images * strips * -(-rows // strips) * enlarge**2 * columns * padded, dtype=torch.float32)
        sums = out.new_empty(images * strips * padded, dtype=torch.float32)
    pointers = addresses(*_interleaved(kernels, 3), *constants[:5], *gate, x, skip, out, y, sums)
    _made().bottleneck(ctypes.byref(_BottleneckStruct(*integers, scale, *pointers)))
    return out


def _empty_for(x: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    shape = (x.shape[0], outputs, *x.shape[2:])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("nvae::inference_convolution", mutates_args=())
def convolution_operator(
    x: Tensor, other: Tensor | None, kernels: Sequence[Tensor], constants: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """See `Convolution`; opaque to torch.compile."""
    return _convolution(x, other, kernels, constants, sizes)


@torch.library.custom_op("nvae::inference_bottleneck", mutates_args=())
def bottleneck_operator(
    x: Tensor, skip: Tensor, kernels: Sequence[Tensor], constants: Sequence[Tensor], sizes: Sequence[int], scale: float
) -> Tensor:
    """See `Bottleneck`; opaque to torch.compile."""
    return _bottleneck(x, skip, kernels, constants, sizes, scale)


@convolution_operator.register_fake
def _(
    x: Tensor, other: Tensor | None, kernels: Sequence[Tensor], constants: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    return _empty_for(x, sizes[0], x.dtype)


@bottleneck_operator.register_fake
def _(
    x: Tensor, skip: Tensor, kernels: Sequence[Tensor], constants: Sequence[Tensor], sizes: Sequence[int], scale: float
) -> Tensor:
    return _empty_for(skip, skip.shape[1], skip.dtype)
