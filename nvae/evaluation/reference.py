"""Published test figures, to stand beside ours (spec §6; spec_vdvae, table), and when they cannot be compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["nats", "bits/dim"]

NVAE, VDVAE = "NVAE", "Very Deep VAE"


@dataclass(frozen=True)
class PublishedResult:
    """One figure: −log p(x) is at most this."""

    data: str
    """The set, as in `data.name`."""
    model: str
    value: float
    unit: Unit
    bits: int = 8
    """Bits of an image channel that the figure is for."""
    note: str = ""

    @property
    def published_edge(self) -> bool:
        """True where it was computed with a published edge that flatters (spec §4; spec_vdvae, Data and loss)."""
        flatters = self.model.startswith(NVAE) or (self.model == VDVAE and self.bits < 8)
        return flatters and self.unit == "bits/dim"


PUBLISHED = (
    PublishedResult("mnist", f"{NVAE} without flows", 78.01, "nats"),
    PublishedResult("mnist", f"{NVAE} with flows", 78.19, "nats"),
    PublishedResult("mnist", "BIVA", 78.41, "nats"),
    PublishedResult("mnist", "DVAE++", 78.49, "nats"),
    PublishedResult("mnist", "IAF-VAE", 79.10, "nats"),
    PublishedResult("cifar10", VDVAE, 2.87, "bits/dim", note="39 M parameters, negative ELBO"),
    PublishedResult("cifar10", f"{NVAE} with flows", 2.91, "bits/dim"),
    PublishedResult("cifar10", f"{NVAE} without flows", 2.93, "bits/dim"),
    PublishedResult("cifar10", "BIVA", 3.08, "bits/dim"),
    PublishedResult("cifar10", "IAF-VAE", 3.11, "bits/dim"),
    PublishedResult("cifar10", "DVAE++", 3.38, "bits/dim"),
    PublishedResult("celeba_64", f"{NVAE} with flows", 2.03, "bits/dim"),
    PublishedResult("celeba_64", f"{NVAE} without flows", 2.04, "bits/dim"),
    PublishedResult("celeba_64", "BIVA", 2.48, "bits/dim"),
    PublishedResult("imagenet_32", VDVAE, 3.80, "bits/dim", note="119 M parameters, negative ELBO"),
    PublishedResult("imagenet_32", f"{NVAE} with flows", 3.92, "bits/dim"),
    PublishedResult("imagenet_32", "BIVA", 3.96, "bits/dim"),
    PublishedResult("imagenet_64", VDVAE, 3.52, "bits/dim", note="125 M parameters, negative ELBO"),
    PublishedResult("celeba_hq_256", f"{NVAE} with flows", 0.70, "bits/dim", bits=5),
    PublishedResult(
        "ffhq_256", VDVAE, 0.61, "bits/dim", bits=5, note="115 M parameters, negative ELBO; up to 0.04 too good"
    ),
    PublishedResult("ffhq_256", f"{NVAE} with flows", 0.69, "bits/dim", bits=5),
    PublishedResult("ffhq_256", f"{NVAE} without flows", 0.71, "bits/dim", bits=5),
    PublishedResult("digits", "a plain VAE of 16 latents", 22.0, "nats", note="this project's baseline"),
    PublishedResult("digits", "mixture of 150 Bernoullis", 22.0, "nats", note="this project's baseline"),
    PublishedResult("digits", "mixture of 10 Bernoullis", 23.5, "nats", note="this project's baseline"),
    PublishedResult("digits", "independent pixels", 27.2, "nats", note="this project's baseline"),
)
"""Bounds with 1000 importance samples on the test split, unless the note says otherwise."""

PUBLISHED_SAMPLES = 1000


def published_for(data: str) -> list[PublishedResult]:
    """The figures for a set, best first."""
    return sorted((result for result in PUBLISHED if result.data == data), key=lambda result: result.value)


def unit_for(data: str, likelihood: Mapping[str, Any]) -> Unit:
    """The unit in which figures of a set are quoted: nats for binary images, else bits/dim (spec §4)."""
    published = published_for(data)
    if published:
        return published[0].unit
    return "nats" if likelihood["kind"] == "bernoulli" else "bits/dim"


def reservations(entry: Mapping[str, Any]) -> list[str]:
    """Why the figures of an entry of `results.json` cannot, or not quite, be compared with those published."""
    likelihood, published = entry["likelihood"], published_for(entry["data"])
    flattered = [result.model for result in published if result.published_edge]
    found = []
    if entry.get("trained_on"):
        found.append("the model was trained on most of these images: figures on them say nothing of others")
    if entry.get("density") == "none":
        found.append("this family gives no bound on the likelihood: the figures are its reconstruction and code length")
    if entry["is_density"]:
        found.append(
            "the likelihood is a Normal density, not the probability of a level: these bits/dim are not comparable "
            "with any discrete likelihood's"
        )
    if not entry["sums_to_one"]:
        found.append(
            "computed with the published mixture edge, whose probabilities sum to more than 1: comparable with "
            f"{' and '.join(flattered) or 'no figure here'} only"
        )
    elif flattered:
        found.append(
            f"{' and '.join(flattered)} were computed with the published mixture edge and come out somewhat too good; "
            "ours is exact (--mixture-edge published gives theirs)"
        )
    other_bits = sorted({result.bits for result in published} - {likelihood["bits"]})
    if other_bits:
        found.append(f"images have {likelihood['bits']} bits a channel here, {other_bits[0]} in the published figures")
    if entry["split"] != "test":
        found.append(f"measured on the {entry['split']} split, the published figures are of the test split")
    if entry.get("limit"):
        found.append(f"measured on the first {entry['images']} images only")
    if published and entry["importance_samples"] < PUBLISHED_SAMPLES and entry["data"] != "digits":
        found.append(
            f"{entry['importance_samples']} importance samples give a looser bound than the {PUBLISHED_SAMPLES} of the "
            "published figures"
        )
    if not published:
        found.append(f"there are no published figures for {entry['data']}")
    return found
