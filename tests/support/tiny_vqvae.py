"""Runs of both stages of a tiny VQ-VAE-2 of two levels on the embedded digits, in a fraction of a second."""

from pathlib import Path
from typing import Any

from tiny_run import TINY

from nvae.core.config import apply_overrides
from nvae.training.config import AnyRunConfig, run_config

IMAGES: dict[str, Any] = {"image_size": 8, "image_channels": 1, "likelihood": {"kind": "bernoulli"}}
FIRST = IMAGES | {
    "family": "vqvae",
    "factors": [2, 2],
    "channels": 8,
    "residual_channels": 4,
    "blocks": 1,
    "quantiser": {"codes": 6, "dim": 4},
}
SNAIL = {"channels": 16, "inner_channels": 8, "kernel": 3, "blocks": 1, "depth": 1, "dropout": 0.0}
SNAIL |= {"condition_channels": 6, "condition_blocks": 1}
PRIOR = IMAGES | {"family": "vqvae_prior", "levels": [SNAIL]}
OPTIM = {"name": "adamw", "lr": 3e-3, "warmup_steps": 2, "eps": 1e-8, "clip_norm": 1.0}
GREY = ("model.likelihood={kind: squared_error}", "data.binarize=false")
"""What makes a run one of grey digits, whose codes are always the same."""


def first_config(*overrides: str) -> AnyRunConfig:
    """A run of stage 1, `tiny`."""
    return run_config(apply_overrides({**TINY, "model": FIRST, "optim": OPTIM}, list(overrides)), "tiny")


def prior_config(codes: Path, *overrides: str) -> AnyRunConfig:
    """A run of stage 2, `prior`, on top of one."""
    data = {**TINY, "name": "prior", "model": {**PRIOR, "codes": str(codes)}, "optim": OPTIM}
    return run_config(apply_overrides(data, list(overrides)), "prior")
