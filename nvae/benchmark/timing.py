"""Times of several ways to do the same, taken in turns so that a noisy machine is noisy for all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

Action = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of each way, round by round: entry i of every list was taken in round i."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Of the way `name`, in seconds."""
        return median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Half of what lies between the quartiles, in seconds."""
        ordered = sorted(self.seconds[name])
        return (ordered[(3 * len(ordered) - 1) // 4] - ordered[len(ordered) // 4]) / 2

    def ratios(self, of: str, to: str) -> list[float]:
        """How many times as long as `to` the way `of` takes, round by round."""
        return [a / b for a, b in zip(self.seconds[of], self.seconds[to], strict=True)]

    def summary(self, name: str, yardstick: str) -> dict[str, float]:
        """Milliseconds with spread, and how many times faster than the yardstick: median, smallest, largest."""
        ratios = self.ratios(yardstick, name)
        return {
            "milliseconds": 1e3 * self.median(name),
            "spread": 1e3 * self.spread(name),
            "faster": median(ratios),
            "faster_least": min(ratios),
            "faster_most": max(ratios),
        }


def in_turns(actions: Mapping[str, Action], rounds: int, device: torch.device, warmup: int = 2) -> Times:
    """Runs each action `warmup` times, then all of them in turns, `rounds` times."""
    for action in actions.values():
        for _ in range(warmup):
            action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(_seconds(action, device))
    return Times(seconds)


def _seconds(action: Action, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Waits for what the device still works on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
