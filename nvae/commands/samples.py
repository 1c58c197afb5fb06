"""sample.py: images from the prior, of classes or of none, as an overview and single PNGs, or as one .npz."""

import hashlib
import io
import json
import math
import shutil
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.distributed import barrier, gather_objects, rank
from ..core.errors import UserError
from ..core.files import atomic_file, require_writable
from ..evaluation.classification import Classifier, likeliest
from ..evaluation.results import fingerprint
from ..sampling.images import Pixels, sample_batches
from ..sampling.pictures import grid, save_png, to_bytes
from .classification import real_classifier, require_classes
from .prior import model_at
from .subject import Subject

Format = Literal["png", "npz"]
MOST_COLUMNS, MOST_ROWS = 10, 100
"""Of an overview."""
LISTED = 10
"""Classes that a name lists; more are told by a digest of them."""
COUNT, COUNT_OF_CLASS = 64, 8


@dataclass(frozen=True)
class Asked:
    """What samples are asked for; with the weights it decides every picture.

    Sample number i of a model of K classes is of class i mod K, where it is of any.
    """

    temperature: Sequence[float]
    """One value, one per scale, or one per group."""
    count: int = COUNT
    """Samples, or samples of each class."""
    seed: int = 0
    pixels: Pixels = "mean"
    readjust: bool = False
    classes: tuple[int, ...] = ()
    """Empty: samples are of no class."""
    keep: float = 1.0
    """Fraction of what is drawn, the likeliest of their class, that is kept."""

    def numbers(self, of: int) -> list[int]:
        """Those of all that is drawn, of a model of so many classes."""
        if not self.classes:
            return list(range(self.count))
        drawn = math.ceil(self.count / self.keep - 1e-9)
        return sorted(place * of + label for place in range(drawn) for label in self.classes)

    def name(self, subject: Subject) -> str:
        """That of the set, with whatever is unusual about it."""
        parts = [f"t{'-'.join(f'{value:g}' for value in self.temperature)}-seed{self.seed}"]
        if self.classes:
            parts.append(_name_of(self.classes, subject.model.config.classes))
        options = {
            "raw": subject.weights == "raw",
            "drawn": self.pixels == "draw",
            "readjusted": self.readjust,
            f"guidance{subject.model.guidance:g}": bool(self.classes and subject.model.guidance),
            f"keep{self.keep:g}": self.keep < 1,
        }
        return "-".join([*parts, *(name for name, is_on in options.items() if is_on)])


def _name_of(classes: Sequence[int], of: int) -> str:
    if len(classes) == of:
        return "classes-all"
    if len(classes) <= LISTED:
        return f"classes{'-'.join(map(str, classes))}"
    return f"{len(classes)}-classes-{hashlib.sha256(str(classes).encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------------------------------------------------- the action


def write_all(subject: Subject, args: Namespace) -> Iterator[str]:
    """Samples at each temperature asked for on the command line; a line for each overview."""
    classes = classes_of(subject, args.classes)
    if args.guidance is not None:
        subject.model.set_guidance(args.guidance)
    for option, is_given in (("--guidance", args.guidance is not None), ("--keep", args.keep < 1)):
        if is_given and not classes:
            raise UserError(f"{option}: is for samples of classes; name some with --classes, or all")
    for temperature in args.temperature:
        asked = Asked(
            temperature,
            args.count or (COUNT_OF_CLASS if classes else COUNT),
            args.seed,
            args.pixels,
            args.readjust,
            classes,
            args.keep,
        )
        path, speed = write_samples(subject, asked, columns=args.grid, batch=args.batch, form=args.format)
        yield f"{path}  {speed:.1f} images/s"


def classes_of(subject: Subject, words: Sequence[str] | None) -> tuple[int, ...]:
    """Of words on the command line. Raises UserError for what is no class of the model."""
    if words is None:
        return ()
    require_classes(subject, "--classes")
    of = subject.model.config.classes
    if list(words) == ["all"]:
        return tuple(range(of))
    for word in words:
        if not word.isdecimal() or int(word) >= of:
            raise UserError(f"--classes: takes numbers from 0 to {of - 1}, or all; found '{word}'")
    return tuple(dict.fromkeys(map(int, words)))


def write_samples(
    subject: Subject, asked: Asked, *, columns: int | None = None, batch: int = 16, form: Format = "png"
) -> tuple[Path, float]:
    """The samples asked for, drawn by all ranks.

    Writes samples/<what>.png, an overview with a class a row, the images in a folder or an .npz of that name, and
    <what>.json, which says of what they are samples. Those that were there of anything else are gone. Returns the
    overview's path and how many images a second were drawn.
    """
    of = subject.model.config.classes
    samples = SampleSet(subject.folder / "samples" / asked.name(subject), of if asked.classes else 0)
    samples.begin()
    classifier = real_classifier(subject, asked.seed) if asked.keep < 1 else None
    about = _about(subject, asked, classifier)
    model, at = model_at(subject, asked.temperature, readjust=asked.readjust, seed=asked.seed)
    numbers = asked.numbers(of)
    columns = columns or min(asked.count if asked.classes else math.ceil(math.sqrt(asked.count)), MOST_COLUMNS)
    started = time.perf_counter()
    drawn = sample_batches(
        model,
        numbers,
        at,
        classes=[number % of for number in numbers] if asked.classes else None,
        seed=asked.seed,
        batch=batch,
        pixels=asked.pixels,
        precision=subject.precision,
    )
    batches: Iterable[tuple[list[int], Tensor]] = ((chosen, to_bytes(images)) for chosen, images in drawn)
    if classifier is not None:
        batches = _kept(batches, classifier, of, asked.count)
    shown = frozenset(_shown(numbers, asked, of, columns)) if form == "png" and classifier is None else None
    held: dict[int, Tensor] = {}
    for chosen, images in batches:
        for number, image in zip(chosen, images, strict=True):
            if form == "png":
                samples.add(number, image)
            if shown is None or number in shown:
                held[number] = image
    together = {number: image for part in gather_objects(held) for number, image in part.items()}
    elapsed = time.perf_counter() - started
    if rank() == 0:
        overview = torch.stack([together[number] for number in _shown(sorted(together), asked, of, columns)])
        samples.finish(together, grid(overview, columns), about, form)
    return samples.overview, len(numbers) / elapsed


def _about(subject: Subject, asked: Asked, classifier: Classifier | None) -> dict[str, Any]:
    """Of what they are samples."""
    about: dict[str, Any] = {
        "checkpoint": subject.checkpoint.name,
        "weights": subject.weights,
        "model": subject.fingerprint,
        "edge": subject.model.config.likelihood.edge,
        "temperature": list(asked.temperature),
        "seed": asked.seed,
        "count": asked.count,
        "pixels": asked.pixels,
        "readjusted": asked.readjust,
        "precision": subject.precision,
    }
    if asked.classes:
        about |= {"classes": list(asked.classes), "guidance": subject.model.guidance, "keep": asked.keep}
    if classifier is not None:
        about["classifier"] = fingerprint(classifier)
    return about


def _kept(
    batches: Iterable[tuple[list[int], Tensor]], classifier: Classifier, of: int, count: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Of all ranks' samples the `count` of each class that the classifier finds likeliest; this rank's of them."""
    mine = [(number, image) for numbers, images in batches for number, image in zip(numbers, images, strict=True)]
    found = classifier.probabilities(torch.stack([image for _, image in mine])) if mine else torch.empty(0)
    probability = {
        number: float(row[number % of])
        for part in gather_objects([(number, row) for (number, _), row in zip(mine, found, strict=True)])
        for number, row in part
    }
    every = torch.tensor(sorted(probability))
    own = torch.tensor([probability[int(number)] for number in every])
    chosen = frozenset(every[likeliest(own, every % of, count)].tolist())
    for number, image in mine:
        if number in chosen:
            yield [number], image[None]


def _shown(numbers: Sequence[int], asked: Asked, of: int, columns: int) -> list[int]:
    """Those of the overview, row by row: a class a row in the order asked for, or as they come."""
    if not asked.classes:
        return list(numbers[: columns**2])
    rows = ([number for number in numbers if number % of == label] for label in asked.classes[:MOST_ROWS])
    return [number for row in rows for number in row[:columns]]


# ----------------------------------------------------------------------------------------------------------- files


class SampleSet:
    """The files of one set of samples: <what>.json, <what>.png, and the images in <what>/ or <what>.npz."""

    def __init__(self, path: Path, classes: int = 0) -> None:
        """With `classes` sample i is of class i mod `classes`, as the names of the images say."""
        self.folder, self._unfinished, self.classes = path, path.with_name(f".{path.name}"), classes
        self.about, self.overview, self.array = (path.with_name(path.name + end) for end in (".json", ".png", ".npz"))

    def begin(self) -> None:
        """Room for new images, beside those of before. Raises OSError where nothing can be written."""
        if rank() == 0:
            require_writable(self.folder.parent)
            shutil.rmtree(self._unfinished, ignore_errors=True)
        barrier()

    def add(self, number: int, image: Tensor) -> None:
        """A uint8 image (C, H, W), from any rank."""
        of_class = f"-class{number % self.classes}" if self.classes else ""
        save_png(self._unfinished / f"{number:06d}{of_class}.png", image)

    def finish(self, images: dict[int, Tensor], overview: Tensor, about: dict[str, Any], form: Format) -> None:
        """The set takes the place of any other. `images`, uint8 (C, H, W) by number, are those of the array."""
        if self._said() != about:
            shutil.rmtree(self.folder, ignore_errors=True)
            for stale in (self.about, self.overview, self.array):
                stale.unlink(missing_ok=True)
        if form == "npz":
            self._save_array(images)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._unfinished.rename(self.folder)
        save_png(self.overview, overview)
        with atomic_file(self.about) as file:
            file.write((json.dumps(about, indent=1) + "\n").encode())

    def _said(self) -> object:
        """What the set that is there says of itself; None for one that says nothing."""
        try:
            return json.loads(self.about.read_bytes())
        except (OSError, ValueError):
            return None

    def _save_array(self, found: dict[int, Tensor]) -> None:
        """`images` (n, H, W, C) uint8, as evaluation code elsewhere expects them, and their classes, `labels` (n,)."""
        numbers = sorted(found)
        arrays: dict[str, Any] = {"images": torch.stack([found[n] for n in numbers]).permute(0, 2, 3, 1).numpy()}
        if self.classes:
            arrays["labels"] = np.array([number % self.classes for number in numbers])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        with atomic_file(self.array) as file:
            file.write(buffer.getvalue())
