"""A run's folder: its lock, its config, its checkpoints and how it ended.

runs/<name>/: config.yaml, outcome.json, metrics.jsonl, tensorboard/, checkpoints/{step-*.pt, latest, best.pt},
samples/, results.json.
"""

import fcntl
import json
from pathlib import Path
from typing import IO, Any

from .checkpoint import atomic_file, is_ours, read_safely, save_checkpoint
from .config import UserError
from .distributed import rank


class RunFolder:
    """Files of one run. Every rank reads; only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock: IO[str] | None = None

    def lock(self) -> None:
        """Makes the folder this process's until it ends. Raises UserError while another process trains in it."""
        if rank() != 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{self.path}: another process is training in this folder; choose another name=") from error
        for leftover in self.checkpoints.glob(".*"):
            leftover.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, name: str, text: str) -> None:
        """A text file, whole or not at all."""
        if rank() == 0:
            with atomic_file(self.path / name) as file:
                file.write(text.encode())

    def record_outcome(self, state: str, step: int, message: str = "") -> None:
        """outcome.json: `running`, `finished`, `interrupted` or `failed`, at which step, and why."""
        self.write("outcome.json", json.dumps({"state": state, "step": step, "message": message}, indent=1) + "\n")

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self, step: int, content: dict[str, Any], *, keep: int, milestone_every: int | None) -> None:
        """Writes checkpoints/step-<step>.pt, points `latest` to it, drops all but the newest `keep` and milestones."""
        if rank() != 0:
            return
        file = self.checkpoints / f"step-{step:09d}.pt"
        save_checkpoint(file, content)
        self.write("checkpoints/latest", file.name + "\n")
        for old in self._steps()[:-keep]:
            if milestone_every is None or int(old.stem.removeprefix("step-")) % milestone_every:
                old.unlink()

    def save_best(self, content: dict[str, Any]) -> None:
        """Writes checkpoints/best.pt."""
        if rank() == 0:
            save_checkpoint(self.checkpoints / "best.pt", content)

    def newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest checkpoint that can be read (None where there is none), and a line for each that can't."""
        problems = []
        for file in reversed(self._steps()):
            try:
                content = read_safely(file)
            except UserError as error:
                problems.append(str(error))
                continue
            if is_ours(content):
                return content, problems
        return None, problems

    def _steps(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*.pt"))
