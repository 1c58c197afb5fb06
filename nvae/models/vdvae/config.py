"""The config of a Very Deep VAE: its layers as strings, its widths (spec_vdvae, Bricks)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from ..config import ConditionalConfig, ModelConfig


@dataclass(frozen=True)
class Layer:
    """A block of a layer string."""

    resolution: int
    pool: int = 1
    """Encoder: the factor by which the block's output is pooled."""
    below: int | None = None
    """Decoder: the resolution whose state is enlarged and added first."""


class VDVAEConfig(ConditionalConfig):
    family: Literal["vdvae"] = "vdvae"
    """Which family of models."""
    encoder: str
    """Bottom-up blocks, `32x11,32d2,16x6,…`: `RxN` N blocks at resolution R, `R` one, `RdK` one, then pooled by K."""
    decoder: str
    """Top-down latent blocks, `1x1,4m1,4x2,…`: `RxN` N at resolution R, `R` one, `RmK` one that first adds the state of
    resolution K, enlarged."""
    width: int = Field(384, ge=1, le=65_536)
    """Channels of the states, at the image's resolution and wherever `widths` does not say otherwise."""
    widths: str = ""
    """Channels at other resolutions, `512:32,256:64,…`; they never grow with the resolution."""
    bottleneck: float = Field(0.25, gt=0, le=64)
    """Channels inside a block, as a fraction of the width."""
    latent_channels: int = Field(16, ge=1, le=65_536)
    """Channels of a latent variable, Z."""
    bias_up_to: int = Field(64, ge=0)
    """Largest resolution at which the decoder's state starts from a learned bias; above, it starts from zeros."""
    input_mean: float | None = None
    """Mean of the training images' pixels, from 0 to 255: subtracted from what the encoder sees. None: measured when a
    run begins, and kept with its weights."""
    input_std: float | None = Field(None, gt=0)
    """Their standard deviation, by which it is then divided; None likewise."""

    @model_validator(mode="after")
    def _possible(self) -> "VDVAEConfig":
        taps = self._check_encoder()
        self._check_decoder(taps)
        self._check_widths(taps)
        if (self.input_mean is None) != (self.input_std is None):
            raise ValueError("input_mean, input_std: give both, or neither for both to be measured")
        return self

    def continuing(self, saved: ModelConfig) -> "VDVAEConfig":
        """With the mean and standard deviation of `saved`, where it has some and this one has none."""
        if self.input_mean is not None or not isinstance(saved, VDVAEConfig):
            return self
        return self.model_copy(update={"input_mean": saved.input_mean, "input_std": saved.input_std})

    def _check_encoder(self) -> list[int]:
        """The resolutions of the encoder, largest first."""
        taps = [self.image_size]
        for layer in self.encoder_layers:
            if layer.resolution != taps[-1]:
                raise ValueError(f"encoder: a block at resolution {layer.resolution} follows an output of {taps[-1]}")
            if layer.resolution % layer.pool:
                raise ValueError(f"encoder: {layer.resolution} pixels can't be pooled by {layer.pool}")
            if layer.pool > 1:
                taps.append(layer.resolution // layer.pool)
        return taps

    def _check_decoder(self, taps: list[int]) -> None:
        resolutions = sorted({layer.resolution for layer in self.decoder_layers})
        for layer in self.decoder_layers:
            if layer.resolution not in taps:
                raise ValueError(
                    f"decoder: resolution {layer.resolution} is not one of the encoder's ({_listed(taps)})"
                )
            possible = [r for r in resolutions if r < layer.resolution and layer.resolution % r == 0]
            if layer.below is not None and layer.below not in possible:
                raise ValueError(
                    f"decoder: {layer.resolution}m{layer.below}: no state of resolution {layer.below} can be enlarged "
                    f"to {layer.resolution} (possible: {_listed(possible)})"
                )
        for needed, what in ((self.image_size, "the image's"), (taps[-1], "the encoder's last")):
            if needed not in resolutions:
                raise ValueError(f"decoder: has no block at {what} resolution, {needed}")

    def _check_widths(self, taps: list[int]) -> None:
        if self.width_at(taps[0]) != self.width:
            raise ValueError(
                f"widths: {self.width_at(taps[0])} at the image's resolution, {taps[0]}, where `width` is {self.width}"
            )
        for large, small in pairwise(taps):
            wide, narrow = self.width_at(large), self.width_at(small)
            if wide > narrow:
                raise ValueError(
                    f"widths: {wide} at resolution {large} but {narrow} at {small}: they can't grow with it"
                )
        if self.middle_at(self.image_size) < 1:
            raise ValueError(f"bottleneck: {self.bottleneck} of width {self.width} leaves no channel")

    @property
    def encoder_layers(self) -> list[Layer]:
        """The blocks bottom-up. Raises ValueError where the string is no layer string."""
        return parse_layers("encoder", self.encoder, "d")

    @property
    def decoder_layers(self) -> list[Layer]:
        """The latent blocks top-down. Raises ValueError likewise."""
        return parse_layers("decoder", self.decoder, "m")

    def width_at(self, resolution: int) -> int:
        """W at a resolution."""
        return parse_widths(self.widths).get(resolution, self.width)

    def middle_at(self, resolution: int) -> int:
        """Channels inside a block at a resolution."""
        return int(self.width_at(resolution) * self.bottleneck)


def parse_layers(field: str, text: str, joint: Literal["d", "m"]) -> list[Layer]:
    """The blocks of a layer string (spec_vdvae, Bricks); `joint` is the letter that changes resolution in it."""
    layers: list[Layer] = []
    for part in text.split(","):
        match = re.fullmatch(rf"\s*([1-9]\d{{,3}})(?:([x{joint}])([1-9]\d{{,3}}))?\s*", part)
        if match is None:
            raise ValueError(f"{field}: '{part}' is not a layer: write R, RxN or R{joint}K, with commas in between")
        resolution, kind, number = int(match[1]), match[2], int(match[3] or 1)
        if kind == "d":
            layers.append(Layer(resolution, pool=number))
        elif kind == "m":
            layers.append(Layer(resolution, below=number))
        else:
            layers += [Layer(resolution)] * number
    return layers


def parse_widths(text: str) -> dict[int, int]:
    """Resolution -> width, from `64:8,32:16`."""
    widths = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*([1-9]\d*):([1-9]\d*)\s*", part)
        if match is None:
            raise ValueError(f"widths: '{part}' is not a resolution and its width, as in 64:8")
        widths[int(match[1])] = int(match[2])
    return widths


def _listed(resolutions: Sequence[int]) -> str:
    return ", ".join(map(str, resolutions)) or "none"
