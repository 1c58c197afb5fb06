"""The discretised mixture of logistics on a CPU, without gradients: in C++ (nvae/kernels/cpu/mixture.cpp; spec §4).

Shapes: B images, C colours, H W space, M mixture components.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..native import addresses, channels_last, library, made_from, structure

SOURCE = Path(__file__).with_name("mixture.cpp")

_Mixture = structure("Mixture", "images pixels components colours levels threads", "highest", "params x log_prob")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the library can be had."""
    return library(SOURCE) is not None


def takes(params: Tensor) -> bool:
    """Whether `log_prob` does: float32, on a CPU, while nobody asks for gradients or traces."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return params.device.type == "cpu" and params.dtype == torch.float32 and available()


def log_prob(params: Tensor, x: Tensor, components: int, levels: int, highest: float) -> Tensor:
    """Nats per pixel (B, 1, H, W) of images (B, C, H, W) from 0 to 1, C 1 or 3.

    params (B, 3M or 10M, H, W) as `LogisticMixture` has them; `levels` V for V + 1 levels evenly from −1 to `highest`.
    """
    images, colours, height, width = x.shape
    assert colours in (1, 3) and params.shape == (images, components * (10 if colours == 3 else 3), height, width)
    params, x = (channels_last(tensor.float()) for tensor in (params, x))
    nats = torch.empty(images, 1, height, width)
    integers = (images, height * width, components, colours, levels, torch.get_num_threads())
    made_from(SOURCE).mixture(ctypes.byref(_Mixture(*integers, highest, *addresses(params, x, nats))))
    return nats
