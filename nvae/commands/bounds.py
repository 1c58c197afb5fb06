"""evaluate.py: bounds of a split, into results.json and onto the screen."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm

from ..core.distributed import barrier, from_rank_zero, rank, world_size
from ..core.errors import UserError
from ..data.loading import Batch, evaluation_batches
from ..data.sets import open_images
from ..data.splits import Split
from ..evaluation.bounds import check_samples, evaluate, has_importance_weights
from ..evaluation.results import circumstances, key_of, read_results, record
from ..models.base import Family
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
    check_samples(subject.model, asked or 1)
    return asked or (DEFAULT_SAMPLES if has_importance_weights(subject.model) else 1)


def evaluate_bounds(
    subject: Subject, asked: Measurement, batch: int | None = None, rows: int | None = None, compile_model: bool = False
) -> dict[str, Any]:
    """The entry of results.json for a measurement: found there, or measured now by all ranks and added.

    An evaluation that was stopped goes on where it was. `batch`: images encoded at once (None: the run's); `rows`:
    images × draws decoded at once (None: as suits their size). Raises UserError where compiling would change nothing.
    """
    if compile_model and type(subject.model).compile_parts is Family.compile_parts:
        raise UserError(f"--compile: {type(subject.model).__name__} names no parts to compile for evaluation; omit it")
    identity = _identity(subject, asked)
    results, key = subject.folder / "results.json", key_of(identity)
    known: dict[str, Any] | None = from_rank_zero(read_results(results).get(key))
    if known is not None:
        if rank() == 0:
            print(f"already in {results}")
        return known
    images, data = open_images(subject.data, asked.split), subject.data
    count = min(len(images), asked.limit or len(images))
    size = batch or data.batch

    def batches(draw: int) -> Iterable[Batch]:
        shares = evaluation_batches(
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
        return tqdm(shares, f"{asked.split}, draw {draw}", total, unit="batch", disable=rank() != 0)

    started = time.perf_counter()
    unfinished = subject.folder / "evaluation" / key.replace(" ", "_")
    model = subject.model.for_inference()
    if compile_model:
        model.compile_parts()
    with subject.autocast():
        evaluation = evaluate(
            model,
            batches,
            draws=asked.draws,
            importance_samples=asked.importance_samples,
            seed=asked.seed,
            rows=rows,
            folder=unfinished,
        )
    entry = {
        **identity,
        **evaluation.entry(subject.model.config),
        "density": subject.model.density,
        "checkpoint": subject.checkpoint.name,
        "path": subject.images_path,
        "trained_on": subject.trained_on,
        "seconds": round(time.perf_counter() - started, 1),
        "ranks": world_size(),
        **circumstances(subject.device),
    }
    if rank() == 0:
        record(results, key, entry)
        shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    return entry


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
