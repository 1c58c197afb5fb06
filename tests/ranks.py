"""Runs a function in several gloo processes, as torchrun would."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

from nvae import distributed


def run_ranks(world: int, function: Callable[..., None], *args: Any) -> None:
    """`function(*args)` on every rank; it is imported afresh there, so it stands at the top of its module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (world, port, function, args), nprocs=world)


def _rank(rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    distributed.start("cpu", timeout_minutes=1)
    function(*args)
    distributed.stop()
