"""evaluate.py: bounds of a split, into results.json and onto the screen."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..core.distributed import rank, world_size
from ..core.errors import UserError
from ..data.loading import Batch, evaluation_batches
from ..data.sets import open_images
from ..data.splits import Split
from ..evaluation.bounds import evaluate
from ..evaluation.results import once, table
from ..kernels.fusion import compile_each
from .subject import Subject

DEFAULT_SAMPLES = 100


@dataclass(frozen=True)
class Measurement:
    """What is asked for; together with the weights it decides every figure."""

    split: Split = "test"
    importance_samples: int = DEFAULT_SAMPLES
    seed: int = 0
    draws: int = 1
    """Test draws of a binarised set."""
    limit: int | None = None
    """Only the first so many images."""


def samples_for(subject: Subject, asked: int | None) -> int:
    """The number of importance samples asked for, or as many as usual where the model has importance weights.

    Raises UserError where they are asked of a model that has none.
    """
    subject.model.check_samples(asked or 1)
    return asked or (DEFAULT_SAMPLES if subject.model.has_importance_weights else 1)


def evaluate_bounds(
    subject: Subject, asked: Measurement, batch: int | None = None, rows: int | None = None, compile_model: bool = False
) -> dict[str, Any]:
    """The entry of results.json for a measurement: found there, or measured now by all ranks; printed.

    An evaluation that was stopped goes on where it was. `batch`: images encoded at once (None: the run's); `rows`:
    images × draws decoded at once (None: as suits their size). Raises UserError where compiling would change nothing.
    """
    if compile_model and not list(subject.model.parts()):
        raise UserError(f"--compile: {type(subject.model).__name__} names no parts to compile for evaluation; omit it")

    def measure(unfinished: Path) -> dict[str, Any]:
        started = time.perf_counter()
        model = subject.model.for_inference()
        if compile_model:
            compile_each(model.parts())
        with subject.autocast():
            evaluation = evaluate(
                model,
                _batches(subject, asked, batch or subject.data.batch),
                draws=asked.draws,
                importance_samples=asked.importance_samples,
                seed=asked.seed,
                rows=rows,
                folder=unfinished,
            )
        entry = {**evaluation.entry(subject.model.config), "density": subject.model.density}
        return {**entry, **subject.origin, "seconds": round(time.perf_counter() - started, 1), "ranks": world_size()}

    return once(subject.folder, _identity(subject, asked), measure, table)


def _batches(subject: Subject, asked: Measurement, size: int) -> Callable[[int], Iterable[Batch]]:
    """This rank's share of the images asked for, of each test draw."""
    images, data = open_images(subject.data, asked.split), subject.data
    count = min(len(images), asked.limit or len(images))

    def of_draw(draw: int) -> Iterable[Batch]:
        share = evaluation_batches(
            images,
            data,
            batch=size,
            device=subject.device,
            seed=asked.seed,
            rank=rank(),
            world=world_size(),
            draw=draw,
            stop=count,
        )
        total = -(-count // world_size() // size)
        return tqdm(share, f"{asked.split}, draw {draw}", total, unit="batch", disable=rank() != 0)

    return of_draw


def _identity(subject: Subject, asked: Measurement) -> dict[str, Any]:
    """Everything that the figures depend on."""
    return {
        "data": subject.images_name(asked.split),
        "content": subject.content(asked.split, asked.limit),
        **asdict(asked),
        "precision": subject.precision,
        "weights": subject.weights,
        "edge": subject.model.config.likelihood.edge,
        "model": subject.fingerprint,
    }
