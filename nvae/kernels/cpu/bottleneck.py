"""Inverted bottlenecks on a CPU, without gradients, in C++ (bottleneck.cpp).

A bottleneck is a convolution to many channels, a depthwise one and a 1×1 convolution to few, with activations between,
scaled, gated and added to `skip`: a separable cell (spec §1) or the shift cell of a flow (spec §3). Its hidden channels
are never in memory as a whole.

Taps of a kernel that are zero, as masks leave them, cost nothing. A depthwise kernel that reads its input enlarged ×2
becomes four smaller ones, one for each phase of the output. Arithmetic is float32, whatever the type of x.

Shapes: B images, C channels, H W space of x; E hidden channels, O outputs; k kernel side, P phases, T taps.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import addresses, channels_last, library, made_from, structure
from ..watching import watched

SOURCE = Path(__file__).with_name("bottleneck.cpp")
PADDING = 16
"""Hidden channels and outputs are padded with zeros to a multiple of this, whatever the width of vectors."""
WIDEST_TILE = 48
"""Most hidden channels that are in memory at once."""
SCRATCH = 2**20
"""Bytes that a strip of rows may take besides weights: half of a processor's second cache."""
LEAST_ROWS = 4
"""Of a strip, where there are fewer images than processors: its neighbours read the rows at its edges, too."""


def available() -> bool:
    """Whether the library can be had; to torch.compile a constant."""
    return library(SOURCE) is not None


available.__dict__["_dynamo_marked_constant"] = True
"""The mark of `torch.compiler.assume_constant_result`, which would import the compiler: a second or two."""


def takes(x: Tensor) -> bool:
    """Whether `bottleneck` does: float32 or bfloat16, on a CPU, without gradients."""
    types = (torch.float32, torch.bfloat16)
    return x.device.type == "cpu" and x.dtype in types and not torch.is_grad_enabled() and available()


# ---------------------------------------------------------------------------------------------------------- weights


class Kernel(NamedTuple):
    """Of a convolution at stride 1 unless told otherwise, padded with zeros to keep H and W."""

    weight: Tensor
    """(O, C/groups, k, k), k odd."""
    bias: Tensor | None = None
    """(O)."""
    stride: int = 1
    enlarge: bool = False
    """Whether it reads its input enlarged ×2 (nearest)."""


class Packed(NamedTuple):
    """A bottleneck's weights in the order in which this processor's library reads them."""

    tensors: list[Tensor]
    """Kernels, biases and offsets of taps, then the gate's parameters if there is one."""
    sizes: list[int]
    library: str
    """For which they were packed."""


def library_here() -> str:
    """The library of this processor, by the path of its file."""
    return str(made_from(SOURCE)._name)


class Weights(NamedTuple):
    """Of project(act'(spatial(act(expand(x))))): act is ELU and act' ELU twice with `elu`, else both swish."""

    expand: Kernel
    """Without groups."""
    spatial: Kernel
    """Depthwise."""
    project: Kernel
    """1×1."""
    elu: bool
    gate: tuple[Tensor, ...]
    """Weight and bias of the two linear layers of squeeze-and-excitation; empty without it."""
    scale: float
    packed: Packed | None


def computed(x: Tensor, skip: Tensor, weights: Weights) -> Tensor:
    """skip + scale · gate(y) · y, as `bottleneck`; for packed weights and what `takes` allows."""
    if weights.packed is None or not takes(x):
        return NotImplemented  # type: ignore[no-any-return]
    return bottleneck(x, skip, weights.packed, weights.scale)


@torch.no_grad()
def packed(expand: Kernel, spatial: Kernel, project: Kernel, *, elu: bool, gate: Sequence[Tensor] = ()) -> Packed:
    """The weights of project(act'(spatial(act(expand(x))))): act is ELU and act' ELU twice with `elu`, else both swish.

    `expand` has no groups, `spatial` is depthwise, `project` 1×1. `gate`: weight and bias of the two linear layers of
    squeeze-and-excitation.
    """
    assert expand.stride == project.stride == 1 and not expand.enlarge and not project.enlarge
    assert len(expand.weight) == len(spatial.weight) == project.weight.shape[1] and len(gate) in (0, 4)
    assert spatial.weight.shape[1] == 1 and project.weight.shape[2:] == (1, 1)
    kernels = [kernel.weight.double().cpu() for kernel in (expand, spatial, project)]
    phases = _phases(kernels[1]) if spatial.enlarge else kernels[1][None]  # (P, E, 1, k, k)
    expanding, expand_at = _taps(kernels[0][None])  # (1, T, E, C), (T, 2)
    convolving, spatial_at = _taps(phases)  # (P, T, E, 1), (T, 2)
    matrices = [
        expanding[0].transpose(1, 2).flatten(0, 1),  # (T · C, E)
        convolving.flatten(2).flatten(0, 1),  # (P · T, E)
        _widened(kernels[2].flatten(1).t()),  # (E padded, O)
    ]
    return Packed(
        [
            *map(_in_tiles, matrices),
            *map(_bias, (expand, spatial, project)),
            expand_at,
            spatial_at,
            *(parameter.cpu().float().clone() for parameter in gate),
        ],
        [
            *project.weight.shape[1::-1],
            spatial.stride,
            2 if spatial.enlarge else 1,
            len(expand_at),
            _reach(expand_at),
            len(spatial_at),
            _reach(spatial_at),
            int(elu),
            len(gate[0]) if gate else 0,
        ],
        library_here(),
    )


def _in_tiles(matrix: Tensor) -> Tensor:
    """(depth, channels) in the order that the C++ function reads it in."""
    matrix = _widened(matrix.t()).t().float().contiguous()
    result = torch.empty_like(matrix)
    depth, channels = (ctypes.c_int64(size) for size in matrix.shape)
    made_from(SOURCE).pack(ctypes.c_void_p(matrix.data_ptr()), depth, channels, ctypes.c_void_p(result.data_ptr()))
    return result


def _bias(kernel: Kernel) -> Tensor:
    bias = kernel.weight.new_zeros(len(kernel.weight)) if kernel.bias is None else kernel.bias
    return _widened(bias.float().cpu())


def _widened(matrix: Tensor) -> Tensor:
    """With zeros after the first axis."""
    return torch.cat([matrix, matrix.new_zeros(-len(matrix) % PADDING, *matrix.shape[1:])])


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


def _taps(kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Of (P, O, C, k, k) those taps that are not zero everywhere: (P, T, O, C), and their offsets (T, 2) in pixels."""
    at = kernels.ne(0).any(2).any(1).any(0).nonzero().contiguous()
    return kernels[..., at[:, 0], at[:, 1]].permute(0, 3, 1, 2), at - kernels.shape[-1] // 2


def _reach(at: Tensor) -> int:
    """The largest |offset|."""
    return int(at.abs().max()) if len(at) else 0


# ------------------------------------------------------------------------------------------------------ the function

_Bottleneck = structure(
    "Bottleneck",
    "images height width inputs hidden outputs stride enlarge expand_taps expand_reach spatial_taps spatial_reach "
    "elu squeezed bfloat16 strips threads",
    "scale",
    "expand spatial project expand_bias spatial_bias project_bias expand_at spatial_at "
    "squeeze squeeze_bias excite excite_bias x skip out y sums",
)


def bottleneck(x: Tensor, skip: Tensor, weights: Packed, scale: float) -> Tensor:
    """skip + scale · gate(y) · y, with y that of `packed`, for x (B, C, H, W) that `takes` allows.

    skip (B, O, H/stride, W/stride), twice that with `enlarge` -> the same shape, in the type of x.
    """
    # Where somebody traces or watches, functions must be operators.
    function = bottleneck_operator if torch.compiler.is_compiling() or watched(x) else _bottleneck
    out: Tensor = function(x, skip.to(x.dtype), weights.tensors, weights.sizes, scale)
    return out


def _bottleneck(x: Tensor, skip: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], scale: float) -> Tensor:
    x, skip = channels_last(x), channels_last(skip)
    images, inputs, height, width = x.shape
    _, outputs, stride, enlarge, expand_taps, expand_reach, _, spatial_reach, _, squeezed = sizes
    rows, columns = -(-height // stride), -(-width // stride)
    assert len(weights[0]) == expand_taps * inputs
    assert skip.shape == (images, outputs, rows * enlarge, columns * enlarge)
    out = torch.empty_like(skip, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    row_bytes = 4 * ((width + 2 * expand_reach) * inputs + (width + 2 * spatial_reach) * WIDEST_TILE) * stride
    strips = _strips(images, rows, row_bytes, expand_reach + spatial_reach, threads)
    y = sums = None
    if strips > 1 and squeezed:  # the gate waits for all strips of an image
        channels = outputs + -outputs % PADDING
        y = x.new_empty(images * strips * -(-rows // strips) * enlarge**2 * columns * channels, dtype=torch.float32)
        sums = x.new_empty(images * strips * channels, dtype=torch.float32)
    integers = (images, height, width, inputs, *sizes, int(x.dtype == torch.bfloat16), strips, threads)
    no_gate = [] if squeezed else [None] * 4
    pointers = addresses(*weights, *no_gate, x, skip, out, y, sums)
    made_from(SOURCE).bottleneck(ctypes.byref(_Bottleneck(*integers, scale, *pointers)))
    return out


def _strips(images: int, rows: int, row_bytes: int, reach: int, threads: int) -> int:
    """Into how many an image is cut: each fits the cache, and no processor is without one."""
    fitting = max(SCRATCH // max(row_bytes, 1) - 2 * reach, LEAST_ROWS)
    return max(-(-rows // fitting), min(-(-threads // max(images, 1)), rows // LEAST_ROWS), 1)


SCHEMA = "(Tensor x, Tensor skip, Tensor[] weights, SymInt[] sizes, float scale) -> Tensor"
"""Written out: PyTorch 2.6 cannot read it from the annotations."""


@torch.library.custom_op("nvae::inference_bottleneck", mutates_args=(), schema=SCHEMA)
def bottleneck_operator(
    x: Tensor, skip: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], scale: float
) -> Tensor:
    """See `bottleneck`; opaque to torch.compile."""
    return _bottleneck(x, skip, weights, sizes, scale)


@bottleneck_operator.register_fake
def _(x: Tensor, skip: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], scale: float) -> Tensor:
    return torch.empty_like(skip, memory_format=torch.channels_last)
