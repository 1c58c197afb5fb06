"""Where images come from, and what is done to them before the model sees them (spec §8)."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..core.config import Config
from ..core.errors import UserError

SetName = Literal[
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
]

ARRAY_SETS: dict[str, tuple[int, Literal[1, 3]]] = {
    "digits": (8, 1),
    "mnist": (28, 1),
    "omniglot": (28, 1),
    "stacked_mnist": (28, 3),
    "cifar10": (32, 3),
    "imagenet_32": (32, 3),
    "imagenet_64": (64, 3),
}
"""Size and channels of the sets that come at one size, and are read at no other."""

USUAL: dict[str, dict[str, Any]] = {
    **{name: {"size": size, "channels": channels} for name, (size, channels) in ARRAY_SETS.items()},
    "celeba_64": {"size": 64},
    "celeba_hq_256": {"size": 256},
    "ffhq_256": {"size": 256},
    "lsun_bedroom": {"size": 128, "crop": "random"},
    "lsun_church": {"size": 64, "crop": "random"},
    "lsun_tower": {"size": 64, "crop": "random"},
}
"""What a set's name says of other fields, where they are not given."""

LOADING = frozenset({"padding", "binarize", "flip", "batch", "global_batch", "workers", "memory", "stored_codes"})
"""Fields of DataConfig that say how images are loaded, once they are read: they have their effect on any set. Each of
the others has one only where the set that is found says so (`Found.uses`)."""


class DataConfig(Config):
    name: SetName = "images"
    """The data set; `images` is any folder, zip, array or LMDB of images of your own."""
    path: Path | None = None
    """Where the set is, or is to be downloaded to; a prepared store works for every set. None: `data/<name>`."""
    size: int = Field(32, ge=1)
    """Height and width of an image in pixels, before padding. By default the named set's."""
    channels: Literal[1, 3] = 3
    """1 for grey or binary images, 3 for RGB. By default the named set's."""
    crop: Literal["centre", "random"] = "centre"
    """Which square of an oblong image is shown in training, once its shorter side is `size`; in evaluation always the
    centre. By default `random` for LSUN."""
    enlarge: bool = False
    """Accept images smaller than `size` and enlarge them. Enlarged images are easy to model: figures come out better
    than they are."""
    holdout: float = Field(0.1, gt=0, le=1)
    """Fraction of a set without splits of its own that is kept for testing, chosen by a hash of the images' names; 1
    keeps them all, and none for training."""
    lists: Path | None = None
    """Folder of train.txt, validation.txt and test.txt that name the images of each split, one a line, relative to
    `path`. None: sub-folders of `path` called train, validation and test count, else such files in `path`."""
    padding: int = Field(0, ge=0)
    """Pixels of zeros added at each side; the likelihood does not count them (`model.likelihood.border`)."""
    binarize: bool = False
    """Draw each pixel from a Bernoulli of its grey value: anew each time in training, always the same in evaluation."""
    flip: bool = False
    """Mirror half of the training images from left to right."""
    stored_codes: bool = False
    """Train a prior of codes on those that the store at `path` keeps of its images (`prepare_data.py --codes`), instead
    of making them of each batch; the same numbers."""
    batch: int = Field(32, ge=1)
    """Images per process and forward pass."""
    global_batch: int | None = Field(None, ge=1)
    """Images per update over all processes; more than batch × processes are accumulated. None: batch × processes."""
    workers: int = Field(4, ge=0)
    """Loader processes, for sets that do not fit `memory`."""
    memory: int = Field(2048, ge=0)
    """Sets up to this size (MiB, decoded as uint8) are kept in memory, on the GPU where there is one."""

    @model_validator(mode="before")
    @classmethod
    def _usual_for_the_set(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**USUAL.get(str(given.get("name")), {}), **given}

    @model_validator(mode="after")
    def _possible(self) -> "DataConfig":
        size, channels = ARRAY_SETS.get(self.name, (self.size, self.channels))
        if (self.size, self.channels) != (size, channels):
            raise ValueError(
                f"{self.name} is {size}×{size} with {channels} channel{'s' * (channels > 1)}, "
                f"found size {self.size} and channels {self.channels} (padding is data.padding)"
            )
        if self.binarize and self.channels != 1:
            raise ValueError("binarize: only one-channel images can be binarised, channels is 3")
        if self.binarize and self.stored_codes:
            raise ValueError("stored_codes: a binarised image has other codes at every draw; make them of each batch")
        if self.global_batch is not None and self.global_batch % self.batch:
            raise ValueError(f"global_batch: {self.global_batch} is not a multiple of batch ({self.batch})")
        return self

    @property
    def source(self) -> Path:
        """`path`, or where a set is by default. Raises UserError where its ~ is nobody's."""
        try:
            return (self.path or Path("data") / self.name).expanduser()
        except RuntimeError as error:
            raise UserError(f"data.path: {self.path}: {error}") from error

    def usual(self) -> "DataConfig":
        """What a config of the set says if it gives the name alone."""
        return DataConfig(name=self.name)

    def given(self) -> list[str]:
        """The fields that say something else than a config of the set's name alone would, the name left out."""
        usual = self.usual()
        return [field for field in DataConfig.model_fields if getattr(self, field) != getattr(usual, field)]
