"""Published test figures, to stand beside ours (spec §6; spec_vdvae, table), and when they cannot be compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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


class Row(NamedTuple):
    """A line of the table in which a model stands beside published ones."""

    value: float
    model: str
    note: str
    error: float | None = None
    """Standard error over images; of the model evaluated only."""


def beside_published(entry: Mapping[str, Any]) -> tuple[Unit, list[Row]]:
    """The unit, and the model of an entry of `results.json` among the published ones of its set, best first."""
    unit = unit_for(entry["data"], entry["likelihood"])
    value, error = value_in(unit, best_bound(entry))
    ours = Row(value, "this model", f"{entry['importance_samples']} samples", error)
    theirs = [Row(result.value, result.model, result.note) for result in published_for(entry["data"])]
    return unit, sorted([ours, *theirs], key=lambda row: row.value)


def has_bound(entry: Mapping[str, Any]) -> bool:
    """False where a distortion stands in the place of a likelihood."""
    return "nelbo" in entry["estimates"]


def density_of(entry: Mapping[str, Any]) -> str:
    """What is bounded: the probability of an image, or of one whose class is given."""
    return "p(x | class)" if entry.get("classes") else "p(x)"


def best_bound(entry: Mapping[str, Any]) -> Mapping[str, float]:
    """The tightest bound of an entry: with most importance samples, or the negative ELBO for a single one."""
    estimates: Mapping[str, Mapping[str, float]] = entry["estimates"]
    name = f"bound_{entry['importance_samples']}"
    return estimates[name] if entry["importance_samples"] > 1 else estimates["nelbo"]


def value_in(unit: str, estimate: Mapping[str, float]) -> tuple[float, float]:
    """An estimate and its standard error over images, in nats or bits/dim."""
    if unit == "nats":
        return estimate["nats"], estimate["standard_error"]
    return estimate["bits_per_dim"], estimate["bits_per_dim_standard_error"]


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
    if not has_bound(entry):
        return [
            *found,
            "a squared error is no likelihood: rate and distortion are figures of their own, without a sum and without "
            "bits/dim of an image",
        ]
    if entry.get("classes"):
        found.append("the model is told the class of every image that has one, models of p(x) are not")
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
