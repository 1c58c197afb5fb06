"""Images from the prior: temperatures, keyed noise, batch-norm re-adjustment (spec §7).

Image number i is drawn from (seed, i), and from its class where it has one, alone: it is the same picture whatever the
batch size and the number of ranks.

Shapes: n or B images, C channels, H W space without the border that is padding, G latent groups (top-down).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from ..bricks.likelihoods import Likelihood
from ..bricks.normalisation import BatchNorm, measuring
from ..core.distributed import from_rank_zero, rank, sum_over_ranks, world_size
from ..core.errors import UserError
from ..core.files import atomic_file, tensors_in
from ..core.precision import Precision, autocast, in_float64
from ..core.randomness import keyed_normal, keyed_uniform
from ..models.base import Family, Temperature

Pixels = Literal["mean", "draw"]
TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
"""At which samples are shown."""


def temperature_of(values: Sequence[float], model: Family[Any]) -> Temperature:
    """One temperature for all groups, or one per group, from one value, one per scale, or one per group.

    Scales and groups are top-down, the smallest first. Raises UserError for another number of values.
    """
    if len(values) == 1:
        return values[0]
    sizes = [shape[2:] for shape in model.latent_shapes(1)]
    scales = list(dict.fromkeys(sizes))
    if len(values) == len(scales):
        return [values[scales.index(size)] for size in sizes]
    if len(values) == len(sizes):
        return list(values)
    raise UserError(
        f"temperature: {len(values)} values; give one, one per scale ({len(scales)}, smallest first), or one per "
        f"latent group ({len(sizes)}, top-down)"
    )


# --------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample_images(
    model: Family[Any],
    indices: Sequence[int],
    temperature: Temperature = 1.0,
    *,
    classes: Sequence[int] | None = None,
    seed: int = 0,
    pixels: Pixels = "mean",
) -> Tensor:
    """The samples of these numbers, (n, C, H, W) in [0, 1], each of its class if there are `classes` (−1: of none).

    Without, samples are of those of `usual_labels`.

    `pixels`: the mean image of p(x | z), or a draw from it (at temperature 1; the latents' is `temperature`).
    """
    device = next(model.parameters()).device
    noise = keyed_normal(model.latent_shapes(len(indices)), indices, seed, "sample", device)
    labels = usual_labels(model, indices) if classes is None else torch.tensor(classes, device=device)
    likelihood = model.sample(len(indices), temperature, noise, labels=labels)
    return pixels_of(likelihood, indices, seed=seed, pixels=pixels)


def usual_labels(model: Family[Any], indices: Sequence[int]) -> Tensor | None:
    """The classes (n,) of samples of these numbers that no class was asked of: none.

    A model that has learned no images without a class draws number i of class i mod K.
    """
    if model.config.knows_unlabelled:
        return None
    classes: int = model.config.classes
    return torch.tensor(indices, device=next(model.parameters()).device) % classes


def pixels_of(likelihood: Likelihood, indices: Sequence[int], *, seed: int = 0, pixels: Pixels = "mean") -> Tensor:
    """The images of a likelihood without their border, (n, C, H, W): means, or draws keyed on (seed, number)."""
    if pixels == "mean":
        return likelihood.visible(likelihood.mean())
    uniform = keyed_uniform(likelihood.noise_shape, indices, seed, "pixels", likelihood.params.device)
    return likelihood.visible(likelihood.sample(uniform=uniform))


def sample_batches(
    model: Family[Any],
    numbers: Sequence[int],
    temperature: Temperature = 1.0,
    *,
    classes: Sequence[int] | None = None,
    seed: int = 0,
    batch: int = 16,
    pixels: Pixels = "mean",
    precision: Precision = "fp32",
) -> Iterator[tuple[list[int], Tensor]]:
    """The samples of these numbers, this rank's share in batches: numbers, and what `sample_images` gives.

    `classes` are one for each number.
    """
    device = next(model.parameters()).device
    for places in tqdm(list(shares(len(numbers), batch)), "sampling", unit="batch", disable=rank() != 0):
        chosen = [numbers[place] for place in places]
        of = None if classes is None else [classes[place] for place in places]
        with autocast(device, precision):
            images = sample_images(model, chosen, temperature, classes=of, seed=seed, pixels=pixels)
        yield chosen, images


def shares(count: int, batch: int) -> Iterator[list[int]]:
    """The numbers below `count` in batches, those of this rank: every number falls to exactly one rank."""
    batches = [list(range(first, min(first + batch, count))) for first in range(0, count, batch)]
    yield from batches[rank() :: world_size()]


# ---------------------------------------------------------------------------------------------- batch-norm statistics


@torch.no_grad()
def readjust(
    model: Family[Any], temperature: Temperature, *, seed: int = 0, batches: int = 500, batch: int = 16
) -> dict[str, Tensor]:
    """Sets the decoder's batch-norm statistics to what it sees when sampling at a temperature (spec §7).

    The decoder runs in training mode, in float32, on batches of prior samples, and the statistics of all batches are
    averaged; ranks share the batches. Returns the statistics by their names in the model, {} where there are none.
    Raises UserError rather than leave a non-finite statistic.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    if not norms:
        return {}
    buffers = [buffer for norm in norms.values() for buffer in (norm.running_mean, norm.running_var)]
    device = buffers[0].device
    total = torch.zeros_like(in_float64(torch.cat(buffers)))
    model.train()
    with measuring(list(norms.values())), torch.autocast(device.type, enabled=False):
        for number in range(rank(), batches, world_size()):
            indices = range(number * batch, (number + 1) * batch)
            noise = keyed_normal(model.latent_shapes(batch), indices, seed, "readjust", device)
            model.sample(batch, temperature, noise, labels=usual_labels(model, indices))
            total += in_float64(torch.cat(buffers))  # what the decoder does not use adds its own value each time
    model.eval()
    average = sum_over_ranks(total) / batches
    for buffer, value in zip(buffers, torch.split(average, [len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(value)
    for name, norm in norms.items():
        if not bool(norm.running_var.isfinite().all()):
            raise UserError(
                f"temperature {temperature}: batch norm '{name}' meets non-finite numbers in float32; "
                "sample without re-adjustment, or look at the weights"
            )
    names = [f"{name}.{kind}" for name in norms for kind in ("running_mean", "running_var")]
    return {name: buffer.clone() for name, buffer in zip(names, buffers, strict=True)}


def readjust_cached(
    model: Family[Any],
    temperature: Temperature,
    folder: Path,
    weights: str,
    *,
    seed: int = 0,
    batches: int = 500,
    batch: int = 16,
) -> None:
    """`readjust`, once per temperature: kept in `folder`, under what it depends on. `weights`: their fingerprint."""
    settings = json.dumps([weights, temperature, seed, batches, batch])
    file = folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.safetensors"
    kept: dict[str, Tensor] | None = from_rank_zero(tensors_in(file) if rank() == 0 else None)
    if kept is not None:
        model.load_state_dict(kept, strict=False)
        return
    found = readjust(model, temperature, seed=seed, batches=batches, batch=batch)
    if rank() == 0 and found:
        with atomic_file(file) as handle:
            handle.write(safetensors.torch.save({name: value.cpu() for name, value in found.items()}))
