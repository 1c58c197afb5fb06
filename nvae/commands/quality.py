"""evaluate.py --fid: samples against the training set, into results.json."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.distributed import barrier, from_rank_zero, rank, world_size
from ..data.loading import evaluation_batches
from ..data.sets import open_images
from ..evaluation.quality import Extractors, Networks, Statistics, cached, metrics, statistics
from ..evaluation.results import circumstances, key_of, read_results, record
from ..sampling.images import sample_images, shares, temperature_of
from .latents import cropped
from .samples import model_at
from .subject import Subject

Numbered = Iterator[tuple[Sequence[int], Tensor]]


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
    """The entry of results.json for samples at a temperature: found there, or measured now by all ranks and added.

    Pixels are drawn from the likelihood. The training set's statistics are kept in `cache` (None: beside torch's
    downloads), for all models of that set.
    """
    networks, content = networks or Networks(), subject.content(subject.reference_split)
    identity = {
        "data": subject.images_name(subject.reference_split),
        "content": content,
        "metric": "fid",
        "temperature": list(temperature),
        "samples": samples,
        "seed": seed,
        "readjusted": readjust,
        "networks": "+".join(vars(networks).values()),
        "precision": subject.precision,
        "weights": subject.weights,
        "model": subject.fingerprint,
    }
    results, key = subject.folder / "results.json", key_of(identity)
    known: dict[str, Any] | None = from_rank_zero(read_results(results).get(key))
    if known is not None:
        return known
    extractors = Extractors(networks, subject.device)
    size = batch or subject.data.batch
    model = model_at(subject, temperature, readjust=readjust, seed=seed)
    at = temperature_of(temperature, model)

    def drawn() -> Numbered:
        for numbers in tqdm(list(shares(samples, size)), "sampling", unit="batch", disable=rank() != 0):
            with subject.autocast():
                images = sample_images(model, numbers, at, seed=seed, pixels="draw")
            yield numbers, images

    digest = hashlib.sha256(json.dumps([content, subject.data.binarize, vars(networks)]).encode()).hexdigest()[:16]
    file = (cache or default_cache()) / f"{identity['data']}-{digest}.safetensors"
    training = cached(file, lambda: _training(subject, size, extractors))
    entry = {
        **identity,
        "metrics": metrics(statistics(drawn(), samples, extractors), training),
        "checkpoint": subject.checkpoint.name,
        "path": subject.images_path,
        **circumstances(subject.device),
    }
    if rank() == 0:
        record(results, key, entry)
    barrier()
    return entry


def default_cache() -> Path:
    """Where torch keeps what it fetched."""
    return Path(torch.hub.get_dir()).parent / "nvae-fid"


def _training(subject: Subject, batch: int, extractors: Extractors) -> Statistics:
    """The statistics of the training set, without flips and without padding."""
    images, data = open_images(subject.data, subject.reference_split), subject.data

    def numbered() -> Numbered:
        shares = evaluation_batches(
            images, data, batch=batch, device=subject.device, seed=0, rank=rank(), world=world_size()
        )
        for part in tqdm(shares, "training set", unit="batch", disable=rank() != 0):
            yield part.indices, cropped(subject, part.images)

    return statistics(numbered(), len(images), extractors)
