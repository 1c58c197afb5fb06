"""What is timed: an update, importance-weighted evaluation, sampling; ours and plain, of the same weights."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bricks.latents import importance_weighted_bound
from ..core.precision import Precision, allow_tf32, autocast
from ..evaluation.bounds import Evaluator
from ..kernels.fusion import compile_each
from ..kernels.operations import using
from ..models.base import Family, FirstBatch, FirstImages
from ..models.config import ModelConfig
from ..models.nvae.config import NVAEConfig
from ..models.registry import build
from ..models.vdvae.config import VDVAEConfig
from ..sampling.images import sample_images
from ..training.config import read_run_config
from ..training.optim import OptimConfig, build_optimiser
from .published_vdvae import as_published
from .timing import Action

MODELS: dict[str, ModelConfig] = {
    "small": NVAEConfig.model_validate(
        {
            "image_size": 32,
            "likelihood": {"kind": "logistic_mixture"},
            "groups": 10,
            "flows": 1,
        }
    ),
    "scales": NVAEConfig.model_validate(
        {
            "image_size": 64,
            "likelihood": {"kind": "logistic_mixture"},
            "scales": 3,
            "groups": 6,
            "adaptive_groups": True,
            "flows": 1,
        }
    ),
    "very-deep": VDVAEConfig.model_validate(
        {
            "image_size": 32,
            "likelihood": {"kind": "logistic_mixture"},
            "encoder": "32x3,32d2,16x2,16d2,8x1,8d2,4x1,4d4,1x1",
            "decoder": "1x1,4m1,4x1,8m4,8x3,16m8,16x4,32m16,32x8",
            "width": 128,
            "input_mean": 120.63838,
            "input_std": 64.16736,
        }
    ),
}
"""`small`: 10 groups at 16×16, as the CIFAR-10 recipe has 30; `scales`: 6 + 3 + 1 groups from 32×32 down to 8×8;
`very-deep`: 21 layers of latents, a Very Deep VAE of 2.2 M parameters."""


def model_named(name: str) -> ModelConfig:
    """One of `MODELS`, or that of a recipe."""
    return MODELS[name] if name in MODELS else read_run_config(Path(name), []).model


@dataclass(frozen=True)
class Way:
    """How something is computed. `plain` is the yardstick: PyTorch's operators one by one, nothing reused."""

    precision: Precision = "fp32"
    plain: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return f"{'plain' if self.plain else 'compiled' if self.compiled else 'ours'} {self.precision}"


@dataclass(frozen=True)
class Workload:
    """A model, a batch of images (noise of the right shape will do) and a device."""

    config: ModelConfig
    batch: int
    device: torch.device
    samples: int = 10
    """Importance samples per image, K."""

    def trained(self) -> Family[Any]:
        """A model with running statistics of a few updates; always the same one."""
        torch.manual_seed(0)
        model = build(self.config).to(self.device).train()
        first = FirstBatch(self.images, torch.full((self.batch,), -1), lambda: model.noise_for(self.batch, None))
        model.begin(FirstImages([first], epoch_size=self.batch, seed=0))
        with torch.no_grad():
            for _ in range(3):
                model(self.images)
        return model

    @property
    def images(self) -> Tensor:
        """(B, C, H, W) in [0, 1]."""
        config, generator = self.config, torch.Generator().manual_seed(0)
        shape = (self.batch, config.image_channels, config.image_size, config.image_size)
        return torch.rand(shape, generator=generator).to(self.device)

    @contextmanager
    def _computing(self, way: Way) -> Iterator[AbstractContextManager[Any]]:
        """Within, kernels and float32 products are those of a way, backward too; yields the forward pass's context."""
        allow_tf32(way.precision)
        with using("plain" if way.plain else "auto"):
            yield autocast(self.device, way.precision)

    def training(self, model: Family[Any], way: Way) -> Action:
        """One update."""
        model = deepcopy(_computed(model, way)).train()
        options = OptimConfig(lr=1e-4)
        if way.plain:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimiser: torch.optim.Optimizer = torch.optim.Adamax(trained, lr=options.lr, foreach=False)
        else:
            optimiser = build_optimiser(model.parameters(), options)
        if way.compiled:
            compile_each(model.parts())
        images = self.images

        def update() -> None:
            optimiser.zero_grad()
            with self._computing(way) as forward:
                with forward:
                    output = model(images)
                loss, _ = model.loss(output, progress=1.0)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                model.after_update(seed=0, step=0, progress=1.0)

        return update

    def evaluation(self, model: Family[Any], way: Way) -> Action:
        """The importance-weighted bound of the batch with K samples; plainly, K whole passes."""
        images, model = self.images, _computed(model, way).eval()

        @torch.no_grad()
        def passes() -> None:
            with self._computing(way) as forward, forward:
                log_weights = [model(images).log_weight for _ in range(self.samples)]
            importance_weighted_bound(torch.stack(log_weights))

        if way.plain:
            return passes
        evaluator = Evaluator(_inference(model, way), samples=self.samples)

        def measure() -> None:
            with self._computing(way) as forward, forward:
                evaluator.measure(images, range(self.batch))

        return measure

    def sampling(self, model: Family[Any], way: Way) -> Action:
        """The batch's number of images at temperature 0.7."""
        model = _computed(model, way).eval()

        @torch.no_grad()
        def draw() -> None:
            with self._computing(way) as forward, forward:
                model.sample(self.batch, 0.7).mean()

        if way.plain:
            return draw
        ready = _inference(model, way)

        def draw_keyed() -> None:
            with self._computing(way) as forward, forward:
                sample_images(ready, range(self.batch), 0.7)

        return draw_keyed


WORK: dict[str, Callable[[Workload, Family[Any], Way], Action]] = {
    "train": Workload.training,
    "evaluate": Workload.evaluation,
    "sample": Workload.sampling,
}


def _computed(model: Family[Any], way: Way) -> Family[Any]:
    """The model, or plainly what stands for it."""
    return as_published(model) if way.plain else model


def _inference(model: Family[Any], way: Way) -> Family[Any]:
    ready = model.for_inference()
    if way.compiled:
        compile_each(ready.parts())
    return ready
