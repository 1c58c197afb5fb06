"""Where a run is watched from: TensorBoard, in every run's folder, and Weights & Biases, where it is asked for."""

import importlib
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from ..core.errors import UserError
from ..core.files import atomic_file

Wandb = Literal["none", "offline", "online"]


class Board(Protocol):
    """What shows a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step."""

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """A picture (C, H, W) in [0, 1]."""

    def text(self, name: str, text: str) -> None:
        """A piece of text, such as the config."""

    def hyperparameters(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run's config, by dotted names, beside its result."""

    def rewind(self, step: int) -> None:
        """The run went back to a step; later ones will come again."""

    def flush(self) -> None:
        """Hands everything to the operating system."""

    def close(self, failed: bool) -> None:
        """Writes out everything."""


class TensorBoard:
    """tensorboard/ in a run's folder, from after a step on; what it had of later ones is forgotten."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder / "tensorboard"
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        self.writer.add_image(name, image, step)

    def text(self, name: str, text: str) -> None:
        self.writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))

    def hyperparameters(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """For the comparison of runs."""
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
        self.writer.add_hparams(plain, dict(results), run_name=".")

    def rewind(self, step: int) -> None:
        self.writer.close()
        self._open(step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """The run of Weights & Biases whose id is in wandb/ of a run's folder: a run that goes on goes on there.

    Its own counter of steps only grows, so charts are drawn over `step`, which may go back. Account and project are
    those of its environment (WANDB_ENTITY, WANDB_PROJECT); the project is `nvae` where none is named.
    """

    def __init__(self, folder: Path, mode: Wandb, config: Mapping[str, Any]) -> None:
        """`config`: the run's, by dotted names. Raises UserError where the service refuses."""
        wandb = wandb_module(mode)
        (folder / "wandb").mkdir(exist_ok=True)  # it would write elsewhere
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "nvae"),
                name=folder.name,
                id=_id_of(folder / "wandb" / "id"),
                resume="allow",
                dir=str(folder),
                mode=mode,
                settings=wandb.Settings(console="off", quiet=True),
            )
        except wandb.Error as error:
            raise UserError(f"train.wandb: {mode}: {' '.join(str(error).split())}") from error
        self.run.config.update(dict(config), allow_val_change=True)
        self.run.define_metric("*", step_metric="step")
        self._image = wandb.Image

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **{name: value for name, value in values.items() if math.isfinite(value)}})

    def picture(self, step: int, name: str, image: Tensor) -> None:
        pixels = (255 * image.detach().cpu().clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
        self.run.log({"step": step, name: self._image(pixels)})

    def text(self, name: str, text: str) -> None:
        """It has the config from the start."""

    def hyperparameters(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        self.run.summary.update(dict(results))

    def rewind(self, step: int) -> None:
        """Charts over `step` go back by themselves."""

    def flush(self) -> None:
        """It writes by itself."""

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def wandb_module(mode: Wandb) -> Any:
    """The package wandb. Raises UserError where it is not installed, or not logged in where it must be."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"train.wandb: {mode} needs the package wandb ({error}): pip install wandb, which is what the extra "
            '"nvae[wandb]" adds, or leave the field out'
        ) from error
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError("train.wandb: online needs an account: run `wandb login` first, or take offline")
    return wandb


def _id_of(file: Path) -> str:
    """The id that a file holds, or a new one, which it then holds."""
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    made = uuid.uuid4().hex[:16]
    with atomic_file(file) as handle:
        handle.write(f"{made}\n".encode())
    return made
