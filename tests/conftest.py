"""What every test may use: seeded random numbers, tiny models, and markers that skip what this machine cannot run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.config import validate
from nvae.models.nvae import NVAEConfig

SHARED = Path(__file__).parents[1].parent / "shared"

SMALL: dict[str, Any] = {
    "image_size": 8,
    "likelihood": {"components": 2},
    "groups": 2,
    "latent_channels": 3,
    "encoder_channels": 4,
    "decoder_channels": 4,
    "preprocess_cells": 1,
    "postprocess_cells": 1,
    "encoder_cells": 1,
    "decoder_cells": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "one scale": {},
    "two scales and a flow": {"scales": 2, "groups": 2, "adaptive_groups": True, "flows": 1},
    "vanilla": {"groups": 1, "flows": 1},
    "binary with a border": {"image_channels": 1, "likelihood": {"kind": "bernoulli", "border": 1}},
    "grey mixture of 5 bits": {"image_channels": 1, "likelihood": {"bits": 5, "components": 1}},
    "normal pixels, plain posterior": {"likelihood": {"kind": "normal"}, "residual_posterior": False},
    "no batch norm": {"architecture": "res_elu"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU or ../shared where there is none."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if not SHARED.is_dir():
        reasons["shared"] = "no ../shared beside the repository"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> Callable[..., NVAEConfig]:
    """Makes the config of a model of a few thousand parameters on 8×8 RGB images; fields may be changed."""

    def make(**changes: Any) -> NVAEConfig:
        return validate(NVAEConfig, {**SMALL, **changes}, "tiny")

    return make


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def any_config(request: pytest.FixtureRequest, tiny_config: Callable[..., NVAEConfig]) -> NVAEConfig:
    """The tiny config of each kind of model in turn."""
    return tiny_config(**request.param)
