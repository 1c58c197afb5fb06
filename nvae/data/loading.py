"""Batches for training and evaluation: any position, any number of ranks and workers, the same images.

Shapes: B images of a batch, C channels, H W pixels with padding.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.devices import sent
from ..core.randomness import derived_seed, keyed_uniform
from .codes import StoredCodes
from .config import DataConfig
from .fetching import Request, fetched
from .images import Images, InMemory


@dataclass
class Batch:
    images: Tensor
    """(B, C, H, W) float32 in [0, 1] on the device: flipped, binarised and padded."""
    indices: list[int]
    """Training: the number of each draw among all ever drawn, over ranks and epochs. Evaluation: place in the split."""
    labels: Tensor
    """(B,) int64 classes on the device, −1 where unknown."""
    codes: Tensor | None = None
    """(B, S) int64 on the device: the codes of the images, where a store keeps them (`codes.py`)."""


class TrainingStream:
    """The endless sequence of training images: epoch after epoch, each a permutation keyed on (seed, epoch) alone.

    The number of an image in the sequence decides its flip, its crop and its binarisation, so that nothing depends on
    ranks, workers, batches, or on where a run was resumed.
    """

    def __init__(
        self,
        images: Images,
        config: DataConfig,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        codes: StoredCodes | None = None,
    ) -> None:
        """`codes`: those of the images, for batches to have."""
        self.images, self.codes = images, codes
        self.config = config
        self.seed = seed
        self.device = device
        self.rank = rank
        self.world = world
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def epoch_size(self) -> int:
        """Images in an epoch."""
        return len(self.images)

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """This rank's micro-batches from the moment that all ranks together have seen `start` images, without end.

        Micro-batch a of rank r holds draws start + (a·world + r)·batch and the batch − 1 after it. To be closed:
        loader processes end with it.
        """
        config, requests = self.config, self._requests(start)
        for pixels, request in _fetched(self.images, requests, config, config.batch, self.device):
            mirrored = _mirrored(request.indices, self.seed) if config.flip else []
            batch = _finished(_flipped(pixels, mirrored), request, self.images, config, self.seed, "binarize")
            if self.codes is not None:
                batch.codes = self.codes.read(request.positions, mirrored).to(self.device)
            yield batch

    def position(self, draw: int) -> int:
        """Place in the split of draw number `draw`."""
        epoch, place = divmod(draw, self.epoch_size)
        if epoch != self._epoch:
            # RandomState's numbers are frozen: the order is the same in every version of numpy.
            random = np.random.RandomState(derived_seed(self.seed, "order", epoch) % 2**32)
            self._epoch, self._order = epoch, random.permutation(self.epoch_size)
        return int(self._order[place])

    def _requests(self, start: int) -> Iterator[Request]:
        batch = self.config.batch
        for first in count(start + self.rank * batch, self.world * batch):
            indices = list(range(first, first + batch))
            crops = None
            if self.images.movable:
                crops = keyed_uniform((batch, 2), indices, self.seed, "crop", "cpu").tolist()
            yield Request([self.position(draw) for draw in indices], indices, crops)


def evaluation_batches(
    images: Images,
    config: DataConfig,
    *,
    batch: int,
    device: torch.device,
    seed: int,
    rank: int = 0,
    world: int = 1,
    draw: int = 0,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of the images from `start` up to `stop`, in order; over all ranks every image exactly once.

    Shares are contiguous and differ by at most one image. Nothing is flipped; a binarised image is the same every
    time, and another one for another `draw`.
    """
    stop = len(images) if stop is None else min(stop, len(images))
    first, last = (start + share * (stop - start) // world for share in (rank, rank + 1))
    places = (list(range(i, min(i + batch, last))) for i in range(first, last, batch))
    yield from batches_at(images, config, places, largest=batch, device=device, seed=seed, draw=draw)


def batches_at(
    images: Images,
    config: DataConfig,
    places: Iterable[list[int]],
    *,
    largest: int,
    device: torch.device,
    seed: int,
    draw: int = 0,
) -> Generator[Batch, None, None]:
    """The images at each list of up to `largest` places, as `evaluation_batches` has them. To be closed."""
    requests = (Request(positions=chosen, indices=chosen) for chosen in places)
    for pixels, request in _fetched(images, requests, config, largest, device):
        yield _finished(pixels, request, images, config, seed, f"evaluation/{draw}")


def _fetched(
    images: Images, requests: Iterable[Request], config: DataConfig, largest: int, device: torch.device
) -> Iterator[tuple[Tensor, Request]]:
    """The pixels (B, C, H, W) uint8 of each request, on the device: indexed there, or read by loader processes."""
    if isinstance(images, InMemory):
        resident = InMemory(images.pixels.to(device), images.levels)
        return ((resident.read(request.positions), request) for request in requests)
    return fetched(images, requests, largest=largest, workers=config.workers, device=device)


def _mirrored(indices: list[int], seed: int) -> list[int]:
    """Rows of the images that are mirrored: half of them, chosen by (seed, index)."""
    coins = keyed_uniform((len(indices),), indices, seed, "flip", "cpu")
    rows: list[int] = (coins < 0.5).nonzero().squeeze(1).tolist()
    return rows


def _flipped(pixels: Tensor, mirrored: list[int]) -> Tensor:
    """The images (B, C, H, W), rows of them mirrored from left to right in place."""
    if not mirrored:
        return pixels
    if pixels.device.type == "cpu":  # one by one in the order of their memory: a tenth of the time
        for row in mirrored:
            pixels[row] = pixels[row].flip(2)
        return pixels
    rows = sent(torch.tensor(mirrored, dtype=torch.int64), pixels.device)
    return pixels.index_copy_(0, rows, pixels.index_select(0, rows).flip(3))


def _finished(pixels: Tensor, request: Request, images: Images, config: DataConfig, seed: int, stream: str) -> Batch:
    """Grey values in [0, 1] of the uint8 pixels (B, C, H, W) of a request, binarised and padded as configured."""
    indices = request.indices
    # Divided by a tensor: a division by a number becomes a product on a GPU, and differs in the last bit.
    grey = pixels.to(torch.float32).div_(torch.full((), float(images.levels), device=pixels.device))
    if config.binarize:
        grey = (keyed_uniform(grey.shape, indices, seed, stream, grey.device) < grey).to(torch.float32)
    labels = sent(images.labels[request.positions], grey.device)
    return Batch(F.pad(grey, (config.padding,) * 4) if config.padding else grey, indices, labels)
