"""The types that products are computed in; likelihood, KL and penalties stay float32 whatever is chosen."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import UserError

Precision = Literal["fp32", "tf32", "bf16", "fp16", "mixed"]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision_on(device: torch.device, wanted: Precision, field: str = "train.precision") -> Precision:
    """What `mixed` means on a device. Raises UserError, naming the field, where the device lacks what was asked for."""
    on_gpu = device.type == "cuda"
    if device.type == "mps" and wanted not in ("fp32", "mixed"):
        raise UserError(f"{field}: {wanted} is not offered on mps; use fp32")
    if wanted == "fp16" and not on_gpu:
        raise UserError(f"{field}: fp16 needs a CUDA device; on the CPU use fp32 or bf16")
    if wanted == "tf32" and not (on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise UserError(f"{field}: tf32 needs a CUDA device of compute capability 8.0 (A100) or later; use fp32")
    if wanted in ("bf16", "mixed") and on_gpu:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        if wanted == "bf16":
            raise UserError(f"{field}: {torch.cuda.get_device_name(device)} has no bf16; use fp16 or mixed")
        return "fp16"
    return "fp32" if wanted == "mixed" else wanted


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The context in which a model computes in a precision."""
    dtype = AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def computed_in(precision: Precision) -> list[torch.dtype]:
    """The types that numbers are computed in: float32 and, where it is mixed, the smaller one."""
    return [torch.float32, *([AUTOCAST[precision]] if precision in AUTOCAST else [])]


def allow_tf32(precision: Precision) -> None:
    """Lets float32 products round to TF32 on CUDA, or not, for this process."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def in_float64(u: Tensor) -> Tensor:
    """The numbers in float64, on the CPU where they lie on Apple's GPU, which has no such type."""
    return (u.cpu() if u.device.type == "mps" else u).double()


def at_least_float32(u: Tensor) -> Tensor:
    """float16 and bfloat16 become float32, float32 and float64 stay."""
    return u.float() if u.dtype.itemsize < 4 else u
