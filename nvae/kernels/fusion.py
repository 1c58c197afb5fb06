"""Passes over memory: functions of tensors compiled into one kernel each, C++ on the CPU and Triton on GPUs.

`fused` marks such a function. It is written once, in plain PyTorch; `torch.compile` makes its kernel at the first
call for a kind of input and keeps it on disk. At its first use on a device the kernel is compared there with the
function as it is written, on a small input; one that differs or cannot be made is left out. Inside a larger compiled
region the function is simply a part of it. Without a compiler, or plainly, it runs as it is written.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo import exc as dynamo_errors
from torch.fx.experimental import _config as shapes

from . import operations
from .compilers import compiles
from .judging import difference
from .verdicts import SOUND, verdict
from .watching import watched

P = ParamSpec("P")
R = TypeVar("R")
Call = tuple[Any, ...]

WORTH_COMPILING = 2**14
"""Tensors with fewer elements than this run uncompiled: a kernel's gain, below 0.05 ms, would not pay for making it."""
WORTH_SECONDS = 2**19
"""From so many elements on, seconds that a kernel takes to be made pay."""
KINDS_OF_CALLS = 256
"""How many kinds of calls (sizes, types, modes) one function may be compiled for; one more is an error, never a silent
return to uncompiled code."""
ANY_SIZE = ("cpu",)
"""Devices where one kernel may serve all sizes."""
SMALL = 8
"""Rows and columns of the images that kernels are compared on."""

RECOMPILE_LIMIT = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
"""Dynamo's name for that limit; the second is torch 2.6's."""
FAIL_AT_LIMIT = (
    "fail_on_recompile_limit_hit" if hasattr(dynamo, "fail_on_recompile_limit_hit") else "fail_on_cache_limit_hit"
)
"""Dynamo's name for the choice of an error there, likewise."""
LIMIT_HIT: type[Exception] = next(
    getattr(dynamo_errors, name)
    for name in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")
    if hasattr(dynamo_errors, name)
)
"""Dynamo's name for that error, likewise."""


def compile_each(modules: Iterable[nn.Module]) -> None:
    """Compiles modules one by one; those of one kind and one size share their code. Each size has its own.

    A module that would need more than `KINDS_OF_CALLS` kinds of code raises an error when it is called.
    """
    setattr(dynamo, RECOMPILE_LIMIT, KINDS_OF_CALLS)
    setattr(dynamo, FAIL_AT_LIMIT, True)
    for module in modules:
        operations.load_all(next((weight.device.type for weight in module.parameters()), "cpu"))
        module.compile(dynamic=False)


def cropped(*args: Any) -> Call:
    """The arguments with images (B, C, H, W) cut to their first rows and columns, in the same order of memory."""
    return tuple(_corner(arg) if isinstance(arg, Tensor) and arg.dim() == 4 else arg for arg in args)


def _corner(image: Tensor) -> Tensor:
    return image[:, :, :SMALL, :SMALL].clone(memory_format=torch.preserve_format)


def fused(
    *, dynamic: bool, least: int | None = None, small: Callable[..., Call] = cropped
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Compiles a function of tensors at its first call on a device that has a compiler; the first argument decides.

    `dynamic`: one kernel for all sizes, else one for each; on a GPU always one for each, where threads read several
    numbers at once only if sizes are known; `least`: the number of elements from which on it is worth making (None:
    `WORTH_COMPILING`); `small` makes of a call's arguments the small ones that the kernel is compared on.
    The function modifies no argument and passes no gradient.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        of_one_size = torch.compile(function, fullgraph=True, dynamic=False)
        of_any_size = torch.compile(function, fullgraph=True, dynamic=True) if dynamic else of_one_size
        name = f"{function.__module__.removeprefix('nvae.')}.{function.__name__}"
        met: set[Any] = set()  # kinds of calls that surely compile nothing
        sound: dict[tuple[torch.device, torch.dtype], bool] = {}

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or not _worth_compiling(args[0], least):
                return function(*args, **kwargs)
            if torch.is_grad_enabled():
                with torch.no_grad():
                    return call(*args, **kwargs)
            assert isinstance(args[0], Tensor)
            place = (args[0].device, args[0].dtype)
            if place not in sound:
                sound[place] = judged(args, *place)
            if not sound[place]:
                return function(*args, **kwargs)
            kind = (torch.get_num_threads(), torch.is_autocast_enabled(), *map(_kind, args))
            if kind in met:
                try:
                    return compiled(args[0])(*args, **kwargs)
                except LIMIT_HIT:  # somebody has emptied the compiler's memory
                    met.clear()
            result = made(*args, **kwargs)
            met.add(kind)
            return result

        def compiled(x: Any) -> Callable[P, R]:
            return of_any_size if x.device.type in ANY_SIZE else of_one_size

        def made(*args: Any, **kwargs: Any) -> R:
            """Sizes that happen to be equal are no reason for a kernel of its own."""
            with dynamo.patch(RECOMPILE_LIMIT, KINDS_OF_CALLS), shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return compiled(args[0])(*args, **kwargs)

        def judged(args: Call, device: torch.device, dtype: torch.dtype) -> bool:
            """Compiled for the call itself first: sizes as they come decide how a kernel is made."""

            def judge() -> str:
                def kernel(*few: Any) -> Any:
                    return made(*few) if not torch.is_grad_enabled() else NotImplemented

                try:
                    made(*args)
                except Exception as error:
                    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                return difference(function, kernel, [small(*args)], dtype) or SOUND

            return verdict(f"{name} (compiled)", device, dtype, judge) == SOUND

        return call

    return decorate


def in_one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled whole for large inputs, where nobody takes gradients; its kernel takes seconds to make."""
    whole = fused(dynamic=False, least=WORTH_SECONDS)(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        return NotImplemented if torch.is_grad_enabled() else whole(*args)

    return call


def _kind(argument: object) -> object:
    """What a compiled function may depend on in an argument: of a view, also what it is a view of."""
    if not isinstance(argument, Tensor):
        return argument
    base = None if argument._base is None else (argument._base.shape, argument._base.stride())
    return argument.shape, argument.stride(), argument.dtype, argument.device, argument.requires_grad, base


def _worth_compiling(x: object, least: int | None) -> bool:
    """False for small tensors, plainly, and where somebody watches."""
    assert isinstance(x, Tensor)
    if operations.is_plain() or x.numel() < (WORTH_COMPILING if least is None else least):
        return False
    return not watched(x) and compiles(x.device.type)
