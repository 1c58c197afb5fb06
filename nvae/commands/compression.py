"""evaluate.py --compress: the bits that images really take beside their bound and other formats, into results.json."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from ..codec import others
from ..codec.archive import Archive
from ..codec.compression import CHAIN, Lost, Picture, compress, decompress
from ..core.errors import UserError
from ..core.files import atomic_file
from ..data.splits import Split
from ..evaluation.bounds import Evaluator
from ..evaluation.results import once
from ..models.base import Family
from .pictures import pictures_of_split
from .subject import Subject

DEFAULT_IMAGES = 500
BATCH = 64


def evaluate_compression(subject: Subject, split: Split, limit: int | None = None, seed: int = 0) -> dict[str, Any]:
    """The entry of results.json: found there, or measured now; printed, and drawn image by image.

    Raises UserError for a model that cannot compress.
    """
    if subject.device.type != "cpu":
        raise UserError("--compress: runs on a CPU, where arithmetic is the same everywhere; give --device cpu")
    images = limit or DEFAULT_IMAGES
    identity = {
        "data": subject.images_name(split),
        "split": split,
        "content": subject.content(split, images),
        "metric": "compression",
        "images": images,
        "chain": CHAIN,
        "seed": seed,
        "weights": subject.weights,
        "model": subject.fingerprint,
    }

    def measure(_: Path) -> dict[str, Any]:
        pictures = pictures_of_split(subject.model, subject.data, split, images, seed)
        bound = negative_elbo(subject.model, pictures, seed) / math.log(2)
        found, spent = measured(subject.model, pictures)
        plain = [picture.levels for picture in pictures]
        alone = {}
        for name, encode in others.encoders(subject.model.config.likelihood.highest_level).items():
            alone[name] = others.bits_each(encode, plain)
            together = others.bits_in_one(encode, plain)
            found["others"][name] = {"each": float(alone[name].sum()), "in_one": together}
        found["bound"] = float(bound.sum())
        found["bound_error"] = float(bound.std(ddof=1) / math.sqrt(len(bound))) if len(bound) > 1 else 0.0
        draw(subject.folder / "compression.png", bound, spent, alone)
        return {**found, **subject.origin}

    return once(subject.folder, identity, measure, table)


def measured(model: Family[Any], pictures: Sequence[Picture]) -> tuple[dict[str, Any], np.ndarray]:
    """Compresses and decompresses: bits, seconds; and the bits of each image, without what chains began with.

    Raises UserError where an image does not come back as it was.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.nvz"
        began = time.perf_counter()
        made = compress(model, pictures, path)
        between = time.perf_counter()
        back = list(decompress(model, Archive(path)))
        ended = time.perf_counter()
        size = path.stat().st_size
    for picture, image in zip(pictures, back, strict=True):
        if isinstance(image, Lost):
            raise UserError(f"{image.name}: {image.reason}")
        if not np.array_equal(image.levels, picture.levels):
            raise UserError(f"{picture.name}: came back as another image")
    index = made.index
    return {
        "dims": index.dims,
        "net": float(made.bits.sum()),
        "begun": index.begun,
        "chains": 8 * index.body,
        "file": 8 * size,
        "seconds_in": between - began,
        "seconds_out": ended - between,
        "others": {},
    }, made.bits


def negative_elbo(model: Family[Any], pictures: Sequence[Picture], seed: int) -> np.ndarray:
    """(N,) nats, one draw of each image: the one that evaluations take."""
    likelihood, evaluator = model.config.likelihood, Evaluator(model, seed=seed)
    found = []
    for first in range(0, len(pictures), BATCH):
        some = pictures[first : first + BATCH]
        x = torch.from_numpy(np.stack([picture.levels for picture in some])).float() / likelihood.highest_level
        labels = torch.tensor([picture.label for picture in some])
        places = range(first, first + len(some))
        figures = evaluator.measure(F.pad(x, [likelihood.border] * 4), places, labels)
        found.append((figures.reconstruction + figures.kl.sum(1)).numpy())
    return np.concatenate(found)


def table(entry: Mapping[str, Any]) -> str:
    """An entry as text."""
    dims, images = entry["dims"], entry["images"]

    def row(name: str, bits: float, note: str = "") -> str:
        return (
            f"{name:<34}{bits / dims:>8.4f}{bits / images:>11.1f}{100 * (bits / entry['bound'] - 1):>+9.2f} %  {note}"
        )

    lines = [
        f"{entry['data']}, {entry['split']}, {images} images, every one bitwise as it was",
        f"{'':<34}{'bits/dim':>8}{'bits/image':>11}{'of bound':>11}",
        row("negative ELBO", entry["bound"], f"± {entry['bound_error']:.1f} bits"),
        row("compressed", entry["net"]),
        row("  with what chains begin with", entry["net"] + entry["begun"]),
        row("  the whole file", entry["file"], "with names and checksums"),
    ]
    for name, bits in entry["others"].items():
        lines += [row(f"{name}, a file each", bits["each"]), row(f"{name}, all in one picture", bits["in_one"])]
    speeds = (images / entry["seconds_in"], images / entry["seconds_out"])
    return "\n".join([*lines, "", "images a second: {:.1f} in, {:.1f} out".format(*speeds)])


def draw(path: Path, bound: np.ndarray, real: np.ndarray, alone: Mapping[str, np.ndarray]) -> None:
    """Writes a picture of every image's bits over its bound's."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for name, bits in {"compressed": real, **alone}.items():
        axes.scatter(bound, bits, s=5, alpha=0.6, label=name, edgecolors="none")
    ends = np.array([bound.min(), bound.max()])
    axes.plot(ends, ends, color="grey", linewidth=0.8, label="as many as the bound")
    axes.set(xlabel="negative ELBO, bits", ylabel="bits of the image", yscale="log", xscale="log")
    axes.legend(markerscale=3, frameon=False)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=110, format="png")
