"""VQ-VAE and VQ-VAE-2, stage 2: learned priors of codes, over a frozen stage 1 (Razavi et al. 2019; spec_vqvae §4).

Codes are made of each batch by the frozen encoder, in float32 and without gradient, so that flips and binarisation keep
changing them. Shapes: B images, L levels top-down, K codes, h w space of a map.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...bricks.labels import partly_unknown
from ...bricks.likelihoods import Likelihood
from ...bricks.quantiser import Quantised, Quantiser, exact_products, squared_distances
from ...core.errors import UserError
from ...core.precision import in_float64
from ..base import (
    Chooser,
    Family,
    FirstImages,
    LatentKind,
    Metrics,
    Noise,
    Output,
    Progress,
    Recomputation,
    Temperature,
    temperatures,
)
from ..config import ModelConfig
from .config import VQVAEPriorConfig
from .model import FIRST, VQVAE, Features, metrics_of, uniform_codes, uniformly
from .network import chosen_nearest
from .pixelsnail import PixelSNAIL

AGREED = ("image_size", "image_channels", "likelihood", "classes", "guidance", "posterior_temperature")
"""Fields of the config in which runs whose priors are joined must not differ."""


class VQVAEPrior(Family[VQVAEPriorConfig]):
    """p(top | class) and p(level | levels above, class), and the first stage that makes images of codes."""

    config_type: ClassVar[type[ModelConfig]] = VQVAEPriorConfig
    latent_kind: ClassVar[LatentKind] = "discrete"
    sizes: Tensor
    """(L,), the number of each level's codes."""
    spread: Tensor
    """(L,), the mean squared distance of each level's vectors from their codes, of the first images."""

    def __init__(self, config: VQVAEPriorConfig) -> None:
        """Raises UserError for a config that was not `built_on` a first stage."""
        super().__init__(config)
        if config.first_stage is None:
            raise UserError(f"model.codes: {config.codes} was not read; its first stage is part of a prior's config")
        self.first = VQVAE(config.first_stage)
        self.codes = self.first.codes
        self.guidance = config.guidance
        spread = config.posterior_temperature > 0 and self.first.density == "point"
        self.density = "bound" if spread else self.first.density
        maps = config.first_stage.maps
        self.priors = nn.ModuleDict(
            {
                str(level): PixelSNAIL(maps[level], prior, maps[:level], config.classes)
                for level, prior in enumerate(config.levels)
                if prior is not None
            }
        )
        self.register_buffer("spread", torch.ones(len(maps)))
        sizes = torch.tensor([float(shape.height * shape.width) for shape in maps])
        self.register_buffer("sizes", sizes, persistent=False)
        self.first.requires_grad_(False)
        if config.train_decoder:
            for part in self.first.network.decoding():
                part.requires_grad_(True)
        for level, prior in self.priors.items():
            prior.requires_grad_(config.level is None or level == str(config.level))

    # ------------------------------------------------------------------------------------------------- the contract

    def forward(
        self, x: Tensor, noise: Noise | None = None, labels: Tensor | None = None, codes: Tensor | None = None
    ) -> Output:
        """Encodes images (B, C, H, W) in [0, 1], or takes their codes (B, S), and decodes."""
        features = self.encode(x, labels) if codes is None else self.coded(x, codes, labels)
        return self.decode(features, noise=noise)

    def encode(self, x: Tensor, labels: Tensor | None = None) -> Features:
        """What the frozen encoders say of images (B, C, H, W) in [0, 1]."""
        self.check_labels(labels, len(x))
        with torch.no_grad(), exact_products(x.device):
            features = self.first.encode(x)
        return Features(features.target, features.encoded, labels)

    def decode(self, features: Features, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """The codes of encoded images, nearest or drawn, what they cost, and what they decode to."""
        noise = self.noise_for(len(features.target), noise)
        indices, log_q = self._codes(features, noise, latents)
        labels = features.labels
        if labels is not None and self.training:
            labels = partly_unknown(labels, noise[0], self.config.label_dropout)
        rates = torch.stack([self._rate(level, indices, labels) for level in range(len(indices))], dim=1)
        with torch.set_grad_enabled(self.config.train_decoder and torch.is_grad_enabled()):
            likelihood = self.first.likelihood(self.first.network.values(indices))
        return Output(
            likelihood,
            features.target,
            channel_kl=list(torch.split(rates + log_q, 1, dim=1)),
            log_q=log_q.sum(1),
            log_p=-rates.sum(1),
            z=[map_[:, None] for map_ in indices],
        )

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Noise | None = None,
        latents: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> Likelihood:
        """n draws from the priors, top-down, logits over each level's temperature; one position at a time."""
        self.check_labels(labels, n)
        noise, given = self.noise_for(n, noise), latents or ()
        self.check_fit("latents", given, n)
        scales = temperatures(temperature, len(noise))
        indices = [z[:, 0] for z in given]
        for level in range(len(given), len(noise)):
            prior = self.prior(level)
            if prior is None:
                codes = self.first.config.quantiser.codes
                indices.append(uniform_codes(noise[level][:, 0] * bool(scales[level]), codes))
                continue
            drawn = prior.draw(noise[level], indices, labels, temperature=scales[level], guidance=self.guidance)
            indices.append(drawn)
        return self.first.likelihood(self.first.network.values(indices))

    @torch.no_grad()
    def unfold(self, choose: Chooser, n: int, labels: Tensor | None = None) -> Likelihood:
        """Map by map, top-down, in raster order; where a level has no prior, the logits are all the same."""
        self.check_labels(labels, n)
        indices: list[Tensor] = []
        for level, shape in enumerate(self.first.config.maps):
            prior = self.prior(level)
            if prior is None:
                indices.append(uniformly(choose, n, shape, self.spread))
            else:
                indices.append(prior.unfold(choose, n, prior.condition(indices, labels)))
        return self.first.likelihood(self.first.network.values(indices))

    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        """(n, 1, h, w) of each level, top-down."""
        return self.first.latent_shapes(n)

    def coding(self) -> str:
        """That of the first stage, whose codes they are."""
        if self.config.posterior_temperature:
            raise UserError(
                f"model.posterior_temperature: {self.config.posterior_temperature:g} draws other codes each time, "
                "kept ones are always the same; allowed is 0"
            )
        return self.first.coding()

    def check_codes(self, coding: str, made_by: str) -> None:
        """Those of its own first stage are taken."""
        if coding != self.coding():
            raise UserError(
                f"data.stored_codes: the store keeps the codes of {made_by} ({coding}), but the model is built on "
                f"another first stage ({self.coding()})"
            )

    def codes_of(self, x: Tensor) -> list[Tensor]:
        return self.first.codes_of(x)

    def coded(self, x: Tensor, codes: Tensor, labels: Tensor | None = None) -> Features:
        """What `encode` gives of images (B, C, H, W) whose codes (B, S) are known; the distortion is the images'."""
        self.check_labels(labels, len(x))
        maps = self.first.config.maps
        parts = torch.split(codes, [shape.height * shape.width for shape in maps], dim=1)
        indices = [part.reshape(-1, shape.height, shape.width) for part, shape in zip(parts, maps, strict=True)]
        return Features(self.first.target(x), [], labels, indices)

    @classmethod
    def joined(cls, parts: Mapping[str, Family[Any]]) -> "VQVAEPrior":
        """The priors that each part trained, over the first stage that all of them are built on.

        Raises UserError for parts of different first stages, for a level that no part, or more than one, has trained,
        and for parts that differ in what images or classes they are for.
        """
        named = cast("Mapping[str, VQVAEPrior]", parts)
        for (name, part), (other, one) in pairwise(named.items()):
            _require_one_first_stage(name, part, other, one)
            for field in AGREED:
                if (ours := getattr(part.config, field)) != (theirs := getattr(one.config, field)):
                    raise UserError(f"{other}: model.{field} is {theirs}, in {name} it is {ours}; parts must agree")
        trained_by = _trained_by({name: part.config for name, part in named.items()})
        levels = tuple(named[name].config.levels[level] for level, name in enumerate(trained_by))
        first = next(iter(named.values()))
        fields: dict[str, Any] = {"levels": levels, "level": None, "train_decoder": False}
        model = cls(first.config.model_copy(update=fields))
        model.first.load_state_dict(first.first.state_dict())
        model.spread.copy_(first.spread)
        for level, name in enumerate(trained_by):
            model.priors[str(level)].load_state_dict(named[name].priors[str(level)].state_dict())
        return model.eval()

    def loss(self, output: Output, progress: Progress) -> tuple[Tensor, Metrics]:
        """Nats a code, summed over the levels, whose priors learn apart from each other (§4).

        Where codes are drawn they are of the KL, which differs from the rate by what no weight can change.
        """
        per_code = output.kl.mean(0) / self.sizes
        loss = per_code.sum()
        if self.config.train_decoder:
            loss = loss + output.reconstruction.mean() / output.likelihood.dims / self.first.config.variance
        return loss, {"nats_per_code": per_code.detach(), **metrics_of(output)}

    @torch.no_grad()
    def begin(self, first: FirstImages) -> None:
        """Measures how far vectors are from their codes, the unit of `posterior_temperature`."""
        images = torch.cat(list(first.images(FIRST)))
        found = self.first.network.quantise(self.first.encode(images).encoded)
        distances = torch.stack([quantised.commitment for quantised in found]) * self.first.config.quantiser.dim
        self.spread.copy_(distances.clamp(min=torch.finfo(distances.dtype).tiny))

    def take_in(self, source: Family[Any]) -> None:
        """Makes the first stage of a model of either stage, and the priors of levels that are not trained, its own."""
        first = source.first if isinstance(source, VQVAEPrior) else source
        self.first.load_state_dict(first.state_dict())
        if isinstance(source, VQVAEPrior) and self.config.level is not None:
            for level, prior in source.priors.items():
                if level != str(self.config.level):
                    self.priors[level].load_state_dict(prior.state_dict())

    def copied(self) -> set[str]:
        """Codebooks by averages."""
        return {name for name, _ in self.named_buffers()}

    def train(self, mode: bool = True) -> "VQVAEPrior":
        """The first stage stays in evaluation mode."""
        super().train(mode)
        self.first.eval()
        return self

    def set_guidance(self, guidance: float) -> None:
        """In the place of `model.guidance`. Raises UserError where it is negative, or where there are no classes."""
        if not 0 <= guidance < math.inf:
            raise UserError(f"guidance: takes a number from 0 on, found {guidance:g}")
        if guidance and not self.config.classes:
            raise UserError("guidance: only samples of a class are guided, and model.classes is 0")
        self.guidance = guidance

    def set_recomputation(self, mode: Recomputation) -> None:
        """`cells`: the backward pass runs blocks of the priors again."""
        for prior in self.priors.values():
            cast(PixelSNAIL, prior).recompute = mode == "cells"

    def parts(self) -> Iterable[nn.Module]:
        """The blocks of all priors."""
        for prior in self.priors.values():
            yield from cast(PixelSNAIL, prior).attention_blocks()

    # ------------------------------------------------------------------------------------------------------- inside

    def prior(self, level: int) -> PixelSNAIL | None:
        """That of a level; None where its codes count as uniform."""
        return cast("PixelSNAIL | None", dict(self.priors.items()).get(str(level)))

    def _rate(self, level: int, indices: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """−log p of a level's map given those above, (B,) nats."""
        prior = self.prior(level)
        if prior is None:
            return torch.full((len(indices[level]),), self.first.rates()[level], device=indices[level].device)
        learns = self.config.level is None or self.config.level == level
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return prior.nats(indices[level], prior.condition(indices[:level], labels))

    @torch.no_grad()
    def _codes(self, features: Features, noise: Noise, latents: Sequence[Tensor] | None) -> tuple[list[Tensor], Tensor]:
        """Each level's codes (B, h, w), and their log q, (B, L) nats."""
        log_q = torch.zeros(len(features.target), len(noise), device=features.target.device)
        if features.indices is not None:
            return features.indices, log_q
        scales = self.config.posterior_temperature * self.spread

        def drawn(number: int, quantiser: Quantiser, vectors: Tensor) -> Quantised:
            indices, nats = drawn_near(quantiser, vectors, noise[number][:, 0], scales[number])
            log_q[:, number] = nats
            return quantiser.chosen(vectors, indices)

        otherwise = drawn if self.config.posterior_temperature > 0 else chosen_nearest
        with exact_products(features.target.device):
            choice = self.first.choice(features, latents, otherwise)
            found = self.first.network.quantise(features.encoded, choice)
        return [quantised.indices for quantised in found], log_q


def drawn_near(quantiser: Quantiser, vectors: Tensor, noise: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B, h, w) drawn with probability ∝ exp(−‖v − e‖² / τ), τ = `scale`, for vectors (B, D, h, w), by standard-
    normal noise (B, h, w); and their log q, (B,) nats (spec_vqvae §1)."""
    batch, dim, height, width = vectors.shape
    distances = squared_distances(vectors.movedim(1, -1).reshape(-1, dim), quantiser.codebook)
    distances = distances.reshape(batch, height * width, -1)
    log_p = torch.log_softmax(-distances / scale, dim=2)
    uniform = torch.special.ndtr(in_float64(noise)).reshape(batch, -1, 1)
    indices = (in_float64(log_p).exp().cumsum(2) < uniform).sum(2).clamp(max=distances.shape[2] - 1).to(noise.device)
    return indices.reshape(batch, height, width), log_p.gather(2, indices[:, :, None]).sum((1, 2))


# ------------------------------------------------------------------------------------------------------------- joining


def _require_one_first_stage(name: str, part: VQVAEPrior, other: str, one: VQVAEPrior) -> None:
    """Raises UserError where two parts are not built on one first stage."""
    ours, theirs = part.first.coding(), one.first.coding()
    if part.config.first_stage != one.config.first_stage or ours != theirs:
        raise UserError(
            f"{other}: is built on another first stage ({one.config.codes}, {theirs}) than {name} "
            f"({part.config.codes}, {ours})"
        )
    state = one.first.state_dict()
    if any(not torch.equal(tensor, state[key]) for key, tensor in part.first.state_dict().items()):
        raise UserError(
            f"{other}: its decoder is not that of {name}, because one was trained on (model.train_decoder); join parts "
            "that left it as it was"
        )
    if part.config.posterior_temperature and not torch.equal(part.spread, one.spread):
        raise UserError(f"{other}: model.posterior_temperature has another unit than in {name}; train both on one seed")


def _trained_by(configs: Mapping[str, VQVAEPriorConfig]) -> list[str]:
    """The name of the part that has trained each level, top-down. Raises UserError where it is none or not one."""
    (count,) = {len(config.levels) for config in configs.values()}
    found: list[str] = []
    for level in range(count):
        names = [
            name
            for name, config in configs.items()
            if config.levels[level] is not None and config.level in (None, level)
        ]
        if len(names) != 1:
            having = " and ".join(names) or f"none of {', '.join(configs)}"
            raise UserError(f"level {level}: its prior was trained by {having}; one part is to have trained it")
        found += names
    return found
