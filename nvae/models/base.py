"""The contract of a model family: what the trainer, the evaluation and the commands may ask of any of them.

Shapes: B batch, C image channels, H W space, G latent groups (top-down), L latent channels, h w space of a group.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from ..bricks.images import require_images
from ..bricks.inference import for_inference
from ..bricks.labels import require_labels
from ..bricks.latents import Draw, Normal
from ..bricks.likelihoods import Likelihood
from ..core.errors import UserError
from .config import ModelConfig

Density = Literal["exact", "bound", "point", "none"]
LatentKind = Literal["normal", "discrete"]
Recomputation = Literal["none", "activations", "cells"]
Temperature = float | Sequence[float]
Noise = Sequence[Tensor]
Metrics = dict[str, Tensor]
Progress = float | Tensor
"""The fraction of training done: a number, or where a pass is recorded to be replayed a 0-d tensor on its device, in
float64, which the host must not read."""
Chooser = Callable[[Tensor], Tensor]
"""Picks codes (B,) int64 by their logits (B, K)."""


# ------------------------------------------------------------------------------------------------ what families give


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
    """The latents, top-down, each of the shape of its noise: (B, L, h, w); of discrete ones the indices, int64."""
    posterior: list[Normal] = field(default_factory=list)
    """q(z | x) of each group, before its flow, top-down; empty for discrete latents, and maybe in training."""
    prior: list[Normal] = field(default_factory=list)
    """p(z) of each group likewise."""

    @staticmethod
    def of(likelihood: Likelihood, target: Tensor, draws: Sequence[Draw]) -> "Output":
        """From the draws of all groups, top-down."""
        return Output(
            likelihood,
            target,
            channel_kl=[draw.score.channel_kl for draw in draws],
            log_q=torch.stack([draw.score.log_q for draw in draws]).sum(0),
            log_p=torch.stack([draw.score.log_p for draw in draws]).sum(0),
            z=[draw.z for draw in draws],
            posterior=[draw.posterior for draw in draws],
            prior=[draw.prior for draw in draws],
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


class TopDown(ABC):
    """A pass through groups of Normal latents, top-down, one at a time.

    The next group has a prior, and a posterior where the pass has features; once a z has entered, the one after it is
    next. After the last one there is a likelihood.
    """

    @abstractmethod
    def prior(self, temperature: float = 1.0) -> Normal:
        """p(z) of the next group, given what has entered: (B, L, h, w), σ times the temperature."""

    @abstractmethod
    def posterior(self) -> Normal:
        """q(z | x) of the next group, given what has entered; with flows, of the draw of which `flowed` makes z."""

    def flowed(self, drawn: Tensor) -> Tensor:
        """The z of a draw from the next group's posterior: what its flows make of it, or itself without any."""
        return drawn

    @abstractmethod
    def enter(self, z: Tensor) -> None:
        """Takes the z (B, L, h, w) of the next group in."""

    @abstractmethod
    def draw(self, noise: Tensor, given: Tensor | None = None) -> Draw:
        """All that `decode` does at the next group: a draw from its posterior, or the given z, is scored and enters."""

    @abstractmethod
    def likelihood(self) -> Likelihood:
        """p(x | z), after the last group."""


# ------------------------------------------------------------------------------------------------ what they are given


@dataclass(frozen=True)
class FirstBatch:
    """What all ranks together take in one pass of training; each rank has all of it."""

    images: Tensor
    """(B, C, H, W) in [0, 1], on the model's device."""
    labels: Tensor
    """(B,) int64, −1 where unknown."""
    noise: Callable[[], Noise]
    """Draws the noise with which training will see them."""


@dataclass(frozen=True)
class FirstImages:
    """What a new run sees first, the same on every rank and in every iteration."""

    batches: Iterable[FirstBatch]
    """From the first on; possibly without end."""
    epoch_size: int
    """Images in the training set."""
    seed: int
    """Of the run."""

    def images(self, limit: int) -> Iterator[Tensor]:
        """Batches of the first `limit` images, or of all where an epoch has fewer."""
        left = min(limit, self.epoch_size)
        for batch in self.batches:
            yield batch.images[:left]
            left -= len(batch.images)
            if left <= 0:
                return


# ------------------------------------------------------------------------------------------------------- the family


ConfigT = TypeVar("ConfigT", bound=ModelConfig)


class Family(nn.Module, ABC, Generic[ConfigT]):
    """A hierarchical VAE.

    `noise` is one standard-normal tensor per group, top-down; None draws fresh ones. Discrete latents are drawn by it
    through its distribution function. `labels` are (B,) int64 classes, −1 where unknown; None: all are.
    """

    config_type: ClassVar[type[ModelConfig]]
    """The family's own config."""
    latent_kind: ClassVar[LatentKind] = "normal"
    """Normal latents have μ, σ and a noise of their own in `Output`; discrete ones are indices."""
    guidance: float = 0.0
    """How far samples of a class go away from those of none."""
    codes: int = 0
    """How many values a discrete latent may have; 0 where they are Normal, or where that is nobody's business."""
    density: Density = "bound"
    """Whether log p(x) is computed exactly, bounded (importance weights exist), bounded by one point of the latents
    (all draws are the same), or not available."""

    draws: int = 1
    """How often training draws the latents of an image, K. Its noise and its output have K·B rows, draw k of image b
    in row k·B + b."""

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    # ------------------------------------------------------------------------------------------------------- passes

    def forward(self, x: Tensor, noise: Noise | None = None, labels: Tensor | None = None) -> Output:
        """Encodes and decodes images (B, C, H, W) in [0, 1], quantising them itself.

        In eval mode others are refused, as those from 0 to 255.
        """
        if not self.training:
            self.check_images(x)
        features = self.encode(x) if labels is None else self.encode(x, labels)
        return self.decode(features, noise=noise)

    @abstractmethod
    def encode(self, x: Tensor, labels: Tensor | None = None) -> Features:
        """The deterministic bottom-up pass: features, labels among them, for any number of `decode` calls."""

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
        labels: Tensor | None = None,
    ) -> Likelihood:
        """n draws from the prior, its σ times the temperature (a number, or one per group, top-down).

        `latents` gives the first groups, top-down; the rest is drawn.
        """

    def top_down(self, features: Any = None, n: int = 1, labels: Tensor | None = None) -> TopDown:
        """A pass through the groups one by one, of encoded images, or without them of n images from the prior.

        Raises UserError for a family that offers none.
        """
        raise UserError(f"{type(self).__name__}: its groups cannot be stepped through one by one")

    @abstractmethod
    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        """The shape of each group's noise for n images, which is that of its z, top-down."""

    def unfold(self, choose: Chooser, n: int, labels: Tensor | None = None) -> Likelihood:
        """Of n images whose discrete latents are chosen one after the other: what their codes decode to.

        Every code's logits are those that the prior gives it after the ones chosen before. Raises UserError for a
        family that offers none.
        """
        raise UserError(f"{type(self).__name__}: its latents cannot be chosen one by one")

    # -------------------------------------------------------------------------------------------------- kept codes

    def coding(self) -> str:
        """Sixteen digits that tell what decides an image's codes from other weights, where these can be kept.

        Raises UserError, saying why, where an image has none or not always the same.
        """
        raise UserError(f"{type(self).__name__}: its latents are no codes that could be kept")

    def check_codes(self, coding: str, made_by: str) -> None:
        """Raises UserError where it cannot be trained on kept codes, of that `coding`, of the run `made_by`.

        A family that can has a `forward` that takes the `codes` of its images: (B, S) int64, those of all groups,
        top-down, each in raster order.
        """
        raise UserError(f"data.stored_codes: {type(self).__name__} trains on images, not on codes; leave it out")

    def codes_of(self, x: Tensor) -> list[Tensor]:
        """Those of images (B, C, H, W) in [0, 1]: (B, h, w) int64 of each group, top-down.

        Raises UserError for a family whose images have none.
        """
        raise UserError(f"{type(self).__name__}: its images have no codes")

    # ----------------------------------------------------------------------------------------------------- training

    def begin(self, first: FirstImages) -> None:
        """Sets what starts from data: nothing by default.

        Called once for each new run, on every rank, before its first update, in training mode and without autocast;
        not for weights that were trained before. Every rank must come to the same result.
        """

    def take_in(self, source: "Family[Any]") -> None:
        """Makes the weights of the model that the config is `built_on` a part of this one, once, before `begin`."""

    @classmethod
    def joined(cls, parts: "Mapping[str, Family[Any]]") -> "Family[Any]":
        """One model of parts of this family that were trained apart, by the names that messages give them.

        Raises UserError for a family that is not trained in parts, and for parts that do not fit together.
        """
        raise UserError(f"{next(iter(parts))}: a {cls.__name__} is not trained in parts that could be joined")

    @abstractmethod
    def loss(self, output: Output, progress: Progress) -> tuple[Tensor, Metrics]:
        """The scalar to minimise at a fraction of training done, and detached metrics to log.

        The scalar is in the family's own unit: thresholds on gradient norms and the optimiser's eps are meant for it.
        Metrics are in nats per image, among them `nelbo` (the true one), `reconstruction` and `kl`.
        """

    def after_update(self, seed: int, step: int, progress: float) -> Metrics:
        """What learns otherwise than by gradients learns now, from the passes since the last update; metrics to log.

        Called on every rank after each update of the weights, `step` counted from 0 and `progress` the fraction of
        training done. Every rank must come to the same result.
        """
        return {}

    def after_skip(self) -> None:
        """Forgets what those passes left behind, where an update was not made."""

    def copied(self) -> Collection[str]:
        """Names in `state_dict` of what an average of the weights takes over as it is."""
        return ()

    def set_recomputation(self, mode: Recomputation) -> None:
        """What the backward pass computes again instead of keeping it. Raises UserError where a mode is not offered."""
        if mode != "none":
            raise UserError(f"train.recompute: {type(self).__name__} offers none, found '{mode}'")

    def set_guidance(self, guidance: float) -> None:
        """How far samples of a class go away from those of none, from 0 on. Raises UserError where none is offered."""
        if guidance:
            why = "has none"
            if self.latent_kind == "normal":
                why = "has none: of Normal latents, p(z | class)^(1 + w) / p(z)^w need not be a distribution"
            raise UserError(f"guidance: {type(self).__name__} {why}; found {guidance:g}, allowed is 0")

    def parts(self) -> Iterable[nn.Module]:
        """The modules that its depth is made of, to be compiled one by one; those of a kind share their code."""
        return ()

    def for_inference(self) -> "Family[ConfigT]":
        """A model for evaluation and sampling with the weights of now, in eval mode: same numbers, less work.

        This one stays as it is, unless none of its bricks has a faster form: then it is the answer itself.
        """
        return for_inference(self)

    # ------------------------------------------------------------------------------------------------- what they take

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

    def check_images(self, images: object) -> None:
        """Raises UserError for what are not images as this model takes them."""
        require_images(images, self.config.image_channels, self.config.image_size, like=next(self.parameters()))

    def check_labels(self, labels: Tensor | None, n: int) -> None:
        """Raises UserError for labels of a model that takes none, and for any but (n,) int64 classes or −1.

        Classes on a GPU are looked at in eval mode only: training, which knows those of its images, would wait for it.
        """
        if labels is None:
            return
        if self.config.classes == 0:
            raise UserError(f"labels: this {type(self).__name__} takes none, its model.classes is 0")
        waits = self.training and labels.device.type != "cpu"
        require_labels(labels, n, self.config.classes, values=not waits)

    @property
    def has_importance_weights(self) -> bool:
        """True where log p(x) is bounded through a density of the latents."""
        return self.density == "bound"

    def check_samples(self, samples: int) -> None:
        """Raises UserError where importance samples are asked of a family that has no importance weights."""
        if samples > 1 and not self.has_importance_weights:
            raise UserError(
                f"importance samples: {type(self).__name__} takes none, {NO_WEIGHTS[self.density]}; found {samples}, "
                "allowed is 1"
            )


NO_WEIGHTS = {
    "exact": "its likelihood is exact",
    "point": "all draws of an image are the same (a model.posterior_temperature above 0 spreads them)",
    "none": "it has no density of its latents",
}


def temperatures(temperature: Temperature, groups: int) -> list[float]:
    """One temperature per group. Raises UserError for another number of them, or for one that is negative or none."""
    values = [float(temperature)] * groups if isinstance(temperature, (int, float)) else [float(t) for t in temperature]
    if len(values) != groups:
        raise UserError(f"temperature: {len(values)} values for {groups} latent groups; give one, or one per group")
    for value in values:
        if not 0 <= value < math.inf:
            raise UserError(f"temperature: must be 0 or more, found {value}")
    return values
