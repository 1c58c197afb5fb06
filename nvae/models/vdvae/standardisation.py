"""What a Very Deep VAE's encoder sees of its images: their pixels with mean 0 and standard deviation 1 (spec_vdvae)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.precision import in_float64
from .config import VDVAEConfig


class Standardisation(nn.Module):
    """(255·x − mean) / std (spec_vdvae, Data and loss), with the config's numbers or with measured ones.

    Measured ones are buffers, for they belong to the weights. The config's are none, and no state dict changes them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VDVAEConfig) -> None:
        super().__init__()
        self.moments: tuple[float, float] | None = None
        """The mean and standard deviation; None as long as nothing was measured. Numbers, not tensors: by those a GPU
        divides with another rounding."""
        if config.input_mean is not None and config.input_std is not None:
            self.moments = config.input_mean, config.input_std
        self.is_given = self.moments is not None
        if not self.is_given:
            self.register_buffer("mean", torch.tensor(0.0))
            self.register_buffer("std", torch.tensor(0.0))  # until it is measured
        self.register_load_state_dict_pre_hook(_without_measured)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_read)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] as the encoder sees them. Raises UserError where nothing was measured."""
        if self.moments is None:
            raise UserError("model.input_mean, model.input_std: not measured; train a run, or give them in the config")
        mean, std = self.moments
        return (255 * x - mean) / std

    @torch.no_grad()
    def measure(self, images: Iterable[Tensor]) -> None:
        """Takes the numbers of these images (B, C, H, W) in [0, 1]."""
        mean, std = pixel_moments(images)
        self.mean.fill_(mean)
        self.std.fill_(std)
        _read(self)


def _without_measured(module: Standardisation, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Takes measured numbers out of a state that is about to be loaded, where the config gives its own."""
    if module.is_given:
        for name in ("mean", "std"):
            state.pop(prefix + name, None)


def _read(module: Standardisation, _: Any = None) -> None:
    """Reads the numbers from the buffers, which may have changed."""
    if not module.is_given:
        mean, std = float(module.mean), float(module.std)
        module.moments = (mean, std) if std > 0 else None


def pixel_moments(images: Iterable[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation, from 0 to 255 and to 4 decimals, of all pixels of (B, C, H, W) images in [0, 1]."""
    sums = torch.zeros(3, dtype=torch.float64)  # how many, Σ, Σ²
    for batch in images:
        pixels = 255 * in_float64(batch)
        sums += torch.stack([torch.ones_like(pixels).sum(), pixels.sum(), pixels.square().sum()]).cpu()
    count, total, squares = sums.tolist()
    mean = total / count
    std = math.sqrt(max(squares / count - mean**2, 0))
    if std == 0:
        raise UserError("data: the training images are all of one grey")
    return round(mean, 4), round(std, 4)
