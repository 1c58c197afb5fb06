"""FID, KID, precision and recall, Inception score of samples against the training set (spec §7), by torch-fidelity.

Every rank reads its share of the images; what is known of the features of all comes together on every rank. The
moments behind FID are of every image. Single features, for the other metrics, are kept of at most `KEPT` images,
evenly spread.

Shapes: n images, C channels, H W space, F numbers of a feature.
"""

import urllib.error
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..core.distributed import from_rank_zero, gather_objects, rank, sum_over_ranks
from ..core.errors import UserError
from ..core.files import atomic_file, tensors_in
from ..core.precision import in_float64
from ..sampling.pictures import to_bytes

SAMPLES = 50_000
KEPT = 50_000
KID_SUBSET = 1000


@dataclass(frozen=True)
class Networks:
    """Which of torch-fidelity's registered feature networks are used."""

    general: str = "inception-v3-compat"
    """For FID, KID and the Inception score."""
    neighbours: str = "vgg16"
    """For precision and recall."""


class Extractors:
    """The networks, built. Raises UserError where torch-fidelity or the weights of a network are missing."""

    def __init__(self, networks: Networks, device: torch.device) -> None:
        try:
            from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as REGISTRY
        except ImportError as error:
            raise UserError('FID needs torch-fidelity, which is not installed: pip install "nvae[fid]"') from error
        layer = {name: REGISTRY[name].get_default_feature_layer_for_metric for name in vars(networks).values()}
        self.device = device
        self.features, self.logits = layer[networks.general]("fid"), layer[networks.general]("isc")
        self.close = layer[networks.neighbours]("prc")
        self._general = _built(networks.general, sorted({self.features, self.logits}), device)
        self._neighbours = _built(networks.neighbours, [self.close], device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (n, C, H, W) in [0, 1] -> features for FID and KID, logits, features for precision; each (n, F)."""
        pixels = to_bytes(images).to(self.device)
        pixels = pixels.expand(-1, 3, -1, -1)  # grey as RGB
        general = self._general.convert_features_tuple_to_dict(self._general(pixels))
        (close,) = self._neighbours(pixels)
        return general[self.features], general[self.logits], close


def _built(name: str, layers: Sequence[str], device: torch.device) -> Any:
    """A network; the first rank fetches its weights, then the others find them."""
    problem = from_rank_zero(_problem(name, layers) if rank() == 0 else None)
    if problem is not None:
        raise UserError(problem)
    from torch_fidelity.utils import create_feature_extractor

    return create_feature_extractor(name, list(layers), cuda=False, verbose=False).to(device)


def _problem(name: str, layers: Sequence[str]) -> str | None:
    """What is in the way of building a network, and what to do about it."""
    from torch_fidelity.utils import create_feature_extractor

    try:
        create_feature_extractor(name, list(layers), cuda=False, verbose=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        source = _sources().get(name, "its weights")
        return (
            f"the weights of {name} cannot be fetched ({error}); put {source} into {folder}/, under the same file name"
        )
    return None


def _sources() -> dict[str, str]:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import VGG16_Weights

    return {"inception-v3-compat": URL_INCEPTION_V3, "vgg16": VGG16_Weights.IMAGENET1K_V1.url}


# ------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Statistics:
    """What is known of the features of a set of images, on the CPU."""

    mean: Tensor
    """(F,) float64, over all images."""
    covariance: Tensor
    """(F, F) float64, over all images, unbiased."""
    features: Tensor
    """(n, F) of the images kept, in their order."""
    logits: Tensor
    """(n, F) likewise."""
    close: Tensor
    """(n, F) likewise."""


def statistics(images: Iterable[tuple[Sequence[int], Tensor]], total: int, extractors: Extractors) -> Statistics:
    """Of all ranks' (numbers, images (n, C, H, W) in [0, 1]), `total` images together; the same on every rank."""
    every = -(-total // KEPT)
    first = second = None
    kept: list[tuple[list[int], list[Tensor]]] = []
    for numbers, batch in images:
        found = extractors(batch)
        features = in_float64(found[0])
        first = features.sum(0) if first is None else first + features.sum(0)
        second = features.T @ features if second is None else second + features.T @ features
        rows = [row for row, number in enumerate(numbers) if number % every == 0]
        kept.append(([numbers[row] for row in rows], [part[rows].cpu() for part in found]))
    first, second = _over_ranks(first, second, extractors.device)
    mean = first / total
    covariance = (second - total * torch.outer(mean, mean)) / (total - 1)
    gathered = [part for parts in gather_objects(kept) for part in parts]
    order = torch.tensor([number for numbers, _ in gathered for number in numbers]).argsort()
    features, logits, close = (torch.cat([found[i] for _, found in gathered])[order] for i in range(3))
    return Statistics(mean.cpu(), covariance.cpu(), features, logits, close)


def _over_ranks(first: Tensor | None, second: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums over ranks; a rank without images has none of its own."""
    size = max(gather_objects(0 if first is None else len(first)))
    if first is None or second is None:
        first = torch.zeros(size, dtype=torch.float64, device=device)
        second = torch.zeros(size, size, dtype=torch.float64, device=device)
    return sum_over_ranks(first), sum_over_ranks(second)


def cached(file: Path, compute: Any) -> Statistics:
    """The statistics a file holds, or computed and then kept in it."""
    found = from_rank_zero(tensors_in(file) if rank() == 0 else None)
    if found is not None:
        return Statistics(**found)
    result: Statistics = compute()
    if rank() == 0:
        with atomic_file(file) as handle:
            handle.write(safetensors.torch.save({name: value.contiguous() for name, value in vars(result).items()}))
    return result


# ---------------------------------------------------------------------------------------------------------- metrics


def metrics(samples: Statistics, training: Statistics) -> dict[str, float]:
    """fid, kid (its mean over subsets) and kid_std, inception_score and _std, precision and recall."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    moments = [{"mu": s.mean.numpy(), "sigma": s.covariance.numpy()} for s in (samples, training)]
    subset = min(KID_SUBSET, len(samples.features), len(training.features))
    found = fid_statistics_to_metric(*moments, verbose=False)
    found |= kid_features_to_metric(samples.features, training.features, kid_subset_size=subset, verbose=False)
    found |= isc_features_to_metric(samples.logits)
    found |= prc_features_to_metric(samples.close, training.close, save_cpu_ram=True, verbose=False)
    return {ours: float(found[theirs]) for ours, theirs in NAMES.items()}


NAMES = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "inception_score": "inception_score_mean",
    "inception_score_std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
}
