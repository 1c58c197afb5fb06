"""Fused passes: compiled where it pays, and never in the way of who watches operators."""

import math

import torch
from torch._dynamo import config as dynamo
from torch.utils.flop_counter import FlopCounterMode

from nvae.kernels.fusion import RECOMPILE_LIMIT, WORTH_COMPILING, fused


def test_a_fused_function_runs_under_a_flop_counter() -> None:
    @fused(dynamic=True)
    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    side = math.isqrt(WORTH_COMPILING)
    x = torch.ones(side, side)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(product(x), x @ x)
    assert counter.get_total_flops() == 2 * 2 * side**3


def test_a_view_is_a_kind_of_call_of_its_own() -> None:
    """The compiler makes other code for it: that must not count as a recompilation of the same kind."""

    @fused(dynamic=True, least=0)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    view = torch.randn(1, 4, 4, 8).permute(0, 3, 1, 2)
    alone = view.clone(memory_format=torch.preserve_format)
    assert view.stride() == alone.stride()
    torch._dynamo.reset()
    with dynamo.patch({RECOMPILE_LIMIT: 1}), torch.no_grad():
        for x in (view, view, alone, alone, view):
            assert torch.equal(doubled(x), 2 * x)
    torch._dynamo.reset()


def test_a_compiler_that_has_forgotten_everything_makes_kernels_anew() -> None:
    """However many kinds of calls there were before."""

    @fused(dynamic=False, least=0)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    inputs = [torch.randn(1, 1, 2, size) for size in range(2, 6)]
    with torch.no_grad():
        for x in inputs:
            doubled(x)
        torch._dynamo.reset()
        with dynamo.patch({RECOMPILE_LIMIT: 1}):
            for x in inputs:
                assert torch.equal(doubled(x), 2 * x)
    torch._dynamo.reset()
