"""The first images of a run, as a family is given them before its first update."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nvae.models.base import FirstBatch, FirstImages, Noise


def first_images(x: Tensor, noise: Noise = ()) -> FirstImages:
    """One batch, of the whole set."""
    return FirstImages([FirstBatch(x, torch.full((len(x),), -1), lambda: noise)], epoch_size=len(x), seed=0)


def never_read() -> FirstImages:
    """Images that fail a test which reads them."""
    return FirstImages(_failing(), epoch_size=1, seed=0)


def _failing() -> Iterator[FirstBatch]:
    raise AssertionError("the images are not needed")
    yield
