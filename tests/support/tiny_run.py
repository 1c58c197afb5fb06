"""Runs of a few thousand parameters on the embedded digits, in a fraction of a second."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvae.core.config import apply_overrides
from nvae.training.config import AnyRunConfig, run_config
from nvae.training.folder import RunFolder, inside
from nvae.training.run import train
from nvae.training.trainer import Outcome

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "family": "nvae",
        "image_size": 8,
        "image_channels": 1,
        "likelihood": {"kind": "bernoulli"},
        "groups": 2,
        "latent_channels": 2,
        "encoder_channels": 4,
        "decoder_channels": 4,
        "preprocess_cells": 1,
        "postprocess_cells": 1,
        "encoder_cells": 1,
        "decoder_cells": 1,
    },
    "data": {"name": "digits", "binarize": True, "batch": 32},
    "optim": {"warmup_steps": 2, "ema": 0.9},
    "train": {"steps": 6, "log_every": 1, "save_every": 2, "keep": 100, "device": "cpu"},
}

VERY_DEEP: dict[str, Any] = {
    "family": "vdvae",
    "image_size": 8,
    "image_channels": 1,
    "likelihood": {"kind": "bernoulli"},
    "width": 8,
    "latent_channels": 2,
    "encoder": "8x1,8d2,4d4,1x1",
    "decoder": "1x1,4m1,8m4,8x1",
    "bias_up_to": 4,
}
"""The model section of a Very Deep VAE as small."""

EVERY_BRICK = ("model.scales=2", "model.adaptive_groups=true", "model.flows=1")
"""Three groups on two scales, with flows."""

TIMINGS = ("images_per_second", "peak_memory_mib", "reserved_memory_mib", "tflops", "share_of_peak")


def tiny_run(*overrides: str) -> AnyRunConfig:
    """The config with `section.field=value` changes."""
    return run_config(apply_overrides(TINY, list(overrides)), "tiny")


def train_in(runs: Path, config: AnyRunConfig) -> Outcome:
    """Trains in runs/<name>, as train.py does in the folder that it is called in."""
    return train(config, RunFolder(inside(runs, config.name)))


def log(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def column(folder: Path, name: str) -> list[float]:
    """The values of one number, line by line."""
    return [line[name] for line in log(folder) if name in line]


def checkpoint(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The checkpoint of a step, or the newest."""
    if step is not None:
        content: dict[str, Any] = torch.load(folder / "checkpoints" / f"step-{step:09d}.pt", weights_only=True)
        return content
    newest = RunFolder(folder).newest()
    assert newest is not None
    return newest


def outcome(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return found


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two checkpoints, or parts of them, differ in a single bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if torch.equal(a, b) else [where]
    return [] if a == b else [f"{where}: {a} and {b}"]
