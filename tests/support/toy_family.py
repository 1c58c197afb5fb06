"""A family as far from NVAE as the contract allows: no batch norm, one discrete latent, a loss of its own.

It lives outside the package and is named in a config as `toy_family:Toy`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.bricks.likelihoods import LIKELIHOODS, Likelihood
from nvae.models.base import Family, Metrics, Noise, Output, Temperature, temperatures
from nvae.models.config import ModelConfig


class ToyConfig(ModelConfig):
    family: Literal["toy_family:Toy"] = "toy_family:Toy"
    codes: int = 16
    """Entries of the codebook."""


@dataclass
class ToyFeatures:
    target: Tensor
    logits: Tensor  # (B, codes)

    def repeated(self, times: int) -> "ToyFeatures":
        return ToyFeatures(self.target.repeat(times, 1, 1, 1), self.logits.repeat(times, 1))


def drawn(logits: Tensor, noise: Tensor) -> Tensor:
    """The codes (B,) of logits (B, codes) that standard-normal noise (B, 1, 1, 1) stands for."""
    cumulative = logits.softmax(1).cumsum(1)
    return (cumulative < torch.special.ndtr(noise.flatten(1))).sum(1).clamp(max=logits.shape[1] - 1)


class Toy(Family[ToyConfig]):
    """q(code | x) from one linear layer, straight-through to a codebook of images; the prior is uniform."""

    config_type = ToyConfig
    latent_kind = "discrete"
    density = "none"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.shape = (config.image_channels, config.image_size, config.image_size)
        pixels = config.image_channels * config.image_size**2
        self.encoder, self.codebook = nn.Linear(pixels, config.codes), nn.Embedding(config.codes, pixels)

    def encode(self, x: Tensor, labels: Tensor | None = None) -> ToyFeatures:
        self.check_labels(labels, len(x))
        return ToyFeatures(x, self.encoder(x.flatten(1)))

    def decode(self, features: Any, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        noise = self.noise_for(len(features.target), noise)
        codes = latents[0].flatten() if latents else drawn(features.logits, noise[0])
        log_q = features.logits.log_softmax(1)
        kl = (log_q.exp() * (log_q + torch.log(torch.tensor(self.config.codes)))).sum(1, keepdim=True)
        straight_through = log_q.exp() - log_q.exp().detach()  # zero, with a gradient
        weights = F.one_hot(codes, self.config.codes) + straight_through
        return Output(self._likelihood(weights), features.target, [kl], None, None, [codes[:, None, None, None]])

    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Noise | None = None,
        latents: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> Likelihood:
        self.check_labels(labels, n)
        temperatures(temperature, 1)  # of a uniform prior it changes nothing
        noise = self.noise_for(n, noise)
        codes = latents[0].flatten() if latents else drawn(noise[0].new_zeros(n, self.config.codes), noise[0])
        return self._likelihood(F.one_hot(codes, self.config.codes).float())

    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        return [(n, 1, 1, 1)]

    def loss(self, output: Output, progress: float) -> tuple[Tensor, Metrics]:
        loss = (output.reconstruction + progress * output.kl.sum(1)).mean()
        return loss, {"reconstruction": output.reconstruction.mean().detach()}

    def _likelihood(self, weights: Tensor) -> Likelihood:
        """Of a weighted sum (B, codes) of the codebook."""
        params = (weights @ self.codebook.weight).unflatten(1, self.shape)
        return LIKELIHOODS[self.config.likelihood.kind](params, self.config.likelihood, self.config.image_channels)
