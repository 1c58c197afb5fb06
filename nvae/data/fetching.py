"""Images read ahead of time by loader processes, into memory that is shared and used again.

Batches that travelled in memory of their own would cost a page fault for every 4 KiB on either side, a tenth of what
decoding them costs.

Shapes: B images of a request, C channels, H W pixels.
"""

import atexit
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.devices import sent
from ..core.errors import UserError
from .images import Crop, Images
from .processes import process_context

PREFETCH = 2
"""Requests that a loader process has before it."""


@dataclass
class Request:
    """Which images a batch takes, where they are cut, and the numbers their random choices are keyed on."""

    positions: list[int]
    indices: list[int]
    crops: list[Crop] | None = None
    slot: int = 0
    """Which part of the shared memory the answer is written to."""


def fetched(
    images: Images, requests: Iterable[Request], *, largest: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Request]]:
    """The pixels (B, C, H, W) uint8 of each request, on the device, in order; B is at most `largest`.

    They may be written to, and on the CPU hold until the next are asked for. Raises UserError: images that can't be
    read, too little memory for loader processes.
    """
    answers = _from_processes(images, requests, largest, workers) if workers else _from_here(images, requests)
    for pixels, request in answers:
        yield sent(pixels, device), request


def _from_here(images: Images, requests: Iterable[Request]) -> Iterator[tuple[Tensor, Request]]:
    for request in requests:
        yield images.read(request.positions, request.crops), request


def _from_processes(
    images: Images, requests: Iterable[Request], largest: int, workers: int
) -> Iterator[tuple[Tensor, Request]]:
    # All that may be under way, the batch in use and the one that is asked for before that is given back.
    slots = _shared_memory(PREFETCH * workers + 2, largest, images.shape)
    leaving = _shared_memory(1, 1, (1, 1, 1))
    leave = partial(leaving.fill_, 1)
    atexit.register(leave)
    loader = DataLoader(
        _Reader(images, slots),
        sampler=(replace(request, slot=i % len(slots)) for i, request in zip(count(), requests, strict=False)),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        worker_init_fn=partial(_leave_with_the_reader, leaving),
        multiprocessing_context=process_context(),
        generator=torch.Generator(),  # its own: the global one must not depend on how often a loader starts
    )
    try:
        for problem, request in loader:
            if problem:
                raise UserError(problem)
            yield slots[request.slot, : len(request.positions)].permute(0, 3, 1, 2), request
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise UserError("data.workers: a loader process was killed, by a lack of memory perhaps; lower it") from error
    finally:
        atexit.unregister(leave)
        leave()


def _leave_with_the_reader(leaving: Tensor, worker: int) -> None:
    """Lets a loader process outlive what terminals and schedulers send to all processes of a run.

    The process that reads still needs it until everything is saved. SIGTERM counts once that one is `leaving`.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if leaving.any() else None)


def _shared_memory(count: int, largest: int, shape: tuple[int, int, int]) -> Tensor:
    """`count` slots for batches, (count, B, H, W, C) uint8, of images of a shape (C, H, W)."""
    channels, height, width = shape
    try:
        slots = torch.zeros((count, largest, height, width, channels), dtype=torch.uint8)
        return cast(Tensor, cast(Any, slots).share_memory_())
    except RuntimeError as error:
        raise UserError(
            f"data.workers: no room in shared memory for {count} batches ({error}); lower data.workers, or give more "
            "(/dev/shm; docker run --shm-size)"
        ) from error


class _Reader(Dataset[tuple[str, Request]]):
    """Answers requests in a loader process. A UserError travels as its text: a raised one would bring a traceback."""

    def __init__(self, images: Images, slots: Tensor) -> None:
        self.images = images
        self.slots = slots

    def __getitem__(self, request: Request) -> tuple[str, Request]:
        try:
            slot = self.slots[request.slot, : len(request.positions)]
            self.images.read_into(slot, request.positions, request.crops)
        except UserError as error:
            return str(error), request
        return "", request
