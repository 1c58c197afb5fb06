"""Makes the codes of a prepared store: image by image through the encoder of a first stage, file by file, resumable.

Shapes: B images at once, C channels, H W pixels with padding; n images of a file, V variants of each and S codes of a
variant as in `codes.py`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..core.errors import UserError
from .codes import (
    CODES,
    MOST,
    CodeIndex,
    CodeShard,
    CodeShardFile,
    Coding,
    code_file,
    has_codes,
    read_code_index,
    write_code_index,
    write_code_shard,
)
from .config import DataConfig
from .loading import evaluation_batches
from .preparation import told
from .sets import open_images
from .splits import Split
from .store import Index, Shard, checksum, read_index


@dataclass(frozen=True)
class Coder:
    """A first stage at work."""

    coding: Coding
    encode: Callable[[Tensor], list[Tensor]]
    """The codes (B, h, w) of each level, top-down, of images (B, C, H, W) in [0, 1]."""
    device: torch.device


def make_codes(config: DataConfig, coder: Coder, *, progress: bool = True) -> CodeIndex:
    """Makes the codes of every split of the store that the config names, and returns their index.

    Codes that are there and were made by the same first stage of the same images are left as they are; unfinished ones
    are continued. Raises UserError: a set whose images change at every draw, codes of another first stage, a full disk.
    """
    store, coding = config.source, coder.coding
    index = read_index(store)
    _require_one_code(config, index, coding)
    made_of = {split: [shard.checksum for shard in part.shards] for split, part in index.splits.items()}
    if has_codes(store):
        found = read_code_index(store)
        made = {split: [shard.of for shard in shards] for split, shards in found.splits.items()}
        if (found.coding.model_copy(update={"made_by": coding.made_by}), made) != (coding, made_of):
            raise UserError(
                f"{store}: keeps the codes of {found.coding.made_by} ({found.coding.first_stage}); asked are those of "
                f"{coding.made_by} ({coding.first_stage}), or of other images, or with other flips: remove {CODES}"
            )
        return found
    total = sum(part.images for part in index.splits.values())
    with tqdm(total=total, desc="codes", unit="image", disable=not progress) as bar:
        splits = {split: _make_split(config, split, part.shards, coder, bar) for split, part in index.splits.items()}
    found = CodeIndex(coding=coding, name=index.settings.name, splits=splits)
    with told(store / CODES):
        write_code_index(store, found)
    return found


def _require_one_code(config: DataConfig, index: Index, coding: Coding) -> None:
    """Raises UserError where an image has no code that could be kept."""
    if config.binarize:
        raise UserError("binarize: a binarised image is drawn anew each time, and has other codes then; train without")
    if index.settings.crop == "random":
        raise UserError("crop: random shows another square in each epoch, codes would be of one; prepare with centre")
    if coding.codes > MOST:
        raise UserError(f"--codes: {coding.made_by} has {coding.codes} codes a level, stores keep up to {MOST}")


def _make_split(
    config: DataConfig, split: Split, shards: tuple[Shard, ...], coder: Coder, bar: "tqdm[Any]"
) -> tuple[CodeShard, ...]:
    """The files of a split, those that an earlier run finished first."""
    keys = [_key(coder.coding, shard) for shard in shards]
    paths = [config.source / code_file(shard.file) for shard in shards]
    done = 0
    while done < len(shards) and _is_written(paths[done], keys[done]):
        bar.update(shards[done].images)
        done += 1
    if done < len(shards):
        rows = _rows(config, split, sum(shard.images for shard in shards[:done]), coder)
        for shard, path, key in list(zip(shards, paths, keys, strict=True))[done:]:
            codes = np.stack([next(rows) for _ in range(shard.images)])
            with told(path):
                write_code_shard(path, codes, key)
            bar.update(shard.images)
    return tuple(
        CodeShard(file=path.name, images=shard.images, checksum=checksum(path), of=shard.checksum)
        for shard, path in zip(shards, paths, strict=True)
    )


def _key(coding: Coding, shard: Shard) -> str:
    """Tells what a file is made of, and by."""
    made = json.dumps([coding.model_dump(exclude={"made_by"}), shard.checksum])
    return hashlib.blake2b(made.encode(), digest_size=16).hexdigest()


def _is_written(path: Path, key: str) -> bool:
    try:
        return CodeShardFile(path).key == key
    except UserError:
        return False


@torch.no_grad()
def _rows(config: DataConfig, split: Split, start: int, coder: Coder) -> Iterator[np.ndarray]:
    """The codes (V, S) uint16 of each image from `start` on."""
    images = open_images(config, split)
    for batch in evaluation_batches(
        images, config, batch=config.batch, device=coder.device, seed=0, start=start, stop=len(images)
    ):
        seen = [batch.images, batch.images.flip(3)] if coder.coding.mirrored else [batch.images]
        maps = [torch.cat([map_.flatten(1) for map_ in coder.encode(image)], dim=1) for image in seen]
        yield from torch.stack(maps, dim=1).cpu().numpy().astype(np.uint16)
