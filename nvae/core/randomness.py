"""Random numbers as a function of what they are for: (seed, stream, image index), never of a generator's history.

A draw does not depend on the batch size, the number of ranks, or on what was drawn before: that is what makes exact
resume, two processes equal to one, and repeatable samples possible.

Shapes: B images, then the shape of one image's draw.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .devices import sent


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as (seed, "noise", image index): BLAKE2b of its text."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator that starts at the key's own seed."""
    return torch.Generator(device).manual_seed(derived_seed(*key))


def reseed(device: torch.device, *key: int | str) -> None:
    """Starts the global generators of the host and of a device at the key's own seed."""
    seed = derived_seed(*key)
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would look for accelerators, each time anew
    else:
        torch.manual_seed(seed)


def keyed_normal(
    shapes: Sequence[Sequence[int]], indices: Sequence[int], seed: int, stream: str, device: torch.device | str
) -> list[Tensor]:
    """Standard-normal tensors of `shapes` (each (B, …)), image b drawn from (seed, stream, indices[b]) alone."""
    sizes = [math.prod(shape[1:]) for shape in shapes]
    rows = torch.empty(len(indices), sum(sizes), device=device)
    for row, index in zip(rows, indices, strict=True):
        torch.randn(row.shape, generator=generator(device, seed, stream, index), out=row)
    parts = torch.split(rows, sizes, dim=1)
    return [part.reshape(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def keyed_uniform(
    shape: Sequence[int], indices: Sequence[int], seed: int, stream: str, device: torch.device | str
) -> Tensor:
    """Uniform [0, 1) numbers of `shape` (B, …), image b drawn from (seed, stream, indices[b]) alone.

    They are hashed, a whole batch at once, and therefore the same on every device: number e of image b is the e-th
    output of SplitMix64 (Steele et al. 2014) started at a hash of b's key, its top 24 bits.
    """
    batch = sent(torch.tensor(indices, dtype=torch.int64), device)
    elements = torch.arange(1, math.prod(shape[1:]) + 1, device=device)
    keys = _mixed(derived_seed(seed, stream) + (batch + 1) * _GOLDEN)
    bits = _mixed(keys[:, None] + elements * _GOLDEN) >> 40 & 0xFFFFFF
    return (bits.to(torch.float32) / 2**24).reshape(tuple(shape))


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants, as signed 64-bit integers
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of int64 `z` reaches every bit of the result."""
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * _SECOND
    return z ^ (z >> 31 & 0x1FFFFFFFF)
