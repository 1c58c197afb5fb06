"""evaluate.py --cas: what classifiers say of samples of classes, into results.json; the classifier of real images."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

from ..core.distributed import barrier, from_rank_zero, gather_objects, rank, world_size
from ..core.errors import UserError
from ..core.randomness import keyed_normal
from ..data.loading import Batch, evaluation_batches
from ..data.sets import open_images, open_unread
from ..data.splits import Split
from ..evaluation.classification import (
    Classifier,
    ClassifierConfig,
    LabelledImages,
    in_proportion,
    load_classifier,
    save_classifier,
    scores,
    train_classifier,
)
from ..evaluation.results import once, scores_table
from ..models.base import Family, Temperature
from ..sampling.images import pixels_of, sample_batches
from ..sampling.pictures import to_bytes
from .prior import model_at
from .subject import Subject

BINARISED = 15_000
"""Images, at least, that classifiers see where each is binarised anew at every draw."""
CLASSIFIER = Path("evaluation/classifier.safetensors")
"""The classifier of real images, in the folder of results."""


def evaluate_cas(
    subject: Subject,
    temperature: Sequence[float],
    samples: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    readjust: bool = False,
    *,
    config: ClassifierConfig | None = None,
) -> dict[str, Any]:
    """The entry of results.json for samples at a temperature: found there, or measured now; printed.

    As many samples as there are training images, or `samples`, their classes in the training images' proportions. Few
    binarised images are drawn several times, to be `BINARISED` at least. All ranks draw and reconstruct, the first one
    trains the classifiers. Raises UserError for a model without classes, and
    for images without.
    """
    require_classes(subject, "--cas")
    config, split = config or ClassifierConfig(), subject.reference_split
    labels, tested = labels_of(subject, split), places_of_known(subject, "test")
    known = places_of_known(subject, split)
    times = draws_of(subject, len(known))
    count = samples or times * len(known)
    about = {"content": subject.content(split), "binarize": subject.data.binarize}

    def measure(_: Path) -> dict[str, Any]:
        model, at = model_at(subject, temperature, readjust=readjust, seed=seed)
        collector = Collector(subject, batch or subject.data.batch, seed)
        used = known[in_proportion(labels[known], min(count, len(known)))]
        draws = range(min(times, math.ceil(count / len(known))))
        real, rebuilt = collector.real(split, used, draws), collector.reconstructed(split, used, model, draws)
        drawn = collector.drawn(model, at, drawn_like(subject, split, count))
        test = collector.real("test", tested)
        found: dict[str, Any] | None = None
        if rank() == 0:
            sets = {"real images": real, "reconstructions": rebuilt, "samples": drawn}
            classifiers = {name: trained(subject, images, config, seed) for name, images in sets.items()}
            if count >= times * len(known):
                save_classifier(subject.folder / CLASSIFIER, classifiers["real images"], about)
            found = scores(classifiers, sets, test)
        return {**cast("dict[str, Any]", from_rank_zero(found)), **subject.origin}

    identity = {
        "data": subject.images_name(split),
        **about,
        "tested": subject.content("test"),
        "metric": "cas",
        "temperature": list(temperature),
        "guidance": subject.model.guidance,
        "samples": count,
        "seed": seed,
        "readjusted": readjust,
        "classifier": ",".join(f"{name}={value}" for name, value in config.model_dump().items()),
        "precision": subject.precision,
        "weights": subject.weights,
        "model": subject.fingerprint,
    }
    return once(subject.folder, identity, measure, scores_table)


def real_classifier(subject: Subject, seed: int = 0, config: ClassifierConfig | None = None) -> Classifier:
    """The classifier of the real training images: kept in the folder of results, or trained now and then kept.

    Raises UserError for images without classes.
    """
    split, file = subject.reference_split, subject.folder / CLASSIFIER
    wanted = {"content": subject.content(split), "binarize": subject.data.binarize}
    if from_rank_zero(file.exists()):
        model, about = load_classifier(file, subject.device)
        if about == wanted and model.classes == subject.model.config.classes:
            return model
    known = places_of_known(subject, split)
    real = Collector(subject, subject.data.batch, seed).real(split, known, range(draws_of(subject, len(known))))
    if rank() == 0:
        save_classifier(file, trained(subject, real, config or ClassifierConfig(), seed), wanted)
    barrier()
    return load_classifier(file, subject.device)[0]


def trained(subject: Subject, images: LabelledImages, config: ClassifierConfig, seed: int) -> Classifier:
    """A classifier of the model's classes, of images that are mirrored where the run's are."""
    classes, flip = subject.model.config.classes, subject.data.flip
    return train_classifier(images, classes, config, seed=seed, device=subject.device, flip=flip)


# ---------------------------------------------------------------------------------------------------------- classes


def require_classes(subject: Subject, option: str) -> None:
    """Raises UserError, naming the option, for a model that takes no labels."""
    if subject.model.config.classes == 0:
        raise UserError(f"{option}: samples of this {type(subject.model).__name__} have no class, model.classes is 0")


def labels_of(subject: Subject, split: Split) -> Tensor:
    """The classes (N,) of the images of a split, −1 where unknown. Raises UserError for some that the model lacks."""
    labels, classes = open_unread(subject.data, split).labels, subject.model.config.classes
    if len(labels) and int(labels.max()) >= classes:
        raise UserError(f"data: {split} images are of class {int(labels.max())}, but model.classes is {classes}")
    return labels


def places_of_known(subject: Subject, split: Split) -> Tensor:
    """Where in a split images have a class. Raises UserError where none has."""
    known = (labels_of(subject, split) >= 0).nonzero()[:, 0]
    if not len(known):
        raise UserError(f"data: none of the {split} images of {subject.data.source} has a class")
    return known


def draws_of(subject: Subject, count: int) -> int:
    """How often a classifier sees so many images: once, unless they are few and binarised anew at every draw."""
    return math.ceil(BINARISED / count) if subject.data.binarize else 1


def drawn_like(subject: Subject, split: Split, count: int) -> Tensor:
    """Classes (count,) in the proportions of those of a split's images."""
    known = labels_of(subject, split)[places_of_known(subject, split)]
    return known[in_proportion(known, count)]


# ----------------------------------------------------------------------------------------------------------- images


class Collector:
    """Images and their classes from all ranks, on every rank, as the model shows them: without padding, as bytes."""

    def __init__(self, subject: Subject, batch: int, seed: int) -> None:
        self.subject, self.batch, self.seed = subject, batch, seed

    def real(self, split: Split, places: Tensor, draws: Sequence[int] = (0,)) -> LabelledImages:
        """The images at these places of a split as the model takes them, binarised in each of these draws."""
        size = self.subject.data.size
        return self._gathered(split, places, draws, lambda batch, draw: center_crop(batch.images, [size]))

    def reconstructed(
        self, split: Split, places: Tensor, model: Family[Any], draws: Sequence[int] = (0,)
    ) -> LabelledImages:
        """What the model makes of them: drawn from p(x | z), of one z for each draw."""

        def rebuilt(batch: Batch, draw: int) -> Tensor:
            shapes, stream = model.latent_shapes(len(batch.indices)), f"reconstruct/{draw}" if draw else "reconstruct"
            noise = keyed_normal(shapes, batch.indices, self.seed, stream, self.subject.device)
            with self.subject.autocast():
                output = model.decode(model.encode(batch.images, batch.labels), noise=noise)
                return pixels_of(output.likelihood, batch.indices, seed=self.seed + draw, pixels="draw")

        return self._gathered(split, places, draws, rebuilt)

    def drawn(self, model: Family[Any], temperature: Temperature, classes: Tensor) -> LabelledImages:
        """A sample of each of these classes, its pixels drawn."""
        labels = classes.tolist()
        batches = sample_batches(
            model,
            range(len(labels)),
            temperature,
            classes=labels,
            seed=self.seed,
            batch=self.batch,
            pixels="draw",
            precision=self.subject.precision,
        )
        return _together((numbers, images, [labels[number] for number in numbers]) for numbers, images in batches)

    @torch.no_grad()
    def _gathered(
        self, split: Split, places: Tensor, draws: Sequence[int], show: Callable[[Batch, int], Tensor]
    ) -> LabelledImages:
        """What is shown of the images at these places in each draw, by all ranks; draw by draw."""
        data, wanted = self.subject.data, frozenset(places.tolist())
        images = open_images(data, split)

        def parts() -> Iterator[tuple[list[int], Tensor, list[int]]]:
            for draw in draws:
                share = evaluation_batches(
                    images,
                    data,
                    batch=self.batch,
                    device=self.subject.device,
                    seed=self.seed,
                    rank=rank(),
                    world=world_size(),
                    draw=draw,
                )
                for batch in tqdm(share, f"{split} images", unit="batch", disable=rank() != 0):
                    part = _only(batch, wanted)
                    if part.indices:
                        numbers = [draw * len(images) + index for index in part.indices]
                        yield numbers, show(part, draw), part.labels.tolist()

        return _together(parts())


def _only(batch: Batch, wanted: frozenset[int]) -> Batch:
    """What of a batch stands at the wanted places."""
    rows = [row for row, index in enumerate(batch.indices) if index in wanted]
    return Batch(batch.images[rows], [batch.indices[row] for row in rows], batch.labels[rows])


def _together(parts: Iterable[tuple[Sequence[int], Tensor, Sequence[int]]]) -> LabelledImages:
    """Numbers, images in [0, 1] and classes, those of all ranks in the order of their numbers."""
    mine = [(list(numbers), to_bytes(images), list(labels)) for numbers, images, labels in parts]
    every = [part for parts in gather_objects(mine) for part in parts]
    order = torch.tensor([number for numbers, _, _ in every for number in numbers]).argsort()
    images, labels = torch.cat([images for _, images, _ in every]), [label for *_, part in every for label in part]
    return LabelledImages(images[order], torch.tensor(labels)[order])
