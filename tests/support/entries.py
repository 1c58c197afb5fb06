"""Entries of results.json, made up."""

import math
from typing import Any

import torch

from nvae.bricks.likelihoods import LikelihoodConfig
from nvae.evaluation.figures import Evaluation, Figures
from nvae.models.config import ModelConfig


class AnyConfig(ModelConfig):
    takes_squared_error = True


def entry_of(data: str = "cifar10", **changes: Any) -> dict[str, Any]:
    """An entry with bounds of 3 bits/dim on four images."""
    likelihood = LikelihoodConfig(**changes.pop("likelihood", {}))
    config = AnyConfig(family="any", image_size=32, likelihood=likelihood)
    nats = 3 * math.log(2) * 3 * 32**2
    four = torch.full((4,), nats) + torch.tensor([-2.0, -1.0, 1.0, 2.0])
    figures = Figures(
        torch.arange(4), four - 5, torch.full((4, 2), 2.5), torch.full((2, 3), 1.0), {1: four, 1000: four - 9}
    )
    base = {"data": data, "split": "test", "importance_samples": 1000, "draws": 1, "weights": "ema", "limit": None}
    base |= {"checkpoint": "step-1.pt", "density": "bound"}
    return {**base, **Evaluation([figures]).entry(config), **changes}
