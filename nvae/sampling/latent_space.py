"""The latents opened: images to codes and back, reconstruction, interpolation, traversal, nearest neighbours.

ε is the noise for which the *prior* gives a latent, z = μp + σp ε. A code is walked in ε, not in z: there every group
is standard normal, and the deeper groups follow the shallower ones through their priors.

Shapes: B images, C channels, H W space without the border that is padding, G latent groups (top-down), L latent
channels and h w space of a group, T steps.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bricks.latents import Normal
from ..core.errors import UserError
from ..core.precision import in_float64
from ..core.randomness import keyed_normal
from ..data.loading import Batch
from ..models.base import Family, Features, Temperature
from .images import pixels_of


@dataclass(frozen=True)
class Code:
    """The latents of B images, one draw of each; lists are by group, top-down."""

    z: list[Tensor]
    """(B, L, h, w)."""
    posterior: list[Normal]
    """q(z | x), before its flow: μ and σ, each (B, L, h, w)."""
    prior: list[Normal]
    """p(z), given the groups before."""

    @property
    def epsilon(self) -> list[Tensor]:
        """The noise for which the prior gives z, (B, L, h, w)."""
        return [p.noise_of(z) for p, z in zip(self.prior, self.z, strict=True)]


@torch.no_grad()
def encode(model: Family[Any], images: Tensor, *, labels: Tensor | None = None, seed: int = 0) -> Code:
    """The code of images (B, C, H, W) in [0, 1], drawn from the posterior with noise keyed on (seed, row).

    `labels` are their classes, (B,) int64, if the model takes any.

    Raises UserError for other images, as for 0 … 255, and for a family whose latents are not Normal.
    """
    if model.latent_kind != "normal":
        raise UserError(
            f"{type(model).__name__}: its latents are not Normal but {model.latent_kind}: without μ, σ and ε"
        )
    model.check_images(images)
    noise = keyed_normal(model.latent_shapes(len(images)), range(len(images)), seed, "encode", images.device)
    output = model.decode(encoded(model, images, labels), noise=noise)
    return Code(output.z, output.posterior, output.prior)


@torch.no_grad()
def decode(
    model: Family[Any],
    z: Sequence[Tensor],
    *,
    labels: Tensor | None = None,
    temperature: Temperature = 1.0,
    seed: int = 0,
    count: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Mean images (B, C, H, W) of the first groups' latents; groups not given are drawn from the prior.

    `count` is B, needed only where no group is given. Draws are keyed on (seed, number), without `numbers` the row.
    """
    batch = len(z[0]) if z else count
    assert batch is not None
    device = next(model.parameters()).device
    noise = keyed_normal(model.latent_shapes(batch), numbers or range(batch), seed, "decode", device)
    return pixels_of(model.sample(batch, temperature, noise, latents=z, labels=labels), range(batch))


def reconstruct(
    model: Family[Any],
    images: Tensor,
    *,
    labels: Tensor | None = None,
    groups: int | None = None,
    temperature: Temperature = 1.0,
    seed: int = 0,
) -> Tensor:
    """Mean images (B, C, H, W) of the first `groups` groups from the posterior (None: all) and the rest from the prior.

    Raises UserError for more groups than there are, and for other images, as for 0 … 255.
    """
    model.check_images(images)
    total = len(model.latent_shapes(1))
    if groups is not None and not 0 <= groups <= total:
        raise UserError(f"groups: the model has {total} latent groups, found {groups}")
    noise = keyed_normal(model.latent_shapes(len(images)), range(len(images)), seed, "encode", images.device)
    with torch.no_grad():
        z = model.decode(encoded(model, images, labels), noise=noise).z
    return decode(model, z[:groups], labels=labels, temperature=temperature, seed=seed, count=len(images))


def encoded(model: Family[Any], images: Tensor, labels: Tensor | None) -> Features:
    """The features of images, and of their classes if there are any: a family without labels need not know of them."""
    return model.encode(images) if labels is None else model.encode(images, labels)


@torch.no_grad()
def from_epsilon(model: Family[Any], epsilon: Sequence[Tensor]) -> Tensor:
    """Mean images (B, C, H, W) of noise ε of every group."""
    batch = len(epsilon[0])
    return pixels_of(model.sample(batch, 1.0, list(epsilon)), range(batch))


def spherical(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """From a to b (both (B, …)) along the great circle between each pair, their lengths going over into each other."""
    flat_a, flat_b = in_float64(a.flatten(1)), in_float64(b.flatten(1))
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1)
    angle = torch.acos(cosine.clamp(-1 + 1e-9, 1 - 1e-9))[:, None]
    mixed = (torch.sin((1 - fraction) * angle) * flat_a + torch.sin(fraction * angle) * flat_b) / torch.sin(angle)
    return mixed.reshape(a.shape).to(a)


def interpolate(model: Family[Any], first: Tensor, second: Tensor, steps: int, *, seed: int = 0) -> Tensor:
    """Images (T, B, C, H, W) on the way from each image of `first` to the one of `second`, in ε, group by group."""
    codes = encode(model, torch.cat([first, second]), seed=seed).epsilon
    ends = [epsilon.chunk(2) for epsilon in codes]
    fractions = [step / max(steps - 1, 1) for step in range(steps)]
    return torch.stack([from_epsilon(model, [spherical(a, b, f) for a, b in ends]) for f in fractions])


def traverse(model: Family[Any], images: Tensor, group: int, steps: int, *, seed: int = 0) -> Tensor:
    """Images (T, B, C, H, W) as one group's ε turns from −δ over its own, in the middle, to δ, a fresh draw.

    The other groups keep their ε. Raises UserError for a group that is not there.
    """
    shapes = model.latent_shapes(len(images))
    if not 0 <= group < len(shapes):
        raise UserError(f"group: the model has {len(shapes)} latent groups, counted from 0; found {group}")
    epsilon = encode(model, images, seed=seed).epsilon
    fresh = keyed_normal([shapes[group]], range(len(images)), seed, "traverse", images.device)[0]
    frames = []
    for step in range(steps):
        angle = math.pi * (step / max(steps - 1, 1) - 0.5)
        turned = math.cos(angle) * epsilon[group] + math.sin(angle) * fresh
        frames.append(from_epsilon(model, [*epsilon[:group], turned, *epsilon[group + 1 :]]))
    return torch.stack(frames)


def nearest(images: Tensor, batches: Iterable[Batch], count: int) -> tuple[Tensor, Tensor]:
    """Distances and positions, both (B, count), of the nearest images among `batches`, nearest first.

    The distance is the Euclidean one between pixels (B, C, H, W) in [0, 1].
    """
    flat = images.flatten(1)
    distances = torch.full((len(flat), count), math.inf, device=flat.device)
    positions = torch.full((len(flat), count), -1, device=flat.device)
    for batch in batches:
        # Not by a matrix product, which cannot tell a copy from a near copy.
        found = torch.cdist(flat, batch.images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        here = torch.tensor(batch.indices, device=flat.device).expand(len(flat), -1)
        distances, order = torch.cat([distances, found], dim=1).sort(dim=1)
        positions = torch.cat([positions, here], dim=1).gather(1, order)[:, :count]
        distances = distances[:, :count]
    return distances, positions
