"""Runs a function in several gloo processes, as torchrun would."""

from collections.abc import Callable
from typing import Any

import torch
from processes import start_ranks

from nvae.core import distributed


def run_ranks(world: int, function: Callable[..., None], *args: Any) -> None:
    """`function(*args)` on every rank, to its end; it stands at the top of its module."""
    processes = start_ranks(world, _rank, function, args)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world


def _rank(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    distributed.start(torch.device("cpu"), timeout_minutes=1)
    function(*args)
    distributed.stop()
