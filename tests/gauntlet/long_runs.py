"""Thousands of updates with logging, validation and saving: memory and open files stay as they are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_run import tiny_run, train_in

from nvae.training.folder import RunFolder

from .cases import Case, Result, Verdict

LATE = 0.2
"""Fraction of a run by which everything has been used once."""
GROWTH_MIB, GROWTH_FILES = 24.0, 2


def run_for(steps: int) -> Callable[[Case], Result]:
    """A run of so many updates, looked at whenever it saves."""

    def run(case: Case) -> Result:
        seen: list[tuple[int, float, int]] = []
        original = RunFolder.save

        def save(self: RunFolder, step: int, *args: Any, **kwargs: Any) -> None:
            original(self, step, *args, **kwargs)
            seen.append((step, _resident_mib(), len(list(Path("/proc/self/fd").iterdir()))))

        RunFolder.save = save  # type: ignore[method-assign]
        often = max(steps // 200, 10)
        options = [f"train.steps={steps}", f"train.save_every={often}", "train.keep=2", "train.log_every=10"]
        options += [f"train.validate_every={often * 32 / 1500}", f"train.pictures_every={often * 64 / 1500}"]
        if train_in(case.folder, tiny_run(*options)) != "finished":
            return Result(Verdict.BROKEN, "it did not finish")
        return _judged(steps, seen)

    return run


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _judged(steps: int, seen: list[tuple[int, float, int]]) -> Result:
    late = [point for point in seen if point[0] >= LATE * steps]
    memory, files = late[-1][1] - late[0][1], late[-1][2] - late[0][2]
    tried = f"{steps} updates: {memory:+.1f} MiB and {files:+d} files from update {late[0][0]} to {late[-1][0]}"
    is_flat = memory <= GROWTH_MIB and files <= GROWTH_FILES
    return Result(Verdict.SURVIVED if is_flat else Verdict.BROKEN, tried)
