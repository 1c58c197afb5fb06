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


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as (seed, "noise", image index): BLAKE2b of its text."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator that starts at the key's own seed."""
    return torch.Generator(device).manual_seed(derived_seed(*key))


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
    """Uniform [0, 1) numbers of `shape` (B, …), image b drawn from (seed, stream, indices[b]) alone."""
    values = torch.empty(tuple(shape), device=device)
    for value, index in zip(values, indices, strict=True):
        torch.rand(value.shape, generator=generator(device, seed, stream, index), out=value)
    return values
