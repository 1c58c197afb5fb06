"""Passes over memory: functions of tensors compiled into one kernel each, C++ on the CPU and Triton on GPUs.

`fused` marks such a function. It is written once, in plain PyTorch; `torch.compile` makes its kernel at the first
call for a kind of input and keeps it on disk. Inside a larger compiled region the function is simply a part of it.
Without a compiler it runs as it is written, and one warning says so.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import _config as shapes
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")

WORTH_COMPILING = 2**14
"""Tensors with fewer elements than this run uncompiled: a kernel's gain, below 0.05 ms, would not pay for making it."""
KINDS_OF_CALLS = 256
"""How many kinds of calls (sizes, types, modes) one function may be compiled for; one more is an error, never a silent
return to uncompiled code."""

RECOMPILE_LIMIT = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
"""Dynamo's name for that limit; the second is torch 2.6's."""
FAIL_AT_LIMIT = (
    "fail_on_recompile_limit_hit" if hasattr(dynamo, "fail_on_recompile_limit_hit") else "fail_on_cache_limit_hit"
)
"""Dynamo's name for the choice of an error there, likewise."""


def compile_each(modules: Iterable[nn.Module]) -> None:
    """Compiles modules one by one; those of one kind and one size share their code. Each size has its own.

    A module that would need more than `KINDS_OF_CALLS` kinds of code raises an error when it is called.
    """
    setattr(dynamo, RECOMPILE_LIMIT, KINDS_OF_CALLS)
    setattr(dynamo, FAIL_AT_LIMIT, True)
    for module in modules:
        module.compile(dynamic=False)


def fused(*, dynamic: bool, least: int = WORTH_COMPILING) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Compiles a function of tensors at its first call on a device that has a compiler; the first argument decides.

    `dynamic`: one kernel for all sizes, else one for each; `least`: the number of elements from which on it is worth
    making. The function modifies no argument and passes no gradient.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
        met: set[Any] = set()  # kinds of calls that surely compile nothing

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or not _worth_compiling(args[0], least):
                return function(*args, **kwargs)
            if torch.is_grad_enabled():
                with torch.no_grad():
                    return call(*args, **kwargs)
            kind = (torch.get_num_threads(), torch.is_autocast_enabled(), *map(_kind, args))
            if kind in met:
                return compiled(*args, **kwargs)
            # Sizes that happen to be equal are no reason for a kernel of its own.
            with dynamo.patch(RECOMPILE_LIMIT, KINDS_OF_CALLS), shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                result: R = compiled(*args, **kwargs)
            met.add(kind)
            return result

        return call

    return decorate


def _kind(argument: object) -> object:
    """What a compiled function may depend on in an argument: of a view, also what it is a view of."""
    if not isinstance(argument, Tensor):
        return argument
    base = None if argument._base is None else (argument._base.shape, argument._base.stride())
    return argument.shape, argument.stride(), argument.dtype, argument.device, argument.requires_grad, base


def watched(x: Tensor) -> bool:
    """True where somebody watches every operator: a FLOP counter, fake tensors."""
    return isinstance(x, FakeTensor) or _get_current_dispatch_mode() is not None


def _worth_compiling(x: object, least: int) -> bool:
    """False for small tensors, and where somebody watches."""
    assert isinstance(x, Tensor)
    return x.numel() >= least and not watched(x) and compiles(x.device.type)


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
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())
