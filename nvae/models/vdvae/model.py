"""The Very Deep VAE: residual blocks and up to 78 layers of latents, down to 1×1 (Child 2021; spec_vdvae).

Shapes: B batch, C image channels, W width and R resolution of a state, Z latent channels, N latent blocks (top-down),
K draws of an image. "Bottom-up" is the encoder, from image to code; "top-down" the decoder. A *tap* is the encoder's
last output at a resolution, after GELU: what the posteriors of that resolution see of the image.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...bricks import convolutions
from ...bricks.convolutions import Conv2d
from ...bricks.latents import Normal, score, sum_with_each
from ...bricks.likelihoods import LIKELIHOODS, Likelihood, quantise
from ...bricks.recomputation import Recomputable
from ...core.errors import UserError
from ...core.precision import at_least_float32
from ...kernels.activations import ACTIVATIONS
from ...kernels.convolution import Geometry, for_autocast
from ...kernels.fusion import compile_each
from ..base import (
    Draw,
    Family,
    Metrics,
    ModelConfig,
    Noise,
    Output,
    Recomputation,
    Temperature,
    temperatures,
)


@dataclass(frozen=True)
class Layer:
    """A block of a layer string."""

    resolution: int
    pool: int = 1
    """Encoder: the factor by which the block's output is pooled."""
    below: int | None = None
    """Decoder: the resolution whose state is enlarged and added first."""


class VDVAEConfig(ModelConfig):
    family: Literal["vdvae"] = "vdvae"
    """Which family of models."""
    encoder: str
    """Bottom-up blocks, `32x11,32d2,16x6,…`: `RxN` N blocks at resolution R, `R` one, `RdK` one, then pooled by K."""
    decoder: str
    """Top-down latent blocks, `1x1,4m1,4x2,…`: `RxN` N at resolution R, `R` one, `RmK` one that first adds the state of
    resolution K, enlarged."""
    width: int = Field(384, ge=1)
    """Channels of the states, at the image's resolution and wherever `widths` does not say otherwise."""
    widths: str = ""
    """Channels at other resolutions, `512:32,256:64,…`; they never grow with the resolution."""
    bottleneck: float = Field(0.25, gt=0)
    """Channels inside a block, as a fraction of the width."""
    latent_channels: int = Field(16, ge=1)
    """Channels of a latent variable, Z."""
    bias_up_to: int = Field(64, ge=0)
    """Largest resolution at which the decoder's state starts from a learned bias; above, it starts from zeros."""
    input_mean: float | None = None
    """Mean of the training images' pixels, from 0 to 255: subtracted from what the encoder sees. None: measured when a
    run begins, and kept in its config."""
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

    def settled(self, saved: "VDVAEConfig | None", images: Iterable[Tensor]) -> "VDVAEConfig":
        """With the mean and standard deviation of the run, or of the images, unless it has its own."""
        if self.input_mean is not None:
            return self
        mean, std = pixel_moments(images) if saved is None else (saved.input_mean, saved.input_std)
        return self.model_copy(update={"input_mean": mean, "input_std": std})

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


def pixel_moments(images: Iterable[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation, from 0 to 255 and to 4 decimals, of all pixels of (B, C, H, W) images in [0, 1]."""
    sums = torch.zeros(3, dtype=torch.float64)  # how many, Σ, Σ²
    for batch in images:
        pixels = 255 * batch.double()
        sums += torch.stack([torch.ones_like(pixels).sum(), pixels.sum(), pixels.square().sum()])
    count, total, squares = sums.tolist()
    mean = total / count
    std = math.sqrt(max(squares / count - mean**2, 0))
    if std == 0:
        raise UserError("data: the training images are all of one grey")
    return round(mean, 4), round(std, 4)


def _listed(resolutions: Sequence[int]) -> str:
    return ", ".join(map(str, resolutions)) or "none"


# ----------------------------------------------------------------------------------------------------------- bricks


def convolution(in_channels: int, out_channels: int, kernel_size: int = 1, *, scale: float = 1.0) -> Conv2d:
    """A plain convolution that keeps the resolution: PyTorch's starting weights times `scale`, biases at 0."""
    layer = Conv2d(in_channels, out_channels, kernel_size, normalised=False)
    with torch.no_grad():
        layer.weight.mul_(scale)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """GELU → 1×1 → GELU → 3×3 → GELU → 3×3 → GELU → 1×1 (spec_vdvae, Bricks); the 3×3s are 1×1s up to R = 2.

    `scale` is of the last starting weights.
    """

    def __init__(self, in_channels: int, middle: int, out_channels: int, resolution: int, scale: float = 1.0) -> None:
        super().__init__()
        kernel_size = 3 if resolution > 2 else 1
        self.reduce = convolution(in_channels, middle)
        self.first = convolution(middle, middle, kernel_size)
        self.second = convolution(middle, middle, kernel_size)
        self.expand = convolution(middle, out_channels, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, R, R) -> (B, out, R, R). Under autocast a state, a long sum, is rounded here and nowhere else."""
        return self.reduced(self.reduce(for_autocast(x), "gelu"))

    def reduced(self, x: Tensor) -> Tensor:
        """What follows the first convolution: (B, middle, R, R) -> (B, out, R, R)."""
        return cast(Tensor, self.expand(self.second(self.first(x, "gelu"), "gelu"), "gelu"))


class EncoderBlock(Recomputable):
    """A residual block; then, where the resolution changes, pooling and channels of zeros up to the next width."""

    def __init__(self, config: VDVAEConfig, layer: Layer, scale: float) -> None:
        super().__init__()
        resolution, width = layer.resolution, config.width_at(layer.resolution)
        self.block = Block(width, config.middle_at(resolution), width, resolution, scale)
        self.pool = layer.pool
        self.growth = config.width_at(resolution // layer.pool) - width

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, R, R) -> (B, W', R/pool, R/pool)."""
        return self.run(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.block(x)
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool)
        return F.pad(x, (0, 0, 0, 0, 0, self.growth)) if self.growth else x


class LatentBlock(Recomputable):
    """One layer of latents: its prior, its posterior, and how z enters the state (spec_vdvae, Decoder)."""

    def __init__(self, config: VDVAEConfig, layer: Layer, scale: float) -> None:
        super().__init__()
        self.resolution, self.below = layer.resolution, layer.below
        self.width, self.latent_channels = config.width_at(layer.resolution), config.latent_channels
        middle = config.middle_at(layer.resolution)
        self.posterior = Block(2 * self.width, middle, 2 * self.latent_channels, self.resolution)
        self.prior = Block(self.width, middle, 2 * self.latent_channels + self.width, self.resolution, scale=0.0)
        self.project = convolution(self.latent_channels, self.width, scale=scale)
        self.residual = Block(self.width, middle, self.width, self.resolution, scale)

    def forward(self, x: Tensor, below: Tensor | None, tap: Tensor, noise: Tensor, given: Tensor | None) -> Draw:
        """A draw from the posterior, or the given z scored, and the state after it.

        x (K·B, W, R, R), below (K·B, W', R', R'), tap (B, W, R, R), noise and given (K·B, Z, R, R); K any number.
        """
        return self.run(self._forward, x, below, tap, noise, given)

    def generate(
        self, x: Tensor, below: Tensor | None, noise: Tensor, temperature: float, given: Tensor | None
    ) -> Tensor:
        """The state (B, W, R, R) after a draw from the prior at a temperature, or after the given z."""
        x = self._joined(x, below)
        p, x = self._prior(x, self.prior(x), temperature)
        return self._entered(x, p.draw(noise) if given is None else given)

    def _forward(self, x: Tensor, below: Tensor | None, tap: Tensor, noise: Tensor, given: Tensor | None) -> Draw:
        x = self._joined(x, below)
        for_prior, for_posterior = self._reduced(x, tap)
        q = Normal.from_log_sigma(self.posterior.reduced(for_posterior))
        p, x = self._prior(x, self.prior.reduced(for_prior))
        z = q.draw(noise) if given is None else given
        return Draw(self._entered(x, z), z, score(q, p, z, z, closed=True), q, p)

    def _joined(self, x: Tensor, below: Tensor | None) -> Tensor:
        """The state after the first channels of the one below, enlarged, were added."""
        if below is None:
            return x
        factor = self.resolution // below.shape[-1]
        return x + F.interpolate(below[:, : self.width], scale_factor=factor, mode="nearest")

    def _reduced(self, x: Tensor, tap: Tensor) -> tuple[Tensor, Tensor]:
        """The first convolutions of the prior, of the state, and of the posterior, of concat(state, tap).

        Both (K·B, middle, R, R). The state's parts are made in one; the tap's is made once an image and added.
        """
        prior, posterior = self.prior.reduce, self.posterior.reduce
        assert prior.bias is not None and posterior.bias is not None
        of_state, of_tap = torch.split(posterior.weight, self.width, dim=1)
        weight, bias = torch.cat([prior.weight, of_state]), torch.cat([prior.bias, posterior.bias])
        for_prior, for_posterior = convolutions.convolution(for_autocast(x), weight, bias, Geometry(), "gelu").chunk(
            2, dim=1
        )
        return for_prior, sum_with_each(for_posterior, convolutions.convolution(tap, of_tap, None, Geometry()))

    def _prior(self, x: Tensor, raw: Tensor, temperature: float = 1.0) -> tuple[Normal, Tensor]:
        """p(z) from what the prior's block says, and the state with what that adds to it."""
        raw, h = torch.split(raw, [2 * self.latent_channels, self.width], dim=1)
        return Normal.from_log_sigma(raw, temperature), x + h

    def _entered(self, x: Tensor, z: Tensor) -> Tensor:
        """The state after z has entered it."""
        x = x + self.project(z)
        return cast(Tensor, x + self.residual(x))


# ------------------------------------------------------------------------------------------------------ the network


@dataclass
class Features:
    """The bottom-up pass of a batch, K draws to come of each of its B images."""

    target: Tensor
    """(K·B, C, H, W), the quantised images."""
    taps: dict[int, Tensor]
    """The tap (B, W, R, R) of each resolution R of the decoder."""

    def repeated(self, times: int) -> "Features":
        """The batch `times` over: draw k of image b is row k·B + b. The taps stay one an image."""
        return Features(self.target.repeat(times, 1, 1, 1), self.taps)


class VDVAE(Family[VDVAEConfig]):
    """One ladder of states, an image's way up and its way down (spec_vdvae)."""

    config_type: ClassVar[type[ModelConfig]] = VDVAEConfig

    def __init__(self, config: VDVAEConfig) -> None:
        super().__init__(config)
        up, down = config.encoder_layers, config.decoder_layers
        self.stem = convolution(config.image_channels, config.width, 3)
        self.encoder = nn.ModuleList(EncoderBlock(config, layer, math.sqrt(1 / len(up))) for layer in up)
        self.decoder = nn.ModuleList(LatentBlock(config, layer, math.sqrt(1 / len(down))) for layer in down)
        self.biases = nn.ParameterDict()
        for resolution in self._resolutions():
            if resolution <= config.bias_up_to:
                bias = torch.zeros(1, config.width_at(resolution), resolution, resolution)
                self.biases[str(resolution)] = bias.contiguous(memory_format=torch.channels_last)
        self.gain = nn.Parameter(torch.ones(1, config.width, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, config.width, 1, 1))
        likelihood = LIKELIHOODS[config.likelihood.kind]
        self.head = convolution(config.width, likelihood.params_per_pixel(config.likelihood, config.image_channels))

    # ------------------------------------------------------------------------------------------------- the contract

    def encode(self, x: Tensor) -> Features:
        """The bottom-up pass of images (B, C, H, W) in [0, 1]. The encoder sees all 8 bits of an image."""
        config = self.config
        if config.input_mean is None or config.input_std is None:
            raise UserError("model.input_mean, model.input_std: not measured; train a run, or give them in the config")
        x_normalised = (255 * x - config.input_mean) / config.input_std
        state = at_least_float32(self.stem(x_normalised.contiguous(memory_format=torch.channels_last)))
        last = {config.image_size: state}
        for block in self.encoder:
            state = block(state)
            last[state.shape[-1]] = state
        taps = {resolution: ACTIVATIONS["gelu"](for_autocast(last[resolution])) for resolution in self._resolutions()}
        return Features(quantise(x, config.likelihood.bits, config.likelihood.grid), taps)

    def decode(self, features: Features, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """Draws from the posterior and decodes. Given latents (the first blocks, top-down) are scored, not drawn."""
        batch, given = features.target.shape[0], latents or ()
        noise = self.noise_for(batch, noise)
        self.check_fit("latents", given, batch)
        states = self._first_states(batch)
        draws: list[Draw] = []
        for i, block in enumerate(self._latent_blocks()):
            z = given[i] if i < len(given) else None
            x, below, tap = states[block.resolution], states.get(block.below), features.taps[block.resolution]
            draws.append(block(x, below, tap, noise[i], z))
            states[block.resolution] = draws[-1].state
        # In training the distributions would only hold memory until the backward pass.
        return Output.of(self._likelihood(states), features.target, draws, distributions=not self.training)

    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Noise | None = None,
        latents: Sequence[Tensor] | None = None,
    ) -> Likelihood:
        """n images from the prior, σ of each block's latents times its temperature (spec_vdvae, Decoder)."""
        blocks, given = self._latent_blocks(), latents or ()
        scale = temperatures(temperature, len(blocks))
        noise = self.noise_for(n, noise)
        self.check_fit("latents", given, n)
        states = self._first_states(n)
        for i, block in enumerate(blocks):
            z = given[i] if i < len(given) else None
            x, below = states[block.resolution], states.get(block.below)
            states[block.resolution] = block.generate(x, below, noise[i], scale[i], z)
        return self._likelihood(states)

    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        """(n, Z, R, R) of each block, top-down."""
        return [(n, block.latent_channels, block.resolution, block.resolution) for block in self._latent_blocks()]

    def loss(self, output: Output, progress: float) -> tuple[Tensor, Metrics]:
        """Mean over the batch of the negative ELBO in nats per dimension (spec_vdvae, Data and loss)."""
        kl = output.kl.sum(1)
        nelbo = output.reconstruction + kl
        metrics = {"nelbo": nelbo, "reconstruction": output.reconstruction, "kl": kl}
        return nelbo.mean() / output.likelihood.dims, {name: nats.mean().detach() for name, nats in metrics.items()}

    def set_recomputation(self, mode: Recomputation) -> None:
        """`cells`: the backward pass runs whole blocks again. Activations it always makes again."""
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.recompute = mode == "cells"

    def compile_parts(self) -> None:
        """Compiles the blocks of both ways; those of a kind share their code, so depth costs no time to compile."""
        compile_each(module for module in self.modules() if isinstance(module, Recomputable))

    # ----------------------------------------------------------------------------------------------------- top-down

    def _latent_blocks(self) -> list[LatentBlock]:
        return cast("list[LatentBlock]", list(self.decoder))

    def _resolutions(self) -> list[int]:
        """Those of the decoder, ascending."""
        return sorted({block.resolution for block in self._latent_blocks()})

    def _first_states(self, batch: int) -> dict[int | None, Tensor]:
        """The state (B, W, R, R) of each resolution R before its first block: the learned bias, or zeros."""
        states: dict[int | None, Tensor] = {}
        for resolution in self._resolutions():
            zeros = self.gain.new_zeros(1, self.config.width_at(resolution), 1, 1)
            start = self.biases.get(str(resolution), zeros)
            states[resolution] = start.expand(batch, -1, resolution, resolution)
        return states

    def _likelihood(self, states: dict[int | None, Tensor]) -> Likelihood:
        params = self.head(states[self.config.image_size] * self.gain + self.shift)
        return LIKELIHOODS[self.config.likelihood.kind](params, self.config.likelihood, self.config.image_channels)
