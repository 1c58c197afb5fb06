"""Inverted bottlenecks for inference: wide in the middle, and never in memory there.

Both the separable cells (spec §1) and the shift cells of flows (spec §3) are one convolution to many channels, a
depthwise one and a 1×1 convolution to few, with activations between, added to what came in. On a CPU all of that is
one C++ function (nvae/kernels/bottleneck.cpp). Taps of a kernel that are zero, as masks leave them, cost nothing; a
depthwise kernel that reads its input enlarged ×2 becomes four smaller ones, one for each phase of the output.

Shapes: B images, H W space of x; C inputs, E hidden channels, O outputs; k kernel side, P phases, T taps.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolutions import Conv2d
from .fusion import watched
from .native import library
from .residual import SqueezeExcite

SOURCE = Path(__file__).parent / "kernels" / "bottleneck.cpp"
PADDING = 16
"""Channels of weights are padded with zeros to a multiple of this, whatever the width of the processor's vectors."""
WIDEST_TILE = 48
"""Most hidden channels that are in memory at once."""
SCRATCH = 2**20
"""Bytes that a strip of rows may take besides weights: half of a processor's second cache."""
LEAST_ROWS = 4
"""Of a strip, where there are fewer images than processors: its neighbours compute the rows at its edges, too."""


class Bottleneck(nn.Module):
    """skip + scale · gate(y) · y, with y = project(act'(spatial(act(expand(x))))), for trained convolutions.

    `elu`: act is ELU and act' ELU twice, else both are swish. The gate is that of squeeze-and-excitation, or 1.
    Arithmetic is float32 whatever the type of x.
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
        super().__init__()
        assert project.geometry.is_pointwise(project.weight) and spatial.geometry.is_depthwise(spatial.weight)
        assert expand.geometry.groups == expand.geometry.stride == 1 and not expand.geometry.enlarge
        self.scale = scale
        self.can_run = library(SOURCE) is not None
        if not self.can_run:
            return
        enlarge = 2 if spatial.geometry.enlarge else 1
        spatial_kernel = _kernel(spatial)
        phases = _phases(spatial_kernel) if enlarge == 2 else spatial_kernel[None]  # (P, E, 1, k, k)
        expanding, expand_at = _taps(_kernel(expand)[None], expand.geometry.dilation)  # (1, T, E, C)
        convolving, spatial_at = _taps(phases)  # (P, T, E, 1)
        projecting = _widened(_kernel(project).flatten(1).t())  # (E, O)
        self.weights = [
            _packed(expanding[0].transpose(1, 2).flatten(0, 1)),
            _bias(expand),
            _packed(convolving.flatten(2).flatten(0, 1)),
            _bias(spatial),
            _packed(projecting),
            _bias(project),
            expand_at,
            spatial_at,
        ]
        if gate is not None:
            self.weights += [p.detach().float().clone() for layer in (gate.squeeze, gate.excite) for p in _of(layer)]
        self.sizes = [
            len(projecting),
            len(_kernel(project)),
            spatial.geometry.stride,
            enlarge,
            len(expand_at),
            int(expand_at.abs().max()),
            len(spatial_at),
            int(spatial_at.abs().max()),
            int(elu),
            0 if gate is None else gate.squeeze.out_features,
        ]

    def runs_on(self, x: Tensor) -> bool:
        """Whether `forward` takes x: float32 or bfloat16, on a CPU, without gradients."""
        types = (torch.float32, torch.bfloat16)
        return self.can_run and x.device.type == "cpu" and x.dtype in types and not torch.is_grad_enabled()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, C, H, W), skip (B, O, H', W') -> (B, O, H', W'), in the type of x."""
        x = x.contiguous(memory_format=torch.channels_last)
        skip = skip.to(x.dtype).contiguous(memory_format=torch.channels_last)
        function = bottleneck_operator if torch.compiler.is_compiling() or watched(x) else _bottleneck
        out: Tensor = function(x, skip, self.weights, self.sizes, self.scale)
        return out


# -------------------------------------------------------------------------------------------------------- the weights


def _kernel(convolution: Conv2d) -> Tensor:
    """(O, C/groups, k, k), float64."""
    return convolution.effective_weight().detach().double().cpu()


def _of(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def _bias(convolution: Conv2d) -> Tensor:
    bias = convolution.weight.new_zeros(len(convolution.weight)) if convolution.bias is None else convolution.bias
    return _widened(bias.detach()).float().contiguous()


def _widened(matrix: Tensor) -> Tensor:
    """With zeros after the first axis, to a multiple of PADDING."""
    missing = -len(matrix) % PADDING
    return torch.cat([matrix, matrix.new_zeros(missing, *matrix.shape[1:])])


def _packed(matrix: Tensor) -> Tensor:
    """(depth, channels) in the order that the C++ function reads it in."""
    made = library(SOURCE)
    assert made is not None
    matrix = _widened(matrix.t()).t().float().contiguous()
    packed = torch.empty_like(matrix)
    made.pack(_pointer(matrix), ctypes.c_int64(matrix.shape[0]), ctypes.c_int64(matrix.shape[1]), _pointer(packed))
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
    at = kernels.ne(0).any(2).any(1).any(0).nonzero().contiguous()  # (T, 2)
    return kernels[..., at[:, 0], at[:, 1]].permute(0, 3, 1, 2), (at - kernels.shape[-1] // 2) * dilation


# ------------------------------------------------------------------------------------------------------- the operator

_INTEGERS = (
    *("images", "height", "width", "inputs"),
    *("hidden", "outputs", "stride", "enlarge", "expand_taps", "expand_reach", "spatial_taps", "spatial_reach"),
    *("elu", "squeezed", "bfloat16", "strips", "threads"),
)
_POINTERS = (
    *("expand", "expand_bias", "spatial", "spatial_bias", "project", "project_bias", "expand_at", "spatial_at"),
    *("squeeze", "squeeze_bias", "excite", "excite_bias", "x", "skip", "out", "y", "sums"),
)


class _Problem(ctypes.Structure):
    """`Problem` of nvae/kernels/bottleneck.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _bottleneck(x: Tensor, skip: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], scale: float) -> Tensor:
    images, inputs, height, width = x.shape
    _, outputs, stride, enlarge, _, expand_reach, _, spatial_reach, _, squeezed = sizes
    rows, columns = -(-height // stride), -(-width // stride)
    threads = torch.get_num_threads()
    row_bytes = 4 * ((width + 2 * expand_reach) * inputs + (width + 2 * spatial_reach) * WIDEST_TILE) * stride
    fitting = max(SCRATCH // row_bytes - 2 * (expand_reach + spatial_reach), LEAST_ROWS)
    strips = max(-(-rows // fitting), min(-(-threads // images), rows // LEAST_ROWS), 1)
    padded = -(-outputs // PADDING) * PADDING
    y = x.new_empty((images, enlarge**2, rows, columns, padded), dtype=torch.float32)
    sums = x.new_empty((images, strips, padded), dtype=torch.float32)
    out = torch.empty_like(skip)
    integers = (images, height, width, inputs, *sizes, int(x.dtype == torch.bfloat16), strips, threads)
    gate = weights[8:] if squeezed else (None,) * 4
    pointers = (None if t is None else t.data_ptr() for t in (*weights[:8], *gate, x, skip, out, y, sums))
    made = library(SOURCE)
    assert made is not None and out.shape == (images, outputs, rows * enlarge, columns * enlarge)
    made.bottleneck(ctypes.byref(_Problem(*integers, scale, *pointers)))
    return out


@torch.library.custom_op("nvae::bottleneck", mutates_args=())
def bottleneck_operator(
    x: Tensor, skip: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], scale: float
) -> Tensor:
    """See `Bottleneck`; opaque to torch.compile."""
    return _bottleneck(x, skip, weights, sizes, scale)


@bottleneck_operator.register_fake
def _(x: Tensor, skip: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], scale: float) -> Tensor:
    return torch.empty_like(skip)
