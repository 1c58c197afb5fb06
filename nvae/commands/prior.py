"""sample.py: images from the prior, as an overview and single PNGs, or as one .npz."""

import copy
import io
import math
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.distributed import gather_objects, rank
from ..core.files import atomic_file
from ..models.base import Family
from ..sampling.images import Pixels, readjust_cached, sample_images, shares, temperature_of
from ..sampling.pictures import grid, save_png, to_bytes
from .subject import Subject

Format = Literal["png", "npz"]
MOST_COLUMNS = 10
READJUSTMENT = {"batches": 500, "batch": 16}


def write_all(subject: Subject, args: Namespace) -> Iterator[str]:
    """Samples at each temperature asked for on the command line; a line for each overview."""
    for temperature in args.temperature:
        path, speed = write_samples(
            subject,
            temperature,
            count=args.num or 64,
            seed=args.seed,
            columns=args.grid,
            batch=args.batch,
            pixels=args.pixels,
            readjust=args.readjust,
            form=args.format,
        )
        yield f"{path}  {speed:.1f} images/s"


def write_samples(
    subject: Subject,
    temperature: Sequence[float],
    *,
    count: int = 64,
    seed: int = 0,
    columns: int | None = None,
    batch: int = 16,
    pixels: Pixels = "mean",
    readjust: bool = False,
    form: Format = "png",
) -> tuple[Path, float]:
    """Samples at a temperature (one value, one per scale, or one per group), drawn by all ranks.

    Writes samples/<what>.png, an overview, and the images in a folder or an .npz of that name. Returns the overview's
    path and how many images a second were drawn.
    """
    model = model_at(subject, temperature, readjust=readjust, seed=seed)
    at = temperature_of(temperature, model)
    path = subject.folder / "samples" / f"{_name(temperature, seed, pixels, readjust)}.png"
    columns = columns or min(math.ceil(math.sqrt(count)), MOST_COLUMNS)
    kept: dict[int, Tensor] = {}
    started = time.perf_counter()
    for numbers in tqdm(list(shares(count, batch)), path.stem, unit="batch", disable=rank() != 0):
        with subject.autocast():
            images = to_bytes(sample_images(model, numbers, at, seed=seed, pixels=pixels))
        kept |= {n: image for n, image in zip(numbers, images, strict=True) if form == "npz" or n < columns**2}
        if form == "png":
            for number, image in zip(numbers, images, strict=True):
                save_png(path.with_suffix("") / f"{number:06d}.png", image)
    together = {number: image for part in gather_objects(kept) for number, image in part.items()}
    elapsed = time.perf_counter() - started
    if rank() == 0:
        images = torch.stack([together[number] for number in sorted(together)])
        save_png(path, grid(images[: columns**2], columns))
        if form == "npz":
            _save_npz(path.with_suffix(".npz"), images)
    return path, count / elapsed


def model_at(subject: Subject, temperature: Sequence[float], *, readjust: bool, seed: int) -> Family[Any]:
    """The subject's model for sampling at a temperature; if asked, a copy whose batch norms are re-adjusted to it."""
    if not readjust:
        return subject.model.for_inference()
    model = copy.deepcopy(subject.model)
    at = temperature_of(temperature, model)
    readjust_cached(model, at, subject.folder / "batch-norm", subject.fingerprint, seed=seed, **READJUSTMENT)
    return model.for_inference()


def _name(temperature: Sequence[float], seed: int, pixels: Pixels, readjust: bool) -> str:
    values = "-".join(f"{value:g}" for value in temperature)
    return f"t{values}-seed{seed}" + ("-drawn" if pixels == "draw" else "") + ("-readjusted" if readjust else "")


def _save_npz(path: Path, images: Tensor) -> None:
    """`images` (n, H, W, C) uint8, as evaluation code elsewhere expects them."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.permute(0, 2, 3, 1).numpy())
    with atomic_file(path) as file:
        file.write(buffer.getvalue())
