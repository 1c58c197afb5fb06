"""The discretised mixture of logistics on a CPU, without gradients: in C++ (nvae/kernels/cpu/mixture.cpp; spec §4).

Shapes: B images, C colours, H W space, M mixture components.
"""

import ctypes
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..native import addresses, channels_last, library, made_from, structure
from ..watching import watched

SOURCE = Path(__file__).with_name("mixture.cpp")

_Mixture = structure("Mixture", "images pixels components colours levels threads", "highest", "params x log_prob")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the library can be had."""
    return library(SOURCE) is not None


class Levels(Protocol):
    """Of the config of a likelihood, what this depends on."""

    components: int
    edge: str

    @property
    def levels(self) -> int:
        """V for V + 1 levels of a colour."""

    @property
    def highest(self) -> float:
        """The highest level, on the [−1, 1] scale; the lowest is −1."""


def log_prob(params: Tensor, x: Tensor, config: Levels, channels: int) -> Tensor:
    """Nats per pixel (B, 1, H, W) of images (B, C, H, W) from 0 to 1, C 1 or 3, in float32, without gradients.

    params (B, 3M or 10M, H, W) as `LogisticMixture` has them.
    """
    if config.edge != "right" or params.dtype != torch.float32 or torch.is_grad_enabled():
        return NotImplemented  # type: ignore[no-any-return]
    if torch.compiler.is_compiling() or watched(params) or not available():
        return NotImplemented  # type: ignore[no-any-return]
    images, _, height, width = x.shape
    assert params.shape == (images, config.components * (10 if channels == 3 else 3), height, width)
    params, x = (channels_last(tensor.float()) for tensor in (params, x))
    nats = torch.empty(images, 1, height, width)
    integers = (images, height * width, config.components, channels, config.levels, torch.get_num_threads())
    made_from(SOURCE).mixture(ctypes.byref(_Mixture(*integers, config.highest, *addresses(params, x, nats))))
    return nats
