"""Passes over memory: functions of tensors compiled into one kernel each, C++ on the CPU and Triton on GPUs.

`fused` marks such a function. It is written once, in plain PyTorch; `torch.compile` makes its kernel at the first
call for a kind of input and keeps it on disk. At its first use on a device the kernel is compared there with the
function as it is written, on a small input; one that differs or cannot be made is left out. Inside a larger compiled
region the function is simply a part of it. Without a compiler, or plainly, it runs as it is written.
"""

from collections.abc import Callable, Iterable
from functools import cached_property, partial, wraps
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

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
ON_GPUS: dict[str, Any] = {"realize_reads_threshold": 16, "realize_opcount_threshold": 200}
"""What the compiler is told there: what is needed twice is computed twice, in registers, not written to memory."""
SMALL = 8
"""Rows and columns of the images that kernels are compared on."""


def compile_each(modules: Iterable[nn.Module]) -> None:
    """Compiles modules one by one; those of one kind and one size share their code. Each size has its own.

    Their backward passes keep what they keep uncompiled, and are to be called outside of autocast.

    A module that would need more than `KINDS_OF_CALLS` kinds of code raises an error when it is called.
    """
    from . import dynamo

    dynamo.allow_kinds(KINDS_OF_CALLS)
    dynamo.differentiate_as_uncompiled()
    for module in modules:
        device = next((weight.device.type for weight in module.parameters()), "cpu")
        operations.load_all(device)
        module.compile(dynamic=False, options=None if device in ANY_SIZE else ON_GPUS)


def cropped(*args: Any) -> Call:
    """The arguments with images (B, C, H, W) cut to their first rows and columns, in the same order of memory."""
    return tuple(_corner(arg) if isinstance(arg, Tensor) and arg.dim() == 4 else arg for arg in args)


def _corner(image: Tensor) -> Tensor:
    return image[:, :, :SMALL, :SMALL].clone(memory_format=torch.preserve_format)


def fused(
    *, dynamic: bool, least: int | None = None, few: bool = False, small: Callable[..., Call] = cropped
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Compiles a function of tensors at its first call on a device that has a compiler; the first argument decides.

    `dynamic`: one kernel for all sizes, else one for each; on a GPU always one for each, where threads read several
    numbers at once only if sizes are known; `least`: the number of elements from which on it is worth making (None:
    `WORTH_COMPILING`); `few`: over few numbers, worth making on a GPU at any size, where each operator would be a
    launch; `small` makes of a call's arguments the small ones that the kernel is compared on.
    The function modifies no argument and passes no gradient.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kernels = _Kernels(function, dynamic, small)
        met: set[Any] = set()  # kinds of calls that surely compile nothing

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or not _worth_compiling(args[0], least, few):
                return function(*args, **kwargs)
            if torch.is_grad_enabled():
                with torch.no_grad():
                    return call(*args, **kwargs)
            if not kernels.are_sound(args):
                return function(*args, **kwargs)
            kind = (torch.get_num_threads(), torch.is_autocast_enabled(), *map(_kind, args))
            if kind in met:
                try:
                    return kernels.of(args[0])(*args, **kwargs)
                except _limit_hit():  # somebody has emptied the compiler's memory
                    met.clear()
            result = kernels.made(*args, **kwargs)
            met.add(kind)
            return result

        return call

    return decorate


class _Kernels(Generic[P, R]):
    """What a function is compiled to, and whether that says what the function says."""

    def __init__(self, function: Callable[P, R], dynamic: bool, small: Callable[..., Call]) -> None:
        self.function, self.small = function, small
        self.name = f"{function.__module__.removeprefix('nvae.')}.{function.__name__} (compiled)"
        self.dynamic = dynamic
        self._sound: dict[tuple[torch.device, torch.dtype], bool] = {}

    @cached_property
    def of_one_size(self) -> Callable[P, R]:
        return torch.compile(self.function, fullgraph=True, dynamic=False)

    @cached_property
    def of_any_size(self) -> Callable[P, R]:
        return torch.compile(self.function, fullgraph=True, dynamic=True)

    @cached_property
    def of_gpus(self) -> Callable[P, R]:
        return torch.compile(self.function, fullgraph=True, dynamic=False, options=ON_GPUS)

    def of(self, x: Any) -> Callable[P, R]:
        """For a first argument."""
        if x.device.type not in ANY_SIZE:
            return self.of_gpus
        return self.of_any_size if self.dynamic else self.of_one_size

    def made(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result, by a kernel that may have to be made. Sizes that happen to be equal are no reason for another."""
        from . import dynamo

        with dynamo.compiling_for(KINDS_OF_CALLS), dynamo.sizes_apart():
            return self.of(args[0])(*args, **kwargs)

    def are_sound(self, args: Call) -> bool:
        """Whether they may be used for such a call."""
        x = args[0]
        place = (x.device, x.dtype)
        if place not in self._sound:
            self._sound[place] = verdict(self.name, *place, partial(self._judged, args, x.dtype)) == SOUND
        return self._sound[place]

    def _judged(self, args: Call, dtype: torch.dtype) -> str:
        """Compiled for the call itself first: sizes as they come decide how a kernel is made."""

        made: Callable[..., Any] = self.made

        def kernel(*few: Any) -> Any:
            return made(*few) if not torch.is_grad_enabled() else NotImplemented

        made(*args)
        return difference(self.function, kernel, [self.small(*args)], dtype) or SOUND


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


def _limit_hit() -> tuple[type[Exception], ...]:
    from .dynamo import LIMIT_HIT

    return LIMIT_HIT


def is_worth_a_pass(x: Tensor) -> bool:
    """Whether a function of `few` numbers like x would be compiled, if there is a compiler."""
    return _are_enough(x, None, few=True)


def _worth_compiling(x: object, least: int | None, few: bool) -> bool:
    """False for small tensors, plainly, and where somebody watches."""
    assert isinstance(x, Tensor)
    if operations.is_plain() or not _are_enough(x, least, few):
        return False
    return not watched(x) and compiles(x.device.type)


def _are_enough(x: Tensor, least: int | None, few: bool) -> bool:
    """Whether a kernel for a tensor of that size would pay."""
    if few and x.device.type not in ANY_SIZE:
        return True
    return x.numel() >= (WORTH_COMPILING if least is None else least)
