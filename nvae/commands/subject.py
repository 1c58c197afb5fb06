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
from ..data.elsewhere import holds_training_images, images_at
from ..data.images import fingerprint as images_fingerprint
from ..data.sets import in_effect, known_as, open_unread, own_splits
from ..data.splits import Split
from ..evaluation.results import fingerprint
from ..models.base import Family
from ..training.content import content_in
from ..training.run import AnyRunConfig, load_run, read_run_config, run_config


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
    trained_on: bool = False
    """True where other images than the config's are measured, and training images of the run are among them."""

    @property
    def data(self) -> DataConfig:
        """Raises UserError where a bare checkpoint came without a config."""
        if self.config is None:
            raise UserError(f"{self.checkpoint}: says nothing of its data; name a recipe with --config configs/….yaml")
        data: DataConfig = self.config.data
        return data

    def images_name(self, split: Split) -> str:
        """What the images of a split are called beside figures: the set's name only where they are the set."""
        return str(from_rank_zero(known_as(self.data, split)))

    @property
    def images_path(self) -> str | None:
        """Where the images lie; None for those that lie nowhere."""
        return None if self.data.path is None and not self.data.source.exists() else str(self.data.source)

    @property
    def reference_split(self) -> Split:
        """The images that samples are held against: training images, or all where none are for training."""
        return "train" if "train" in own_splits(self.data) else "test"

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

    `data` is where other images are, or the same; what they are, they say themselves (`images_at`).

    Raises UserError for what cannot be loaded, for a recipe whose data is not what the model takes, and for a precision
    that the device lacks.
    """
    precision = precision_on(device, precision, "--precision")
    allow_tf32(precision)
    checkpoint = checkpoint_file(path)
    run_folder = checkpoint.parent.parent
    in_a_run = (run_folder / "config.yaml").is_file() and checkpoint.parent.name == "checkpoints"
    recipe, trained_on = None, False
    if config is not None:
        recipe = read_run_config(config, [])
    elif in_a_run:
        recipe = load_run(run_folder)
    model, held = load_checkpoint(checkpoint, recipe.model if recipe else None, mixture_edge, weights)
    if recipe is not None:
        plain = {**recipe.model_dump(mode="json"), "model": model.config.model_dump(mode="json")}
        recipe = run_config(plain, f"{checkpoint} with the data of {config or run_folder / 'config.yaml'}")
        images = recipe.data if config is not None else in_effect(recipe.data)
        if data is not None:
            images = images_at(data, recipe.data)
            begun_on = content_in(run_folder).get("train") if in_a_run else None
            trained_on = begun_on is not None and holds_training_images(
                images, begun_on.fingerprint, recipe.data.holdout
            )
        recipe = recipe.model_copy(update={"data": images})
    elif data is not None:
        raise UserError(f"--data: {checkpoint} says nothing of its data; name a recipe with --config configs/….yaml")
    return Subject(
        model=model.to(device),
        config=recipe,
        checkpoint=checkpoint,
        folder=run_folder if in_a_run else checkpoint.with_suffix(""),
        weights=held,
        device=device,
        precision=precision,
        trained_on=trained_on,
    )
