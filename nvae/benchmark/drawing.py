"""Drawing a map of codes position by position: with what earlier positions left, beside a whole pass for each code."""

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..models.vqvae.pixelsnail import MapShape, PixelSNAIL, PixelSNAILConfig
from .timing import Times, in_turns

DRAWN, PASSES = "a map drawn", "passes over it"
AT_ONCE = 8
"""Passes that are timed together."""
SMALL = PixelSNAILConfig(channels=64, inner_channels=64, kernel=5, blocks=2, depth=2, dropout=0)
"""Two blocks of two gated layers and attention."""
CODES = 512


@dataclass(frozen=True)
class Drawing:
    """How long a batch of maps takes, and `AT_ONCE` passes over it."""

    side: int
    batch: int
    parameters: int
    times: Times

    @property
    def faster(self) -> list[float]:
        """How many times as long one pass for each code would take, round by round."""
        passes = self.side**2 / AT_ONCE
        return [passes * ratio for ratio in self.times.ratios(PASSES, DRAWN)]

    def summary(self) -> dict[str, float]:
        """Milliseconds of a map and of a pass, with spread, and how many times faster: median, smallest, largest."""
        return {
            "parameters": self.parameters,
            "milliseconds": 1e3 * self.times.median(DRAWN),
            "spread": 1e3 * self.times.spread(DRAWN),
            "pass_milliseconds": 1e3 * self.times.median(PASSES) / AT_ONCE,
            "pass_spread": 1e3 * self.times.spread(PASSES) / AT_ONCE,
            "faster": median(self.faster),
            "faster_least": min(self.faster),
            "faster_most": max(self.faster),
        }


def drawing(side: int, batch: int, rounds: int, device: torch.device) -> Drawing:
    """Draws `batch` maps of side × side codes, and passes over them, in turns."""
    torch.manual_seed(0)
    prior = PixelSNAIL(MapShape(CODES, side, side), SMALL).to(device).eval()
    noise = torch.randn(batch, 1, side, side, device=device)
    codes = torch.zeros(batch, side, side, dtype=torch.int64, device=device)

    @torch.no_grad()
    def passes() -> list[Tensor]:
        return [prior(codes) for _ in range(AT_ONCE)]

    times = in_turns({DRAWN: lambda: prior.draw(noise), PASSES: passes}, rounds, device, warmup=1)
    return Drawing(side, batch, sum(p.numel() for p in prior.parameters()), times)
