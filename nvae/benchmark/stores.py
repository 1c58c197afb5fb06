"""A prepared store to measure loading with: made pictures that compress about as photographs do."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..data.config import DataConfig
from ..data.preparation import prepare


def made_store(folder: Path, count: int = 96, size: int = 256) -> Path:
    """Prepares `count` pictures of size × size: smooth fields with detail on every scale."""
    draws, source, store = np.random.default_rng(0), folder / "pictures", folder / "store"
    source.mkdir()
    for number in range(count):
        picture = np.zeros((size, size, 3))
        for cells in (4, 16, 64, 256):
            field = Image.fromarray(draws.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            picture += np.asarray(field.resize((size, size), Image.Resampling.BICUBIC), dtype=float) / cells**0.5
        picture *= 255 / picture.max()
        Image.fromarray(picture.astype(np.uint8)).save(source / f"{number:03d}.png")
    prepare(DataConfig(path=source, size=size), store, progress=False)
    return store
