"""Watching a run: progress bar, TensorBoard, JSON lines. Only rank 0 writes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from .distributed import rank


class Tracker:
    """Writes numbers, pictures and text of a run to its folder; a resumed run continues where its checkpoint was."""

    def __init__(self, folder: Path, total_steps: int, first_step: int, quiet: bool = False) -> None:
        self.active = rank() == 0
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        _drop_lines_after(self.path, first_step)
        self.lines = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=quiet, dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self.active:
            self.bar.update(step - self.bar.n)

    def scalars(self, step: int, values: Mapping[str, float], *, shown: Sequence[str] = ()) -> None:
        """One line of numbers at a step; `shown` ones stand beside the progress bar."""
        if not self.active:
            return
        self.lines.write(json.dumps({"step": step, **values}) + "\n")
        self.lines.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if shown:
            self.bar.set_postfix({name: f"{values[name]:.4g}" for name in shown if name in values}, refresh=False)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """A picture (C, H, W) in [0, 1]."""
        if self.active:
            self.board.add_image(name, image, step)

    def text(self, name: str, text: str) -> None:
        """A piece of text, such as the config."""
        if self.active:
            self.board.add_text(name, f"```\n{text}\n```")

    def hyperparameters(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run's config beside its result, for TensorBoard's comparison of runs."""
        if self.active:
            plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
            self.board.add_hparams(plain, dict(results), run_name=".")

    def note(self, message: str) -> None:
        """A line for the person watching, above the progress bar."""
        if self.active:
            self.bar.write(message)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.bar.close()
            self.lines.close()
            self.board.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """Forgets what was logged past the checkpoint a run continues from, and a line cut short by a kill."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
    path.write_text("".join(kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
