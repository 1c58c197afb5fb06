"""Likelihoods of images: Bernoulli, discretised mixture of logistics, Normal (spec §4).

All are computed in at least float32. Shapes: B batch, C image channels, H W space, M mixture components.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..core.config import Config
from ..core.precision import at_least_float32
from ..kernels.operations import operation
from .latents import Normal
from .recomputation import recomputed

MixtureEdge = Literal["right", "published"]
Grid = Literal["stretched", "truncated"]


class LikelihoodConfig(Config):
    kind: Literal["bernoulli", "logistic_mixture", "normal", "squared_error"] = "logistic_mixture"
    """Distribution of a pixel: `bernoulli` for binarised one-channel images, `logistic_mixture` for 1 or 3 channels (a
    probability per level, so bits/dim are comparable), `normal` (a density: bits/dim are not comparable), or
    `squared_error`, which is none: there is a distortion, and no bound."""
    bits: int = Field(8, ge=1, le=8)
    """Bits of an image channel; images are quantised to 2**bits levels. Binary images keep 8."""
    grid: Grid = "stretched"
    """Where the levels lie in [0, 1]: `stretched` from end to end, k / (2^b − 1) (NVAE); `truncated` at the 8-bit
    values without their low bits, k · 2^(8−b) / 255 (VDVAE). At 8 bits they are the same."""
    components: int = Field(10, ge=1, le=1000)
    """Components of the logistic mixture."""
    edge: MixtureEdge = "right"
    """`right`: the probabilities of the mixture's levels sum to 1. `published`: as the published code of the `grid` has
    bins and tails, which err (see `sums_to_one`); for comparisons with its figures only."""
    border: int = Field(0, ge=0)
    """Pixels at each side of the image that are padding: they do not count in the likelihood nor in bits/dim."""

    @model_validator(mode="after")
    def _consistent(self) -> "LikelihoodConfig":
        if self.kind == "bernoulli" and self.bits != 8:
            raise ValueError("bits: a Bernoulli likelihood takes binary images, leave bits at 8")
        return self

    def idle(self) -> dict[str, str]:
        is_mixture = self.kind == "logistic_mixture"
        found = {} if is_mixture else dict.fromkeys(("components", "edge"), f"the likelihood is {self.kind}")
        if self.bits == 8 and not (is_mixture and self.edge == "published"):
            found["grid"] = "both have the same 8 bits"
        return found

    @property
    def levels(self) -> int:
        """V: levels count from 0 to 2^b − 1."""
        return int(2**self.bits - 1)

    @property
    def highest_level(self) -> int:
        """The highest that an image's pixels have: V, or 1 where they are binary."""
        return 1 if self.kind == "bernoulli" else self.levels

    @property
    def highest(self) -> float:
        """The highest level on the [−1, 1] scale, where the lowest is −1."""
        return 2 * highest_level(self.bits, self.grid) - 1

    @property
    def sums_to_one(self) -> bool:
        """False where probabilities of levels sum to more than 1, so that bits/dim come out too good (spec §4).

        NVAE's published edge does at any depth, VDVAE's below 8 bits (spec_vdvae, Data).
        """
        published = self.kind == "logistic_mixture" and self.edge == "published"
        return not (published and (self.grid == "stretched" or self.bits < 8))


def highest_level(bits: int, grid: Grid) -> float:
    """The brightest of the 2^b levels, in [0, 1]; the darkest is 0 and they lie evenly (spec §4; spec_vdvae, Data)."""
    return 1.0 if grid == "stretched" else (2**bits - 1) * 2 ** (8 - bits) / 255


def quantise(x: Tensor, bits: int, grid: Grid = "stretched") -> Tensor:
    """Images in [0, 1] at level floor(255x / 2^(8−b)) of the grid's 2^b levels; unchanged at 8 bits (spec §4)."""
    if bits == 8:
        return x
    # Images are multiples of 1/255 or of 1/(2^b − 1) up to rounding; 1e-3 of a level undoes the rounding.
    level = torch.floor(255 * x / 2 ** (8 - bits) + 1e-3)
    return level / float(2**bits - 1) * highest_level(bits, grid)


class Likelihood(ABC):
    """p(x | z) for a batch of images, from the decoder's raw output `params`."""

    noise_channels: ClassVar[int] = 0
    is_density = False
    """True where `log_prob` is a density and not the probability of a level."""
    is_probability = True
    """False where `log_prob` is no logarithm of either."""

    def __init__(self, params: Tensor, config: LikelihoodConfig, channels: int, *, recompute: bool = False) -> None:
        """`recompute`: the backward pass computes `log_prob` again from `params` instead of keeping what is inside."""
        self.params = at_least_float32(params)
        self.config = config
        self.channels = channels
        self.recompute = recompute

    @property
    def dims(self) -> int:
        """How many numbers of an image count: channels · height · width without the border."""
        border = 2 * self.config.border
        return self.channels * (self.params.shape[2] - border) * (self.params.shape[3] - border)

    def visible(self, image: Tensor) -> Tensor:
        """The part of (B, C, H, W) inside the border."""
        b = self.config.border
        return image[:, :, b : image.shape[2] - b, b : image.shape[3] - b]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood in nats, (B,), of images (B, C, H, W) in [0, 1]; quantised here if they are not."""
        if self.recompute:
            return recomputed(partial(self._log_prob_anew, x), self.params)
        pixels = self._log_prob(quantise(at_least_float32(x), self.config.bits, self.config.grid))
        return self.visible(pixels).sum((1, 2, 3))

    def _log_prob_anew(self, x: Tensor, params: Tensor) -> Tensor:
        return type(self)(params, self.config, self.channels).log_prob(x)

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor:
        """Nats per pixel (B, 1 or C, H, W) of quantised images."""

    @abstractmethod
    def mean(self) -> Tensor:
        """The mean image (B, C, H, W) in [0, 1]."""

    @abstractmethod
    def sample(self, temperature: float = 1.0, uniform: Tensor | None = None) -> Tensor:
        """A draw (B, C, H, W) in [0, 1]. `uniform` (B, `noise_shape`…) in [0, 1) replaces fresh random numbers."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, int, int, int]:
        """Shape of the uniform numbers that one draw of the batch takes."""

    def _uniform(self, given: Tensor | None) -> Tensor:
        """The given numbers or fresh ones, kept off 0 and 1."""
        numbers = torch.rand(self.noise_shape, device=self.params.device) if given is None else given
        return numbers.clamp(1e-5, 1 - 1e-5)


class Bernoulli(Likelihood):
    """Independent binary pixels; params (B, C, H, W) are logits."""

    @staticmethod
    def params_per_pixel(config: LikelihoodConfig, channels: int) -> int:
        return channels

    def _log_prob(self, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(self.params, x, reduction="none")

    def mean(self) -> Tensor:
        return torch.sigmoid(self.params)

    @property
    def noise_shape(self) -> tuple[int, int, int, int]:
        batch, channels, height, width = self.params.shape
        return batch, channels, height, width

    def sample(self, temperature: float = 1.0, uniform: Tensor | None = None) -> Tensor:
        """The logits are divided by the temperature; at 0 the likelier value comes out."""
        return (temperature * torch.logit(self._uniform(uniform)) < self.params).to(self.params.dtype)


class LogisticMixture(Likelihood):
    """Mixture of M discretised logistics on the [−1, 1] scale (Salimans et al. 2017; spec §4).

    Params per pixel: M logits, then per colour M means, M log-scales ≥ −7 and, for RGB, M coefficients through tanh.
    G's mean shifts with the observed R, B's with R and G.
    """

    @staticmethod
    def params_per_pixel(config: LikelihoodConfig, channels: int) -> int:
        return config.components * (10 if channels == 3 else 3)

    @property
    def logits(self) -> Tensor:
        """(B, M, H, W)."""
        return self.params[:, : self.config.components]

    @property
    def means(self) -> Tensor:
        """(B, C, M, H, W)."""
        return self._of_colours[:, :, 0]

    @property
    def log_scales(self) -> Tensor:
        """(B, C, M, H, W), ≥ −7."""
        return self._of_colours[:, :, 1].clamp(min=-7)

    @property
    def coefficients(self) -> Tensor | None:
        """(B, 3, M, H, W), for RGB."""
        return self._of_colours[:, :, 2].tanh() if self.channels == 3 else None

    @property
    def _of_colours(self) -> Tensor:
        batch, _, height, width = self.params.shape
        m = self.config.components
        return self.params[:, m:].reshape(batch, self.channels, -1, m, height, width)  # (B, C, 3 or 2, M, H, W)

    def _shifted_means(self, x: Tensor) -> Tensor:
        """Component means given the observed image x (B, C, 1, H, W) in [−1, 1]: (B, C, M, H, W)."""
        coefficients = self.coefficients
        if coefficients is None:
            return self.means
        c0, c1, c2 = coefficients.unbind(1)  # each (B, M, H, W)
        red, green, _ = x.unbind(1)  # each (B, 1, H, W)
        mean_r, mean_g, mean_b = self.means.unbind(1)
        return torch.stack([mean_r, mean_g + c0 * red, mean_b + c1 * red + c2 * green], dim=1)

    def _log_prob(self, x: Tensor) -> Tensor:
        return mixture_log_prob(self.params, x, self.config, self.channels)

    def log_prob_of_pixels(self, x: Tensor) -> Tensor:
        """Nats per pixel (B, 1, H, W) of quantised images (B, C, H, W) in [0, 1]."""
        x = (2 * x - 1).unsqueeze(2)  # (B, C, 1, H, W)
        means = self._shifted_means(x)
        levels = self.config.levels
        if self.config.edge == "published":
            above = PUBLISHED_HIGHEST_ABOVE[self.config.grid]
            per_colour = published_logistic_log_prob(x, x - means, self.log_scales, levels, above)
        else:
            per_colour = logistic_log_prob(x, means, self.log_scales, levels, self.config.highest)
        return torch.logsumexp(per_colour.sum(1) + F.log_softmax(self.logits, dim=1), dim=1, keepdim=True)

    def mean(self) -> Tensor:
        weights = F.softmax(self.logits, dim=1).unsqueeze(1)  # (B, 1, M, H, W)
        mean = (weights * self.means).sum(2)  # (B, C, H, W)
        coefficients = self.coefficients
        if coefficients is None:
            return mean.clamp(-1, 1) / 2 + 0.5
        c0, c1, c2 = (weights * coefficients).sum(2).unbind(1)
        red = mean[:, 0].clamp(-1, 1)
        green = (mean[:, 1] + c0 * red).clamp(-1, 1)
        blue = (mean[:, 2] + c1 * red + c2 * green).clamp(-1, 1)
        return torch.stack([red, green, blue], dim=1) / 2 + 0.5

    @property
    def noise_shape(self) -> tuple[int, int, int, int]:
        batch, components, height, width = self.logits.shape
        return batch, components + self.channels, height, width

    def sample(self, temperature: float = 1.0, uniform: Tensor | None = None) -> Tensor:
        """Component by Gumbel-max at the temperature, then each colour in turn, its noise times the temperature."""
        numbers = self._uniform(uniform)
        m = self.config.components
        gumbel = -torch.log(-torch.log(numbers[:, :m]))
        chosen = (self.logits + temperature * gumbel).argmax(dim=1)[:, None, None]  # (B, 1, 1, H, W)

        def pick(values: Tensor) -> Tensor:  # (B, C, M, H, W) -> (B, C, H, W)
            return values.gather(2, chosen.expand(-1, values.shape[1], -1, -1, -1)).squeeze(2)

        logistic = torch.logit(numbers[:, m:])  # (B, C, H, W)
        x = pick(self.means) + temperature * pick(self.log_scales).exp() * logistic
        coefficients = self.coefficients
        if coefficients is None:
            return x.clamp(-1, 1) / 2 + 0.5
        c0, c1, c2 = pick(coefficients).unbind(1)
        red = x[:, 0].clamp(-1, 1)
        green = (x[:, 1] + c0 * red).clamp(-1, 1)
        blue = (x[:, 2] + c1 * red + c2 * green).clamp(-1, 1)
        return torch.stack([red, green, blue], dim=1) / 2 + 0.5


def _mixtures(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    for channels, bits in ((3, 8), (1, 5)):
        config = LikelihoodConfig(components=3, bits=bits)
        shape = (2, LogisticMixture.params_per_pixel(config, channels), 4, 5)
        params = torch.randn(shape, generator=generator).to(device, wide)
        x = torch.randint(2**bits, (2, channels, 4, 5), generator=generator) / (2**bits - 1)
        yield params, x.to(device, wide), config, channels


@operation(_mixtures)
def mixture_log_prob(params: Tensor, x: Tensor, config: LikelihoodConfig, channels: int) -> Tensor:
    """Nats per pixel (B, 1, H, W) of quantised images (B, C, H, W) in [0, 1] under a `LogisticMixture`."""
    return LogisticMixture(params, config, channels).log_prob_of_pixels(x)


def logistic_log_prob(x: Tensor, means: Tensor, log_scales: Tensor, levels: int, highest: float = 1.0) -> Tensor:
    """Log-probability in nats of a level x ∈ [−1, 1] under a discretised logistic; sums to 1 over the levels.

    With a, b the ends of the level's bin in units of the scale, σ(b) − σ(a) = σ(b) σ(−a) (1 − e^(a−b)), which stays
    exact where the difference underflows. The lowest level takes the left tail, the highest the right one. The V + 1
    levels, V = `levels` = 2^b − 1, lie evenly from −1 to `highest`; x counts as the one it is nearest to.
    """
    half = (highest + 1) / (2 * levels)  # half the width of a bin
    level = torch.round((x + 1) / (2 * half))
    # Computed from the level, a bin's upper edge is the next one's lower edge to the last bit: so the sum is 1.
    above, below = (2 * level + 1) * half - 1, (2 * level - 1) * half - 1
    inverse = torch.exp(-log_scales)
    upper = F.logsigmoid((above - means) * inverse)  # log σ(b)
    lower = F.logsigmoid((means - below) * inverse)  # log σ(−a)
    width = torch.log(-torch.expm1(-(2 * half * inverse).clamp(min=1e-37)))  # an infinite scale stays finite
    return torch.where(level <= 0, upper, torch.where(level >= levels, lower, upper + lower + width))


PUBLISHED_HIGHEST_ABOVE: dict[Grid, float] = {"stretched": 0.99, "truncated": 0.999}
"""Above which x the published code of each grid, NVAE's and VDVAE's, takes a level for the highest."""


def published_logistic_log_prob(
    x: Tensor, centred: Tensor, log_scales: Tensor, levels: int, highest_above: float = 0.99
) -> Tensor:
    """As `logistic_log_prob`, as the published codes have it (spec §4; spec_vdvae, Data): does not sum to 1.

    "Highest" is x > `highest_above`: at 8 bits 0.99 also takes level 254; below 8 bits 0.999 takes none of the
    truncated levels. Bins are 2/V wide on either grid. Where the difference is at most 1e-5, the density at the centre
    times 2/V stands in.
    """
    inverse = torch.exp(-log_scales)
    b, a = (centred + 1 / levels) * inverse, (centred - 1 / levels) * inverse
    difference = torch.sigmoid(b) - torch.sigmoid(a)
    middle = centred * inverse
    density = middle - log_scales - 2 * F.softplus(middle) - math.log(levels / 2)
    inside = torch.where(difference > 1e-5, difference.clamp(min=1e-10).log(), density)
    return torch.where(x < -0.999, F.logsigmoid(b), torch.where(x > highest_above, F.logsigmoid(-a), inside))


class NormalLikelihood(Likelihood):
    """Independent Normals on the [−1, 1] scale; params (B, 2C, H, W): means, then log σ, as latents' (spec §4).

    A density: bits/dim from it are not comparable with a discrete likelihood's.
    """

    is_density = True

    @staticmethod
    def params_per_pixel(config: LikelihoodConfig, channels: int) -> int:
        return 2 * channels

    @cached_property
    def normal(self) -> Normal:
        """Of every pixel and colour."""
        return Normal.from_raw(self.params)

    def _log_prob(self, x: Tensor) -> Tensor:
        return self.normal.log_prob(2 * x - 1)

    def mean(self) -> Tensor:
        return self.normal.mean.clamp(-1, 1) / 2 + 0.5

    @property
    def noise_shape(self) -> tuple[int, int, int, int]:
        batch, channels, height, width = self.normal.mean.shape
        return batch, channels, height, width

    def sample(self, temperature: float = 1.0, uniform: Tensor | None = None) -> Tensor:
        """The standard deviation is multiplied by the temperature."""
        noise: Tensor = torch.special.ndtri(self._uniform(uniform))
        return (self.normal.mean + temperature * self.normal.sigma * noise).clamp(-1, 1) / 2 + 0.5


class SquaredError(Likelihood):
    """A mean image and nothing else; params (B, C, H, W) are the image on the [−1, 1] scale.

    `log_prob` is minus the squared error on that scale, which only stands where others have nats.
    """

    is_probability = False

    @staticmethod
    def params_per_pixel(config: LikelihoodConfig, channels: int) -> int:
        return channels

    def _log_prob(self, x: Tensor) -> Tensor:
        return -(2 * x - 1 - self.params).square()

    def mean(self) -> Tensor:
        return self.params.clamp(-1, 1) / 2 + 0.5

    @property
    def noise_shape(self) -> tuple[int, int, int, int]:
        batch, channels, height, width = self.params.shape
        return batch, channels, height, width

    def sample(self, temperature: float = 1.0, uniform: Tensor | None = None) -> Tensor:
        """The mean image."""
        return self.mean()


LIKELIHOODS: dict[str, type[Bernoulli] | type[LogisticMixture] | type[NormalLikelihood] | type[SquaredError]] = {
    "bernoulli": Bernoulli,
    "logistic_mixture": LogisticMixture,
    "normal": NormalLikelihood,
    "squared_error": SquaredError,
}
