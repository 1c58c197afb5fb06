"""What families of Normal latent groups share: `decode` and `sample` are passes through their groups.

Shapes: n or B images, L latent channels, h w space of a group; lists are by group, top-down.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..bricks.likelihoods import Likelihood
from .base import ConfigT, Family, Noise, Output, Temperature, TopDown, temperatures


class Hierarchy(Family[ConfigT]):
    """A family whose features have a `target`, and which says how one group follows the other."""

    @abstractmethod
    def top_down(self, features: Any = None, n: int = 1, labels: Tensor | None = None) -> TopDown:
        """A pass through the groups one by one, of encoded images, or without them of n images from the prior."""

    def decode(self, features: Any, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """Draws from the posterior and decodes. Given latents (the first groups, top-down) are scored, not drawn."""
        return self.decoded(self.top_down(features), features.target, noise, latents or ())

    def decoded(self, groups: TopDown, target: Tensor, noise: Noise | None, given: Sequence[Tensor] = ()) -> Output:
        """At each group of a pass the prior, the posterior, a draw or the given z, and on with it (spec §2, §3)."""
        batch = len(target)
        noise = self.noise_for(batch, noise)
        self.check_fit("latents", given, batch)
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
        self.check_labels(labels, n)
        noise, given = self.noise_for(n, noise), latents or ()
        self.check_fit("latents", given, n)
        scales = temperatures(temperature, len(noise))
        groups = self.top_down(n=n, labels=labels)
        for g, (epsilon, scale) in enumerate(zip(noise, scales, strict=True)):
            groups.enter(given[g] if g < len(given) else groups.prior(scale).draw(epsilon))
        return groups.likelihood()
