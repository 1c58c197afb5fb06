"""The Very Deep VAE in the published arithmetic: the yardstick of its speed, of the same weights (spec_vdvae).

Eager and NCHW, gradients are PyTorch's; a posterior reads the concatenation of state and tap, activations stay for the
backward pass, the states of a pass are made anew at each addition, an evaluation encodes an image for every draw.

Shapes: B batch, W width and R resolution of a state, Z latent channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bricks.convolutions import Conv2d
from ..bricks.latents import Draw, Normal, Score, kl_divergence, score
from ..bricks.likelihoods import quantise
from ..models.base import Family, TopDown
from ..models.vdvae.model import VDVAE, Block, Distributions, Features, LatentBlock, TopDownPass


class PublishedVDVAE(VDVAE):
    """A Very Deep VAE whose passes are those of the published code."""

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

    def top_down(self, features: Any = None, n: int = 1, labels: Tensor | None = None) -> TopDown:
        """A pass through the blocks one by one."""
        return PublishedPass(self, features, n if features is None else len(features.target), labels)


class PublishedPass(TopDownPass):
    """A pass in which a posterior reads the concatenation of state and tap."""

    def enter(self, z: Tensor) -> None:
        """The z (n, Z, R, R) of the next block."""
        block = self._block
        x = self._before_z().state + convolved(block.project, z)
        self._go_on(x + passed(block.residual, x))

    def draw(self, noise: Tensor, given: Tensor | None = None) -> Draw:
        """Everything at the next block."""
        resolution, q, p = self._block.resolution, self.posterior(), self.prior()
        z = q.draw(noise) if given is None else given
        self.enter(z)
        return Draw(self.states[resolution], z, self._score(q, p, z), q, p)

    def _said_by(self, block: LatentBlock) -> Distributions:
        x, below, tap = self._inputs
        x, q = block.joined(x, below), None
        if tap is not None:
            q = Normal.from_log_sigma(passed(block.posterior, torch.cat([x, tap], dim=1)))
        raw, h = torch.split(passed(block.prior, x), [2 * block.latent_channels, block.width], dim=1)
        return Distributions(x + h, raw, q)

    def _score(self, q: Normal, p: Normal, z: Tensor) -> Score:
        """In training the KL alone; densities are for importance weights."""
        if not self.model.training:
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
