"""Integers that two machines agree on, of numbers that they compute almost alike.

What a network gives in float64 differs from machine to machine in its last bits, and a coder needs distributions that
are the same to the last one. So everything is rounded to integers first. Two machines can only disagree on a number
that lies between two integers almost exactly; of those the writer notes, beside its bits, which of the two it took.

Shapes: B images, one of each chain; N numbers of each.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..core.errors import UserError

MARGIN = 2.0**-20
"""How near to the middle of two integers a number is noted: far more than float64 networks differ (some 1e-11 where
integers are hundredths of a standard deviation), and seldom met by chance (one in 500 000)."""

Corrections = Mapping[int, bool]
"""Of an image: whether the integer is odd, by the places of its numbers near a middle."""


class Rounding:
    """Rounds the numbers of a batch, each at a place of its own, and notes or follows corrections."""

    def __init__(self, images: int, known: Sequence[Corrections] | None = None) -> None:
        """`known`: what the writer noted of each image; None writes."""
        self.known = known
        self.noted: list[dict[int, bool]] = [{} for _ in range(images)]

    def __call__(self, numbers: Tensor, place: int) -> np.ndarray:
        """(B, …) -> (B, N) int64. `place` is that of each image's first number.

        Raises UserError for numbers that are not finite.
        """
        values = numbers.detach().reshape(len(numbers), -1).cpu().double().numpy()
        if not np.isfinite(values).all():
            raise UserError("the model gives numbers that are not finite for these images; they cannot be compressed")
        below = np.floor(values)
        integers: np.ndarray = below.astype(np.int64) + (values - below >= 0.5)
        if self.known is None:
            self._note(integers, np.abs(values - below - 0.5) < MARGIN, place)
        else:
            self._follow(integers, below, place)
        return integers

    def _note(self, integers: np.ndarray, is_near: np.ndarray, place: int) -> None:
        for image, number in zip(*np.nonzero(is_near), strict=True):
            self.noted[image][place + int(number)] = bool(integers[image, number] & 1)

    def _follow(self, integers: np.ndarray, below: np.ndarray, place: int) -> None:
        assert self.known is not None
        for image, corrections in enumerate(self.known):
            for noted, is_odd in corrections.items():
                if 0 <= (number := noted - place) < integers.shape[1]:
                    lower = int(below[image, number])
                    integers[image, number] = lower + (lower % 2 != is_odd)
