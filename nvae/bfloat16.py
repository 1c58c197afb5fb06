"""Where bfloat16 tensors are computed with in float16: CPUs that multiply float16 fast and bfloat16 slowly.

Such a CPU has AVX512-FP16 and no matrix unit (AMX), or a system that hides it: it multiplies bfloat16 numbers at half
of float32's rate, float16 numbers at twice that rate. Numbers are scaled by powers of two to fit float16, which rounds
eight times finer than bfloat16, and long sums go on in float32 (nvae/kernels/bfloat16.h).
"""

from pathlib import Path

import torch

from .native import library


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def pays(source: Path) -> bool:
    """Whether this is such a CPU, and the library of a C++ file can be had."""
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return False
    made = library(source)
    return made is not None and bool(made.has_float16())
