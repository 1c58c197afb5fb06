"""NVAE: a deep hierarchical VAE of residual cells (Vahdat & Kautz 2020; spec §2, §3, §5).

Shapes: B batch, C channels, H W space, G latent groups (top-down), S scales, L latent channels, h w space of a group.
"Bottom-up" is the encoder, from image to code; "top-down" the decoder. A group's level is the number of halvings
between the image and its latents.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...bricks import bottleneck as inference
from ...bricks.cells import ARCHITECTURES, Cell, Op, RegularOp, Separable
from ...bricks.convolutions import Conv2d, EffectiveWeights
from ...bricks.flows import FlowCell
from ...bricks.folding import IN_CPP, composed, fold
from ...bricks.latents import Normal, Score, score, sum_with_each
from ...bricks.likelihoods import LIKELIHOODS, Likelihood, quantise
from ...bricks.normalisation import BatchNorm
from ...bricks.recomputation import Recomputable
from ...bricks.regularizers import SpectralPenalty, batch_norm_penalty
from ...core.config import nearest
from ...core.precision import at_least_float32
from ...kernels.fusion import compile_each
from ..base import (
    Draw,
    Family,
    Metrics,
    ModelConfig,
    Noise,
    Output,
    Recomputation,
    Temperature,
    temperatures,
)
from .objective import (
    ObjectiveConfig,
    balance_factors,
    balance_weights,
    balanced_kl,
    kl_coefficient,
    spectral_weight,
)


class NVAEConfig(ModelConfig):
    family: Literal["nvae"] = "nvae"
    """Which family of models."""
    scales: int = Field(1, ge=1)
    """Number of latent resolutions; each is half the one before."""
    groups: int = Field(10, ge=1)
    """Latent groups at the largest latent resolution."""
    adaptive_groups: bool = False
    """Halve the number of groups from scale to scale; otherwise all scales have the same."""
    min_groups: int = Field(1, ge=1)
    """Fewest groups a scale may have when adaptive."""
    latent_channels: int = Field(20, ge=1)
    """Channels of a latent variable, L."""
    encoder_channels: int = Field(32, ge=4)
    """Bottom-up channels at the image's resolution; they double at every halving."""
    decoder_channels: int = Field(32, ge=4)
    """Top-down channels at the image's resolution; they double at every halving."""
    halvings: int = Field(1, ge=0)
    """Halvings before the largest latent resolution (blocks of pre-processing, and of post-processing)."""
    preprocess_cells: int = Field(2, ge=1)
    """Cells of a pre-processing block; the last one halves the resolution."""
    postprocess_cells: int = Field(2, ge=1)
    """Cells of a post-processing block; the first one doubles the resolution."""
    encoder_cells: int = Field(2, ge=0)
    """Bottom-up cells per latent group."""
    decoder_cells: int = Field(2, ge=0)
    """Top-down cells per latent group."""
    flows: int = Field(0, ge=0)
    """Inverse-autoregressive flow cells per group, on the posterior."""
    squeeze_excite: bool = True
    """Squeeze-and-excitation in every cell."""
    residual_posterior: bool = True
    """The encoder gives the posterior relative to the prior (paper §3.2)."""
    architecture: str = "res_mbconv"
    """Which cells stand where: a row of the architecture table (nvae/bricks/cells.py)."""
    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _possible(self) -> "NVAEConfig":
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: no '{self.architecture}'{nearest(self.architecture, ARCHITECTURES)}")
        halvings = self.halvings + self.scales - 1
        if self.image_size % 2**halvings:
            possible = (self.image_size & -self.image_size).bit_length() - 1
            raise ValueError(
                f"image_size: {self.image_size} pixels can be halved {possible} times; halvings={self.halvings} and "
                f"scales={self.scales} need {halvings} (a multiple of {2**halvings} pixels)"
            )
        self._require_whole_groups("encoder_channels", ARCHITECTURES[self.architecture].preprocess)
        self._require_whole_groups("decoder_channels", ARCHITECTURES[self.architecture].postprocess)
        return self

    def _require_whole_groups(self, field: str, ops: tuple[Op, ...]) -> None:
        """Raises ValueError where the groups of a convolution do not divide the channels at the image's resolution."""
        for op in ops if self.halvings else ():
            channels: int = getattr(self, field)
            if isinstance(op, Separable) and op.groups and op.expansion * channels % op.groups:
                raise ValueError(
                    f"{field}: {self.architecture} convolves in {op.groups} groups, so a multiple of "
                    f"{op.groups // math.gcd(op.groups, op.expansion)} is needed, found {channels}"
                )

    @property
    def groups_per_scale(self) -> list[int]:
        """Number of groups of each scale, bottom-up from the largest latent resolution (spec §2)."""
        if not self.adaptive_groups:
            return [self.groups] * self.scales
        return [max(self.groups // 2**scale, self.min_groups) for scale in range(self.scales)]

    @property
    def levels(self) -> list[int]:
        """The halvings of each group's resolution, top-down."""
        by_scale = enumerate(self.groups_per_scale)
        return [self.halvings + scale for scale, count in reversed(list(by_scale)) for _ in range(count)]

    @property
    def is_vanilla(self) -> bool:
        """One scale with one group: a plain VAE, without towers (spec §2)."""
        return self.groups_per_scale == [1]


@dataclass
class Features:
    """The bottom-up pass of a batch."""

    target: Tensor
    """(B, C, H, W), the quantised images."""
    taps: list[Tensor]
    """What each group's posterior sees of the image, (B, C, h, w), top-down."""

    def repeated(self, times: int) -> "Features":
        """The batch `times` over: draw k of image b is row k·B + b. The taps stay one an image."""
        return Features(self.target.repeat(times, 1, 1, 1), self.taps)


class LatentGroup(nn.Module):
    """One group of latents: its cells in both towers, its distributions, and how its z enters the decoder (spec §2)."""

    def __init__(self, config: NVAEConfig, level: int, *, first: bool) -> None:
        super().__init__()
        architecture = ARCHITECTURES[config.architecture]
        encoder, decoder = config.encoder_channels * 2**level, config.decoder_channels * 2**level
        latent, plain = config.latent_channels, config.is_vanilla
        self.is_first, self.is_vanilla, self.residual_posterior = first, plain, config.residual_posterior

        def cells(ops: tuple[Op, ...], channels: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(Cell(ops, channels, "same", config.squeeze_excite) for _ in range(count)))

        self.encoder_cells = cells(architecture.encoder, encoder, 0 if plain else config.encoder_cells)
        self.posterior = Conv2d(encoder, 2 * latent, 3)
        self.flow = nn.ModuleList(FlowCell(latent) for _ in range(config.flows))
        self.decoder_cells = cells(architecture.decoder, decoder, 0 if first else config.decoder_cells)
        self.combine = Conv2d(latent if plain else decoder + latent, decoder)
        if not first:
            self.merge = Conv2d(decoder, encoder)
            self.prior = Conv2d(decoder, 2 * latent)
        self.merged: Conv2d | None = None
        """For inference, what `posterior` makes of `merge`: one convolution of the decoder state."""
        self.normal: Callable[..., Normal] = Normal.from_sum
        self.score: Callable[..., Score] = score

    def forward(self, state: Tensor, tap: Tensor, noise: Tensor, given: Tensor | None) -> Draw:
        """The prior, the posterior, a draw from it (or the `given` z, scored), and z in the decoder state (spec §3).

        state (K·B, C, h, w), tap (B, …, h, w) from `seen`, noise and given (K·B, L, h, w); K any number.
        """
        prior_raw = self.prior_raw(state, like=noise)
        p = self.normal([prior_raw])
        q = self.normal(self.posterior_raws(tap, state, prior_raw))
        if given is not None:
            z, drawn = given, self.before_flow(given)
        else:
            drawn = q.draw(noise)
            z = self.through_flow(drawn)
        scored = self.score(q, p, drawn, z, closed=len(self.flow) == 0)
        return Draw(self.combined(state, z), z, scored, q, p)

    def prior_raw(self, state: Tensor, like: Tensor) -> Tensor:
        """Raw prior parameters (B, 2L, h, w) from the decoder state; zeros for the first group (spec §3)."""
        if self.is_first:
            return torch.zeros_like(like).repeat(1, 2, 1, 1)
        return at_least_float32(self.prior(state, "elu"))

    def seen(self, features: Tensor) -> Tensor:
        """What the posterior takes of the encoder's features (B, C, h, w): computed once, however many the draws."""
        if self.merged is None:
            return features
        assert self.merge.bias is not None
        return cast(Tensor, self.posterior(features + self.merge.bias[:, None, None]))

    def posterior_raws(self, tap: Tensor, state: Tensor, prior_raw: Tensor) -> list[Tensor]:
        """What raw parameters (K·B, 2L, h, w) of the posterior are the sum of; residual ones add to the prior's."""
        if self.is_first:
            return [prior_raw, self.posterior(tap)]
        if self.merged is None:
            raws = [self.posterior(sum_with_each(self.merge(state), tap))]
        else:
            raws = [self.merged(state), tap]
        return [prior_raw, *raws] if self.residual_posterior else raws

    def fold(self) -> None:
        """For inference: P(tap + M(state)) as P(tap + M's bias), once an image, plus one convolution of the state."""
        if not self.is_first:
            self.merged = composed(self.posterior, self.merge)
        self.normal, self.score = inference.normal, inference.score

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

    def combined(self, state: Tensor, z: Tensor) -> Tensor:
        """The decoder state (B, C, h, w) after z has entered it."""
        z = z.to(state.dtype)
        if self.is_vanilla:
            return cast(Tensor, self.combine(z))
        return cast(Tensor, self.combine(torch.cat([state, z], dim=1)))


class NVAE(Family[NVAEConfig]):
    """The hierarchy of spec §2: stem, pre-processing, two towers joined at every group, post-processing."""

    config_type: ClassVar[type[ModelConfig]] = NVAEConfig
    started: Tensor

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__(config)
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
        self.groups = nn.ModuleList(LatentGroup(config, level, first=g == 0) for g, level in enumerate(levels))
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

        self.weights = EffectiveWeights(self)
        self.spectral = SpectralPenalty(self.weights.shapes)
        self.register_buffer("started", torch.tensor(not architecture.starts_from_data))
        self._known_started = False
        self.recompute = False
        self.register_load_state_dict_post_hook(_forget_start)  # type: ignore[no-untyped-call]

    @property
    def _latent_groups(self) -> list[LatentGroup]:
        """Top-down."""
        return cast("list[LatentGroup]", list(self.groups))

    # ------------------------------------------------------------------------------------------------- the contract

    def forward(self, x: Tensor, noise: Noise | None = None) -> Output:
        """(B, C, H, W) in [0, 1] -> Output. In training the first batch sets what starts from data (`res_elu`)."""
        if self.training and not self.has_started:
            self._start_from(x, noise)
        self.weights.refresh()
        features = self._bottom_up(x)
        return self._top_down(features, noise)

    def encode(self, x: Tensor) -> Features:
        """The bottom-up pass of images (B, C, H, W) in [0, 1]."""
        self.weights.refresh()
        return self._bottom_up(x)

    def decode(self, features: Features, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """Draws from the posterior and decodes. Given latents (the first groups, top-down) are scored, not drawn."""
        self.weights.refresh()
        return self._top_down(features, noise, latents or ())

    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Noise | None = None,
        latents: Sequence[Tensor] | None = None,
    ) -> Likelihood:
        """n images from the prior, every group's σ times the temperature (spec §7)."""
        self.weights.refresh()
        scale = temperatures(temperature, len(self.groups))
        noise = self.noise_for(n, noise)
        self.check_fit("latents", latents or (), n)
        state = self._first_state(n)
        for g, group in enumerate(self._latent_groups):
            state = self._entering(g, state)
            if latents and g < len(latents):
                z = latents[g]
            else:
                z = group.normal([group.prior_raw(state, like=noise[g])], scale[g]).draw(noise[g])
            state = group.combined(state, z)
        return self._likelihood(state)

    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        """(n, L, h, w) of each group, top-down."""
        size, latent = self.config.image_size, self.config.latent_channels
        return [(n, latent, size // 2**level, size // 2**level) for level in self.config.levels]

    def loss(self, output: Output, progress: float) -> tuple[Tensor, Metrics]:
        """Mean over the batch of reconstruction + balanced KL, plus λ (Σ σ_max + Σ max|γ|), in nats (spec §5)."""
        objective = self.config.objective
        coefficient = kl_coefficient(progress, objective)
        lam = spectral_weight(coefficient, objective)
        balances = objective.kl_balance and coefficient < 1
        weights = balance_weights(output.kl, self.balance_factors(output.kl.device)) if balances else None
        kl = balanced_kl(output.kl, coefficient, weights)
        loss = (output.reconstruction + kl).mean()
        metrics = {
            "nelbo": (output.reconstruction + output.kl.sum(1)).mean().detach(),
            "reconstruction": output.reconstruction.mean().detach(),
            "kl": output.kl.sum(1).mean().detach(),
            "kl_coefficient": torch.tensor(coefficient),
            "kl_group_coefficient": coefficient * (torch.ones(len(self.groups)) if weights is None else weights),
            "spectral_weight": torch.tensor(lam),
        }
        if lam > 0:
            spectral, scales = self.spectral(self.weights.matrices), self.batch_norm_penalty()
            loss = loss + lam * (spectral + scales)
            metrics |= {"spectral": spectral.detach(), "batch_norm_scales": scales.detach()}
        return loss, metrics

    def set_recomputation(self, mode: Recomputation) -> None:
        """`cells`: the backward pass computes whole cells, flows and the likelihood again.

        Batch norms and activations it computes again in any mode.
        """
        self.recompute = mode == "cells"
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.recompute = self.recompute

    def for_inference(self) -> "NVAE":
        """A copy with the weights and statistics of now, whose batch norms are part of its convolutions."""
        model = deepcopy(self).eval()
        for group in model._latent_groups:
            group.fold()
        fold(model)
        model.weights = EffectiveWeights(model, besides=IN_CPP)
        return model

    def compile_parts(self) -> None:
        """Compiles cells and latent groups; those of a kind share their code, so depth costs no time to compile.

        What runs in C++ already (nvae/bricks/bottleneck.py) is left as it is.
        """
        in_cpp = any(isinstance(module, IN_CPP) for module in self.modules())
        kinds = (Cell,) if in_cpp else (Cell, LatentGroup)
        compile_each(module for module in self.modules() if isinstance(module, kinds))

    def mark_loaded(self) -> None:
        """Loaded weights count as started from data."""
        self.started.fill_(True)
        self._known_started = True

    # ------------------------------------------------------------------------------------------- starting from data

    @property
    def has_started(self) -> bool:
        """False before the first batch has set what starts from data (`res_elu`)."""
        self._known_started = self._known_started or bool(self.started)
        return self._known_started

    @torch.no_grad()
    def _start_from(self, x: Tensor, noise: Noise | None) -> None:
        """One pass in which each op without batch norm sets its start from the input it gets, without autocast."""
        ops = [m for m in self.modules() if isinstance(m, RegularOp) and m.norm is None]
        hooks = [op.register_forward_pre_hook(lambda op, inputs: op.start_from(*inputs)) for op in ops]
        self.weights.clear()
        with torch.autocast(x.device.type, enabled=False):
            self._top_down(self._bottom_up(x), noise)
        for hook in hooks:
            hook.remove()
        self.started.fill_(True)

    # --------------------------------------------------------------------------------------------------- bottom-up

    def _bottom_up(self, x: Tensor) -> Features:
        likelihood = self.config.likelihood
        target = quantise(x, likelihood.bits, likelihood.grid)
        image = (2 * target - 1).contiguous(memory_format=torch.channels_last)
        state = self.preprocess(self.stem(image))
        taps: list[Tensor] = []
        for g in reversed(range(len(self.groups))):
            state = cast(LatentGroup, self.groups[g]).encoder_cells(state)
            if g == 0:
                state = F.elu(self.top(state, "elu"))
            taps.append(state)
            if (joint := self.joint_above(g)) is not None:
                state = self.down[joint](state)
        seen = [group.seen(tap) for group, tap in zip(self._latent_groups, reversed(taps), strict=True)]
        return Features(target, seen)

    # ---------------------------------------------------------------------------------------------------- top-down

    def _top_down(self, features: Features, noise: Noise | None, given: Sequence[Tensor] = ()) -> Output:
        """Algorithm of spec §2 and §3: at each group the prior, the posterior, a draw, and on with the state."""
        batch = features.target.shape[0]
        noise = self.noise_for(batch, noise)
        self.check_fit("latents", given, batch)
        state = self._first_state(batch)
        draws: list[Draw] = []
        for g, group in enumerate(self.groups):
            z = given[g] if g < len(given) else None
            draws.append(group(self._entering(g, state), features.taps[g], noise[g], z))
            state = draws[-1].state
        return Output.of(self._likelihood(state), features.target, draws)

    def _first_state(self, batch: int) -> Tensor:
        return self.first_state.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def joint_above(self, g: int) -> int | None:
        """The index in `down` and `up` of the joint of scales between group g and the one above it, if there is one."""
        levels = self.config.levels
        return levels[0] - levels[g] - 1 if g > 0 and levels[g] < levels[g - 1] else None

    def _entering(self, g: int, state: Tensor) -> Tensor:
        """The decoder state at group g's resolution, after its cells."""
        if (joint := self.joint_above(g)) is not None:
            state = self.up[joint](state)
        return cast(Tensor, cast(LatentGroup, self.groups[g]).decoder_cells(state))

    def _likelihood(self, state: Tensor) -> Likelihood:
        params = self.head(self.postprocess(state), "elu")
        config = self.config.likelihood
        return LIKELIHOODS[config.kind](params, config, self.config.image_channels, recompute=self.recompute)

    # --------------------------------------------------------------------------------------------------- objective

    def batch_norm_penalty(self) -> Tensor:
        """Σ max|γ| over the batch norms."""
        return batch_norm_penalty([m.weight for m in self.modules() if isinstance(m, BatchNorm)])

    def balance_factors(self, device: torch.device) -> Tensor:
        """α of each group, (G,)."""
        scales = [self.config.levels[0] - level for level in self.config.levels]
        return balance_factors(scales, device)


def _forget_start(model: nn.Module, incompatible: Any) -> None:
    model._known_started = False  # type: ignore[assignment]
