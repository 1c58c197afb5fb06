"""A group of latents in a ladder of two towers, with a residual Normal posterior (spec §2, §3; paper §3.2).

Shapes: B images, K draws of each, C channels of a tower, L latent channels, h w space of the group.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..core.precision import at_least_float32
from .cells import Cell, Op
from .convolutions import Conv2d
from .flows import FlowCell
from .latents import Draw, Normal, score, sum_with_each


class Tower(NamedTuple):
    """What stands at a group in one of the two towers."""

    ops: tuple[Op, ...]
    """Of a cell."""
    channels: int
    cells: int


class LatentGroup(nn.Module):
    """One group of latents: its cells in both towers, its distributions, and how its z enters the decoder (spec §2)."""

    def __init__(
        self,
        encoder: Tower,
        decoder: Tower,
        latent_channels: int,
        *,
        flows: int,
        squeeze_excite: bool,
        residual_posterior: bool,
        first: bool,
        vanilla: bool,
    ) -> None:
        """`first`: the top-most one, without a prior network. `vanilla`: the only one, whose z is all of the state."""
        super().__init__()
        self.is_first, self.is_vanilla, self.residual_posterior = first, vanilla, residual_posterior
        self.latent_channels = latent_channels

        def cells(tower: Tower) -> nn.Sequential:
            return nn.Sequential(*(Cell(tower.ops, tower.channels, "same", squeeze_excite) for _ in range(tower.cells)))

        self.encoder_cells = cells(encoder)
        self.posterior = Conv2d(encoder.channels, 2 * latent_channels, 3)
        self.flow = nn.ModuleList(FlowCell(latent_channels) for _ in range(flows))
        self.decoder_cells = cells(decoder)
        self.combine = Conv2d(latent_channels if vanilla else decoder.channels + latent_channels, decoder.channels)
        if not first:
            self.merge = Conv2d(decoder.channels, encoder.channels)
            self.prior = Conv2d(decoder.channels, 2 * latent_channels)

    def forward(
        self, state: Tensor, tap: Tensor, noise: Tensor, given: Tensor | None, of_class: Tensor | None = None
    ) -> Draw:
        """The prior, the posterior, a draw from it (or the `given` z, scored), and z in the decoder state (spec §3).

        state (K·B, C, h, w), tap (B, …, h, w) from `seen`, noise and given (K·B, L, h, w), of_class (K·B, 2L, 1, 1), to
        the first group only; K any number.
        """
        prior_raw = self.prior_raw(state, of_class)
        p = Normal.from_sum([prior_raw])
        q = Normal.from_sum(self.posterior_raws(tap, state, prior_raw))
        if given is not None:
            z, drawn = given, self.before_flow(given)
        else:
            drawn = q.draw(noise)
            z = self.through_flow(drawn)
        scored = score(q, p, drawn, z, closed=len(self.flow) == 0)
        return Draw(self.entered(state, z), z, scored, q, p)

    def prior_raw(self, state: Tensor, of_class: Tensor | None = None) -> Tensor:
        """Raw prior parameters (B, 2L, h, w) from the decoder state.

        For the first group they are zeros (spec §3), or what the class says, (B, 2L, 1, 1).
        """
        if self.is_first:
            batch, _, height, width = state.shape
            zeros = at_least_float32(state.new_zeros(batch, 2 * self.latent_channels, height, width))
            return zeros if of_class is None else zeros + of_class
        return at_least_float32(self.prior(state, "elu"))

    def seen(self, features: Tensor) -> Tensor:
        """What the posterior takes of the encoder's features (B, C, h, w): computed once, however many the draws."""
        return features

    def posterior_raws(self, tap: Tensor, state: Tensor, prior_raw: Tensor) -> list[Tensor]:
        """What raw parameters (K·B, 2L, h, w) of the posterior are the sum of; residual ones add to the prior's."""
        if self.is_first:
            return [prior_raw, self.posterior(tap)]
        raw = self.posterior(sum_with_each(self.merge(state), tap))
        return [prior_raw, raw] if self.residual_posterior else [raw]

    def through_flow(self, z: Tensor) -> Tensor:
        """The posterior draw after its flow cells."""
        for cell in self.flow:
            z = cell(z)
        return z

    def before_flow(self, z: Tensor) -> Tensor:
        """The draw that the flow cells turned into z."""
        for cell in reversed(self.flow):
            z = cast(FlowCell, cell).inverse(z)
        return z

    def entered(self, state: Tensor, z: Tensor) -> Tensor:
        """The decoder state (B, C, h, w) after z has entered it."""
        z = z.to(state.dtype)
        if self.is_vanilla:
            return cast(Tensor, self.combine(z))
        return cast(Tensor, self.combine(torch.cat([state, z], dim=1)))
