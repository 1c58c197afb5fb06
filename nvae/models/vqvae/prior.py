"""VQ-VAE and VQ-VAE-2, stage 2: learned priors of codes, over a frozen stage 1 (Razavi et al. 2019; spec_vqvae §4).

Codes are made of each batch by the frozen encoder, in float32 and without gradient, so that flips and binarisation keep
changing them. Shapes: B images, L levels top-down, K codes, h w space of a map.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...bricks.likelihoods import Likelihood
from ...bricks.quantiser import Quantised, Quantiser, exact_products, squared_distances
from ...core.errors import UserError
from ...core.precision import in_float64
from ..base import (
    Family,
    FirstImages,
    LatentKind,
    Metrics,
    ModelConfig,
    Noise,
    Output,
    Recomputation,
    Temperature,
    temperatures,
)
from .config import VQVAEPriorConfig
from .model import FIRST, VQVAE, Features, metrics_of, uniform_codes
from .network import chosen_nearest
from .pixelsnail import PixelSNAIL


class VQVAEPrior(Family[VQVAEPriorConfig]):
    """p(top | class) and p(level | levels above, class), and the first stage that makes images of codes."""

    config_type: ClassVar[type[ModelConfig]] = VQVAEPriorConfig
    latent_kind: ClassVar[LatentKind] = "discrete"

    spread: Tensor
    """(L,), the mean squared distance of each level's vectors from their codes, of the first images."""

    def __init__(self, config: VQVAEPriorConfig) -> None:
        """Raises UserError for a config that was not `built_on` a first stage."""
        super().__init__(config)
        if config.first_stage is None:
            raise UserError(f"model.codes: {config.codes} was not read; its first stage is part of a prior's config")
        self.first = VQVAE(config.first_stage)
        self.codes = self.first.codes
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
        self.first.requires_grad_(False)
        if config.train_decoder:
            for part in self._decoding():
                part.requires_grad_(True)
        for level, prior in self.priors.items():
            prior.requires_grad_(config.level is None or level == str(config.level))

    # ------------------------------------------------------------------------------------------------- the contract

    def encode(self, x: Tensor, labels: Tensor | None = None) -> Features:
        """What the frozen encoders say of images (B, C, H, W) in [0, 1]."""
        self.check_labels(labels, len(x))
        with torch.no_grad(), exact_products(x.device):
            features = self.first.encode(x)
        return Features(features.target, features.encoded, labels)

    def decode(self, features: Features, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """The codes of encoded images, nearest or drawn, what they cost, and what they decode to."""
        noise = self.noise_for(len(features.target), noise)
        found, log_q = self._codes(features, noise, latents)
        indices = [quantised.indices for quantised in found]
        labels = self._known(features.labels, noise)
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
                indices.append(uniform_codes(noise[level][:, 0], codes, scales[level]))
                continue
            guidance = self.config.guidance
            drawn = prior.draw(noise[level], indices, labels, temperature=scales[level], guidance=guidance)
            indices.append(drawn)
        return self.first.likelihood(self.first.network.values(indices))

    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        """(n, 1, h, w) of each level, top-down."""
        return self.first.latent_shapes(n)

    def loss(self, output: Output, progress: float) -> tuple[Tensor, Metrics]:
        """Nats a code, summed over the levels, whose priors learn apart from each other (§4).

        Where codes are drawn they are of the KL, which differs from the rate by what no weight can change.
        """
        codes = torch.tensor([shape.height * shape.width for shape in self.first.config.maps]).to(output.kl)
        per_code = output.kl.mean(0) / codes
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

    def _known(self, labels: Tensor | None, noise: Noise) -> Tensor | None:
        """The labels; in training a part of them counts as unknown, which an image's own noise decides.

        It is the digits of its first number that no draw of a code depends on.
        """
        if labels is None or not self.training:
            return labels
        share = torch.frac(2.0**12 * noise[0].flatten(1)[:, 0].abs())
        return labels.masked_fill(share < self.config.label_dropout, -1)

    @torch.no_grad()
    def _codes(
        self, features: Features, noise: Noise, latents: Sequence[Tensor] | None
    ) -> tuple[list[Quantised], Tensor]:
        """Each level's codes, and their log q, (B, L) nats."""
        log_q = torch.zeros(len(features.target), len(noise), device=features.target.device)
        scales = self.config.posterior_temperature * self.spread

        def drawn(number: int, quantiser: Quantiser, vectors: Tensor) -> Quantised:
            indices, nats = drawn_near(quantiser, vectors, noise[number][:, 0], scales[number])
            log_q[:, number] = nats
            return quantiser.chosen(vectors, indices)

        otherwise = drawn if self.config.posterior_temperature > 0 else chosen_nearest
        with exact_products(features.target.device):
            choice = self.first.choice(features, latents, otherwise)
            return self.first.network.quantise(features.encoded, choice), log_q

    def _decoding(self) -> Iterable[nn.Module]:
        """What turns codes into the image, and does not decide codes."""
        *coarse, finest = self.first.network.top_down()
        yield finest.decoder
        if coarse:
            yield coarse[-1].enlarge


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
