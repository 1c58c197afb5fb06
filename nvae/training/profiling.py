"""Some updates of a run, recorded by torch.profiler: what each operator and kernel took, and when."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ..core.distributed import rank

SKIPPED = 3
"""Updates of a process that are not recorded: they compile, choose algorithms and warm the profiler up."""
ROWS = 40


class Recorder:
    """Within, records `updates` updates after the first `SKIPPED`, on rank 0.

    profile/step-….json in the run's folder is a trace for Chrome or Perfetto, step-….txt what took longest, both named
    for the first update that was recorded. A run that ends before leaves what there is.
    """

    def __init__(self, folder: Path, updates: int, device: torch.device) -> None:
        """0 updates: nothing is recorded."""
        self.folder, self.updates, self.device = folder / "profile", updates, device
        self._profiler: Any = None
        self._left = 0

    def __enter__(self) -> Self:
        if self.updates and rank() == 0:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=SKIPPED - 1, warmup=1, active=self.updates, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
            )
            self._left = SKIPPED + self.updates
            self._profiler.__enter__()
        return self

    def advance(self, step: int) -> None:
        """An update was made, the `step`-th of the run."""
        if self._profiler is None:
            return
        self._left -= 1
        if self._left == self.updates:
            self._first = step + 1
        self._profiler.step()
        if self._left == 0:
            self._close(None, None, None)

    def _write(self, profiler: profile) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"step-{self._first:09d}.json"
        profiler.export_chrome_trace(str(file))
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        file.with_suffix(".txt").write_text(table, encoding="utf-8")

    def _close(self, *error: Any) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.__exit__(*error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(kind, error, trace)
