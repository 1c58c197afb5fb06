"""How cost grows, what stays in memory, and how long it takes until the first update."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..core.memory import MIB, peak_mib
from ..kernels.operations import Mode, using
from ..models.base import Recomputation
from ..models.config import ModelConfig
from .memory import saved_bytes
from .timing import in_turns
from .workloads import Way, Workload


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line of what was varied."""

    values: list[int]
    seconds: list[float]

    @property
    def fit(self) -> tuple[float, float, float]:
        """Seconds of one more, seconds of none, and the share of the variance that the line explains (R²)."""
        slope, none = np.polyfit(self.values, self.seconds, 1)
        left = np.asarray(self.seconds) - (slope * np.asarray(self.values) + none)
        return float(slope), float(none), float(1 - np.var(left) / np.var(self.seconds))


def over_batches(workload: Workload, batches: Sequence[int], way: Way, rounds: int) -> Line:
    """An update's time over the size of the batch."""
    model = workload.trained()
    actions = {str(n): replace(workload, batch=n).training(model, way) for n in batches}
    times = in_turns(actions, rounds, workload.device)
    return Line(list(batches), [times.median(str(n)) for n in batches])


def has_groups(config: ModelConfig) -> bool:
    """Whether a number of groups says how deep the model is."""
    return "groups" in type(config).model_fields


def over_groups(workload: Workload, groups: Sequence[int], way: Way, rounds: int) -> Line:
    """An update's time over the number of groups at the largest latent resolution."""
    actions = {}
    for count in groups:
        deeper = replace(workload, config=workload.config.model_copy(update={"groups": count}))
        actions[str(count)] = deeper.training(deeper.trained(), way)
    times = in_turns(actions, rounds, workload.device)
    return Line(list(groups), [times.median(str(count)) for count in groups])


def saved_mib_per_image(config: ModelConfig, precision: torch.dtype | None) -> dict[str, float]:
    """What is kept for the backward pass, per image: plainly, ours, and ours with whole cells recomputed."""
    modes: dict[str, tuple[Recomputation, Mode]] = {
        "plain": ("none", "plain"),
        "ours": ("none", "auto"),
        "ours, cells recomputed": ("cells", "auto"),
    }
    found = {}
    for name, (recompute, mode) in modes.items():
        with using(mode):
            one, two = (saved_bytes(config, batch, recompute, precision) for batch in (1, 2))
        found[name] = (two - one) / MIB
    return found


def memory_growth(workload: Workload, way: Way, first: int = 5, last: int = 50) -> tuple[float, float]:
    """Peak memory in MiB of this process, or of its part of the GPU, up to update `first` and up to update `last`."""
    update = workload.training(workload.trained(), way)
    peaks = []
    for step in range(1, last + 1):
        update()
        if step in (first, last):
            peaks.append(peak_mib(workload.device))
    return peaks[0], peaks[1]


FIRST_UPDATE = """
import torch
from nvae.benchmark.workloads import MODELS, Way, Workload
workload = Workload(MODELS["{model}"], {batch}, torch.device("{device}"))
from nvae.models.registry import build
workload.training(build(workload.config).to(workload.device), Way(precision="{precision}"))()
"""


def seconds_to_first_update(model: str, batch: int, device: torch.device, way: Way) -> float:
    """From starting Python to the end of the first update, in a process of its own."""
    code = FIRST_UPDATE.format(model=model, batch=batch, device=device, precision=way.precision)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - start
