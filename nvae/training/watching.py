"""What is looked at while a model trains: numbers over all ranks, bounds on held-out images, pictures.

Shapes: C image channels, H W space; G latent groups, L latent channels of a group (of the largest one; groups with
fewer have zeros there).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.utils import make_grid

from ..bricks.likelihoods import LIKELIHOODS
from ..core.distributed import mean_over_ranks, rank, world_size
from ..core.randomness import keyed_normal
from ..data.config import DataConfig
from ..data.images import Images
from ..data.loading import evaluation_batches
from ..evaluation.bounds import evaluate_batches
from ..evaluation.figures import ACTIVE, Evaluation, bits_per_dim, dims_of
from ..models.base import Family, Metrics, Output
from ..models.config import ModelConfig
from ..sampling.images import TEMPERATURES


def quotes_bits(config: ModelConfig) -> bool:
    """True where bits/dim are the usual unit: probabilities of levels, but not of binary images' (spec §4)."""
    likelihood = LIKELIHOODS[config.likelihood.kind]
    return config.likelihood.kind != "bernoulli" and likelihood.is_probability and not likelihood.is_density


# ---------------------------------------------------------------------------------------------------------- numbers


def group_metrics(output: Output) -> Metrics:
    """Mean KL of each group (G,) and, of Normal latents, of each latent channel (G, L), in nats."""
    with torch.no_grad():
        channel_kl = pad_sequence([kl.float().mean(0) for kl in output.channel_kl], batch_first=True)
        of_groups = {"kl_group": channel_kl.sum(1)}
        return of_groups | {"channel_kl": channel_kl} if all(z.is_floating_point() for z in output.z) else of_groups


def numbers_of(metrics: Metrics, config: ModelConfig, device: torch.device) -> dict[str, float]:
    """Means over ranks of metrics, a name each: one of a vector gets its place in its name.

    Of `channel_kl` the number of active channels (KL > 0.1) of each group is given, of `nelbo` bits/dim as well.
    """
    flat = torch.cat([value.detach().float().reshape(-1).to(device) for value in metrics.values()])
    parts = torch.split(mean_over_ranks(flat).cpu(), [value.numel() for value in metrics.values()])
    means = {name: part.reshape(metrics[name].shape) for name, part in zip(metrics, parts, strict=True)}
    if "channel_kl" in means:
        means["active_units"] = (means.pop("channel_kl") > ACTIVE).sum(1)
    numbers: dict[str, float] = {}
    for name, mean in means.items():
        places = [name] if mean.dim() == 0 else [f"{name}/{place:02d}" for place in range(len(mean))]
        numbers |= dict(zip(places, mean.reshape(-1).tolist(), strict=True))
    if quotes_bits(config) and "nelbo" in numbers:
        numbers["bits_per_dim"] = bits_per_dim(numbers["nelbo"], dims_of(config))
    return numbers


# ---------------------------------------------------------------------------------------------------- held-out images


class Watcher:
    """Looks at a model, in eval mode, through held-out images."""

    def __init__(
        self, images: Images, data: DataConfig, *, importance_samples: int, seed: int, device: torch.device
    ) -> None:
        self.images, self.data, self.seed, self.device = images, data, seed, device
        self.importance_samples = importance_samples

    def bounds(self, model: Family[Any]) -> dict[str, float]:
        """Means over all images and ranks, in nats; `bound` is the tightest, to be minimised.

        Without a likelihood there is a `criterion` in its place, the sum of distortion and rate, and no bound.
        """
        batches = evaluation_batches(
            self.images,
            self.data,
            batch=self.data.batch,
            device=self.device,
            seed=self.seed,
            rank=rank(),
            world=world_size(),
        )
        found = evaluate_batches(
            model.for_inference(), batches, importance_samples=self.importance_samples, seed=self.seed
        )
        means = found.summary()
        if found.codes is not None:
            means |= {f"codes_in_use/{level:02d}": float(n) for level, n in enumerate(found.active_units)}
            nats = Evaluation([found]).codebooks()["nats_per_code"]
            means |= {f"nats_per_code/{level:02d}": value for level, value in enumerate(nats)}
        if not LIKELIHOODS[model.config.likelihood.kind].is_probability:
            means["squared_error"] = means.pop("reconstruction") / dims_of(model.config)
            return means | {"criterion": means.pop("nelbo")}
        tightest = max(found.bounds, default=None)
        means["bound"] = means["nelbo" if tightest is None else f"bound_{tightest}"]
        if quotes_bits(model.config):
            means["bits_per_dim"] = bits_per_dim(means["bound"], dims_of(model.config))
        return means

    @torch.no_grad()
    def pictures(self, model: Family[Any], count: int = 16) -> dict[str, Tensor]:
        """Images above their reconstructions, and mean images of samples at four temperatures: (C, H, W) in [0, 1]."""
        batch = next(iter(evaluation_batches(self.images, self.data, batch=count, device=self.device, seed=self.seed)))
        noise = keyed_normal(model.latent_shapes(count), range(count), self.seed, "pictures", self.device)
        labels = (batch.labels,) if model.config.classes else ()
        first = [numbers[: len(batch.indices)] for numbers in noise]
        reconstructions = model(batch.images, first, *labels).likelihood.mean()
        pictures = {"reconstructions": make_grid(torch.cat([batch.images, reconstructions]), nrow=len(batch.indices))}
        for temperature in TEMPERATURES:
            samples = model.sample(count, temperature, noise).mean()
            pictures[f"samples/{temperature}"] = make_grid(samples, nrow=4)
        return pictures
