"""Fused passes: compiled where it pays, and never in the way of who watches operators."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from nvae.fusion import WORTH_COMPILING, fused


def test_a_fused_function_runs_under_a_flop_counter() -> None:
    @fused(dynamic=True)
    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    side = math.isqrt(WORTH_COMPILING)
    x = torch.ones(side, side)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(product(x), x @ x)
    assert counter.get_total_flops() == 2 * 2 * side**3
