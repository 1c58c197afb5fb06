"""Fused passes: compiled where it pays, and never in the way of who watches operators."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._dynamo import config
from torch.utils.flop_counter import FlopCounterMode

from nvae.kernels import fusion
from nvae.kernels.dynamo import RECOMPILE_LIMIT
from nvae.kernels.fusion import WORTH_COMPILING, fused


def test_a_fused_function_runs_under_a_flop_counter() -> None:
    @fused(dynamic=True)
    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    side = math.isqrt(WORTH_COMPILING)
    x = torch.ones(side, side)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(product(x), x @ x)
    assert counter.get_total_flops() == 2 * 2 * side**3


@pytest.mark.parametrize(("devices", "kernels"), [(("cpu",), 1), ((), 2)], ids=["cpu", "elsewhere"])
def test_one_kernel_serves_all_sizes_on_a_cpu_alone(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], kernels: int
) -> None:
    monkeypatch.setattr(fusion, "ANY_SIZE", devices)
    made: list[object] = []

    def noted(graph: torch.fx.GraphModule, inputs: object, **options: object) -> Callable[..., object]:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=noted))
    torch._dynamo.reset()

    @fused(dynamic=True, least=0)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    monkeypatch.setattr(fusion, "verdict", lambda *_: fusion.SOUND)  # nothing is compared, which would count as well
    with torch.no_grad():
        for size in (16, 32):
            x = torch.randn(1, 1, 4, size)
            assert torch.equal(doubled(x), 2 * x)
    assert len(made) == kernels
    torch._dynamo.reset()


def test_a_view_is_a_kind_of_call_of_its_own() -> None:
    """The compiler makes other code for it: that must not count as a recompilation of the same kind."""

    @fused(dynamic=True, least=0)
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    view = torch.randn(1, 4, 4, 8).permute(0, 3, 1, 2)
    alone = view.clone(memory_format=torch.preserve_format)
    assert view.stride() == alone.stride()
    torch._dynamo.reset()
    with config.patch({RECOMPILE_LIMIT: 1}), torch.no_grad():
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
        with config.patch({RECOMPILE_LIMIT: 1}):
            for x in inputs:
                assert torch.equal(doubled(x), 2 * x)
    torch._dynamo.reset()
