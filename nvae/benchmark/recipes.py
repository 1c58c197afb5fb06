"""What a recipe asks of a device, and how to run it there: precision, recomputation and batch, from counted memory.

Counts are made on tensors that have shapes and no numbers, which takes a minute a recipe. They lie in counted.json,
each with a fingerprint of the model that it is of; `count` makes them again.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from ..core.memory import MIB
from ..core.precision import Precision, precision_on
from ..models.base import Recomputation
from ..models.config import ModelConfig
from ..models.registry import build
from ..models.vdvae.config import VDVAEConfig
from ..training.config import AnyRunConfig, read_run_config
from ..training.throughput import flop_per_image
from .memory import step_memory

TABLE = Path(__file__).with_name("counted.json")
MODES: tuple[Recomputation, ...] = ("none", "cells")
USABLE = 0.9
"""Share of a device's memory that counted tensors may fill: workspaces of convolutions and the context come on top."""


@dataclass(frozen=True)
class Demand:
    """Counts of a recipe; memory in MiB."""

    fingerprint: str
    """Of the model's config, and of the type that its products are computed in."""
    parameters: int
    gflop_per_image: float
    """Of an update: products of forward and backward pass, nothing computed twice."""
    batches: tuple[int, int]
    """At which memory was counted, images at once: that of the recipe, and twice as many."""
    peaks: dict[Recomputation, tuple[float, float]]
    """By recomputation, at either batch: most that is alive beside weights, their average and moments."""

    def peak(self, recompute: Recomputation, batch: int) -> float:
        """MiB at a batch: on the line through both counts, and never below the gradients of the weights.

        With `activations` made again it is at most what it is without.
        """
        (few, many), (low, high) = self.batches, self.peaks["cells" if recompute == "cells" else "none"]
        line = low + (high - low) / (many - few) * (batch - few)
        return max(line, 4 * self.parameters / MIB)

    def beside(self, averaged: bool) -> float:
        """MiB of weights, two moments and, where one is kept, the average."""
        return (16 if averaged else 12) * self.parameters / MIB


@dataclass(frozen=True)
class Recommendation:
    """How a recipe fits a device."""

    overrides: list[str]
    """`section.field=value` for each field that is to differ from the recipe's."""
    precision: Precision
    recompute: Recomputation
    batch: int
    """Images at once on each device."""
    mib: float
    """Of all tensors, at this batch."""


def recommended(
    config: AnyRunConfig, demand: Demand, device: torch.device, mib: float, devices: int
) -> Recommendation | None:
    """The first that fits devices of so much memory: the largest batch, down to the recipe's own; that one with whole
    cells recomputed; smaller ones.

    The larger a pass, the more images its batch statistics span, and the less the host launches. An update sees as many
    images as the recipe has it see. None where one image at a time is too much.
    """
    data, asked = config.data, config.train.recompute
    total = data.global_batch or data.batch * devices
    share = total // devices if total % devices == 0 else total
    batches = [n for n in range(share, 0, -1) if share % n == 0]
    options = [(n, asked) for n in batches if n >= data.batch]
    options += [(n, mode) for n in batches if n <= data.batch for mode in dict.fromkeys((asked, MODES[-1]))]
    beside = demand.beside(config.optim.ema is not None)
    for batch, recompute in options:
        needed = beside + demand.peak(recompute, batch)
        if needed <= USABLE * mib:
            precision, overrides = _precision(config, device)
            overrides += [f"train.recompute={recompute}"] if recompute != asked else []
            overrides += [f"data.batch={batch}"] if batch != data.batch else []
            overrides += [f"data.global_batch={total}"] if batch != data.batch and data.global_batch is None else []
            return Recommendation(overrides, precision, recompute, batch, needed)
    return None


def _precision(config: AnyRunConfig, device: torch.device) -> tuple[Precision, list[str]]:
    """What a device computes the recipe in, and the override where it lacks what the recipe names."""
    try:
        return precision_on(device, config.train.precision), []
    except UserError:
        return precision_on(device, "mixed"), ["train.precision=mixed"]


def counted() -> dict[str, Demand]:
    """The counts that are kept, by recipe."""
    kept = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: _demand(entry) for name, entry in kept.items()}


def _demand(entry: dict[str, Any]) -> Demand:
    peaks = {mode: tuple(pair) for mode, pair in entry["peaks"].items()}
    return Demand(**{**entry, "batches": tuple(entry["batches"]), "peaks": peaks})


def keep(name: str, demand: Demand) -> None:
    """Puts the counts of a recipe into the file."""
    kept = json.loads(TABLE.read_text(encoding="utf-8")) | {name: asdict(demand)}
    lines = [f" {json.dumps(recipe)}: {json.dumps(kept[recipe])}" for recipe in sorted(kept)]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def count(file: Path) -> Demand:
    """The counts of a recipe in the precision that it asks for."""
    config, model = read_run_config(file, []), model_of(file)
    few = config.data.batch
    batches = (few, 2 * few)
    dtype = None if config.train.precision in ("fp32", "tf32") else torch.bfloat16
    peaks: dict[Recomputation, tuple[float, float]] = {}
    for mode in MODES:
        low, high = (round(step_memory(model, batch, mode, dtype).peak / MIB, 1) for batch in batches)
        peaks[mode] = (low, high)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(model).parameters())
    return Demand(fingerprint(file), parameters, round(flop_per_image(model) / 1e9, 3), batches, peaks)


def model_of(file: Path) -> ModelConfig:
    """The model of a recipe; one that is built on the run of another recipe has that one's model in it."""
    config: ModelConfig = read_run_config(file, []).model
    if isinstance(config, VDVAEConfig) and config.input_mean is None:  # measured when a run begins
        return config.model_copy(update={"input_mean": 0.0, "input_std": 1.0})
    if config.foundation is None:
        return config
    return config.built_on(model_of(file.with_name(f"{Path(config.foundation).name}.yaml")))


def fingerprint(file: Path) -> str:
    """Sixteen digits of what the counts of a recipe depend on, beside the code."""
    config = read_run_config(file, [])
    described = [model_of(file).model_dump(mode="json"), config.data.batch, config.train.precision]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
