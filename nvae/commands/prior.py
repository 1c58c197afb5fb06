"""sample.py: images from the prior, as an overview and single PNGs, or as one .npz."""

import copy
import io
import json
import math
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..bricks.normalisation import BatchNorm
from ..core.distributed import barrier, gather_objects, rank
from ..core.errors import UserError
from ..core.files import atomic_file, require_writable
from ..models.base import Family, Temperature
from ..sampling.images import Pixels, readjust_cached, sample_batches, temperature_of
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
            count=args.count or 64,
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

    Writes samples/<what>.png, an overview, the images in a folder or an .npz of that name, and <what>.json, which says
    of what they are samples. Those that were there of anything else are gone. Returns the overview's path and how many
    images a second were drawn.
    """
    about = {
        "checkpoint": subject.checkpoint.name,
        "weights": subject.weights,
        "model": subject.fingerprint,
        "edge": subject.model.config.likelihood.edge,
        "temperature": list(temperature),
        "seed": seed,
        "count": count,
        "pixels": pixels,
        "readjusted": readjust,
        "precision": subject.precision,
    }
    samples = SampleSet(subject.folder / "samples" / _name(subject, temperature, seed, pixels, readjust))
    samples.begin()
    model, at = model_at(subject, temperature, readjust=readjust, seed=seed)
    columns = columns or min(math.ceil(math.sqrt(count)), MOST_COLUMNS)
    kept: dict[int, Tensor] = {}
    started = time.perf_counter()
    for numbers, images in sample_batches(
        model, count, at, seed=seed, batch=batch, pixels=pixels, precision=subject.precision
    ):
        for number, image in zip(numbers, to_bytes(images), strict=True):
            if form == "png":
                samples.add(number, image)
            if form == "npz" or number < columns**2:
                kept[number] = image
    together = {number: image for part in gather_objects(kept) for number, image in part.items()}
    elapsed = time.perf_counter() - started
    if rank() == 0:
        samples.finish(torch.stack([together[number] for number in sorted(together)]), columns, about, form)
    return samples.overview, count / elapsed


class SampleSet:
    """The files of one set of samples: <what>.json, <what>.png, and the images in <what>/ or <what>.npz."""

    def __init__(self, path: Path) -> None:
        self.folder, self._unfinished = path, path.with_name(f".{path.name}")
        self.about, self.overview, self.array = (path.with_name(path.name + end) for end in (".json", ".png", ".npz"))

    def begin(self) -> None:
        """Room for new images, beside those of before. Raises OSError where nothing can be written."""
        if rank() == 0:
            require_writable(self.folder.parent)
            shutil.rmtree(self._unfinished, ignore_errors=True)
        barrier()

    def add(self, number: int, image: Tensor) -> None:
        """A uint8 image (C, H, W), from any rank."""
        save_png(self._unfinished / f"{number:06d}.png", image)

    def finish(self, images: Tensor, columns: int, about: dict[str, Any], form: Format) -> None:
        """The set takes the place of any other. `images` (n, C, H, W) uint8: those of the overview, or of the array."""
        if self._said() != about:
            shutil.rmtree(self.folder, ignore_errors=True)
            for stale in (self.about, self.overview, self.array):
                stale.unlink(missing_ok=True)
        if form == "npz":
            _save_npz(self.array, images)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._unfinished.rename(self.folder)
        save_png(self.overview, grid(images[: columns**2], columns))
        with atomic_file(self.about) as file:
            file.write((json.dumps(about, indent=1) + "\n").encode())

    def _said(self) -> object:
        """What the set that is there says of itself; None for one that says nothing."""
        try:
            return json.loads(self.about.read_bytes())
        except (OSError, ValueError):
            return None


def model_at(
    subject: Subject, temperature: Sequence[float], *, readjust: bool, seed: int
) -> tuple[Family[Any], Temperature]:
    """The subject's model for sampling at a temperature, and that as the model takes it.

    If asked, a copy whose batch norms are re-adjusted to the temperature.
    """
    at = temperature_of(temperature, subject.model)
    if not readjust:
        return subject.model.for_inference(), at
    if not any(isinstance(module, BatchNorm) for module in subject.model.modules()):
        raise UserError(
            f"--readjust: has no effect on {type(subject.model).__name__}, it has no batch norm; leave it out"
        )
    model = copy.deepcopy(subject.model)
    readjust_cached(model, at, subject.folder / "batch-norm", subject.fingerprint, seed=seed, **READJUSTMENT)
    return model.for_inference(), at


def _name(subject: Subject, temperature: Sequence[float], seed: int, pixels: Pixels, readjust: bool) -> str:
    values = "-".join(f"{value:g}" for value in temperature)
    options = {"raw": subject.weights == "raw", "drawn": pixels == "draw", "readjusted": readjust}
    return "-".join([f"t{values}-seed{seed}", *(name for name, is_on in options.items() if is_on)])


def _save_npz(path: Path, images: Tensor) -> None:
    """`images` (n, H, W, C) uint8, as evaluation code elsewhere expects them."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.permute(0, 2, 3, 1).numpy())
    with atomic_file(path) as file:
        file.write(buffer.getvalue())
