"""Processes that start in milliseconds: forked from a server that has imported everything and computed nothing."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import torch

PRELOADED = ["nvae.training.run", "sklearn.datasets", "torch.utils.tensorboard", "tiny_run"]


def start(function: Callable[..., Any], *args: Any, **environment: str) -> ForkServerProcess:
    """`function(*args)`, which stands at the top of its module, in a process of its own with one thread."""
    process = _context().Process(target=_child, args=(environment, function, args))
    process.start()
    return process


def start_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[ForkServerProcess]:
    """The function on every rank, with what torchrun puts into the environment."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(function, *args, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _child(environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    function(*args)
