"""What PyTorch's compiler calls things, from 2.6 on.

Importing the compiler takes a second or two, so this file is imported by the functions that compile, when they do.
"""

from typing import Any

from torch._dynamo import config, exc
from torch._functorch import config as gradients
from torch.fx.experimental import _config as shapes

RECOMPILE_LIMIT = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
"""How many kinds of calls one function may be compiled for."""
FAIL_AT_LIMIT = (
    "fail_on_recompile_limit_hit" if hasattr(config, "fail_on_recompile_limit_hit") else "fail_on_cache_limit_hit"
)
"""Whether one more is an error."""
LIMIT_HIT: tuple[type[Exception], ...] = tuple(
    getattr(exc, name)
    for name in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit", "RecompileLimitExceeded")
    if hasattr(exc, name)
)
"""Those errors; 2.6 raises the last one where the whole function must be one graph."""


def allow_kinds(kinds: int) -> None:
    """From now on every function may be compiled for so many kinds of calls; one more is an error."""
    setattr(config, RECOMPILE_LIMIT, kinds)
    setattr(config, FAIL_AT_LIMIT, True)


def differentiate_as_uncompiled() -> None:
    """From now on compiled backward passes keep what uncompiled ones keep, and compute in the types that they do.

    The compiler would merge equal expressions of both passes, and keep x − mean in float32 where a batch norm keeps x
    in half of its bytes; and it would run backward passes under the forward pass's autocast, gates in half precision.
    """
    gradients.cse = False
    if hasattr(gradients, "backward_pass_autocast"):
        gradients.backward_pass_autocast = "off"


def compiling_for(kinds: int) -> Any:
    """A context in which a function may be compiled for so many kinds of calls."""
    return config.patch(RECOMPILE_LIMIT, kinds)


def sizes_apart() -> Any:
    """A context in which two sizes that happen to be equal are taken for two, not for one."""
    return shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]
