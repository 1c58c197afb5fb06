"""The contract of a model family: what the trainer, the evaluation and the commands may ask of any of them.

Shapes: B batch, C image channels, H W space, G latent groups (top-down), L latent channels, h w space of a group.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..bricks.latents import Normal, Score
from ..bricks.likelihoods import Likelihood, LikelihoodConfig
from ..core.config import Config
from ..core.errors import UserError

Density = Literal["exact", "bound", "none"]
Recomputation = Literal["none", "activations", "cells"]
Temperature = float | Sequence[float]
Noise = Sequence[Tensor]
Metrics = dict[str, Tensor]


class ModelConfig(Config):
    family: str
    """Which family of models: `nvae`, or `package.module:Class` for one of your own."""
    image_size: int = Field(32, ge=1)
    """Height and width of the model's input in pixels, padding included."""
    image_channels: Literal[1, 3] = 3
    """1 for grey or binary images, 3 for RGB."""
    likelihood: LikelihoodConfig = LikelihoodConfig()

    @model_validator(mode="after")
    def _likelihood_fits(self) -> Self:
        if self.likelihood.kind == "bernoulli" and self.image_channels != 1:
            raise ValueError("likelihood.kind: bernoulli is for one-channel images, image_channels is 3")
        if self.likelihood.kind == "normal" and self.image_channels != 3:
            raise ValueError("likelihood.kind: normal is for RGB images, image_channels is 1")
        if 2 * self.likelihood.border >= self.image_size:
            raise ValueError(f"likelihood.border: {self.likelihood.border} leaves nothing of {self.image_size} pixels")
        return self

    def with_likelihood(self, **fields: Any) -> Self:
        """The same model with some fields of its likelihood changed."""
        return self.model_copy(update={"likelihood": self.likelihood.model_copy(update=fields)})

    def settled(self, saved: Self | None, images: Iterable[Tensor]) -> Self:
        """The config with what it leaves open as `saved`, the run's own, has it, or else measured on training images.

        `images` are batches (B, C, H, W) in [0, 1], read only where they are needed. Here nothing is left open.
        """
        return self


class Draw(NamedTuple):
    """What one group of Normal latents makes of a batch, and of the decoder's state."""

    state: Tensor
    """(B, C, h, w), with z in it."""
    z: Tensor
    """(B, L, h, w)."""
    score: Score
    posterior: Normal
    prior: Normal


@dataclass
class Output:
    """What a model says of a batch."""

    likelihood: Likelihood
    """p(x | z)."""
    target: Tensor
    """(B, C, H, W) in [0, 1], the images as the likelihood takes them."""
    channel_kl: list[Tensor]
    """KL of each latent channel, (B, L) nats a group, top-down."""
    log_q: Tensor | None
    """(B,) nats, log q(z | x) at the draw; None where the family has no such density."""
    log_p: Tensor | None
    """(B,) nats, log p(z) at the draw; None likewise."""
    z: list[Tensor]
    """The latents (B, L, h, w), top-down."""
    posterior: list[Normal] = field(default_factory=list)
    """q(z | x) of each group, before its flow, top-down; empty where latents are not Normal, and maybe in training."""
    prior: list[Normal] = field(default_factory=list)
    """p(z) of each group likewise."""

    @staticmethod
    def of(likelihood: Likelihood, target: Tensor, draws: Sequence[Draw], *, distributions: bool = True) -> "Output":
        """From the draws of all groups, top-down; without their distributions if those are not asked for."""
        return Output(
            likelihood,
            target,
            channel_kl=[draw.score.channel_kl for draw in draws],
            log_q=torch.stack([draw.score.log_q for draw in draws]).sum(0),
            log_p=torch.stack([draw.score.log_p for draw in draws]).sum(0),
            z=[draw.z for draw in draws],
            posterior=[draw.posterior for draw in draws] if distributions else [],
            prior=[draw.prior for draw in draws] if distributions else [],
        )

    @cached_property
    def kl(self) -> Tensor:
        """KL of each group, (B, G) nats, top-down."""
        return torch.stack([kl.sum(1) for kl in self.channel_kl], dim=1)

    @cached_property
    def reconstruction(self) -> Tensor:
        """−log p(x | z) in nats, (B,)."""
        return -self.likelihood.log_prob(self.target)

    @property
    def log_weight(self) -> Tensor:
        """log p(x | z) + log p(z) − log q(z | x), (B,) nats: the importance weight of the draw (spec §7)."""
        if self.log_q is None or self.log_p is None:
            raise UserError("this family has no density of its latents, so there are no importance weights")
        return self.log_p - self.log_q - self.reconstruction


class Features(Protocol):
    """What the bottom-up pass says of a batch of images; families choose what is inside."""

    def repeated(self, times: int) -> Self:
        """The batch `times` over, one copy after the other: draw k of image b is row k·B + b of what `decode` returns,
        so that its (times·B,) log weights reshape to (times, B)."""


ConfigT = TypeVar("ConfigT", bound=ModelConfig)


class Family(nn.Module, ABC, Generic[ConfigT]):
    """A hierarchical VAE. `noise` is one standard-normal tensor per group, top-down; None draws fresh ones."""

    config_type: ClassVar[type[ModelConfig]]
    """The family's own config."""
    density: ClassVar[Density] = "bound"
    """Whether log p(x) is computed exactly, bounded (importance weights exist), or not available."""

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, noise: Noise | None = None) -> Output:
        """Encodes and decodes images (B, C, H, W) in [0, 1], quantising them itself."""
        return self.decode(self.encode(x), noise=noise)

    @abstractmethod
    def encode(self, x: Tensor) -> Features:
        """The deterministic bottom-up pass: features for any number of `decode` calls."""

    @abstractmethod
    def decode(self, features: Any, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """Draws the latents of encoded images and decodes them. `latents` gives the first groups, top-down."""

    @abstractmethod
    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Noise | None = None,
        latents: Sequence[Tensor] | None = None,
    ) -> Likelihood:
        """n draws from the prior, its σ times the temperature (a number, or one per group, top-down).

        `latents` gives the first groups, top-down; the rest is drawn.
        """

    @abstractmethod
    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        """The shape of each group's noise for n images, top-down."""

    def noise_for(self, n: int, noise: Noise | None) -> Noise:
        """The given noise for n images, or fresh one. Raises UserError where it does not fit the groups."""
        if noise is None:
            device = next(self.parameters()).device
            return [torch.randn(shape, device=device) for shape in self.latent_shapes(n)]
        if len(noise) != (groups := len(self.latent_shapes(n))):
            raise UserError(f"noise: {len(noise)} tensors for {groups} latent groups")
        self.check_fit("noise", noise, n)
        return noise

    def check_fit(self, name: str, tensors: Sequence[Tensor], n: int) -> None:
        """Raises UserError for more tensors than groups, or of other shapes: broadcasting would hide the mistake."""
        shapes = self.latent_shapes(n)
        if len(tensors) > len(shapes):
            raise UserError(f"{name}: {len(tensors)} tensors for {len(shapes)} latent groups")
        for g, (tensor, shape) in enumerate(zip(tensors, shapes, strict=False)):
            if tensor.shape != shape:
                raise UserError(f"{name}: group {g} takes {shape}, found {tuple(tensor.shape)}")

    @abstractmethod
    def loss(self, output: Output, progress: float) -> tuple[Tensor, Metrics]:
        """The scalar to minimise at a fraction of training done, and detached metrics to log.

        The scalar is in the family's own unit: thresholds on gradient norms and the optimiser's eps are meant for it.
        Metrics are in nats per image, among them `nelbo` (the true one), `reconstruction` and `kl`.
        """

    def set_recomputation(self, mode: Recomputation) -> None:
        """What the backward pass computes again instead of keeping it. Raises UserError where a mode is not offered."""
        if mode != "none":
            raise UserError(f"train.recompute: {type(self).__name__} offers none, found '{mode}'")

    def for_inference(self) -> "Family[ConfigT]":
        """A model for evaluation and sampling with the weights of now, in eval mode: same numbers, less work.

        This one stays as it is, unless the family has no faster form: then it is the answer itself.
        """
        return self.eval()

    def compile_parts(self) -> None:
        """Compiles, in place, the parts whose compilation pays (`torch.compile`); the first passes then take longer.

        Here that is `forward`, which training calls and evaluation does not: a family names its parts itself.
        """
        self.compile()

    @property
    def has_started(self) -> bool:
        """False while the next pass in training mode sets weights from its images, before it computes anything."""
        return True

    def mark_loaded(self) -> None:
        """Called after weights were loaded: whatever starts from data counts as started."""


def temperatures(temperature: Temperature, groups: int) -> list[float]:
    """One temperature per group. Raises UserError for another number of them, or for one that is negative or none."""
    values = [float(temperature)] * groups if isinstance(temperature, (int, float)) else [float(t) for t in temperature]
    if len(values) != groups:
        raise UserError(f"temperature: {len(values)} values for {groups} latent groups; give one, or one per group")
    for value in values:
        if not 0 <= value < math.inf:
            raise UserError(f"temperature: must be 0 or more, found {value}")
    return values
