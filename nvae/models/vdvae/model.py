"""The Very Deep VAE: residual blocks and up to 78 layers of latents, down to 1×1 (Child 2021; spec_vdvae).

Shapes: B batch, C image channels, W width and R resolution of a state, Z latent channels, N latent blocks (top-down),
K draws of an image. "Bottom-up" is the encoder, from image to code; "top-down" the decoder. A *tap* is the encoder's
last output at a resolution, after GELU: what the posteriors of that resolution see of the image.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bricks.convolutions import Conv2d, convolution
from ...bricks.labels import ClassVectors
from ...bricks.latents import Draw, Normal, score, sum_with_each
from ...bricks.likelihoods import LIKELIHOODS, Likelihood, quantise
from ...bricks.recomputation import Recomputable
from ...core.precision import at_least_float32
from ...kernels.activations import ACTIVATIONS
from ...kernels.convolution import Geometry, for_autocast
from ..base import FirstImages, Metrics, Noise, Output, Progress, Recomputation, TopDown
from ..config import ModelConfig
from ..hierarchy import EncodedImages, Hierarchy
from .config import Layer, VDVAEConfig
from .standardisation import Standardisation

MEASURED = 10_000
"""Images whose mean and standard deviation stand for the training set's."""


# ----------------------------------------------------------------------------------------------------------- bricks


def conv2d(in_channels: int, out_channels: int, kernel_size: int = 1, *, scale: float = 1.0) -> Conv2d:
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
        self.reduce = conv2d(in_channels, middle)
        self.first = conv2d(middle, middle, kernel_size)
        self.second = conv2d(middle, middle, kernel_size)
        self.expand = conv2d(middle, out_channels, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, R, R) -> (B, out, R, R). Under autocast a state, a long sum, is rounded here and nowhere else."""
        return self.reduced(self.reduce(for_autocast(x), "gelu"))

    def reduced(self, x: Tensor) -> Tensor:
        """What follows the first convolution: (B, middle, R, R), which nobody else reads, -> (B, out, R, R)."""
        for following in (self.first, self.second, self.expand):
            x = following(x, "gelu") if torch.is_grad_enabled() else following(torch.ops.aten.gelu_(x))
        return x


def added(made: Tensor, x: Tensor) -> Tensor:
    """made + x, without gradients in the memory of `made`, which nobody else reads; x may be of one image for all."""
    in_place = not torch.is_grad_enabled() and made.dtype == x.dtype
    return made.add_(x) if in_place else x + made


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
        x = added(self.block(x), x)
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool)
        return F.pad(x, (0, 0, 0, 0, 0, self.growth)) if self.growth else x


class Distributions(NamedTuple):
    """What a latent block says before its z."""

    state: Tensor
    """(K·B, W, R, R), with what the prior adds to it."""
    prior_raw: Tensor
    """(K·B, 2Z, R, R), the prior's μ and log σ."""
    posterior: Normal | None


class LatentBlock(Recomputable):
    """One layer of latents: its prior, its posterior, and how z enters the state (spec_vdvae, Decoder)."""

    def __init__(self, config: VDVAEConfig, layer: Layer, scale: float) -> None:
        super().__init__()
        self.resolution, self.below = layer.resolution, layer.below
        self.width, self.latent_channels = config.width_at(layer.resolution), config.latent_channels
        middle = config.middle_at(layer.resolution)
        self.posterior = Block(2 * self.width, middle, 2 * self.latent_channels, self.resolution)
        self.prior = Block(self.width, middle, 2 * self.latent_channels + self.width, self.resolution, scale=0.0)
        self.project = conv2d(self.latent_channels, self.width, scale=scale)
        self.residual = Block(self.width, middle, self.width, self.resolution, scale)

    def forward(self, x: Tensor, below: Tensor | None, tap: Tensor, noise: Tensor, given: Tensor | None) -> Draw:
        """A draw from the posterior, or the given z scored, and the state after it.

        x (K·B, W, R, R), below (K·B, W', R', R'), tap (B, W, R, R), noise and given (K·B, Z, R, R); K any number.
        """
        return self.run(self._forward, x, below, tap, noise, given)

    def _forward(self, x: Tensor, below: Tensor | None, tap: Tensor, noise: Tensor, given: Tensor | None) -> Draw:
        x, prior_raw, q = self.distributions(x, below, tap)
        p = Normal.from_log_sigma(prior_raw)
        assert q is not None
        z = q.draw(noise) if given is None else given
        return Draw(self.entered(x, z), z, score(q, p, z, z, closed=True), q, p)

    def distributions(self, x: Tensor, below: Tensor | None, tap: Tensor | None) -> Distributions:
        """Before the z; x and below as for `forward`, without a tap there is no posterior."""
        x, q = self.joined(x, below), None
        if tap is None:
            raw = self.prior(x)
        else:
            for_prior, for_posterior = self._reduced(x, tap)
            q = Normal.from_log_sigma(self.posterior.reduced(for_posterior))
            raw = self.prior.reduced(for_prior)
        raw, h = torch.split(raw, [2 * self.latent_channels, self.width], dim=1)
        return Distributions(x + h, raw, q)

    def entered(self, x: Tensor, z: Tensor) -> Tensor:
        """The state (K·B, W, R, R) after z has entered it."""
        x = added(self.project(z), x)
        return added(self.residual(x), x)

    def joined(self, x: Tensor, below: Tensor | None) -> Tensor:
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
        for_prior, for_posterior = convolution(for_autocast(x), weight, bias, Geometry(), "gelu").chunk(2, dim=1)
        return for_prior, sum_with_each(for_posterior, convolution(tap, of_tap, None, Geometry()))


# ------------------------------------------------------------------------------------------------------ the network


@dataclass
class Features(EncodedImages):
    """The bottom-up pass of a batch, K draws to come of each of its B images."""

    taps: dict[int, Tensor]
    """The tap (B, W, R, R) of each resolution R of the decoder."""


class TopDownPass(TopDown):
    """The states of all resolutions on their way through the blocks; what `draw` does at once is in parts what the
    others do."""

    def __init__(self, model: "VDVAE", features: Features | None, n: int, labels: Tensor | None = None) -> None:
        """`labels` are of a pass without features."""
        self.model, self.features = model, features
        self.blocks = model.latent_blocks
        self.place = 0
        """Of the next block."""
        self.states = model.initial_states(n, labels if features is None else features.labels)
        self._distributions: Distributions | None = None

    @property
    def _block(self) -> LatentBlock:
        return self.blocks[self.place]

    @property
    def _inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The next block's state, the one it adds to it, and its tap."""
        block = self._block
        tap = None if self.features is None else self.features.taps[block.resolution]
        return self.states[block.resolution], self.states.get(block.below), tap

    def prior(self, temperature: float = 1.0) -> Normal:
        """(n, Z, R, R), σ times the temperature."""
        return Normal.from_log_sigma(self._before_z().prior_raw, temperature)

    def posterior(self) -> Normal:
        """(n, Z, R, R)."""
        posterior = self._before_z().posterior
        assert posterior is not None, "without features there is no posterior"
        return posterior

    def enter(self, z: Tensor) -> None:
        """The z (n, Z, R, R) of the next block."""
        self._go_on(self._block.entered(self._before_z().state, z))

    def draw(self, noise: Tensor, given: Tensor | None = None) -> Draw:
        """Everything at the next block, as the one function that is trained."""
        draw: Draw = self._block(*self._inputs, noise, given)
        self._go_on(draw.state)
        return draw

    def likelihood(self) -> Likelihood:
        """p(x | z)."""
        assert self.place == len(self.blocks), "not every block has its z"
        return self.model.likelihood(self.states)

    def _before_z(self) -> Distributions:
        if self._distributions is None:
            self._distributions = self._said_by(self._block)
        return self._distributions

    def _said_by(self, block: LatentBlock) -> Distributions:
        return block.distributions(*self._inputs)

    def _go_on(self, state: Tensor) -> None:
        self.states[self._block.resolution] = state
        self.place, self._distributions = self.place + 1, None


class VDVAE(Hierarchy[VDVAEConfig]):
    """One ladder of states, an image's way up and its way down (spec_vdvae)."""

    config_type: ClassVar[type[ModelConfig]] = VDVAEConfig

    def __init__(self, config: VDVAEConfig) -> None:
        super().__init__(config)
        up, down = config.encoder_layers, config.decoder_layers
        self.input = Standardisation(config)
        self.stem = conv2d(config.image_channels, config.width, 3)
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
        self.head = conv2d(config.width, likelihood.params_per_pixel(config.likelihood, config.image_channels))
        self.class_state: ClassVectors | None = None
        if config.classes:
            self.class_state = ClassVectors(config.classes, self.latent_blocks[0].width)

    # ------------------------------------------------------------------------------------------------- the contract

    def encode(self, x: Tensor, labels: Tensor | None = None) -> Features:
        """The bottom-up pass of images (B, C, H, W) in [0, 1]. The encoder sees all 8 bits of an image."""
        self.check_labels(labels, x.shape[0])
        config = self.config
        state = at_least_float32(self.stem(self.input(x).contiguous(memory_format=torch.channels_last)))
        last = {config.image_size: state}
        for block in self.encoder:
            state = block(state)
            last[state.shape[-1]] = state
        taps = {resolution: ACTIVATIONS["gelu"](for_autocast(last[resolution])) for resolution in self._resolutions()}
        return Features(quantise(x, config.likelihood.bits, config.likelihood.grid), labels, taps)

    def decode(self, features: Features, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """Draws from the posterior and decodes. Given latents (the first blocks, top-down) are scored, not drawn."""
        output = super().decode(features, noise, latents)
        if self.training:  # the distributions would only hold memory until the backward pass
            output.posterior, output.prior = [], []
        return output

    def top_down(self, features: Any = None, n: int = 1, labels: Tensor | None = None) -> TopDown:
        """A pass through the blocks one by one, of encoded images, or without them of n images from the prior."""
        if features is None:
            self.check_labels(labels, n)
        return TopDownPass(self, features, n if features is None else features.target.shape[0], labels)

    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        """(n, Z, R, R) of each block, top-down."""
        return [(n, block.latent_channels, block.resolution, block.resolution) for block in self.latent_blocks]

    def loss(self, output: Output, progress: Progress) -> tuple[Tensor, Metrics]:
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

    def parts(self) -> Iterator[nn.Module]:
        """The blocks of both ways."""
        return (module for module in self.modules() if isinstance(module, Recomputable))

    def begin(self, first: FirstImages) -> None:
        """Measures the mean and standard deviation of the input, unless the config gives them."""
        if not self.input.is_given:
            self.input.measure(first.images(MEASURED))

    # ----------------------------------------------------------------------------------------------------- top-down

    @property
    def encoder_blocks(self) -> list[EncoderBlock]:
        """Bottom-up."""
        return cast("list[EncoderBlock]", list(self.encoder))

    @property
    def latent_blocks(self) -> list[LatentBlock]:
        """Top-down."""
        return cast("list[LatentBlock]", list(self.decoder))

    def _resolutions(self) -> list[int]:
        """Those of the decoder, ascending."""
        return sorted({block.resolution for block in self.latent_blocks})

    def initial_states(self, n: int, labels: Tensor | None = None) -> dict[int | None, Tensor]:
        """The state (B, W, R, R) of each resolution R before its first block: the learned bias, or zeros.

        That of the first block knows the classes.
        """
        states: dict[int | None, Tensor] = {}
        for resolution in self._resolutions():
            zeros = self.gain.new_zeros(1, self.config.width_at(resolution), 1, 1)
            start = self.biases.get(str(resolution), zeros)
            states[resolution] = start.expand(n, -1, resolution, resolution)
        if self.class_state is not None and labels is not None:
            first = self.latent_blocks[0].resolution
            states[first] = states[first] + self.class_state(labels)
        return states

    def likelihood(self, states: dict[int | None, Tensor]) -> Likelihood:
        """p(x | z) from the states after the last block."""
        params = self.head(states[self.config.image_size] * self.gain + self.shift)
        return LIKELIHOODS[self.config.likelihood.kind](params, self.config.likelihood, self.config.image_channels)
