"""How a new run begins: its family sets what starts from data, by the first images of training and their noise."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.distributed import is_distributed, to_all_ranks, world_size
from ..core.randomness import keyed_normal
from ..data.config import DataConfig
from ..data.images import Images
from ..data.loading import TrainingStream
from ..models.base import Family, FirstBatch, FirstImages
from .state import TrainingState


def training_noise(model: Family[Any], indices: list[int], seed: int) -> list[Tensor]:
    """The noise of training's images, (K·B, …) of K draws of each, keyed on the number of the image."""
    device = next(model.parameters()).device
    shapes = [(len(indices), model.draws, *shape[1:]) for shape in model.latent_shapes(len(indices))]
    return [noise.transpose(0, 1).flatten(0, 1) for noise in keyed_normal(shapes, indices, seed, "latents", device)]


def begin(state: TrainingState, images: Images, data: DataConfig, seed: int) -> None:
    """Lets the family of a new run set what starts from its first images: on every rank, with rank 0's result."""
    state.begin(FirstImages(_FirstBatches(state.model, images, data, seed), len(images), seed))
    if is_distributed():  # their GPUs may differ in the last bit
        tensors = state.tensors()
        to_all_ranks(tensors.values())
        state.model.load_state_dict(state.model.state_dict())  # modules look at their buffers again


@dataclass(frozen=True)
class _FirstBatches:
    """The batches of a run from its first image on, as all ranks together see them; anew in each iteration."""

    model: Family[Any]
    images: Images
    data: DataConfig
    seed: int

    def __iter__(self) -> Iterator[FirstBatch]:
        device = next(self.model.parameters()).device
        data = self.data.model_copy(update={"batch": self.data.batch * world_size()})
        stream = TrainingStream(self.images, data, seed=self.seed, device=torch.device("cpu"))
        with closing(stream.batches(start=0)) as batches:
            for batch in batches:
                noise = partial(training_noise, self.model, batch.indices, self.seed)
                yield FirstBatch(batch.images.to(device), batch.labels.to(device), noise)
