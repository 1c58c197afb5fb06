"""The Very Deep VAE in the published arithmetic: the yardstick of its speed, of the same weights (spec_vdvae).

Eager and NCHW, gradients are PyTorch's; a posterior reads the concatenation of state and tap, activations stay for the
backward pass, the states of a pass are made anew at each addition, an evaluation encodes an image for every draw.

Shapes: B batch, W width and R resolution of a state, Z latent channels.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bricks.convolutions import Conv2d
from ..bricks.latents import Draw, Normal, Score, kl_divergence, score
from ..bricks.likelihoods import Likelihood, quantise
from ..models.base import Family, Noise, Output, Temperature
from ..models.config import ModelConfig
from ..models.vdvae.config import VDVAEConfig
from ..models.vdvae.model import VDVAE, Block, Features, LatentBlock


class PublishedVDVAE(VDVAE):
    """A Very Deep VAE whose passes are those of the published code."""

    config_type: ClassVar[type[ModelConfig]] = VDVAEConfig

    @staticmethod
    def of(model: VDVAE) -> "PublishedVDVAE":
        """A copy of a model, its weights laid out as PyTorch does."""
        with model.gain.device:
            copied = PublishedVDVAE(model.config)
        for bias in copied.biases.values():
            bias.data = bias.detach().contiguous()
        copied.load_state_dict(model.state_dict())
        return copied.train(model.training)

    def encode(self, x: Tensor, labels: Tensor | None = None) -> Features:
        """Bottom-up; the taps are the states themselves."""
        state = convolved(self.stem, self.input(x))
        taps = {self.config.image_size: state}
        for block in self.encoder_blocks:
            state = state + passed(block.block, state)
            if block.pool > 1:
                state = F.avg_pool2d(state, block.pool)
            state = F.pad(state, (0, 0, 0, 0, 0, block.growth)) if block.growth else state
            taps[state.shape[-1]] = state
        return Features(quantise(x, self.config.likelihood.bits, self.config.likelihood.grid), labels, taps)

    def decode(self, features: Any, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """Draws from the posterior and decodes."""
        n = len(features.target)
        states, draws = self.initial_states(n, features.labels), []
        for block, epsilon in zip(self.latent_blocks, self.noise_for(n, noise), strict=True):
            x = joined(block, states)
            q = Normal.from_log_sigma(passed(block.posterior, torch.cat([x, features.taps[block.resolution]], dim=1)))
            x, p = self._prior(block, x)
            z = q.draw(epsilon)
            states[block.resolution] = entered(block, x, z)
            draws.append(Draw(states[block.resolution], z, self._score(q, p, z), q, p))
        return Output.of(self.likelihood(states), features.target, draws)

    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Noise | None = None,
        latents: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> Likelihood:
        """From the prior, at one temperature."""
        assert isinstance(temperature, float)
        states = self.initial_states(n, labels)
        for block, epsilon in zip(self.latent_blocks, self.noise_for(n, noise), strict=True):
            x, p = self._prior(block, joined(block, states), temperature)
            states[block.resolution] = entered(block, x, p.draw(epsilon))
        return self.likelihood(states)

    @staticmethod
    def _prior(block: LatentBlock, x: Tensor, temperature: float = 1.0) -> tuple[Tensor, Normal]:
        """The state with what the prior adds to it, and p(z)."""
        raw, h = torch.split(passed(block.prior, x), [2 * block.latent_channels, block.width], dim=1)
        return x + h, Normal.from_log_sigma(raw, temperature)

    def _score(self, q: Normal, p: Normal, z: Tensor) -> Score:
        """In training the KL alone; densities are for importance weights."""
        if not self.training:
            return score(q, p, z, z, closed=True)
        none = z.new_zeros(len(z))
        return Score(kl_divergence(q, p).sum((2, 3)), none, none)


def as_published(model: Family[Any]) -> Family[Any]:
    """What the plain mode computes: where a family has published arithmetic of its own, that; else the model itself."""
    return PublishedVDVAE.of(model) if isinstance(model, VDVAE) else model


def convolved(convolution: Conv2d, x: Tensor) -> Tensor:
    """(B, C, R, R) -> (B, O, R, R)."""
    return F.conv2d(x, convolution.weight, convolution.bias, padding=convolution.geometry.padding)


def passed(block: Block, x: Tensor) -> Tensor:
    """(B, in, R, R) -> (B, out, R, R)."""
    for convolution in (block.reduce, block.first, block.second, block.expand):
        x = convolved(convolution, F.gelu(x))
    return x


def joined(block: LatentBlock, states: dict[int | None, Tensor]) -> Tensor:
    """The state (B, W, R, R) of a block, with the one below."""
    x = states[block.resolution]
    if block.below is None:
        return x
    below = states[block.below][:, : block.width]
    return x + F.interpolate(below, scale_factor=block.resolution // block.below, mode="nearest")


def entered(block: LatentBlock, x: Tensor, z: Tensor) -> Tensor:
    """The state (B, W, R, R) with z (B, Z, R, R) in it."""
    x = x + convolved(block.project, z)
    return x + passed(block.residual, x)
