"""An update's gradients as one CUDA graph: the host launches thousands of kernels at once (docs/performance.md)."""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch

from ..bricks.recomputation import Recomputable
from ..core.distributed import world_size
from ..core.errors import UserError
from ..models.base import Family
from .passes import Pass

Result = TypeVar("Result")
WARM_UP = 3
"""Passes before one is recorded: in these libraries choose algorithms, and kernels are compiled."""


class Graph:
    """Work of a GPU that is launched as a whole (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.graph = torch.cuda.CUDAGraph()

    def beside(self, compute: Callable[[], Result]) -> Result:
        """compute(), on the stream that is recorded: where gradients are first summed they are always summed."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = compute()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, compute: Callable[[], Result]) -> Result:
        """The work of compute(), not yet done; its result is where each `replay` writes."""
        # Other threads may ask CUDA for memory meanwhile: those that read images ahead.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return compute()

    def replay(self) -> None:
        """Does the work."""
        self.graph.replay()


class Replayed(Generic[Result]):
    """A computation on passes whose work is recorded once and replayed, after a few times that it is done plainly.

    It must ask for no number of the GPU's and depend on nothing of the host's that changes. All calls take as many
    passes, of the same sizes; a result holds until the next call.
    """

    def __init__(self, compute: Callable[[Iterable[Pass]], Result], *, recording: bool) -> None:
        """Without `recording` it is done plainly every time."""
        self.compute, self.recording = compute, recording
        self.forget()

    def forget(self) -> None:
        """Begins anew: to be called where tensors were set, or modules told, by other ways than passes and updates."""
        self._graph: Graph | None = None
        self._passes: list[Pass] = []
        self._result: Result
        self._warm = 0

    def __call__(self, passes: Iterable[Pass]) -> Result:
        if not self.recording:
            return self.compute(passes)
        if self._graph is None:
            self._graph = Graph()
        if self._warm < WARM_UP:
            self._warm += 1
            return self._graph.beside(lambda: self.compute(passes))
        if not self._passes:
            self._passes = [one.clone() for one in passes]
            self._result = self._graph.record(lambda: self.compute(self._passes))
        else:
            for kept, one in zip(self._passes, passes, strict=True):
                torch._foreach_copy_(kept.tensors, one.tensors)
        self._graph.replay()
        return self._result


def require_replayable(model: Family[Any], device: torch.device, *, profiled: bool) -> None:
    """Raises UserError where the gradients of an update cannot be recorded, for `train.graph`."""
    reason = None
    if device.type != "cuda":
        reason = f"is for a CUDA device, found {device.type}"
    elif world_size() > 1:
        reason = f"is for one process, there are {world_size()}"
    elif profiled:
        reason = "cannot be recorded by train.profile, kernel by kernel; leave one of them out"
    elif type(model).after_update is not Family.after_update:
        reason = f"needs updates that are made of gradients alone; {type(model).__name__} learns otherwise, too"
    elif any(isinstance(part, Recomputable) and part.recompute and part.draws for part in model.modules()):
        reason = "cannot draw again what train.recompute=cells computes again"
    if reason is not None:
        raise UserError(f"train.graph: {reason}")
