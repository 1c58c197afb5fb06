"""Images other than those that a config names: what they are, and which of them are test images."""

from pathlib import Path

from ..core.errors import UserError
from .config import DataConfig
from .images import fingerprint
from .named import counts_agree, find
from .sets import open_unread, readable
from .store import is_store, read_index


def images_at(path: Path, config: DataConfig) -> DataConfig:
    """The config of a trained model's data with the images at `path` in place of its own. Nothing is downloaded.

    They are the config's set where they lie as it is given out, or were prepared from that; else they are `images`,
    and without splits of their own all of them are test images. Raises UserError.
    """
    if not path.expanduser().exists():
        raise UserError(f"--data: {path} does not exist")
    moved = config.model_copy(update={"path": path})
    with readable(path):
        if moved.source.resolve() == config.source.resolve():
            return config
        if is_store(moved.source):
            return _store_at(path, config)
        if config.name != "images" and _is_the_set(moved):
            return moved
        foreign = _foreign(path, config)
        return foreign.model_copy(update={"holdout": 1.0}) if "holdout" in find(foreign).uses else foreign


def _store_at(path: Path, config: DataConfig) -> DataConfig:
    """The config for a prepared store, which knows itself what its images are."""
    index = read_index(path.expanduser())
    update: dict[str, object] = {"enlarge": False}
    if index.settings.name == config.name:
        update["name"] = config.name
    if index.all_held_out():
        update["holdout"] = 1.0
    return _foreign(path, config).model_copy(update=update)


def holds_training_images(config: DataConfig, trained_on: str | None, holdout: float) -> bool:
    """True where all images at a path are measured, and a run was trained on most of them.

    `trained_on` is the fingerprint of the run's training images, `holdout` what it kept for testing.
    """
    if config.holdout < 1 or trained_on is None:
        return False
    try:
        images = open_unread(config.model_copy(update={"holdout": holdout}), "train")
        return fingerprint(images, len(images)) == trained_on
    except UserError:
        return False


def _foreign(path: Path, config: DataConfig) -> DataConfig:
    """A config for other images: of the model's size and channels, loaded as its own are."""
    kept = ("size", "channels", "enlarge", "padding", "binarize", "batch", "global_batch", "workers", "memory")
    return DataConfig(name="images").model_copy(update={"path": path, **{name: getattr(config, name) for name in kept}})


def _is_the_set(config: DataConfig) -> bool:
    """True where the config's set lies at its path: as it is given out, or in a conversion that has all images."""
    try:
        found = find(config, fetch=False)
        if not found.is_named or "path" not in found.uses:
            return False
        return not found.is_converted or counts_agree(config.name, found.counts())
    except UserError:
        return False
