"""A run's folder: its lock, its config, its checkpoints and how it ended.

runs/<name>/: config.yaml, outcome.json, metrics.jsonl, tensorboard/, checkpoints/{step-*.pt, latest, best.pt},
samples/, results.json, profile/. All ranks must see it: several machines need a file system that they share.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ..checkpoints.format import is_ours, read_safely, save_checkpoint
from ..core.distributed import barrier, from_rank_zero, rank
from ..core.errors import UserError
from ..core.files import atomic_file, lock


def inside(runs: Path, name: str) -> Path:
    """The folder of a run. Raises UserError for a name that is none, or leads out of the folder of all runs."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise UserError(f"name: '{name}' is no name of a folder inside {runs}/")
    return runs / name


class RunFolder:
    """Files of one run. Every rank reads; only rank 0 writes, except that any may say why it failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.begun = False
        """True once a command to train here was accepted."""
        self._damaged: list[Path] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, the folder is this run's alone. Raises UserError, on every rank, while another run trains in it.

        The system gives the lock back whatever becomes of the process.
        """
        with lock(self.path / ".lock", wait=False) if rank() == 0 else nullcontext() as taken:
            if not from_rank_zero(taken):
                raise UserError(f"{self.path}: another process trains in this folder; choose another name=")
            if rank() == 0 and not self._is_a_run():
                (self.path / "outcome.json").unlink(missing_ok=True)  # of a command that was refused
            yield

    def begin(self, config: str) -> None:
        """A command to train here is accepted: from now on the folder changes. `config`: the run's, as YAML."""
        self.begun = True
        if rank() == 0:
            self._clear_temporary_files()
            self._set_damaged_aside()
            self.write("config.yaml", config)
            self.record_outcome("running")
        barrier()

    def _clear_temporary_files(self) -> None:
        """What a killed process was writing."""
        for folder in (self.path, self.checkpoints):
            for leftover in folder.glob(".*.*"):
                if leftover.suffix != ".lock":  # another command may hold it
                    leftover.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """A text file, whole or not at all."""
        if rank() == 0:
            with atomic_file(self.path / name) as file:
                file.write(text.encode())

    # ------------------------------------------------------------------------------------------------------ outcome

    def record_outcome(self, outcome: str) -> None:
        """outcome.json: `running`, `finished` or `interrupted`, and the step of the newest checkpoint."""
        self.write("outcome.json", self._outcome(outcome, ""))

    def record_failure(self, message: str) -> None:
        """outcome.json: `failed`, and why. The first rank to fail has its say; the others fail because of it.

        A command that is refused changes nothing of a run that an earlier one began.
        """
        if self._is_a_run() and not self.begun:
            return
        try:
            if json.loads((self.path / "outcome.json").read_bytes())["outcome"] == "failed":
                return
        except (OSError, ValueError, KeyError):
            pass
        with suppress(OSError), atomic_file(self.path / "outcome.json") as file:  # a full disk may be what failed
            file.write(self._outcome("failed", f"rank {rank()}: {message}").encode())

    def _is_a_run(self) -> bool:
        """True once any command to train here was accepted."""
        return (self.path / "config.yaml").exists()

    def _outcome(self, outcome: str, message: str) -> str:
        steps = [step_of(file) for file in self._files()]
        return json.dumps({"outcome": outcome, "step": max(steps, default=0), "message": message}, indent=1) + "\n"

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self, step: int, content: dict[str, Any], *, keep: int, milestone_every: int | None) -> None:
        """Writes checkpoints/step-<step>.pt, points `latest` to it, drops all but the newest `keep` and milestones."""
        if rank() != 0:
            return
        file = self.checkpoints / f"step-{step:09d}.pt"
        save_checkpoint(file, content)
        self._point_latest_to(file)
        for old in self._files()[:-keep]:
            if not is_milestone(step_of(old), milestone_every):
                old.unlink()

    def save_best(self, content: dict[str, Any]) -> None:
        """Writes checkpoints/best.pt."""
        if rank() == 0:
            save_checkpoint(self.checkpoints / "best.pt", content)

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, the same on every rank; None where there is none yet.

        There is a line for each that can't be read; once the run has begun they are renamed to *.damaged. Raises
        UserError when none is left.
        """
        content, name = self._newest_of_rank_zero() if rank() == 0 else (None, None)
        name = from_rank_zero(name)
        return read_safely(self.checkpoints / name) if name is not None and rank() != 0 else content

    def _newest_of_rank_zero(self) -> tuple[dict[str, Any] | None, str | None]:
        self._damaged = []
        for file in reversed(self._files()):
            try:
                content = read_safely(file)
                if not is_ours(content):
                    raise UserError(f"{file}: not a checkpoint of this package")
            except UserError as error:
                print(error, file=sys.stderr)
                self._damaged.append(file)
                continue
            if self._damaged:
                print(f"{file.parent}: going on from {file.name}, the newest that can be read", file=sys.stderr)
            if self.begun:
                self._set_damaged_aside()
            return content, file.name
        if self._damaged:
            raise UserError(f"{self.checkpoints}: none of them can be read; restore one, or choose another name=")
        return None, None

    def _set_damaged_aside(self) -> None:
        """So that they never outlive good ones."""
        for file in self._damaged:
            file.rename(file.with_name(f"{file.name}.damaged"))
        self._damaged = []
        if files := self._files():
            self._point_latest_to(files[-1])

    def _point_latest_to(self, file: Path) -> None:
        """A symbolic link, replaced as a whole; for people only, so that a file system without links does without."""
        temporary = self.checkpoints / ".latest.new"
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(file.name)
            temporary.replace(self.checkpoints / "latest")

    def _files(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*.pt"))


def is_milestone(step: int, every: int | None) -> bool:
    """True for checkpoints that are kept for ever."""
    return every is not None and step > 0 and step % every == 0


def step_of(file: Path) -> int:
    """The step of a checkpoint file step-<step>.pt."""
    return int(file.stem.removeprefix("step-"))
