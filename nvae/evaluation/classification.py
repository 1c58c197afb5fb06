"""Classifiers, and what they say of samples: the classification accuracy score (Ravuri & Vinyals 2019), agreement, and
rejection (Razavi et al. 2019 §3.4).

A classifier is trained on samples of a model and tested on real images: it can be right on those only as far as samples
of a class are what the class is. Beside it stand one trained on real images and one trained on their reconstructions.

Shapes: N images, C channels, H W space, K classes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models import resnet18

from ..core.config import Config
from ..core.errors import UserError
from ..core.files import atomic_file
from ..core.randomness import derived_seed, generator

SMALL = 32
"""Side of the largest images that two layers classify; larger ones take a ResNet-18."""


class ClassifierConfig(Config):
    passes: int = Field(10, ge=1)
    """Over the training images, at least."""
    updates: int = Field(300, ge=1)
    """At least."""
    batch: int = Field(128, ge=1)
    """Images of an update."""
    lr: float = Field(2e-3, gt=0)
    """Learning rate of AdamW at the start; it falls to 0 with half a cosine."""
    weight_decay: float = Field(0.5, ge=0)
    """Of AdamW."""
    channels: int = Field(32, ge=1)
    """Of the first of two convolutions; the second has twice as many."""


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes, on the CPU."""

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor
    """(N,) int64."""

    def __len__(self) -> int:
        return len(self.labels)


class Classifier(nn.Module):
    """Two convolutions up to 32×32 pixels, a ResNet-18 (He et al. 2016) above."""

    def __init__(self, shape: Sequence[int], classes: int, config: ClassifierConfig) -> None:
        """`shape`: (C, H, W) of the images."""
        super().__init__()
        self.shape, self.classes, self.config = tuple(shape), classes, config
        channels, *sides = shape
        self.network = _two_layers(channels, sides, classes, config) if max(sides) <= SMALL else _resnet(classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> logits (N, K)."""
        x = images.to(torch.float32) / 127.5 - 1
        if max(self.shape[1:]) > SMALL:
            x = x.expand(-1, 3, -1, -1)  # grey as RGB
        return cast(Tensor, self.network(x))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> (N, K), in eval mode, on the CPU. Raises UserError for images of another shape."""
        if images.shape[1:] != self.shape:
            raise UserError(f"classifier: trained on images of {self.shape}, found {tuple(images.shape[1:])}")
        device = next(self.parameters()).device
        parts = [self(part.to(device)).softmax(1).cpu() for part in torch.split(images, self.config.batch)]
        return torch.cat(parts)

    def accuracy(self, found: LabelledImages) -> float:
        """Top-1, the fraction of images whose class is thought to be the likeliest."""
        return _share(self.probabilities(found.images).argmax(1) == found.labels)


def _two_layers(channels: int, sides: Sequence[int], classes: int, config: ClassifierConfig) -> nn.Sequential:
    height, width = (math.ceil(side / 4) for side in sides)
    return nn.Sequential(
        nn.Conv2d(channels, config.channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(config.channels, 2 * config.channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(2 * config.channels * height * width, classes),
    )


def _resnet(classes: int) -> nn.Module:
    return cast(nn.Module, resnet18(weights=None, num_classes=classes))


# --------------------------------------------------------------------------------------------------------- training


def train_classifier(
    found: LabelledImages,
    classes: int,
    config: ClassifierConfig,
    *,
    seed: int,
    device: torch.device,
    flip: bool = False,
) -> Classifier:
    """A classifier of these images, in eval mode; the same one for a seed. `flip`: half of them mirrored, each pass."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "classifier"))
        model = Classifier(found.images.shape[1:], classes, config)
    model = model.to(device).train()
    batches = math.ceil(len(found) / config.batch)
    passes = max(config.passes, math.ceil(config.updates / batches))
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, passes * batches)
    for number in range(passes):
        random = generator("cpu", seed, "classifier", number)
        order = torch.randperm(len(found), generator=random)
        mirrored = torch.rand(len(found), generator=random) < 0.5 if flip else torch.zeros(len(found), dtype=torch.bool)
        for rows in torch.split(order, config.batch):
            images = torch.where(mirrored[rows, None, None, None], found.images[rows].flip(3), found.images[rows])
            loss = F.cross_entropy(model(images.to(device)), found.labels[rows].to(device))
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return model.eval()


# ------------------------------------------------------------------------------------------------------------ files


def save_classifier(file: Path, model: Classifier, about: Mapping[str, Any]) -> None:
    """Writes its weights and geometry, and of what it is, to a safetensors file."""
    geometry = {"shape": model.shape, "classes": model.classes, "config": model.config.model_dump()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"geometry": json.dumps(geometry), "about": json.dumps(about)}
    with atomic_file(file) as handle:
        handle.write(safetensors.torch.save(tensors, metadata))


def load_classifier(file: Path, device: torch.device) -> tuple[Classifier, dict[str, Any]]:
    """A saved classifier in eval mode, and of what it is. Raises UserError where the file is something else."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        geometry, about = json.loads(metadata["geometry"]), json.loads(metadata["about"])
        model = Classifier(geometry["shape"], geometry["classes"], ClassifierConfig(**geometry["config"]))
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{file}: not a classifier: {error}") from error
    return model.to(device).eval(), about


# ----------------------------------------------------------------------------------------------------- classes drawn


def in_proportion(labels: Tensor, count: int) -> Tensor:
    """Places (count,) among labels (N,), evenly spread over them in the order of their classes.

    So every class has its share of `count`, to within one image; for `count` = N every place comes out once.
    """
    order = labels.argsort(stable=True)
    return order[(2 * torch.arange(count) + 1) * len(labels) // (2 * count)]


def likeliest(own: Tensor, classes: Tensor, count: int) -> Tensor:
    """Places (n,), ascending, of the `count` images of each class with the greatest probability `own` of that class.

    Both (N,); of equal ones the first.
    """
    kept = []
    for label in torch.unique(classes):
        places = (classes == label).nonzero()[:, 0]
        kept.append(places[own[places].argsort(descending=True, stable=True)[:count]])
    return torch.cat(kept).sort().values


# ----------------------------------------------------------------------------------------------------------- scores


def scores(
    classifiers: Mapping[str, Classifier], sets: Mapping[str, LabelledImages], test: LabelledImages
) -> dict[str, Any]:
    """Accuracies on test images of classifiers by what they were trained on, `real images` and `samples` among them.

    Besides, how often the one of real images thinks samples to be what they were drawn as, over all and by class.
    """
    drawn = sets["samples"]
    agreed = classifiers["real images"].probabilities(drawn.images).argmax(1) == drawn.labels
    by_class = {str(label): agreed[drawn.labels == label] for label in torch.unique(drawn.labels).tolist()}
    return {
        "accuracy": {name: classifier.accuracy(test) for name, classifier in classifiers.items()},
        "training_images": {name: len(images) for name, images in sets.items()},
        "test_images": len(test),
        "agreement": _share(agreed),
        "agreement_by_class": {label: _share(those) for label, those in by_class.items()},
    }


def _share(found: Tensor) -> float:
    """The fraction of a bool tensor that is true."""
    return int(found.sum()) / len(found)
