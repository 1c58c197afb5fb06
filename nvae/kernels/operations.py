"""What is computed how: the one place that decides.

An *operation* is a function of tensors, written once in plain PyTorch where it belongs (nvae/bricks). `TABLE` names its
faster implementations for each type of device. At its first use there, an implementation is compared with the plain
function on the operation's examples, values and gradients; one that differs, raises or cannot be built is left out, one
line says so, and the plain function computes. `use("plain")` leaves out all of them.

An implementation answers NotImplemented to a call that it does not compute: the next one is asked, at last the plain
function, which is always there.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from importlib import import_module
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ..core.distributed import gather_objects
from ..core.errors import in_a_line
from .judging import difference
from .verdicts import SOUND, verdict
from .watching import watched

P = ParamSpec("P")
R = TypeVar("R")
Mode = Literal["auto", "plain"]
Examples = Callable[[torch.device, torch.dtype], Iterator[tuple[Any, ...]]]
Implementation = Callable[..., Any]

TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "weight_norm": {"cpu": ("weight_norm:weight_norm",), "cuda": ("weight_norm:weight_norm",)},
    "convolution": {"cpu": ("convolution:convolution",), "cuda": ("convolution:convolution",)},
    "batch_norm": {"cpu": ("batch_norm:batch_norm",), "cuda": ("batch_norm:batch_norm",)},
    "batch_norm_fixed": {"cpu": ("batch_norm:batch_norm_fixed",), "cuda": ("batch_norm:batch_norm_fixed",)},
    "batch_norm_convolution": {
        "cpu": ("batch_norm:batch_norm_convolution",),
        "cuda": ("batch_norm:batch_norm_convolution",),
    },
    "gated_sum": {"cpu": ("gated_sum:gated_sum",), "cuda": ("gated_sum:gated_sum",)},
    "batch_norm_gated_sum": {
        "cpu": ("gated_sum:batch_norm_gated_sum",),
        "cuda": ("gated_sum:batch_norm_gated_sum",),
    },
    "bounded_normal": {
        "cpu": ("cpu.latents:bounded_normal", "latents:bounded_normal"),
        "cuda": ("latents:bounded_normal",),
    },
    "log_sigma_normal": {"cpu": ("latents:log_sigma_normal",), "cuda": ("latents:log_sigma_normal",)},
    "score_terms": {"cpu": ("cpu.latents:score_terms", "latents:score_terms"), "cuda": ("latents:score_terms",)},
    "mixture_log_prob": {"cpu": ("mixture:log_prob", "compiled"), "cuda": ("mixture:log_prob", "compiled")},
    "bottleneck": {"cpu": ("cpu.bottleneck:computed",)},
    "depthwise": {"cuda": ("triton.depthwise:forward",)},
    "depthwise_input_gradient": {
        "cpu": ("depthwise:turned_forward",),
        "cuda": ("triton.depthwise:input_gradient", "depthwise:turned_forward"),
    },
    "depthwise_weight_gradient": {"cpu": ("depthwise:summed_taps",), "cuda": ("triton.depthwise:weight_gradient",)},
}
"""Operation -> type of device -> its implementations, `module:function` in nvae/kernels, in the order of asking."""

COMPILED = "compiled"
"""In the table: the plain function itself, compiled into one pass where nobody takes gradients."""

_mode: Mode = "auto"
_operations: dict[str, "Operation[..., Any]"] = {}


def use(mode: Mode) -> None:
    """Lets this process compute with the implementations of the table, or plainly."""
    global _mode
    _mode = mode


@contextmanager
def using(mode: Mode) -> Iterator[None]:
    """As `use`, within."""
    before = _mode
    use(mode)
    try:
        yield
    finally:
        use(before)


def is_plain() -> bool:
    """Whether this process computes plainly."""
    return _mode == "plain"


def memory_format() -> torch.memory_format:
    """The order in memory that images are brought into: channels-last, plainly PyTorch's own."""
    return torch.contiguous_format if is_plain() else torch.channels_last


class Operation(Generic[P, R]):
    """A plain function of tensors and its implementations in `TABLE`; the first argument's device and type decide."""

    def __init__(self, plain: Callable[P, R], examples: Examples, differentiable: bool = True) -> None:
        update_wrapper(self, plain)
        self.name, self.plain, self.examples, self.differentiable = plain.__name__, plain, examples, differentiable
        self._trusted: dict[tuple[str, torch.dtype], tuple[Implementation, ...]] = {}
        self._in_one_pass: Implementation | None = None
        _operations[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The operation's result."""
        for implementation in self._faster(args[0]):
            result: R = implementation(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.plain(*args, **kwargs)

    def _faster(self, x: object) -> tuple[Implementation, ...]:
        """Those to ask, for a first argument."""
        if _mode == "plain":
            return ()
        x = _first_tensor(x)
        key = (x.device.type, computing_type(x))
        if key in self._trusted:
            return self._trusted[key]
        if torch.compiler.is_compiling() or watched(x):  # nothing can be compared here
            return tuple(map(self.implementation, TABLE[self.name].get(key[0], ())))
        self._trusted[key] = self._judged(x.device, key[1])
        return self._trusted[key]

    def _judged(self, device: torch.device, dtype: torch.dtype) -> tuple[Implementation, ...]:
        """The implementations for a device that agree with the plain function there."""
        names = TABLE[self.name].get(device.type, ())
        return tuple(self.implementation(name) for name in names if self._is_sound(name, device, dtype))

    def implementation(self, name: str) -> Implementation:
        """The one that an entry of the table names."""
        if name != COMPILED:
            return load(name)
        if self._in_one_pass is None:
            self._in_one_pass = load("fusion:in_one_pass")(self.plain)
        return self._in_one_pass

    def _is_sound(self, implementation: str, device: torch.device, dtype: torch.dtype) -> bool:
        def judge() -> str:
            return self._difference(implementation, device, dtype) or SOUND

        return verdict(f"{self.name} ({implementation})", device, dtype, judge) == SOUND

    def problem_of(self, implementation: str, device: torch.device, dtype: torch.dtype) -> str:
        """What is wrong with an implementation, in one line, or nothing."""
        try:
            return self._difference(implementation, device, dtype)
        except Exception as error:
            return in_a_line(error)

    def _difference(self, implementation: str, device: torch.device, dtype: torch.dtype) -> str:
        examples = self.examples(device, dtype)
        return difference(self._plainly, self.implementation(implementation), examples, dtype, self.differentiable)

    def _plainly(self, *args: Any) -> Any:
        with using("plain"):
            return cast(Callable[..., Any], self.plain)(*args)


def operation(examples: Examples, *, differentiable: bool = True) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Makes an operation of a plain function; `examples` yields small arguments on a device, in a type.

    `differentiable`: whether anybody takes gradients of it.
    """

    def decorate(plain: Callable[P, R]) -> Operation[P, R]:
        return Operation(plain, examples, differentiable)

    return decorate


def _first_tensor(x: object) -> Tensor:
    while isinstance(x, tuple):
        x = x[0]
    assert isinstance(x, Tensor)
    return x


def computing_type(x: Tensor) -> torch.dtype:
    """The type that products of a tensor are computed in: its own, or autocast's."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def operations() -> tuple["Operation[..., Any]", ...]:
    """All there are."""
    return tuple(_operations.values())


def settle(device: torch.device, dtypes: Iterable[torch.dtype]) -> None:
    """Judges all implementations for a device now, and lets all ranks use the same ones."""
    if is_plain():
        return
    for operation in operations():
        names = TABLE[operation.name].get(device.type, ())
        for dtype in dtypes:
            sound = [name for name in names if operation._is_sound(name, device, dtype)]
            of_all = gather_objects(sound)
            everywhere = [name for name in sound if all(name in theirs for theirs in of_all)]
            operation._trusted[device.type, dtype] = tuple(map(operation.implementation, everywhere))


_loaded: dict[str, Implementation] = {}


def load(implementation: str) -> Implementation:
    """The function that an entry of the table names."""
    if implementation not in _loaded:
        module, _, function = implementation.partition(":")
        _loaded[implementation] = getattr(import_module(f"{__package__}.{module}"), function)
    return _loaded[implementation]


def load_all(device_type: str) -> None:
    """Loads what the table names for a type of device, so that compilers find it loaded."""
    for known in operations():
        for name in TABLE[known.name].get(device_type, ()):
            known.implementation(name)
