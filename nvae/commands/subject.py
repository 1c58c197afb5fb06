"""What evaluate.py and sample.py work on: a trained model, the data it is for, and where results go."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..bricks.likelihoods import MixtureEdge
from ..checkpoints.loading import Held, Weights, checkpoint_file, load_checkpoint
from ..core.distributed import from_rank_zero
from ..core.errors import UserError
from ..core.precision import Precision, allow_tf32, autocast, precision_on
from ..data.config import DataConfig
from ..data.images import fingerprint as images_fingerprint
from ..data.sets import open_unread
from ..data.splits import Split
from ..evaluation.results import fingerprint
from ..models.base import Family
from ..training.config import AnyRunConfig, load_run, read_run_config, run_config


@dataclass(frozen=True)
class Subject:
    """A model in eval mode on its device, and what belongs to it."""

    model: Family[Any]
    config: AnyRunConfig | None
    """Of the run; None for a bare checkpoint."""
    checkpoint: Path
    folder: Path
    """The run's, or one beside a bare checkpoint."""
    weights: Held
    device: torch.device
    precision: Precision = "fp32"

    @property
    def data(self) -> DataConfig:
        """Raises UserError where a bare checkpoint came without a config."""
        if self.config is None:
            raise UserError(f"{self.checkpoint}: says nothing of its data; name a recipe with --config configs/….yaml")
        data: DataConfig = self.config.data
        return data

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, as loaded."""
        return fingerprint(self.model)

    def content(self, split: Split, limit: int | None = None) -> str:
        """Fingerprint of the images of a split, or of the first `limit`, as the first rank finds them."""
        images = open_unread(self.data, split)
        return str(from_rank_zero(images_fingerprint(images, min(len(images), limit or len(images)))))

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model computes in its precision."""
        return autocast(self.device, self.precision)


def open_subject(
    path: Path,
    *,
    config: Path | None = None,
    data: Path | None = None,
    weights: Weights = "ema",
    mixture_edge: MixtureEdge | None = None,
    device: torch.device,
    precision: Precision = "fp32",
) -> Subject:
    """A run folder, a checkpoint of one, or any other checkpoint (`config`, a recipe, then says what data it is for).

    `data` takes the place of the config's `data.path`.

    Raises UserError for what cannot be loaded, for a recipe whose data is not what the model takes, and for a precision
    that the device lacks.
    """
    precision = precision_on(device, precision, "--precision")
    allow_tf32(precision)
    checkpoint = checkpoint_file(path)
    run_folder = checkpoint.parent.parent
    in_a_run = (run_folder / "config.yaml").is_file() and checkpoint.parent.name == "checkpoints"
    recipe = None
    if config is not None:
        recipe = read_run_config(config, [])
    elif in_a_run:
        recipe = load_run(run_folder)
    model, held = load_checkpoint(checkpoint, recipe.model if recipe else None, mixture_edge, weights)
    if recipe is not None:
        plain = {**recipe.model_dump(mode="json"), "model": model.config.model_dump(mode="json")}
        if data is not None:
            plain["data"]["path"] = str(data)
        recipe = run_config(plain, f"{checkpoint} with the data of {config or run_folder / 'config.yaml'}")
    return Subject(
        model=model.to(device),
        config=recipe,
        checkpoint=checkpoint,
        folder=run_folder if in_a_run else checkpoint.with_suffix(""),
        weights=held,
        device=device,
        precision=precision,
    )
