"""Where images come from, and what is done to them before the model sees them (spec §8)."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ..config import Config


class DataConfig(Config):
    name: Literal[
        "digits",
        "mnist",
        "omniglot",
        "stacked_mnist",
        "cifar10",
        "imagenet_32",
        "imagenet_64",
        "celeba_64",
        "celeba_hq_256",
        "ffhq_256",
        "lsun_bedroom",
        "lsun_church",
        "lsun_tower",
        "images",
    ] = "images"
    """The data set; `images` is any folder, zip, array or LMDB of images of your own."""
    path: Path | None = None
    """Where the set is, or is to be downloaded to; none: `data/<name>`."""
    size: int = Field(32, ge=1)
    """Height and width of an image in pixels, before padding."""
    channels: Literal[1, 3] = 3
    """1 for grey or binary images, 3 for RGB."""
    padding: int = Field(0, ge=0)
    """Pixels of zeros added at each side; the likelihood does not count them (`model.likelihood.border`)."""
    binarize: bool = False
    """Draw each pixel from a Bernoulli of its grey value: anew each time in training, always the same in evaluation."""
    flip: bool = False
    """Mirror half of the training images from left to right."""
    batch: int = Field(32, ge=1)
    """Images per process and forward pass."""
    global_batch: int | None = Field(None, ge=1)
    """Images per update over all processes; more than batch × processes are accumulated. None: batch × processes."""
    workers: int = Field(4, ge=0)
    """Loader processes, for sets that do not fit `memory`."""
    memory: int = Field(2048, ge=0)
    """Sets up to this size (MiB, decoded as uint8) are kept in memory, on the GPU where there is one."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Fraction of a set without splits of its own that is kept for testing, drawn with a fixed seed."""

    @model_validator(mode="after")
    def _possible(self) -> "DataConfig":
        if self.binarize and self.channels != 1:
            raise ValueError("binarize: only one-channel images can be binarised, channels is 3")
        if self.global_batch is not None and self.global_batch % self.batch:
            raise ValueError(f"global_batch: {self.global_batch} is not a multiple of batch ({self.batch})")
        return self
