"""Which compilers are at hand."""

import logging
import warnings
from functools import cache


@cache
def compiles(device_type: str) -> bool:
    """Whether `torch.compile` has what it needs for a type of device; says so once where it has not."""
    if device_type == "cpu":
        found, needed = _has_cpp_compiler(), "a C++ compiler (g++ or clang++)"
    else:
        found, needed = _has_triton(), "Triton"
    if not found:
        warnings.warn(f"no fused kernels on {device_type}, which need {needed}: everything runs, slower", stacklevel=4)
    return found


def _has_cpp_compiler() -> bool:
    """Says, too, that PyTorch need not tell where CUDA's tools are: it looks for them when it builds for a CPU."""
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_about_cuda)
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def _is_not_about_cuda(record: logging.LogRecord) -> bool:
    return not record.msg.startswith("No CUDA runtime is found")


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())
