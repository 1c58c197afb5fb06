"""VQ-VAE and VQ-VAE-2, stage 1: images as maps of codes that count as uniform (van den Oord et al. 2017; Razavi et al.
2019; spec_vqvae §1, §3).

q(codes | x) sits on one point, so that the bound is log p(x | codes) + log p(codes), p(codes) uniform: true where
p(x | codes) is a likelihood; with a squared error there is none.

Shapes: B images, L levels top-down, K codes, h w space of a map.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...bricks.likelihoods import LIKELIHOODS, Likelihood, quantise
from ...bricks.quantiser import Quantised, Quantiser, after_update, discard, exact_products
from ...bricks.recomputation import Recomputable
from ...core.errors import UserError
from ...core.precision import in_float64
from ..base import (
    Chooser,
    Density,
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
from .config import VQVAEConfig
from .network import Choice, Network, chosen_nearest
from .pixelsnail import MapShape

FIRST = 64
"""Images whose vectors the first codes are drawn from."""


@dataclass
class Features:
    """What the encoders say of a batch."""

    target: Tensor
    """(B, C, H, W), the quantised images."""
    encoded: list[Tensor]
    """(B, c, h, w) of each level, top-down."""
    labels: Tensor | None = None
    """(B,), for the priors."""
    indices: list[Tensor] | None = None
    """(B, h, w) of each level, where the codes are known; there is nothing encoded then."""

    def repeated(self, times: int) -> "Features":
        """The batch `times` over: draw k of image b is row k·B + b."""
        return Features(
            self.target.repeat(times, 1, 1, 1),
            [h.repeat(times, 1, 1, 1) for h in self.encoded],
            None if self.labels is None else self.labels.repeat(times),
            None if self.indices is None else [map_.repeat(times, 1, 1) for map_ in self.indices],
        )


@dataclass
class QuantisedOutput(Output):
    """With what the quantisers of all levels found, top-down."""

    quantised: list[Quantised] = field(default_factory=list)


class VQVAE(Family[VQVAEConfig]):
    """Levels of codes between an image and its likelihood."""

    config_type: ClassVar[type[ModelConfig]] = VQVAEConfig
    latent_kind: ClassVar[LatentKind] = "discrete"

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.density = density_of(config)
        self.codes = config.quantiser.codes
        kind, channels = LIKELIHOODS[config.likelihood.kind], config.image_channels
        out = kind.params_per_pixel(config.likelihood, channels)
        self.network = Network(channels, out, config.shape, config.quantiser, config.factors)

    # ------------------------------------------------------------------------------------------------- the contract

    def encode(self, x: Tensor, labels: Tensor | None = None) -> Features:
        """The encoders' way up from images (B, C, H, W) in [0, 1]."""
        self.check_labels(labels, len(x))
        target = self.target(x)
        return Features(target, self.network.encode(rescaled(target)))

    def decode(self, features: Features, noise: Noise | None = None, latents: Sequence[Tensor] | None = None) -> Output:
        """Takes the nearest codes, top-down, and decodes them. `latents` gives the first levels' indices."""
        found = self.network.quantise(features.encoded, self.choice(features, latents))
        rates = [torch.full((len(features.target), 1), nats, device=features.target.device) for nats in self.rates()]
        return QuantisedOutput(
            self.likelihood([quantised.output for quantised in found]),
            features.target,
            rates,
            log_q=torch.zeros_like(rates[0][:, 0]),
            log_p=-torch.cat(rates, dim=1).sum(1),
            z=[quantised.indices[:, None] for quantised in found],
            quantised=found,
        )

    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Noise | None = None,
        latents: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> Likelihood:
        """n images of codes that are all equally likely; at temperature 0 zeros stand for those that are not given."""
        self.check_labels(labels, n)
        noise, given = self.noise_for(n, noise), latents or ()
        self.check_fit("latents", given, n)
        scales = temperatures(temperature, len(noise))
        indices = [z[:, 0] for z in given]
        for epsilon in noise[len(given) :]:
            indices.append(uniform_codes(epsilon[:, 0], self.config.quantiser.codes))
        values = self.network.values(indices)
        for level in range(len(given), len(values)):
            values[level] = values[level] * bool(scales[level])
        return self.likelihood(values)

    @torch.no_grad()
    def unfold(self, choose: Chooser, n: int, labels: Tensor | None = None) -> Likelihood:
        """Map by map, top-down, in raster order; all codes have the same logits."""
        self.check_labels(labels, n)
        like = next(self.parameters())
        return self.likelihood(self.network.values([uniformly(choose, n, shape, like) for shape in self.config.maps]))

    def latent_shapes(self, n: int) -> list[tuple[int, ...]]:
        """(n, 1, h, w) of each level, top-down."""
        return [(n, 1, shape.height, shape.width) for shape in self.config.maps]

    def coding(self) -> str:
        """A digest of its encoders and codebooks, and of what else decides the codes of an image."""
        config = self.config
        digest = hashlib.sha256(repr((config.shape, config.likelihood.bits, config.likelihood.grid)).encode())
        for name, tensor in sorted(self.network.deciding().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def codes_of(self, x: Tensor) -> list[Tensor]:
        with exact_products(x.device):
            return [quantised.indices for quantised in self.network.quantise(self.encode(x).encoded)]

    def loss(self, output: Output, progress: Progress) -> tuple[Tensor, Metrics]:
        """Distortion per dimension, commitment times β, and the codebooks' term where they learn by gradient (§3)."""
        assert isinstance(output, QuantisedOutput)
        commitment = torch.stack([quantised.commitment for quantised in output.quantised]).sum()
        codebooks = torch.stack([quantised.codebook for quantised in output.quantised]).sum()
        distortion = output.reconstruction.mean() / output.likelihood.dims / self.config.variance
        loss = distortion + self.config.commitment * commitment + codebooks
        return loss, {"commitment": commitment.detach(), **metrics_of(output)}

    @torch.no_grad()
    def begin(self, first: FirstImages) -> None:
        """Takes the first codes from the first images, where the config says so."""
        if self.config.quantiser.start != "batch":
            return

        def begun(number: int, quantiser: Quantiser, vectors: Tensor) -> Quantised:
            quantiser.begin(vectors, first.seed, number)
            return chosen_nearest(number, quantiser, vectors)

        images = torch.cat(list(first.images(FIRST)))
        self.network.quantise(self.encode(images).encoded, begun)
        self.after_skip()

    def after_update(self, seed: int, step: int, progress: float) -> Metrics:
        """Codebooks by averages learn from what the update saw; perplexity and restarts (L,)."""
        found = [metrics for metrics in after_update(self.network.quantisers(), seed, step, progress) if metrics]
        return {name: torch.stack([metrics[name] for metrics in found]) for name in found[0]} if found else {}

    def after_skip(self) -> None:
        """They forget it."""
        discard(self.network.quantisers())

    def copied(self) -> set[str]:
        """Codebooks by averages, which restart."""
        return {name for name, _ in self.named_buffers()}

    def set_recomputation(self, mode: Recomputation) -> None:
        """`cells`: the backward pass runs encoders and decoders of levels again, quantisers never."""
        for part in self.parts():
            assert isinstance(part, Recomputable)
            part.recompute = mode == "cells"

    def parts(self) -> Iterable[nn.Module]:
        """Encoders and decoders of all levels."""
        for level in self.network.top_down():
            yield from (level.encoder, level.decoder)

    # ---------------------------------------------------------------------------------------------- for both stages

    def target(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] as the likelihood takes them."""
        return quantise(x, self.config.likelihood.bits, self.config.likelihood.grid)

    def likelihood(self, codes: Sequence[Tensor]) -> Likelihood:
        """p(x | codes) of their values (B, D, h, w), top-down."""
        config = self.config.likelihood
        return LIKELIHOODS[config.kind](self.network.decode(codes), config, self.config.image_channels)

    def rates(self) -> list[float]:
        """Nats of each level's map while codes are uniform, h·w·ln K."""
        return [shape.height * shape.width * math.log(shape.codes) for shape in self.config.maps]

    def choice(
        self, features: Features, latents: Sequence[Tensor] | None, otherwise: Choice = chosen_nearest
    ) -> Choice:
        """The given codes of the first levels, then what is chosen `otherwise`. Raises UserError where none is one."""
        given = latents or ()
        self.check_fit("latents", given, len(features.target))
        return partial(_chosen, [z[:, 0] for z in given], otherwise)


def _chosen(
    given: Sequence[Tensor], otherwise: Choice, number: int, quantiser: Quantiser, vectors: Tensor
) -> Quantised:
    """The given indices of a level where there are some."""
    if number >= len(given):
        return otherwise(number, quantiser, vectors)
    indices, codes = given[number], len(quantiser.codebook)
    if indices.is_floating_point() or int(indices.min()) < 0 or int(indices.max()) >= codes:
        raise UserError(f"latents: group {number} takes indices of codes, whole numbers from 0 to {codes - 1}")
    return quantiser.chosen(vectors, indices)


def density_of(config: VQVAEConfig) -> Density:
    """A bound by one point, or none, without a likelihood."""
    return "point" if LIKELIHOODS[config.likelihood.kind].is_probability else "none"


def metrics_of(output: Output) -> Metrics:
    """Means over images, in nats where there is a likelihood; rate and squared error have no sum."""
    rate, distortion = output.kl.sum(1).mean().detach(), output.reconstruction.mean().detach()
    if not output.likelihood.is_probability:
        return {"squared_error": distortion / output.likelihood.dims, "kl": rate}
    return {"nelbo": distortion + rate, "reconstruction": distortion, "kl": rate}


def rescaled(images: Tensor) -> Tensor:
    """From [0, 1] to [−1, 1]."""
    return (2 * images - 1).contiguous(memory_format=torch.channels_last)


def uniformly(choose: Chooser, n: int, shape: MapShape, like: Tensor) -> Tensor:
    """A map (n, h, w) of chosen codes that are all equally likely."""
    logits = like.new_zeros(n, shape.codes)
    codes = [choose(logits) for _ in range(shape.height * shape.width)]
    return torch.stack(codes, dim=1).reshape(n, shape.height, shape.width)


def uniform_codes(noise: Tensor, codes: int) -> Tensor:
    """Indices that standard-normal noise (B, h, w) draws, each as likely as the others."""
    share: Tensor = torch.special.ndtr(in_float64(noise))
    return (share * codes).long().clamp(max=codes - 1).to(noise.device)
