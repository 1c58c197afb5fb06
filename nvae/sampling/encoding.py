"""What is kept of the latents of images: posterior means or draws, moments, codes.

Shapes: B images, L latent channels, h w space of a group; lists are by group, top-down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.randomness import keyed_normal
from ..data.loading import Batch
from ..models.base import Family
from .latent_files import latent_name
from .latent_space import encoded


@dataclass(frozen=True)
class Kept:
    """What is asked for of each image."""

    groups: int | None = None
    """The first so many; None: all."""
    drawn: bool = False
    """A draw from the posterior, keyed on (seed, number of the image), instead of its mean or its codes."""
    seed: int = 0
    moments: bool = False
    """Mean and sigma of the posteriors, too."""
    half: bool = False
    """float16 instead of float32."""


class Encoder:
    """A model that gives the latents of images."""

    def __init__(self, model: Family[Any], kept: Kept) -> None:
        """Raises UserError for what the model has not, and for what would have no effect."""
        self.model, self.kept = model, kept
        name, shapes = type(model).__name__, model.latent_shapes(1)
        self.is_discrete = model.latent_kind == "discrete"
        if kept.groups is not None and kept.groups > len(shapes):
            raise UserError(f"--groups: the model has {len(shapes)} latent groups, found {kept.groups}")
        if self.is_discrete and (kept.moments or kept.half):
            option = "--moments" if kept.moments else "--float16"
            raise UserError(f"{option}: has no effect on {name}, whose latents are codes; leave it out")
        if self.is_discrete and kept.drawn and model.codes and not model.has_importance_weights:
            raise UserError(
                f"--draw: has no effect on {name}, every draw of an image is its nearest codes; leave it out"
            )
        if self.is_discrete and not kept.drawn and not model.codes:
            raise UserError(f"{name}: its images have no codes that are always the same; draw some with --draw")
        self.shapes = [shape[1:] for shape in shapes][: kept.groups]
        """(L, h, w) of each group that is kept."""

    @property
    def columns(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """The arrays of a file by name: type, and shape (L, h, w) of an image's part."""
        kinds = ("z", "mean", "scale") if self.kept.moments else ("z",)
        return {
            latent_name(kind, group): (self._dtype, shape) for kind in kinds for group, shape in enumerate(self.shapes)
        }

    @property
    def meaning(self) -> str:
        """What `z` is, in words."""
        if self.kept.drawn:
            return "posterior draws"
        return "codes" if self.is_discrete else "posterior means"

    @torch.no_grad()
    def rows(self, batch: Batch, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The part of a batch of each of the `columns`, (B, L, h, w); `numbers` are those of its images.

        Raises UserError for other images than the model takes.
        """
        model = self.model
        model.check_images(batch.images)
        if self.is_discrete and not self.kept.drawn:
            return self._arrays("z", [map_[:, None] for map_ in model.codes_of(batch.images)])
        output = model.decode(
            encoded(model, batch.images, batch.labels if model.config.classes else None), noise=self._noise(numbers)
        )
        found = self._arrays("z", output.z)
        if self.kept.moments:
            found |= self._arrays("mean", [normal.mean for normal in output.posterior])
            found |= self._arrays("scale", [normal.sigma for normal in output.posterior])
        return found

    def _noise(self, numbers: Sequence[int]) -> list[Tensor]:
        """What makes a draw of each posterior, or its mean, group by group."""
        shapes, device = self.model.latent_shapes(len(numbers)), next(self.model.parameters()).device
        if not self.kept.drawn:
            return [torch.zeros(shape, device=device) for shape in shapes]
        return keyed_normal(shapes, numbers, self.kept.seed, "encode", device)

    def _arrays(self, kind: str, groups: Sequence[Tensor]) -> dict[str, np.ndarray]:
        kept = groups[: len(self.shapes)]
        return {
            latent_name(kind, group): z.cpu().numpy().astype(self._dtype, order="C") for group, z in enumerate(kept)
        }  # in C's order: safetensors would write those of channels that come last as they lie

    @property
    def _dtype(self) -> np.dtype[Any]:
        if not self.is_discrete:
            return np.dtype(np.float16 if self.kept.half else np.float32)
        return np.min_scalar_type(self.model.codes - 1) if self.model.codes else np.dtype(np.int64)


def as_latents(model: Family[Any], arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Of the first groups, each (B, L, h, w), what a model takes, on its device; the opposite of `Encoder.rows`.

    Raises UserError for other shapes than the model's, for numbers that are not finite, and for what are no codes.
    """
    shapes, device = model.latent_shapes(1), next(model.parameters()).device
    if len(arrays) > len(shapes):
        raise UserError(f"the model has {len(shapes)} latent groups, found {len(arrays)}")
    for group, (array, (_, *wanted)) in enumerate(zip(arrays, shapes, strict=False)):
        name = latent_name("z", group)
        if list(array.shape[1:]) != wanted:
            raise UserError(f"{name}: is {array.shape[1:]} of an image, the model takes {tuple(wanted)}")
        if model.latent_kind == "discrete":
            _require_codes(name, array, model.codes)
        elif not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"{name}: takes floating-point numbers, found {array.dtype}")
        elif not np.isfinite(array).all():
            raise UserError(f"{name}: takes finite numbers, found others")
    dtype = np.int64 if model.latent_kind == "discrete" else np.float32
    return [torch.from_numpy(array.astype(dtype)).to(device) for array in arrays]


def _require_codes(name: str, array: np.ndarray, codes: int) -> None:
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name}: takes codes, whole numbers, found {array.dtype}")
    if array.min() < 0 or (codes and array.max() >= codes):
        raise UserError(f"{name}: takes codes from 0 to {codes - 1}, found {array.min()} to {array.max()}")
