"""What families of Normal latent groups share: `decode` and `sample` are passes through their groups.

Shapes: n or B images, L latent channels, h w space of a group; lists are by group, top-down.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from ..bricks.labels import partly_unknown
from ..bricks.likelihoods import Likelihood
from .base import Family, Noise, Output, Temperature, TopDown, temperatures
from .config import ConditionalConfig

ConfigT = TypeVar("ConfigT", bound=ConditionalConfig)
FeaturesT = TypeVar("FeaturesT", bound="EncodedImages")


@dataclass
class EncodedImages:
    """What every bottom-up pass says of a batch."""

    target: Tensor
    """(B, C, H, W), the quantised images."""
    labels: Tensor | None
    """(B,) int64 classes, −1 where unknown; None: all are."""

    def repeated(self: FeaturesT, times: int) -> FeaturesT:
        """The batch `times` over: draw k of image b is row k·B + b. What posteriors see stays one an image."""
        labels = None if self.labels is None else self.labels.repeat(times)
        return replace(self, target=self.target.repeat(times, 1, 1, 1), labels=labels)


class Hierarchy(Family[ConfigT]):
    """A family that says how one group follows the other."""

    @abstractmethod
    def top_down(self, features: Any = None, n: int = 1, labels: Tensor | None = None) -> TopDown:
        """A pass through the groups one by one, of encoded images, or without them of n images from the prior.

        Raises UserError as `check_labels` does.
        """

    def decode(self, features: Any, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """Draws from the posterior and decodes. Given latents (the first groups, top-down) are scored, not drawn."""
        noise = self.noise_for(len(features.target), noise)
        return self.decoded(self.top_down(self.as_known(features, noise)), features.target, noise, latents or ())

    def as_known(self, features: FeaturesT, noise: Noise) -> FeaturesT:
        """The features with the labels that count: all of them, but in training."""
        if features.labels is None or not self.training:
            return features
        return replace(features, labels=partly_unknown(features.labels, noise[0], self.config.label_dropout))

    def decoded(self, groups: TopDown, target: Tensor, noise: Noise, given: Sequence[Tensor] = ()) -> Output:
        """At each group of a pass the prior, the posterior, a draw or the given z, and on with it (spec §2, §3)."""
        self.check_fit("latents", given, len(target))
        draws = [groups.draw(epsilon, given[g] if g < len(given) else None) for g, epsilon in enumerate(noise)]
        return Output.of(groups.likelihood(), target, draws)

    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Noise | None = None,
        latents: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> Likelihood:
        """n images from the prior, every group's σ times its temperature (spec §7; spec_vdvae, Decoder)."""
        noise, given = self.noise_for(n, noise), latents or ()
        self.check_fit("latents", given, n)
        scales = temperatures(temperature, len(noise))
        groups = self.top_down(n=n, labels=labels)
        for g, (epsilon, scale) in enumerate(zip(noise, scales, strict=True)):
            groups.enter(given[g] if g < len(given) else groups.prior(scale).draw(epsilon))
        return groups.likelihood()
