"""Which images a run is trained on, kept in its folder: others in their place are noticed when it goes on."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..core.config import Config
from ..core.distributed import from_rank_zero, rank
from ..core.errors import UserError
from ..data.images import Images, fingerprint

IMAGES = "images.json"


class Content(Config):
    """A split, as told apart from others."""

    images: int
    fingerprint: str
    """As `data.images.fingerprint` gives it."""


def content_of(images: Mapping[str, Images]) -> dict[str, Content]:
    """The content of splits, as the first rank reads them. Raises BadImagesError."""
    found = {}
    if rank() == 0:
        found = {
            split: Content(images=len(those), fingerprint=fingerprint(those, len(those)))
            for split, those in images.items()
        }
    return dict(from_rank_zero(found))


def content_in(folder: Path) -> dict[str, Content]:
    """What a run's folder says of its images; nothing in those of earlier versions. Raises UserError where damaged."""
    path = folder / IMAGES
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {str(split): Content.model_validate(content) for split, content in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); remove it") from error


def trained_content(folder: Path) -> str | None:
    """The fingerprint of the images that the run in a folder is trained on; None where it does not say."""
    train = content_in(folder).get("train")
    return None if train is None else train.fingerprint


def text_of(content: Mapping[str, Content]) -> str:
    """The text of the file."""
    return json.dumps({split: part.model_dump() for split, part in content.items()}, indent=1) + "\n"


def changed_images(before: Mapping[str, Content], now: Mapping[str, Content], *, allowed: bool) -> list[str]:
    """A line for each split whose images are others than before.

    Raises UserError where these are training images, unless that is `allowed`: each is seen once an epoch, in an order
    that follows from their number.
    """
    lines = []
    for split in [split for split in now if split in before and before[split] != now[split]]:
        count = f"{before[split].images} → {now[split].images}"
        lines.append(f"{split} images: {count if before[split].images != now[split].images else 'others'}")
        if split == "train" and not allowed:
            raise UserError(
                f"data: the run was trained on other images ({lines[-1]}); restore them, choose another name=, or pass "
                "allow_changes=true"
            )
    return lines
