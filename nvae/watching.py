"""What is looked at while a model trains: the bound on held-out images, reconstructions and samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from .data.config import DataConfig
from .data.loading import evaluation_batches
from .data.sets import open_images
from .distributed import rank, world_size
from .evaluation import evaluate_batches
from .models.base import Family
from .randomness import keyed_normal

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)


def validation(
    data: DataConfig, importance_samples: int, seed: int, device: torch.device
) -> Callable[[Family[Any]], dict[str, float]]:
    """A function that gives the bounds (nats) of a model on the validation images, over all ranks."""
    images = open_images(data, "validation")

    def validate(model: Family[Any]) -> dict[str, float]:
        batches = evaluation_batches(
            images, data, batch=data.batch, device=device, seed=seed, rank=rank(), world=world_size()
        )
        return evaluate_batches(model, batches, importance_samples=importance_samples, seed=seed).summary()

    return validate


def illustration(
    data: DataConfig, seed: int, device: torch.device, count: int = 16
) -> Callable[[Family[Any]], dict[str, Tensor]]:
    """A function that gives a model's pictures: images over their reconstructions, samples at four temperatures."""
    images = open_images(data, "validation")

    @torch.no_grad()
    def illustrate(model: Family[Any]) -> dict[str, Tensor]:
        batch = next(iter(evaluation_batches(images, data, batch=count, device=device, seed=seed)))
        shapes = model.latent_shapes(count)
        noise = keyed_normal(shapes, range(count), seed, "pictures", device)
        shown = [n[: len(batch.indices)] for n in noise]
        reconstructions = model(batch.images, shown).likelihood.mean()
        pictures = {"reconstructions": make_grid(torch.cat([batch.images, reconstructions]), nrow=count)}
        for temperature in TEMPERATURES:
            samples = model.sample(count, temperature, noise).mean()
            pictures[f"samples/{temperature}"] = make_grid(samples, nrow=4)
        return pictures

    return illustrate
