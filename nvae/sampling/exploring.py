"""What a page to play with a model shows: samples one group of which is drawn again, an image from its first groups.

Shapes: n images, C channels, H W space without the border that is padding, G latent groups (top-down), K prefixes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from ..core.errors import UserError
from ..core.randomness import keyed_normal
from ..data.config import DataConfig
from ..data.decoding import BadImage
from ..data.images import InMemory
from ..data.loading import batches_at
from ..data.sets import shaping
from ..models.base import Family, Temperature
from .images import pixels_of, usual_labels
from .latent_space import reconstruct


def redrawn(draws: Sequence[int], group: int | None = None) -> list[int]:
    """The numbers of the draws once a group, or with None every group, has been drawn again."""
    return [draw + (group in (None, place)) for place, draw in enumerate(draws)]


@torch.no_grad()
def samples_of_draws(
    model: Family[Any],
    draws: Sequence[int],
    count: int,
    temperature: Temperature = 1.0,
    *,
    seed: int = 0,
    label: int | None = None,
) -> Tensor:
    """Mean images (n, C, H, W) from the prior, of a class or of none; `draws` has the number of each group's draw.

    Noise is keyed on (seed, draw, group, number of the image): another draw of a group leaves that of the others.
    """
    device = next(model.parameters()).device
    numbers = range(count)
    noise = [
        keyed_normal([shape], numbers, seed, f"explore/{draw}/{group}", device)[0]
        for group, (draw, shape) in enumerate(zip(draws, model.latent_shapes(count), strict=True))
    ]
    labels = usual_labels(model, numbers) if label is None else torch.full((count,), label, device=device)
    return pixels_of(model.sample(count, temperature, noise, labels=labels), numbers)


def as_taken(image: Image.Image, config: DataConfig, device: torch.device, *, seed: int = 0) -> Tensor:
    """An image of any size, (1, C, H, W) with its border, as a model takes those of a set: cut, scaled, binarised.

    Smaller ones are enlarged. Raises UserError for what cannot be cut.
    """
    try:
        square = shaping(config.model_copy(update={"enlarge": True})).cut(image.convert("RGB"))
    except BadImage as error:
        raise UserError(f"image: {error}") from None
    pixels = torch.from_numpy(np.array(square)).reshape(1, config.size, config.size, config.channels)
    resident = InMemory(pixels.permute(0, 3, 1, 2))
    (batch,) = batches_at(resident, config, [[0]], largest=1, device=device, seed=seed)
    return batch.images


def prefixes(
    model: Family[Any],
    image: Tensor,
    groups: Sequence[int],
    temperature: Temperature = 1.0,
    *,
    seed: int = 0,
    label: int | None = None,
) -> Tensor:
    """An image (1, C, H, W) beside its reconstructions from the first k groups, for each of K k: (1 + K, 1, C, H, W).

    The rest is drawn from the prior. Raises UserError as `reconstruct` does.
    """
    labels = None if label is None else torch.tensor([label], device=image.device)
    found = [reconstruct(model, image, labels=labels, groups=k, temperature=temperature, seed=seed) for k in groups]
    return torch.stack([center_crop(image, [model.config.visible_size]), *found])
