"""NVAE: a deep hierarchical VAE of residual cells (Vahdat & Kautz 2020; spec §2, §3, §5).

Shapes: B batch, C channels, H W space, G latent groups (top-down), S scales, L latent channels, h w space of a group.
"Bottom-up" is the encoder, from image to code; "top-down" the decoder. A group's level is the number of halvings
between the image and its latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bricks.cells import ARCHITECTURES, Cell, Op, RegularOp
from ...bricks.convolutions import Conv2d, EffectiveWeights
from ...bricks.groups import LatentGroup, Tower
from ...bricks.labels import ClassVectors
from ...bricks.latents import Draw, Normal, importance_weighted_bound
from ...bricks.likelihoods import LIKELIHOODS, Likelihood, quantise
from ...bricks.normalisation import BatchNorm, advancing_together
from ...bricks.recomputation import Recomputable
from ...bricks.regularizers import SpectralPenalty, batch_norm_penalty
from ...kernels.operations import memory_format
from ..base import FirstImages, Metrics, Noise, Output, Progress, Recomputation, TopDown
from ..config import ModelConfig
from ..hierarchy import EncodedImages, Hierarchy
from .config import NVAEConfig
from .objective import (
    Number,
    balance_factors,
    balance_weights,
    balanced_kl,
    in_warm_up,
    kl_coefficient,
    spectral_weight,
)

UP, DOWN = 10, 2
"""Stages of either way of a pass. Ranks exchange a stage's gradients as soon as the backward pass has left it."""


@dataclass
class Features(EncodedImages):
    """The bottom-up pass of a batch."""

    taps: list[Tensor]
    """What each group's posterior sees of the image, (B, C, h, w), top-down."""


class TopDownPass(TopDown):
    """The decoder's state on its way through the groups; what `draw` does at once is in parts what the others do."""

    def __init__(self, model: "NVAE", features: Features | None, n: int, labels: Tensor | None = None) -> None:
        """`labels` are of a pass without features."""
        self.model, self.features = model, features
        self.groups = model.latent_groups
        self.place = 0
        """Of the next group."""
        labels = labels if features is None else features.labels
        self._of_class = model.first_prior(labels)
        self.state = model.entering(0, model.initial_state(n, labels))
        """(n, C, h, w), at the next group after its cells."""
        self._prior_raw: Tensor | None = None

    @property
    def _group(self) -> LatentGroup:
        return self.groups[self.place]

    @property
    def _tap(self) -> Tensor:
        assert self.features is not None, "without features there is no posterior"
        return self.features.taps[self.place]

    def prior(self, temperature: float = 1.0) -> Normal:
        """(n, L, h, w), σ times the temperature."""
        return Normal.from_sum([self._raw()], temperature)

    def posterior(self) -> Normal:
        """(n, L, h, w), of the draw before the flows; `flowed` makes the z of it, which has the same density."""
        return Normal.from_sum(self._group.posterior_raws(self._tap, self.state, self._raw()))

    def flowed(self, drawn: Tensor) -> Tensor:
        """What the group's flow cells make of a draw from its posterior."""
        return self._group.through_flow(drawn)

    def enter(self, z: Tensor) -> None:
        """The z after its flows, (n, L, h, w)."""
        self._go_on(self._group.entered(self.state, z))

    def draw(self, noise: Tensor, given: Tensor | None = None) -> Draw:
        """Everything at the next group, as the one function that is trained."""
        draw: Draw = self._group(self.state, self._tap, noise, given, self._of_class)
        self._go_on(draw.state)
        return draw

    def likelihood(self) -> Likelihood:
        """p(x | z)."""
        assert self.place == len(self.groups), "not every group has its z"
        return self.model.likelihood(self.state)

    def _raw(self) -> Tensor:
        if self._prior_raw is None:
            self._prior_raw = self._group.prior_raw(self.state, self._of_class)
        return self._prior_raw

    def _go_on(self, state: Tensor) -> None:
        self.place, self._prior_raw, self._of_class = self.place + 1, None, None
        self.state = self.model.entering(self.place, state) if self.place < len(self.groups) else state


class NVAE(Hierarchy[NVAEConfig]):
    """The hierarchy of spec §2: stem, pre-processing, two towers joined at every group, post-processing."""

    config_type: ClassVar[type[ModelConfig]] = NVAEConfig
    started: Tensor
    _balance_factors: Tensor

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__(config)
        self.draws = config.objective.importance_samples
        architecture = ARCHITECTURES[config.architecture]
        levels, top = config.levels, config.levels[0]
        encoder, decoder = config.encoder_channels, config.decoder_channels

        def cell(ops: tuple[Op, ...], channels: int, resampling: Literal["same", "down", "up"]) -> Cell:
            return Cell(ops, channels, resampling, config.squeeze_excite)

        # Bottom-up.
        self.stem = Conv2d(config.image_channels, encoder, 3)
        self.preprocess = nn.Sequential()
        for level in range(config.halvings):
            for _ in range(config.preprocess_cells - 1):
                self.preprocess.append(cell(architecture.preprocess, encoder * 2**level, "same"))
            self.preprocess.append(cell(architecture.preprocess, encoder * 2**level, "down"))
        self.top = Conv2d(encoder * 2**top, encoder * 2**top)

        # Both towers, top-down; `down[s]` and `up[s]` join scale s (0 smallest) with the next larger one.
        self.groups = nn.ModuleList(_group(config, level, first=g == 0) for g, level in enumerate(levels))
        joints = range(top - 1, config.halvings - 1, -1)  # level of the larger resolution at each joint, top-down
        self.down = nn.ModuleList(cell(architecture.encoder, encoder * 2**level, "down") for level in joints)
        self.up = nn.ModuleList(cell(architecture.decoder, decoder * 2 ** (level + 1), "up") for level in joints)

        # Top-down.
        side = config.image_size // 2**top
        # Kept in vanilla checkpoints and in the parameter count, but not used there (spec §2).
        first_state = torch.rand(decoder * 2**top, side, side)
        self.first_state = nn.Parameter(first_state, requires_grad=not config.is_vanilla)
        self.postprocess = nn.Sequential()
        for level in range(config.halvings, 0, -1):
            self.postprocess.append(cell(architecture.postprocess, decoder * 2**level, "up"))
            for _ in range(config.postprocess_cells - 1):
                self.postprocess.append(cell(architecture.postprocess, decoder * 2 ** (level - 1), "same"))
        likelihood = LIKELIHOODS[config.likelihood.kind]
        self.head = Conv2d(decoder, likelihood.params_per_pixel(config.likelihood, config.image_channels), 3)

        self.weights = EffectiveWeights(self, stages=self._stages())
        self.spectral = SpectralPenalty(self.weights.shapes)
        # False until `begin` has set what starts from data.
        self.register_buffer("started", torch.tensor(not architecture.starts_from_data))
        self.recompute = False
        factors = balance_factors([top - level for level in levels], self.first_state.device)
        self.register_buffer("_balance_factors", factors, persistent=False)

        # Where labels enter: where the prior begins, and where the decoder does.
        self.class_prior: ClassVectors | None = None
        self.class_state: ClassVectors | None = None
        if config.classes:
            self.class_prior = ClassVectors(config.classes, 2 * config.latent_channels)
            if not config.is_vanilla:
                self.class_state = ClassVectors(config.classes, decoder * 2**top)

    @property
    def latent_groups(self) -> list[LatentGroup]:
        """Top-down."""
        return cast("list[LatentGroup]", list(self.groups))

    @property
    def norms(self) -> list[BatchNorm]:
        """Every batch norm."""
        return [module for module in self.modules() if isinstance(module, BatchNorm)]

    # ------------------------------------------------------------------------------------------------- the contract

    def forward(self, x: Tensor, noise: Noise | None = None, labels: Tensor | None = None) -> Output:
        """(B, C, H, W) in [0, 1] -> Output. Both ways with one set of effective weights."""
        if not self.training:
            self.check_images(x)
        draws = self.draws if self.training else 1
        with advancing_together(self.norms if self.training else []):
            features, noise = self.encode(x, labels), self.noise_for(draws * len(x), noise)
            features = self.as_known(features, [part[: len(x)] for part in noise])
            if draws > 1:
                features = features.repeated(draws)
            return self.decoded(TopDownPass(self, features, draws * len(x)), features.target, noise)

    def encode(self, x: Tensor, labels: Tensor | None = None) -> Features:
        """The bottom-up pass of images (B, C, H, W) in [0, 1]."""
        self.check_labels(labels, x.shape[0])
        self.weights.begin()
        return self.bottom_up(x, labels)

    def top_down(self, features: Any = None, n: int = 1, labels: Tensor | None = None) -> TopDown:
        """A pass through the groups one by one, of encoded images, or without them of n images from the prior."""
        if features is None:
            self.check_labels(labels, n)
        self.weights.refresh()
        return TopDownPass(self, features, n if features is None else features.target.shape[0], labels)

    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        """(n, L, h, w) of each group, top-down."""
        size, latent = self.config.image_size, self.config.latent_channels
        return [(n, latent, size // 2**level, size // 2**level) for level in self.config.levels]

    def loss(self, output: Output, progress: Progress) -> tuple[Tensor, Metrics]:
        """Mean over the batch of reconstruction + balanced KL, plus λ (Σ σ_max + Σ max|γ|), in nats (spec §5).

        Of several draws an image, after the warm-up, minus the importance-weighted bound in place of the first two.
        """
        objective = self.config.objective
        coefficient = kl_coefficient(progress, objective)
        lam = spectral_weight(coefficient, objective)
        balances = objective.kl_balance and (isinstance(coefficient, Tensor) or coefficient < 1)
        weights = balance_weights(output.kl, self.balance_factors(output.kl.device)) if balances else None
        even = torch.ones(len(self.groups), device=output.kl.device)
        kl = objective.kl_weight * balanced_kl(output.kl, coefficient, weights)
        loss = (output.reconstruction + kl).mean()
        if self.draws > 1:
            loss = self._after_warm_up(output, coefficient, loss)
        metrics = {
            "nelbo": (output.reconstruction + output.kl.sum(1)).mean().detach(),
            "reconstruction": output.reconstruction.mean().detach(),
            "kl": output.kl.sum(1).mean().detach(),
            "kl_coefficient": torch.as_tensor(coefficient),
            "kl_group_coefficient": coefficient * (even if weights is None else in_warm_up(weights, coefficient)),
            "spectral_weight": torch.as_tensor(lam),
        }
        if objective.spectral > 0:
            spectral, scales = self.spectral(self.weights.matrices), self.batch_norm_penalty()
            penalty = spectral + scales
            loss = loss + (lam.to(penalty) if isinstance(lam, Tensor) else lam) * penalty
            metrics |= {"spectral": spectral.detach(), "batch_norm_scales": scales.detach()}
        return loss, metrics

    def _after_warm_up(self, output: Output, coefficient: Number, loss: Tensor) -> Tensor:
        """The loss in the warm-up, then minus the mean importance-weighted bound of the draws of each image."""
        of_latents = output.log_weight + output.reconstruction  # log p(z) − log q(z | x)
        log_weights = self.config.objective.kl_weight * of_latents - output.reconstruction
        weighted = -importance_weighted_bound(log_weights.reshape(self.draws, -1)).mean()
        if isinstance(coefficient, Tensor):
            return torch.where(coefficient < 1, loss, weighted)
        return loss if coefficient < 1 else weighted

    def set_recomputation(self, mode: Recomputation) -> None:
        """`cells`: the backward pass computes whole cells, flows and the likelihood again.

        Batch norms and activations it computes again in any mode.
        """
        self.recompute = mode == "cells"
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.recompute = self.recompute

    def parts(self) -> Iterator[nn.Module]:
        """Cells and latent groups."""
        for module in self.modules():
            if isinstance(module, Cell | LatentGroup):
                yield module

    @torch.no_grad()
    def begin(self, first: FirstImages) -> None:
        """Without batch norm (`res_elu`), sets each op by the input it gets from the first batch (spec §1)."""
        if self.started:
            return
        batch = next(iter(first.batches))
        ops = [m for m in self.modules() if isinstance(m, RegularOp) and m.norm is None]
        hooks = [op.register_forward_pre_hook(lambda op, inputs: op.start_from(*inputs)) for op in ops]
        self.weights.clear()
        features = self.bottom_up(batch.images)
        noise = [part[: len(batch.images)] for part in batch.noise()]  # of the first draw of each
        self.decoded(TopDownPass(self, features, len(batch.images)), features.target, noise)
        for hook in hooks:
            hook.remove()
        self.started.fill_(True)

    # --------------------------------------------------------------------------------------------------- bottom-up

    def bottom_up(self, x: Tensor, labels: Tensor | None = None) -> Features:
        """With the effective weights of now."""
        likelihood = self.config.likelihood
        target = quantise(x, likelihood.bits, likelihood.grid)
        image = (2 * target - 1).contiguous(memory_format=memory_format())
        state = self.preprocess(self.stem(image))
        taps: list[Tensor] = []
        for g in reversed(range(len(self.groups))):
            self.weights.reach(self._stages_of(g)[0])
            state = cast(LatentGroup, self.groups[g]).encoder_cells(state)
            if g == 0:
                state = F.elu(self.top(state, "elu"))
            taps.append(state)
            if (joint := self.joint_above(g)) is not None:
                state = self.down[joint](state)
        seen = [group.seen(tap) for group, tap in zip(self.latent_groups, reversed(taps), strict=True)]
        return Features(target, labels, seen)

    # ---------------------------------------------------------------------------------------------------- top-down

    def first_prior(self, labels: Tensor | None) -> Tensor | None:
        """What classes say of the first group's prior, (B, 2L, 1, 1) raw; None where there are none."""
        return None if self.class_prior is None or labels is None else cast(Tensor, self.class_prior(labels))

    def initial_state(self, n: int, labels: Tensor | None = None) -> Tensor:
        """The learned first state of the decoder, of n images of classes."""
        state = self.first_state.expand(n, -1, -1, -1)
        if self.class_state is not None and labels is not None:
            state = state + self.class_state(labels)
        return state.contiguous(memory_format=memory_format())

    def joint_above(self, g: int) -> int | None:
        """The index in `down` and `up` of the joint of scales between group g and the one above it, if there is one."""
        levels = self.config.levels
        return levels[0] - levels[g] - 1 if g > 0 and levels[g] < levels[g - 1] else None

    def entering(self, g: int, state: Tensor) -> Tensor:
        """The decoder state at group g's resolution, after its cells."""
        self.weights.reach(self._stages_of(g)[1])
        if (joint := self.joint_above(g)) is not None:
            state = self.up[joint](state)
        return cast(Tensor, cast(LatentGroup, self.groups[g]).decoder_cells(state))

    def likelihood(self, state: Tensor) -> Likelihood:
        """p(x | z) from the state after the last group."""
        self.weights.reach(UP + DOWN - 1)
        params = self.head(self.postprocess(state), "elu")
        config = self.config.likelihood
        return LIKELIHOODS[config.kind](params, config, self.config.image_channels, recompute=self.recompute)

    # ------------------------------------------------------------------------------------------------------- stages

    def _stages_of(self, g: int) -> tuple[int, int]:
        """Those in which a pass gets to group g on its way up and on its way down."""
        share = g / len(self.groups)
        return UP - 1 - int(share * UP), UP + int(share * DOWN)

    def _stages(self) -> list[list[nn.Module]]:
        """What a pass gets to in each."""
        stages: list[list[nn.Module]] = [[] for _ in range(UP + DOWN)]
        stages[0] += [self.stem, self.preprocess]
        stages[UP - 1].append(self.top)
        stages[-1] += [self.postprocess, self.head]
        for g, group in enumerate(self.latent_groups):
            up, down = self._stages_of(g)
            stages[up].append(group.encoder_cells)
            stages[down] += [part for name, part in group.named_children() if name != "encoder_cells"]
            if (joint := self.joint_above(g)) is not None:
                stages[up].append(self.down[joint])
                stages[down].append(self.up[joint])
        return stages

    # --------------------------------------------------------------------------------------------------- objective

    def batch_norm_penalty(self) -> Tensor:
        """Σ max|γ| over the batch norms."""
        return batch_norm_penalty([norm.weight for norm in self.norms])

    def balance_factors(self, device: torch.device) -> Tensor:
        """α of each group, (G,)."""
        return self._balance_factors.to(device)


def _group(config: NVAEConfig, level: int, *, first: bool) -> LatentGroup:
    architecture, plain = ARCHITECTURES[config.architecture], config.is_vanilla
    encoder_cells, decoder_cells = 0 if plain else config.encoder_cells, 0 if first else config.decoder_cells
    return LatentGroup(
        Tower(architecture.encoder, config.encoder_channels * 2**level, encoder_cells),
        Tower(architecture.decoder, config.decoder_channels * 2**level, decoder_cells),
        config.latent_channels,
        flows=config.flows,
        squeeze_excite=config.squeeze_excite,
        residual_posterior=config.residual_posterior,
        first=first,
        vanilla=plain,
    )
