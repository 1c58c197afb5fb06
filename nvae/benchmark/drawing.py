"""Drawing a map of codes position by position: with what earlier positions left, beside a whole pass at each."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.vqvae.pixelsnail import MapShape, PixelSNAIL, PixelSNAILConfig, chosen
from .timing import Times, in_turns

KEPT, ANEW = "kept", "whole passes"
SMALL = PixelSNAILConfig(channels=64, inner_channels=64, kernel=5, blocks=2, depth=2, dropout=0)
"""Two blocks of two gated layers and attention."""
CODES = 512


@dataclass(frozen=True)
class Drawing:
    """How long a batch of maps takes either way."""

    side: int
    batch: int
    parameters: int
    times: Times


@torch.no_grad()
def anew(prior: PixelSNAIL, noise: Tensor) -> Tensor:
    """What `PixelSNAIL.draw` gives, (B, h, w), of noise (B, 1, h, w), by a whole pass over the map at each position."""
    uniform = torch.special.ndtr(noise[:, 0].double())
    codes = torch.zeros(uniform.shape, dtype=torch.int64, device=noise.device)
    for row in range(codes.shape[1]):
        for column in range(codes.shape[2]):
            codes[:, row, column] = chosen(prior(codes)[:, :, row, column], 1.0, uniform[:, row, column])
    return codes


def drawing(side: int, batch: int, rounds: int, device: torch.device) -> Drawing:
    """Draws `batch` maps of side × side codes both ways, in turns."""
    torch.manual_seed(0)
    prior = PixelSNAIL(MapShape(CODES, side, side), SMALL).to(device).eval()
    noise = torch.randn(batch, 1, side, side, device=device)
    actions = {KEPT: lambda: prior.draw(noise), ANEW: lambda: anew(prior, noise)}
    times = in_turns(actions, rounds, device, warmup=0)
    return Drawing(side, batch, sum(p.numel() for p in prior.parameters()), times)
