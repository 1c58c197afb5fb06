"""The config of an NVAE: the geometry of its hierarchy (spec §2), and its objective."""

import math
from typing import Literal

from pydantic import Field, model_validator

from ...bricks.cells import ARCHITECTURES, Op, Separable
from ...core.config import nearest
from ..config import ConditionalConfig
from .objective import ObjectiveConfig


class NVAEConfig(ConditionalConfig):
    family: Literal["nvae"] = "nvae"
    """Which family of models."""
    scales: int = Field(1, ge=1, le=16)
    """Number of latent resolutions; each is half the one before."""
    groups: int = Field(10, ge=1, le=1000)
    """Latent groups at the largest latent resolution."""
    adaptive_groups: bool = False
    """Halve the number of groups from scale to scale; otherwise all scales have the same."""
    min_groups: int = Field(1, ge=1, le=1000)
    """Fewest groups a scale may have when adaptive."""
    latent_channels: int = Field(20, ge=1, le=65_536)
    """Channels of a latent variable, L."""
    encoder_channels: int = Field(32, ge=4, le=65_536)
    """Bottom-up channels at the image's resolution; they double at every halving."""
    decoder_channels: int = Field(32, ge=4, le=65_536)
    """Top-down channels at the image's resolution; they double at every halving."""
    halvings: int = Field(1, ge=0, le=16)
    """Halvings before the largest latent resolution (blocks of pre-processing, and of post-processing)."""
    preprocess_cells: int = Field(2, ge=1, le=1000)
    """Cells of a pre-processing block; the last one halves the resolution."""
    postprocess_cells: int = Field(2, ge=1, le=1000)
    """Cells of a post-processing block; the first one doubles the resolution."""
    encoder_cells: int = Field(2, ge=0, le=1000)
    """Bottom-up cells per latent group."""
    decoder_cells: int = Field(2, ge=0, le=1000)
    """Top-down cells per latent group."""
    flows: int = Field(0, ge=0, le=1000)
    """Inverse-autoregressive flow cells per group, on the posterior."""
    squeeze_excite: bool = True
    """Squeeze-and-excitation in every cell."""
    residual_posterior: bool = True
    """The encoder gives the posterior relative to the prior (paper §3.2)."""
    architecture: str = "res_mbconv"
    """Which cells stand where: a row of the architecture table (nvae/bricks/cells.py)."""
    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _possible(self) -> "NVAEConfig":
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: no '{self.architecture}'{nearest(self.architecture, ARCHITECTURES)}")
        halvings = self.halvings + self.scales - 1
        if self.image_size % 2**halvings:
            possible = (self.image_size & -self.image_size).bit_length() - 1
            raise ValueError(
                f"image_size: {self.image_size} pixels can be halved {possible} times; halvings={self.halvings} and "
                f"scales={self.scales} need {halvings} (a multiple of {2**halvings} pixels)"
            )
        self._require_whole_groups("encoder_channels", ARCHITECTURES[self.architecture].preprocess)
        self._require_whole_groups("decoder_channels", ARCHITECTURES[self.architecture].postprocess)
        return self

    def _require_whole_groups(self, field: str, ops: tuple[Op, ...]) -> None:
        """Raises ValueError where the groups of a convolution do not divide the channels at the image's resolution."""
        for op in ops if self.halvings else ():
            channels: int = getattr(self, field)
            if isinstance(op, Separable) and op.groups and op.expansion * channels % op.groups:
                raise ValueError(
                    f"{field}: {self.architecture} convolves in {op.groups} groups, so a multiple of "
                    f"{op.groups // math.gcd(op.groups, op.expansion)} is needed, found {channels}"
                )

    def idle(self) -> dict[str, str]:
        own = {} if self.adaptive_groups else {"min_groups": "without adaptive_groups all scales have the same"}
        return super().idle() | own

    @property
    def groups_per_scale(self) -> list[int]:
        """Number of groups of each scale, bottom-up from the largest latent resolution (spec §2)."""
        if not self.adaptive_groups:
            return [self.groups] * self.scales
        return [max(self.groups // 2**scale, self.min_groups) for scale in range(self.scales)]

    @property
    def levels(self) -> list[int]:
        """The halvings of each group's resolution, top-down."""
        by_scale = enumerate(self.groups_per_scale)
        return [self.halvings + scale for scale, count in reversed(list(by_scale)) for _ in range(count)]

    @property
    def is_vanilla(self) -> bool:
        """One scale with one group: a plain VAE, without towers (spec §2)."""
        return self.groups_per_scale == [1]
