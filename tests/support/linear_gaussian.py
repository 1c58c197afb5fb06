"""A linear-Gaussian family: x = W z + s·noise, whose log-likelihood, posterior and ELBO are known in closed form.

An image in [0, 1] stands for u = 20 (x − ½), which the formulas are about: densities are those of u.
Its posterior is wrong on purpose (wider, and off by a constant), so that the bounds have a gap to close.
Shapes: B batch, D = C·H·W numbers of an image, L latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nvae.bricks.latents import Normal, kl_divergence
from nvae.bricks.likelihoods import Likelihood
from nvae.models.base import Family, Metrics, Noise, Output, Temperature, temperatures
from nvae.models.config import ModelConfig

LATENTS, SPREAD, WIDER, OFF = 3, 0.3, 1.5, 0.1


def numbers_of(x: Tensor) -> Tensor:
    """u of images in [0, 1], float64."""
    return 20 * (x.double() - 0.5)


def images_of(u: Tensor) -> Tensor:
    """The images in [0, 1] that stand for u."""
    return u / 20 + 0.5


class FixedNormal(Likelihood):
    """Normal of a fixed spread around `params` (B, C, H, W)."""

    is_density = True

    def _log_prob(self, x: Tensor) -> Tensor:
        return Normal(self.params, torch.full_like(self.params, SPREAD)).log_prob(x)

    def mean(self) -> Tensor:
        return self.params

    @property
    def noise_shape(self) -> tuple[int, int, int, int]:
        batch, channels, height, width = self.params.shape
        return batch, channels, height, width

    def sample(self, temperature: float = 1.0, uniform: Tensor | None = None) -> Tensor:
        return self.params + temperature * SPREAD * torch.special.ndtri(self._uniform(uniform))


@dataclass
class Encoded:
    images: Tensor
    posterior: Normal

    def repeated(self, times: int) -> "Encoded":
        q = Normal(self.posterior.mean.repeat(times, 1, 1, 1), self.posterior.sigma.repeat(times, 1, 1, 1))
        return Encoded(self.images.repeat(times, 1, 1, 1), q)


class LinearGaussian(Family[ModelConfig]):
    config_type = ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(1)
        dims = config.image_channels * config.image_size**2
        self.matrix = nn.Parameter(torch.randn(dims, LATENTS, generator=generator, dtype=torch.float64) / 4)
        self.encoded = 0  # calls of the encoder

    def exact_posterior(self, x: Tensor) -> torch.distributions.MultivariateNormal:
        precision = torch.eye(LATENTS, dtype=torch.float64) + self.matrix.T @ self.matrix / SPREAD**2
        covariance = torch.linalg.inv(precision)
        mean = numbers_of(x).flatten(1) @ self.matrix @ covariance / SPREAD**2
        return torch.distributions.MultivariateNormal(mean, covariance, validate_args=False)

    def exact_log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,) nats."""
        dims = self.matrix.shape[0]
        covariance = self.matrix @ self.matrix.T + SPREAD**2 * torch.eye(dims, dtype=torch.float64)
        zero = torch.zeros(dims, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(zero, covariance).log_prob(numbers_of(x).flatten(1))

    def exact_elbo(self, x: Tensor) -> Tensor:
        """log p(x) − KL(q ‖ p(z|x)), (B,) nats."""
        posterior, q = self.exact_posterior(x), self.encode(x).posterior
        mean, sigma = q.mean[:, :, 0, 0], q.sigma[:, :, 0, 0]
        ours = torch.distributions.MultivariateNormal(mean, torch.diag_embed(sigma.square()))
        return self.exact_log_prob(x) - torch.distributions.kl_divergence(ours, posterior)

    def check_images(self, images: object) -> None:
        """Images of any floating type: it computes in float64 itself."""
        super().check_images(images.double() if isinstance(images, Tensor) else images)

    def encode(self, x: Tensor) -> Encoded:
        self.encoded += 1
        exact = self.exact_posterior(x)
        q = Normal(exact.mean + OFF, WIDER * exact.variance.sqrt())
        return Encoded(x, Normal(q.mean[:, :, None, None], q.sigma[:, :, None, None]))

    def decode(self, features: Any, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        noise = [torch.randn(shape) for shape in self.latent_shapes(len(features.images))] if noise is None else noise
        q = features.posterior
        p = Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
        z = latents[0] if latents else q.draw(noise[0].double())
        return Output(
            likelihood=self._likelihood(z),
            target=numbers_of(features.images),
            channel_kl=[kl_divergence(q, p).sum((2, 3))],
            log_q=q.log_prob(z).sum((1, 2, 3)),
            log_p=p.log_prob(z).sum((1, 2, 3)),
            z=[z],
            posterior=[q],
            prior=[p],
        )

    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Noise | None = None,
        latents: Sequence[Tensor] | None = None,
    ) -> Likelihood:
        noise = [torch.randn(shape) for shape in self.latent_shapes(n)] if noise is None else noise
        return self._likelihood(latents[0] if latents else temperatures(temperature, 1)[0] * noise[0].double())

    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        return [(n, LATENTS, 1, 1)]

    def loss(self, output: Output, progress: float) -> tuple[Tensor, Metrics]:
        return (output.reconstruction + output.kl.sum(1)).mean(), {}

    def _likelihood(self, z: Tensor) -> Likelihood:
        size, channels = self.config.image_size, self.config.image_channels
        image = (z.flatten(1) @ self.matrix.T).reshape(-1, channels, size, size)
        return FixedNormal(image, self.config.likelihood, channels)


class WithoutDensity(LinearGaussian):
    """The same, but it says nothing of the density of its latents."""

    density = "none"

    def decode(self, features: Any, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        output = super().decode(features, noise, latents)
        output.log_q = output.log_p = None
        return output


def linear_gaussian(family: type[LinearGaussian] = LinearGaussian) -> LinearGaussian:
    """A model of 4×4 RGB images, in eval mode."""
    return family(ModelConfig(family="toy", image_size=4)).eval()


def draw_images(model: LinearGaussian, count: int) -> Tensor:
    """Images from the model's own distribution, (count, 3, 4, 4) float64."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(count, LATENTS, generator=generator, dtype=torch.float64)
    clean = z @ model.matrix.detach().T
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return images_of(clean + SPREAD * noise).reshape(count, 3, 4, 4)
