"""Signals that ask a run to save and leave."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
"""Windows has no SIGUSR1."""


class Interruption:
    """Within, SIGTERM, SIGINT and SIGUSR1 are remembered instead of ending the process; repeated ones change nothing.

    Schedulers and torchrun send the same signal more than once, so a second one must not cut a save short.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def ignore_signals() -> None:
    """For a process that is about to leave anyway."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
