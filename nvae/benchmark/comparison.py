"""Every implementation in the table of operations: does it say on a device what the plain function says, how fast."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..kernels.operations import COMPILED, TABLE, Operation, operations, using
from .findings import Finding
from .timing import in_turns

ROUNDS = 5


def comparisons(device: torch.device, dtypes: list[torch.dtype]) -> Iterator[Finding]:
    """A finding for each implementation; times are of forward passes over the operation's examples, which are small."""
    for operation in operations():
        for name in TABLE[operation.name].get(device.type, ()):
            found = {str(dtype).removeprefix("torch."): _compared(operation, name, device, dtype) for dtype in dtypes}
            wrong = any(not figures["sound"] for figures in found.values())
            words = ", ".join(f"{dtype} {_words(figures)}" for dtype, figures in found.items())
            title = f"{operation.name} ({name})" if name != COMPILED else f"{operation.name} (torch.compile)"
            yield Finding(title, words, attention=wrong, figures=found)


def _compared(operation: Operation[..., Any], name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    wrong = operation.problem_of(name, device, dtype)
    if wrong:
        return {"sound": False, "problem": wrong}

    def plainly(*args: Any) -> Any:
        with using("plain"):
            return operation.plain(*args)

    examples = list(operation.examples(device, dtype))
    ways = {"fast": _over(operation.implementation(name), examples), "plain": _over(plainly, examples)}
    times = in_turns(ways, ROUNDS, device)
    ours, plain = (1e3 * times.median(way) for way in ("fast", "plain"))
    return {"sound": True, "milliseconds": ours, "plain_milliseconds": plain}


def _words(figures: dict[str, Any]) -> str:
    if not figures["sound"]:
        return str(figures["problem"])
    return f"right, {figures['milliseconds']:.2f} ms (plain {figures['plain_milliseconds']:.2f})"


def _over(function: Callable[..., Any], examples: list[tuple[Any, ...]]) -> Callable[[], None]:
    """The forward pass over all examples; those that an implementation leaves to others cost it nothing."""

    @torch.no_grad()
    def run() -> None:
        for example in examples:
            function(*example)

    return run
