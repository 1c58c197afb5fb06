"""sample.py reconstruct, interpolate, traverse, neighbours: strips of pictures, an image a row.

Each takes what was asked on the command line, and yields a line for each file it has written.
"""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop

from ..core.distributed import rank
from ..core.errors import UserError
from ..data.loading import Batch, evaluation_batches
from ..data.sets import open_images
from ..data.splits import Split
from ..sampling import latent_space
from ..sampling.images import sample_images, temperature_of
from ..sampling.pictures import ANIMATIONS, save_animation, save_png, strip
from .prior import model_at
from .subject import Subject

ROWS = 8


def write_reconstructions(subject: Subject, args: Namespace) -> Iterator[str]:
    """Each image beside its reconstructions from the first k latent groups, for each k asked for (none: from all)."""
    model = subject.model.for_inference()
    batch = batch_of(subject, args.split, args.first, args.count, seed=args.seed)
    unpadded = center_crop(batch.images, [subject.data.size])
    at = temperature_of(args.temperature[0], model)
    with subject.autocast():
        found = [
            latent_space.reconstruct(
                model, batch.images, labels=told(subject, batch), groups=groups, temperature=at, seed=args.seed
            )
            for groups in args.groups
        ]
    yield str(_save(subject, "reconstructions", torch.stack([unpadded, *found])))


def write_interpolation(subject: Subject, args: Namespace) -> Iterator[str]:
    """From each image to another one: a strip, and an animation."""
    images = batch_of(subject, args.split, args.first, args.count, together=2, seed=args.seed).images
    first, second = images.chunk(2)
    with subject.autocast():
        frames = latent_space.interpolate(subject.model.for_inference(), first, second, args.steps, seed=args.seed)
    still = _save(subject, "interpolation", frames)
    yield str(still)
    moving = still.with_suffix(args.animation)
    if rank() == 0:
        for earlier in ANIMATIONS:
            still.with_suffix(earlier).unlink(missing_ok=True)  # of other weights, perhaps
        save_animation(moving, frames)
    yield str(moving)


def write_traversal(subject: Subject, args: Namespace) -> Iterator[str]:
    """Each image as one latent group is turned; the image as it is stands in the middle."""
    images = batch_of(subject, args.split, args.first, args.count, seed=args.seed).images
    with subject.autocast():
        frames = latent_space.traverse(subject.model.for_inference(), images, args.group, args.steps, seed=args.seed)
    yield str(_save(subject, f"traversal-group{args.group}", frames))


def write_neighbours(subject: Subject, args: Namespace) -> Iterator[str]:
    """Samples, each beside the training images nearest to it."""
    data = subject.data.model_copy(update={"binarize": False, "padding": 0})
    training = open_images(data, subject.reference_split)
    if args.nearest > len(training):
        raise UserError(f"--nearest: there are {len(training)} training images, found {args.nearest}")
    model, at = model_at(subject, args.temperature[0], readjust=args.readjust, seed=args.seed)
    with subject.autocast():
        samples = sample_images(model, range(args.count or ROWS), at, seed=args.seed)
    batches = evaluation_batches(training, data, batch=1024, device=subject.device, seed=args.seed)
    _, positions = latent_space.nearest(samples, batches, args.nearest)
    found = training.read(positions.T.flatten().tolist()).to(samples) / training.levels
    found = found.reshape(args.nearest, *samples.shape)
    yield str(_save(subject, "neighbours", torch.cat([samples[None], found])))


def batch_of(
    subject: Subject, split: Split, first: int, rows: int | None, *, together: int = 1, seed: int = 0
) -> Batch:
    """rows · together images from `first` on of a split, as the model takes them, and their classes.

    None are as many rows as usual, or as the split has. Raises UserError where the split does not hold them.
    """
    images = open_images(subject.data, split)
    count = together * (rows or max(min(ROWS, len(images) // together), 1))
    if not 0 <= first <= len(images) - count:
        raise UserError(f"the {split} split has {len(images)} images; found --first {first} and {count} from there on")
    chosen = evaluation_batches(
        images, subject.data, batch=count, device=subject.device, seed=seed, start=first, stop=first + count
    )
    return next(iter(chosen))


def told(subject: Subject, batch: Batch) -> Tensor | None:
    """The classes of a batch that the model is told, (B,); None where it takes none."""
    return batch.labels if subject.model.config.classes else None


def _save(subject: Subject, name: str, frames: Tensor) -> Path:
    """Those of one name take each other's place; those of the weights as trained have names of their own."""
    path = subject.folder / "samples" / f"{name}{'-raw' * (subject.weights == 'raw')}.png"
    if rank() == 0:
        save_png(path, strip(frames))
    return path
