"""What was measured of images: figures one by one, their means with standard errors, an entry of results.json.

All figures are in nats and are to be minimised: −log p(x) is at most each bound, in expectation.

Shapes: N images of a split, D test draws, G latent groups (top-down), L latent channels of a group (of the largest one;
groups with fewer have zeros there).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bricks.likelihoods import LIKELIHOODS
from ..models.config import ModelConfig

ACTIVE = 0.1
"""A latent channel whose mean KL over the images is above this many nats is active (spec §6)."""

SUMS = ("channel_kl", "codes")
"""Figures that are summed over the images."""


@dataclass(frozen=True)
class Figures:
    """What was measured of N images: means over their draws, in nats, float64, on the CPU."""

    indices: Tensor
    """(N,) positions of the images in their split."""
    reconstruction: Tensor
    """(N,) −log p(x | z)."""
    kl: Tensor
    """(N, G)."""
    channel_kl: Tensor
    """(G, L) KL of each latent channel, summed over the N images."""
    bounds: dict[int, Tensor]
    """Number of importance samples -> (N,), minus the importance-weighted bound; empty where there are no weights."""
    codes: Tensor | None = None
    """(G, K) how often each of the K codes of discrete latents was chosen, summed over the N images."""

    @property
    def nelbo(self) -> Tensor:
        """(N,) negative ELBO."""
        return self.reconstruction + self.kl.sum(1)

    @property
    def active_units(self) -> Tensor:
        """(G,) number of active latent channels of each group, of discrete latents that of the codes in use."""
        if self.codes is not None:
            return (self.codes > 0).sum(1)
        return (self.channel_kl / len(self.indices) > ACTIVE).sum(1)

    def summary(self) -> dict[str, float]:
        """Means over the images: nelbo, reconstruction, kl, and bound_K for each K."""
        means = {"nelbo": self.nelbo, "reconstruction": self.reconstruction, "kl": self.kl.sum(1)}
        means |= {f"bound_{samples}": bound for samples, bound in self.bounds.items()}
        return {name: float(values.mean()) for name, values in means.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, to be written or joined."""
        named = {name: getattr(self, name) for name in ("indices", "reconstruction", "kl", "channel_kl")}
        if self.codes is not None:
            named["codes"] = self.codes
        return named | {f"bound.{samples}": bound for samples, bound in self.bounds.items()}

    @staticmethod
    def from_tensors(named: dict[str, Tensor]) -> "Figures":
        """The reverse of `tensors`."""
        bounds = {int(k.removeprefix("bound.")): v for k, v in named.items() if k.startswith("bound.")}
        plain = {name: value for name, value in named.items() if not name.startswith("bound.")}
        return Figures(**plain, bounds=dict(sorted(bounds.items())))

    @staticmethod
    def joined(parts: Sequence["Figures"]) -> "Figures":
        """The figures of all images of several disjoint parts, in the order of the split."""
        named = [part.tensors() for part in parts]
        order = torch.cat([part.indices for part in parts]).argsort()
        sums = {name: torch.stack([part[name] for part in named]).sum(0) for name in named[0] if name in SUMS}
        together = {name: torch.cat([part[name] for part in named])[order] for name in named[0] if name not in SUMS}
        assert bool((together["indices"].diff() > 0).all()), "an image was measured twice"
        return Figures.from_tensors(together | sums)


@dataclass(frozen=True)
class Estimate:
    """The mean over images of a figure, in nats, with its standard errors."""

    nats: float
    standard_error: float
    """Over the images."""
    draws_standard_error: float | None
    """Over the test draws of a binarised set; None for one draw."""

    @staticmethod
    def of(values: Tensor) -> "Estimate":
        """From (D, N): D test draws of N images."""
        draws, images = values.shape
        per_image, per_draw = values.mean(0), values.mean(1)
        return Estimate(
            float(values.mean()),
            float(per_image.std()) / math.sqrt(images) if images > 1 else math.nan,
            float(per_draw.std()) / math.sqrt(draws) if draws > 1 else None,
        )


@dataclass(frozen=True)
class Evaluation:
    """The figures of a split: of one test draw, or of several where images are binarised anew in each."""

    draws: list[Figures]

    @property
    def images(self) -> int:
        return len(self.draws[0].indices)

    def estimates(self) -> dict[str, Estimate]:
        """nelbo, reconstruction, kl, and bound_K for each K."""
        columns = {
            "nelbo": [figures.nelbo for figures in self.draws],
            "reconstruction": [figures.reconstruction for figures in self.draws],
            "kl": [figures.kl.sum(1) for figures in self.draws],
        }
        for samples in self.draws[0].bounds:
            columns[f"bound_{samples}"] = [figures.bounds[samples] for figures in self.draws]
        return {name: Estimate.of(torch.stack(values)) for name, values in columns.items()}

    def without_likelihood(self, dims: int) -> dict[str, Estimate]:
        """The squared error per dimension, which is not in nats, and the rate, which is; there is no sum of them."""
        errors = torch.stack([figures.reconstruction / dims for figures in self.draws])
        return {"squared_error": Estimate.of(errors), "kl": self.estimates()["kl"]}

    def codebooks(self) -> dict[str, list[float]]:
        """Of each level of codes nats a code and the perplexity of their use; empty where latents are no codes."""
        counts = self.draws[0].codes
        if counts is None:
            return {}
        of_an_image = counts.sum(1) / (self.images * max(self.draws[0].bounds, default=1))
        nats = torch.stack([figures.kl.mean(0) for figures in self.draws]).mean(0)
        p = counts / counts.sum(1, keepdim=True)
        return {
            "nats_per_code": (nats / of_an_image).tolist(),
            "perplexity": torch.special.entr(p).sum(1).exp().tolist(),
        }

    def entry(self, config: ModelConfig) -> dict[str, Any]:
        """What `results.json` keeps: every estimate in nats and bits/dim, KL and active units by group."""
        dims, likelihood = dims_of(config), LIKELIHOODS[config.likelihood.kind]
        estimates = {}
        for name, estimate in (
            self.estimates() if likelihood.is_probability else self.without_likelihood(dims)
        ).items():
            in_bits = {"bits_per_dim": bits_per_dim(estimate.nats, dims)}
            in_bits["bits_per_dim_standard_error"] = bits_per_dim(estimate.standard_error, dims)
            estimates[name] = {**vars(estimate), **in_bits}
        return {
            "images": self.images,
            "dims": dims,
            "estimates": estimates,
            "kl_per_group": torch.stack([figures.kl.mean(0) for figures in self.draws]).mean(0).tolist(),
            "active_units_per_group": self.draws[0].active_units.tolist(),
            "likelihood": config.likelihood.model_dump(mode="json"),
            "sums_to_one": config.likelihood.sums_to_one,
            "is_density": likelihood.is_density,
            **({"codebooks": codebooks} if (codebooks := self.codebooks()) else {}),
            "classes": config.classes,
        }


def bits_per_dim(nats: float, dims: int) -> float:
    """nats / (ln 2 · dims), dims = C·H·W of the original data (spec §4)."""
    return nats / (math.log(2) * dims)


def dims_of(config: ModelConfig) -> int:
    """How many numbers of an image count: channels · height · width without the border."""
    return config.image_channels * config.visible_size**2
