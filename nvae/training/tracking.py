"""Watching a run: progress bar, JSON lines, boards. Only rank 0 writes."""

import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from torch import Tensor
from tqdm import tqdm

from ..core.config import flat
from ..core.distributed import rank
from ..core.files import naming
from .boards import Board, TensorBoard, Wandb, WeightsAndBiases, wandb_module


class Tracker:
    """Within, writes numbers, pictures and text of a run to its folder, from a step on.

    `log_lines` is how many lines of metrics.jsonl belong to what came before: the rest, left by a process that was
    killed after its last checkpoint, is forgotten, so that the file ends as that of a run never interrupted.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        step: int = 0,
        log_lines: int = 0,
        *,
        wandb: Wandb = "none",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`config`: the run's, section by section. Raises UserError where `wandb` cannot be had."""
        self.active = rank() == 0
        self.folder, self.total_steps = folder, total_steps
        self.step, self.log_lines = step, log_lines
        self.wandb, self.config = wandb, config or {}
        self.boards: list[Board] = []
        if self.active and wandb != "none":
            wandb_module(wandb)

    def _open(self, step: int) -> None:
        self.log = _opened_after(self.folder / "metrics.jsonl", self.log_lines)
        # In a log file, where no bar can move, lines take its place.
        unseen = not sys.stderr.isatty()
        self.bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, disable=unseen)
        self._advanced = [(time.monotonic(), step)]
        self._paced: tuple[float, int] | None = None

    def rewind(self, step: int, log_lines: int) -> None:
        """Forgets what was written past a step to which the run returns."""
        self.log_lines = log_lines
        if self.active:
            self._close()
            self._open(step)
            for board in self.boards:
                board.rewind(step)

    def flush(self) -> None:
        """Hands everything to the operating system."""
        if self.active:
            with naming(self.folder):
                self.log.flush()
                for board in self.boards:
                    board.flush()

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self.active:
            self.bar.update(step - self.bar.n)
            if self._paced is None:
                self._advanced.append((time.monotonic(), step))

    def scalars(self, step: int, values: Mapping[str, float], *, shown: Sequence[str] = ()) -> None:
        """One line of numbers at a step (null where not finite); `shown` ones stand beside the progress bar."""
        self.log_lines += 1
        if not self.active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with naming(self.folder):
            self.log.write(json.dumps({"step": step, **finite}).encode() + b"\n")
            self.log.flush()
            for board in self.boards:
                board.scalars(step, values)
        beside = {name: f"{values[name]:.4g}" for name in shown if name in values}
        if beside and self.bar.disable:
            words = [f"{name} {value}" for name, value in beside.items()]
            print(f"step {step}/{self.total_steps}", *words, f"{self._left(step)} left", sep="  ", flush=True)
        elif beside:
            self.bar.set_postfix(beside, refresh=False)

    def _left(self, step: int) -> datetime.timedelta:
        """Time until the last step at the pace since the first line, without what the first steps compiled."""
        now = time.monotonic()
        if self._paced is None:
            self._paced = now, step
            pace = _median_pace(self._advanced)
        else:
            since, first = self._paced
            pace = (now - since) / max(step - first, 1)
        return datetime.timedelta(seconds=round(pace * (self.total_steps - step)))

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """A picture (C, H, W) in [0, 1]."""
        for board in self.boards:
            board.picture(step, name, image)

    def text(self, name: str, text: str) -> None:
        """A piece of text, such as the config."""
        for board in self.boards:
            board.text(name, text)

    def hyperparameters(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run's config, by dotted names, beside its result."""
        for board in self.boards:
            board.hyperparameters(values, results)

    def note(self, message: str) -> None:
        """A line for the person watching, above the progress bar."""
        if self.active:
            self.bar.write(message)

    def _close(self) -> None:
        self.bar.close()
        with naming(self.folder):
            self.log.close()

    def __enter__(self) -> Self:
        if self.active:
            self._open(self.step)
            self.boards.append(TensorBoard(self.folder, self.step))
            if self.wandb != "none":
                self.boards.append(WeightsAndBiases(self.folder, self.wandb, flat(self.config)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._close()
            with naming(self.folder):
                for board in self.boards:
                    board.close(failed=kind is not None)


def _opened_after(path: Path, lines: int) -> IO[bytes]:
    """The file, made where it is missing, to be written from after its first so many lines on."""
    path.touch()
    file = path.open("r+b")
    file.seek(sum(len(line) for line in islice(file, lines)))
    file.truncate()
    return file


def _median_pace(advanced: Sequence[tuple[float, int]]) -> float:
    """Seconds a step, of times at which steps were reached: the median, which one that compiles does not move."""
    paces = [(now - then) / (step - before) for (then, before), (now, step) in pairwise(advanced) if step > before]
    return statistics.median(paces) if paces else 0.0
