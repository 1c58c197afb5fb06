"""evaluate.py --report: gathers what is known of a run and draws its pictures for the page."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop

from ..core.config import dump_yaml
from ..core.distributed import rank
from ..core.errors import UserError
from ..core.files import atomic_file
from ..data.sets import open_images
from ..evaluation.report import Chart, Page, Picture, Series, render
from ..evaluation.results import read_results
from ..models.base import Family
from ..sampling import latent_space
from ..sampling.images import TEMPERATURES, sample_images
from ..sampling.pictures import grid, png, strip
from .latents import batch_of, told
from .prior import model_at
from .subject import Subject

SAMPLES, COLUMNS = 32, 8
IMAGES, STEPS = 10, 9
LEVELS = range(4)
"""Levels of codes whose curves are drawn."""
CHARTS = (
    (
        "Negative ELBO",
        "nats",
        {"nelbo": "training", "validation/nelbo": "validation", "validation_ema/nelbo": "validation, averaged weights"},
    ),
    ("Reconstruction and KL", "nats", {"reconstruction": "reconstruction", "kl": "KL"}),
    ("Squared error", "", {"squared_error": "training", "validation/squared_error": "validation"}),
    (
        "Rate of each level, training",
        "nats a code",
        {f"nats_per_code/{level:02d}": f"level {level}" for level in LEVELS},
    ),
    (
        "Rate of each level, validation",
        "nats a code",
        {f"validation/nats_per_code/{level:02d}": f"level {level}" for level in LEVELS},
    ),
    ("Use of codebooks", "perplexity", {f"perplexity/{level:02d}": f"level {level}" for level in LEVELS}),
    ("Gradient norm", "", {"gradient_norm": "before clipping"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
)


def write_page(subject: Subject, *, seed: int = 0, readjust: bool = False) -> Path:
    """Writes report.html into the subject's folder."""
    path = subject.folder / "report.html"
    with subject.autocast():
        page = page_of(subject, seed=seed, readjust=readjust)
    if rank() == 0:
        with atomic_file(path) as file:
            file.write(render(page).encode())
    return path


def page_of(subject: Subject, *, seed: int = 0, readjust: bool = False) -> Page:
    """Everything on the page."""
    entries = read_results(subject.folder / "results.json").values()
    bounds = [entry for entry in entries if "estimates" in entry]
    lines = _metrics(subject.run / "metrics.jsonl" if subject.run else None)
    kl, active = _groups([entry for entry in bounds if entry["model"] == subject.fingerprint], lines)
    config = subject.config
    return Page(
        title=config.name if config is not None else subject.checkpoint.stem,
        subtitle=f"{type(subject.model).__name__} on {subject.images_name('test')}",
        facts=_facts(subject, active),
        entries=bounds,
        qualities=[entry for entry in entries if "metrics" in entry],
        scores=[entry for entry in entries if "accuracy" in entry],
        charts=[chart for chart in (_chart(lines, *what) for what in CHARTS) if chart.series],
        kl_per_group=kl,
        active_units=active,
        **({"units": "codes in use"} if subject.model.codes else {}),
        samples=list(_samples(subject, seed, readjust)),
        strips=list(_strips(subject, seed)),
        config=dump_yaml(config) if config is not None else "",
    )


def _facts(subject: Subject, active: Sequence[float]) -> dict[str, str]:
    shapes = subject.model.latent_shapes(1)
    facts = {
        "parameters": f"{sum(p.numel() for p in subject.model.parameters()):,}",
        "latent groups": str(len(shapes)),
        "latent numbers": f"{sum(math.prod(shape) for shape in shapes):,}",
        "checkpoint": subject.checkpoint.name,
        "weights": subject.weights,
    }
    if active:
        facts["active units"] = f"{sum(active):g}"
    return facts


# ------------------------------------------------------------------------------------------------------------ curves


def _metrics(path: Path | None) -> list[dict[str, float]]:
    """The lines that training wrote, NaN where a number was not finite; none for a bare checkpoint.

    A run that was killed, or that trains on, may be amid the last one. Raises UserError for another that is damaged.
    """
    if path is None or not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    try:
        lines = [json.loads(line) for line in whole]
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


def _chart(lines: Sequence[Mapping[str, float]], title: str, unit: str, names: Mapping[str, str]) -> Chart:
    series = []
    for name, label in names.items():
        points = [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
        if points:
            series.append(Series(label, [step for step, _ in points], [value for _, value in points]))
    return Chart(title, unit, series)


def _groups(
    bounds: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, float]]
) -> tuple[list[float], list[float]]:
    """KL and active units of each group: as evaluated last, else as logged last in training."""
    if bounds:
        return bounds[-1]["kl_per_group"], bounds[-1]["active_units_per_group"]
    last = next((line for line in reversed(lines) if math.isfinite(line.get("kl_group/00", math.nan))), {})
    return _numbered(last, "kl_group"), _numbered(last, "active_units")


def _numbered(line: Mapping[str, float], name: str) -> list[float]:
    return [line[key] for key in sorted(line) if key.startswith(f"{name}/")]


# ---------------------------------------------------------------------------------------------------------- pictures


def _samples(subject: Subject, seed: int, readjust: bool) -> Iterator[Picture]:
    for temperature in TEMPERATURES:
        model, at = model_at(subject, [temperature], readjust=readjust, seed=seed)
        images = sample_images(model, range(SAMPLES), at, seed=seed)
        yield Picture(f"temperature {temperature}", "", png(grid(images, COLUMNS)))


def _strips(subject: Subject, seed: int) -> Iterator[Picture]:
    count = min(IMAGES, len(open_images(subject.data, "test")))
    batch = batch_of(subject, "test", 0, count, seed=seed)
    images, labels, model = batch.images, told(subject, batch), subject.model.for_inference()
    rebuilt = latent_space.reconstruct(model, images, labels=labels, seed=seed)
    top = range(1, len(model.latent_shapes(1))) if model.codes else []
    parts = [
        latent_space.reconstruct(model, images, labels=labels, groups=groups, temperature=0.0, seed=seed)
        for groups in top
    ]
    caption = "test images, and what the model makes of them"
    if parts:
        caption += ": of the codes of the top levels alone, the others the likeliest, then of all"
    yield Picture("Reconstructions", caption, _rows(subject, images, *parts, rebuilt))
    yield from _interpolation(model, images, seed)


def _interpolation(model: Family[Any], images: Tensor, seed: int) -> Iterator[Picture]:
    """None for a family whose latents cannot be interpolated, or for fewer than two images."""
    if model.latent_kind != "normal" or len(images) < 2:
        return
    first, second = images[: len(images) // 2], images[len(images) // 2 : len(images) // 2 * 2]
    frames = latent_space.interpolate(model, first, second, STEPS, seed=seed)
    yield Picture("Interpolations", "between test images, in the prior's noise", png(strip(frames)))


def _rows(subject: Subject, images: Tensor, *rebuilt: Tensor) -> bytes:
    """Images above what became of them."""
    return png(grid(torch.cat([center_crop(images, [subject.data.size]), *rebuilt]), columns=len(images)))
