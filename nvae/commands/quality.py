"""evaluate.py --fid: samples against the training set, into results.json."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..core.distributed import rank, world_size
from ..data.loading import evaluation_batches
from ..data.sets import open_images
from ..evaluation.quality import Extractors, Networks, Statistics, cached, metrics, statistics
from ..evaluation.results import once, quality_table
from ..sampling.images import sample_batches
from .classification import drawn_like, labels_of
from .prior import model_at
from .subject import Subject


def evaluate_fid(
    subject: Subject,
    temperature: Sequence[float],
    samples: int,
    seed: int = 0,
    batch: int | None = None,
    readjust: bool = False,
    *,
    networks: Networks | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The entry of results.json for samples at a temperature: found there, or measured now by all ranks; printed.

    Pixels are drawn from the likelihood; samples of a model of classes are of those of the training set, if it has any,
    in their proportions. The training set's statistics are kept in `cache` (None: beside torch's downloads), for all
    models of that set.
    """
    networks, split, size = networks or Networks(), subject.reference_split, batch or subject.data.batch
    content = subject.content(split)
    conditional = subject.model.config.classes > 0 and bool((labels_of(subject, split) >= 0).any())
    classes = drawn_like(subject, split, samples).tolist() if conditional else None

    def measure(_: Path) -> dict[str, Any]:
        extractors = Extractors(networks, subject.device)
        model, at = model_at(subject, temperature, readjust=readjust, seed=seed)
        numbers = range(samples)
        drawn = sample_batches(
            model,
            numbers,
            at,
            classes=classes,
            seed=seed,
            batch=size,
            pixels="draw",
            precision=subject.precision,
        )
        digest = hashlib.sha256(json.dumps([content, subject.data.binarize, vars(networks)]).encode()).hexdigest()[:16]
        file = (cache or default_cache()) / f"{identity['data']}-{digest}.safetensors"
        training = cached(file, lambda: _training(subject, size, extractors))
        return {"metrics": metrics(statistics(drawn, samples, extractors), training), **subject.origin}

    identity = {
        "data": subject.images_name(split),
        "content": content,
        "metric": "fid",
        "temperature": list(temperature),
        "samples": samples,
        "seed": seed,
        "readjusted": readjust,
        "networks": "+".join(vars(networks).values()),
        **({"classes": "theirs", "guidance": subject.model.guidance} if conditional else {}),
        "precision": subject.precision,
        "weights": subject.weights,
        "model": subject.fingerprint,
    }
    return once(subject.folder, identity, measure, quality_table)


def default_cache() -> Path:
    """Where torch keeps what it fetched."""
    return Path(torch.hub.get_dir()).parent / "nvae-fid"


def _training(subject: Subject, batch: int, extractors: Extractors) -> Statistics:
    """The statistics of the training set, without flips and without padding."""
    data = subject.data.model_copy(update={"padding": 0})
    images = open_images(data, subject.reference_split)
    share = evaluation_batches(
        images, data, batch=batch, device=subject.device, seed=0, rank=rank(), world=world_size()
    )
    shown = tqdm(share, "training set", unit="batch", disable=rank() != 0)
    return statistics(((part.indices, part.images) for part in shown), len(images), extractors)
