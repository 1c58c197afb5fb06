"""What a pass of training takes: a micro-batch with the noise of its images, and how far training is."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.devices import sent
from ..data.loading import Batch
from ..models.base import Family, Output, Progress
from .beginning import training_noise


@dataclass
class Pass:
    images: Tensor
    """(B, C, H, W)."""
    noise: list[Tensor]
    """(B, …) of each group."""
    labels: Tensor | None
    """(B,), of a model of classes."""
    codes: Tensor | None
    """(B, S), where a store keeps them."""
    progress: Progress

    @classmethod
    def of(cls, batch: Batch, model: Family[Any], seed: int, progress: float, *, on_device: bool) -> "Pass":
        """That of a batch, whose noise is keyed on the numbers of its images; `on_device`: with the progress there."""
        noise, labels = training_noise(model, batch.indices, seed), batch.labels if model.config.classes else None
        there = sent(torch.tensor(progress, dtype=torch.float64), batch.images.device) if on_device else progress
        return cls(batch.images, noise, labels, batch.codes, there)

    def through(self, model: nn.Module) -> Output:
        """What the model says."""
        labels = () if self.labels is None else (self.labels,)
        kept = {} if self.codes is None else {"codes": self.codes}
        output: Output = model(self.images, self.noise, *labels, **kept)
        return output

    @property
    def tensors(self) -> list[Tensor]:
        """Those it has, in one order."""
        every = (self.images, *self.noise, self.labels, self.codes, self.progress)
        return [tensor for tensor in every if isinstance(tensor, Tensor)]

    def clone(self) -> "Pass":
        """The same numbers in memory of its own."""
        return copy.deepcopy(self)
