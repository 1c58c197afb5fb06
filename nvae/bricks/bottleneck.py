"""Trained models on a CPU: bottlenecks and latents in C++ (nvae/kernels/cpu), the latter else as in latents.py."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..kernels.cpu import bottleneck as kernels
from ..kernels.cpu import latents as latent_kernels
from .convolutions import Conv2d
from .latents import Normal, Score
from .latents import score as score_in_torch
from .squeeze_excite import SqueezeExcite


class Bottleneck(nn.Module):
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
        super().__init__()
        parameters = [] if gate is None else list(gate.parameters())
        self.packed = kernels.packed(*map(_kernel, (expand, spatial, project)), elu=elu, gate=parameters)
        self.scale = scale

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, C, H, W), which `takes` must allow, skip (B, O, H', W') -> (B, O, H', W'), in the type of x."""
        return kernels.bottleneck(x, skip, self.packed, self.scale)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.packed.library != kernels.library_here():
            raise ValueError("a model for inference belongs to the machine that made it; make it again from the model")


def _kernel(convolution: Conv2d) -> kernels.Kernel:
    stride, _, dilation, groups, enlarge = convolution.geometry
    weight = convolution.effective_weight()
    assert dilation == 1 and (groups == 1 or convolution.geometry.is_depthwise(weight))
    return kernels.Kernel(weight, convolution.bias, stride, enlarge)


def normal(raws: Sequence[Tensor], temperature: float = 1.0) -> Normal:
    """`Normal.from_sum`, in one pass."""
    if not latent_kernels.takes_raw(raws):
        return Normal.from_sum(raws, temperature)
    return Normal(*latent_kernels.normal(raws, temperature))


def score(q: Normal, p: Normal, drawn: Tensor, z: Tensor, *, closed: bool) -> Score:
    """`latents.score`, in one pass."""
    if not latent_kernels.takes(q.mean, q.sigma, p.mean, p.sigma, drawn, z):
        return score_in_torch(q, p, drawn, z, closed=closed)
    kl, log_q, log_p = latent_kernels.score((q.mean, q.sigma), (p.mean, p.sigma), drawn, z, closed=closed)
    return Score(kl, log_q.sum(1), log_p.sum(1))
