"""What lies at a path: the splits of a set, and the fields of its config that had a say in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..core.errors import UserError
from .config import LOADING, DataConfig
from .sources import Source
from .splits import Split, choose

Opener = Callable[[], Source]

SHAPED = frozenset({"name", "path", "size", "channels", "crop", "enlarge"})
"""Fields that decide what becomes of images of any size."""
FIXED = frozenset({"name", "path", "size", "channels"})
"""Those for a set of one size, which is read at no other."""


@dataclass(frozen=True)
class Found:
    """A set where it lies."""

    path: Path
    splits: Mapping[Split, Opener]
    """Those that the set has itself."""
    uses: frozenset[str]
    """Fields of DataConfig that decide which images these are and what they become; of the others, those that say how
    images are loaded have their effect later, and the rest has none."""
    layout: str
    """What it is, for messages: "a folder with splits of its own"."""
    is_named: bool = False
    """True where it was read as the set that the config names, not as images of anyone's."""
    is_converted: bool = False
    """True where that is someone's conversion, which may be any images."""
    unread: tuple[str, ...] = ()
    """Names of files beside the splits that may hold images, and are not read."""

    def counts(self) -> dict[Split, Callable[[], int]]:
        """How many images each split has, counted when asked."""
        return {split: partial(lambda part: len(self.of(part)), split) for split in self.splits}

    def of(self, split: Split) -> Source:
        """The images of a split, or of that which stands in for it. Raises UserError where there is neither."""
        return choose(self.splits, split, self.path)()


def require_effect(config: DataConfig, uses: frozenset[str], layout: str) -> None:
    """Raises UserError naming the first field that was given and that the images do not depend on."""
    for field in config.given():
        if field not in uses | LOADING:
            raise UserError(
                f"data.{field}: has no effect on {layout}; leave it out (found {field}={getattr(config, field)})"
            )


def without_idle_fields(config: DataConfig, uses: frozenset[str]) -> DataConfig:
    """The config with the fields that have no effect as if they had not been given."""
    idle = [field for field in config.given() if field not in uses | LOADING]
    return config.model_copy(update={field: getattr(config.usual(), field) for field in idle})
