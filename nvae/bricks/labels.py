"""Classes of images: a learned vector each, and labels that count as unknown now and then.

Shapes: B images, C channels. Labels are (B,) int64 classes, −1 where unknown.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UserError

UNKNOWN = -1


class ClassVectors(nn.Module):
    """A vector for each class, added to what a model computes: zero at first, and always for unknown classes."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, C, 1, 1)."""
        known = (labels != UNKNOWN)[:, None]
        return (F.embedding(labels.clamp(min=0), self.weight) * known)[:, :, None, None]


def require_labels(labels: Tensor, n: int, classes: int, *, values: bool = True) -> None:
    """Raises UserError for any but (n,) int64 classes below `classes`, or −1; `values`: whether these are looked at."""
    if labels.shape != (n,):
        raise UserError(f"labels: {n} images take ({n},), found {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise UserError(f"labels: classes are int64, found {labels.dtype}")
    wrong = labels[(labels < UNKNOWN) | (labels >= classes)] if values else labels[:0]
    if len(wrong):
        raise UserError(
            f"labels: found class {int(wrong[0])}, but model.classes is {classes}: allowed are 0 to {classes - 1}, and "
            f"{UNKNOWN} where unknown"
        )


def partly_unknown(labels: Tensor, noise: Tensor, share: float) -> Tensor:
    """Labels of which a `share` counts as unknown, as the images' own standard-normal noise (B, …) decides.

    It is the digits of an image's first number below 2⁻¹², to which no draw of a latent owes anything that shows.
    """
    place = torch.frac(2.0**12 * noise.flatten(1)[:, 0].abs())
    return labels.masked_fill(place < share, UNKNOWN)
