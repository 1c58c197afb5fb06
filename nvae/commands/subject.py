"""What evaluate.py and sample.py work on: a trained model, the data it is for, and where results go."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..bricks.likelihoods import MixtureEdge
from ..checkpoints.loading import Weights, load_checkpoint
from ..checkpoints.model_folder import WEIGHTS, Held
from ..checkpoints.pretrained import ships
from ..core.distributed import from_rank_zero
from ..core.errors import UserError
from ..core.precision import Precision, allow_tf32, autocast, precision_on
from ..data.config import DataConfig
from ..data.elsewhere import holds_training_images, images_at
from ..data.images import fingerprint as images_fingerprint
from ..data.sets import in_effect, known_as, open_unread, own_splits
from ..data.splits import Split
from ..evaluation.results import circumstances, fingerprint
from ..models.base import Family
from ..training.config import AnyRunConfig, read_run_config, run_config
from ..training.content import trained_content


@dataclass(frozen=True)
class Subject:
    """A model in eval mode on its device, and what belongs to it."""

    model: Family[Any]
    config: AnyRunConfig | None
    """Of the run; None for a checkpoint of no run that came without a recipe."""
    checkpoint: Path
    run: Path | None
    """The run's folder; None for a bare checkpoint."""
    folder: Path
    """Where results go."""
    weights: Held
    device: torch.device
    precision: Precision = "fp32"
    trained_on: bool = False
    """True where other images than the config's are measured, and training images of the run are among them."""
    updates: int | None = None
    """That the weights have seen; None where nobody knows."""

    @property
    def data(self) -> DataConfig:
        """Raises UserError where a checkpoint of no run came without a recipe."""
        if self.config is None:
            raise UserError(f"{self.checkpoint}: says nothing of its data; name a recipe with --config configs/….yaml")
        data: DataConfig = self.config.data
        return data

    def images_name(self, split: Split) -> str:
        """What the images of a split are called beside figures: the set's name only where they are the set."""
        return str(from_rank_zero(known_as(self.data, split)))

    @property
    def reference_split(self) -> Split:
        """The images that samples are held against: training images, or all where none are for training."""
        return "train" if "train" in own_splits(self.data) else "test"

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, as loaded."""
        return fingerprint(self.model)

    @property
    def origin(self) -> dict[str, Any]:
        """Where figures come from: what an entry of results.json says without their depending on it."""
        nowhere = self.data.path is None and not self.data.source.exists()
        return {
            "checkpoint": self.checkpoint.name,
            "path": None if nowhere else str(self.data.source),
            "trained_on": self.trained_on,
            **circumstances(self.device),
        }

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
    out: Path | None = None,
    weights: Weights = "ema",
    mixture_edge: MixtureEdge | None = None,
    device: torch.device,
    precision: Precision = "fp32",
    trust_code: bool = False,
) -> Subject:
    """A run folder, a checkpoint of a run, a model folder, or any other checkpoint.

    `config`, a recipe, says what data it is for where the checkpoint does not. `data` is where other images are, or the
    same ones: what they are, they say themselves (`images_at`). Results go to `out`, by default the run's folder, or
    one beside a bare checkpoint or a model folder. `trust_code` lets a model folder name a family of somebody's own.

    Raises UserError for what cannot be loaded, for a recipe whose data is not what the model takes, and for a precision
    that the device lacks.
    """
    precision = precision_on(device, precision, "--precision")
    allow_tf32(precision)
    torch.backends.cudnn.benchmark = True  # shapes do not change
    recipe: AnyRunConfig | None = None if config is None else read_run_config(config, [])
    loaded = load_checkpoint(path, recipe.model if recipe else None, mixture_edge, weights, trust_code)
    model, file, written = loaded.model, loaded.file, loaded.config
    if weights == "raw" and loaded.weights == "ema":
        raise UserError("--weights: raw has no effect, a model folder of averaged weights has no others; leave it out")
    if mixture_edge is not None and model.config.likelihood.kind != "logistic_mixture":
        raise UserError(
            f"--mixture-edge: has no effect, the likelihood is {model.config.likelihood.kind}; leave it out"
        )
    if recipe is not None:
        written = recipe.model_dump(mode="json")
    if written is not None:
        written = {**written, "model": model.config.model_dump(mode="json")}
        recipe = run_config(written, f"{file} with the data of {config}" if config else str(file))
    in_a_run = file.parent.name == "checkpoints" and (file.parent.parent / "config.yaml").is_file()
    run, trained_on = file.parent.parent if in_a_run else None, False
    if recipe is not None and config is None:  # a field without effect is refused before training, but once was not
        recipe = recipe.model_copy(update={"data": in_effect(recipe.data)})
    if data is not None:
        if recipe is None:
            raise UserError(f"--data: {file} does not say how it takes images; name a recipe with --config")
        images = images_at(data, recipe.data)
        trained_on = run is not None and holds_training_images(images, trained_content(run), recipe.data.holdout)
        recipe = recipe.model_copy(update={"data": images})
    return Subject(
        model=model.to(device),
        config=recipe,
        checkpoint=file,
        run=run,
        folder=out or run or beside(file),
        weights=loaded.weights,
        device=device,
        precision=precision,
        trained_on=trained_on,
        updates=loaded.updates,
    )


def beside(file: Path) -> Path:
    """Where results of weights of no run go: `x/` of x.pt, `x-results/` of the model folder x/.

    Those of models that ship with the package go to the working folder.
    """
    if file.name != WEIGHTS:
        return file.with_suffix("")
    folder = file.parent if file.parent.name not in ("", "..") else file.parent.resolve()
    name = f"{folder.name}-results"
    return Path(name) if ships(folder) else folder.with_name(name)
