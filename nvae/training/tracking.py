"""Watching a run: progress bar, TensorBoard, JSON lines. Only rank 0 writes."""

import datetime
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from torch import Tensor
from tqdm.auto import tqdm

from ..core.distributed import rank
from ..core.files import naming


class Tracker:
    """Within, writes numbers, pictures and text of a run to its folder, from a step on.

    `log_lines` is how many lines of metrics.jsonl belong to what came before: the rest, left by a process that was
    killed after its last checkpoint, is forgotten, so that the file ends as that of a run never interrupted.
    """

    def __init__(self, folder: Path, total_steps: int, step: int = 0, log_lines: int = 0) -> None:
        self.active = rank() == 0
        self.folder, self.total_steps = folder, total_steps
        self.step, self.log_lines = step, log_lines

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.log = _opened_after(self.folder / "metrics.jsonl", self.log_lines)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        # In a log file, where no bar can move, lines take its place.
        unseen = not sys.stderr.isatty()
        self.bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, disable=unseen)
        self._opened = time.monotonic(), step

    def rewind(self, step: int, log_lines: int) -> None:
        """Forgets what was written past a step to which the run returns."""
        self.log_lines = log_lines
        if self.active:
            self.close()
            self._open(step)

    def flush(self) -> None:
        """Hands everything to the operating system."""
        if self.active:
            with naming(self.folder):
                self.board.flush()
                self.log.flush()

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self.active:
            self.bar.update(step - self.bar.n)

    def scalars(self, step: int, values: Mapping[str, float], *, shown: Sequence[str] = ()) -> None:
        """One line of numbers at a step (null where not finite); `shown` ones stand beside the progress bar."""
        self.log_lines += 1
        if not self.active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with naming(self.folder):
            self.log.write(json.dumps({"step": step, **finite}).encode() + b"\n")
            self.log.flush()
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        beside = {name: f"{values[name]:.4g}" for name in shown if name in values}
        if beside and self.bar.disable:
            words = [f"{name} {value}" for name, value in beside.items()]
            print(f"step {step}/{self.total_steps}", *words, f"{self._left(step)} left", sep="  ", flush=True)
        elif beside:
            self.bar.set_postfix(beside, refresh=False)

    def _left(self, step: int) -> datetime.timedelta:
        """Time until the last step at the pace since the files were opened."""
        opened, first = self._opened
        seconds = (time.monotonic() - opened) / max(step - first, 1) * (self.total_steps - step)
        return datetime.timedelta(seconds=round(seconds))

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """A picture (C, H, W) in [0, 1]."""
        if self.active:
            self.board.add_image(name, image, step)

    def text(self, name: str, text: str) -> None:
        """A piece of text, such as the config."""
        if self.active:
            self.board.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))

    def hyperparameters(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run's config beside its result, for TensorBoard's comparison of runs."""
        if self.active:
            plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
            self.board.add_hparams(plain, dict(results), run_name=".")

    def note(self, message: str) -> None:
        """A line for the person watching, above the progress bar."""
        if self.active:
            self.bar.write(message)

    def close(self) -> None:
        """Writes out everything and closes the files."""
        if self.active:
            self.bar.close()
            with naming(self.folder):
                self.log.close()
                self.board.close()

    def __enter__(self) -> Self:
        if self.active:
            self._open(self.step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opened_after(path: Path, lines: int) -> IO[bytes]:
    """The file, made where it is missing, to be written from after its first so many lines on."""
    path.touch()
    file = path.open("r+b")
    file.seek(sum(len(line) for line in islice(file, lines)))
    file.truncate()
    return file
