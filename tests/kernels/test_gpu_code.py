"""The code that PyTorch's compiler makes for GPUs, counted without one: kernels of each pass over memory, and of an
update with `train.compile`."""

from typing import Any

import fake_gpu
import pytest
from fake_gpu import Trace, let_it_train
from fake_update import compiled_update, traced_update
from gpu_code import Launched, gpu_code
from places import ROOT

pytest.importorskip("triton")

import torch

from nvae.kernels.fusion import ON_GPUS
from nvae.training.config import AnyRunConfig, read_run_config

SHALLOW = "model.groups=6"
"""Of CIFAR-10's 30 groups."""


@pytest.fixture(scope="module", autouse=True)
def trainable(tmp_path_factory: pytest.TempPathFactory) -> None:
    let_it_train(tmp_path_factory.mktemp("library"))


def cifar10(*overrides: str) -> AnyRunConfig:
    return read_run_config(ROOT / "configs" / "cifar10.yaml", list(overrides))


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.full)])
def test_no_pass_is_more_kernels_than_it_is_counted_for(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass of an update, as made for its first call, that of the largest images."""
    made: dict[str, int] = {}
    run = Trace._passed

    def compiled_once(trace: Trace, function: Any, args: tuple[Any, ...]) -> Any:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        if not (trace._silent or name in made):
            launched.trace = trace
            before = launched.kernels.total()
            torch.compile(function, fullgraph=True, dynamic=False, options=ON_GPUS)(*args)
            made[name] = launched.kernels.total() - before
        return run(trace, function, args)

    monkeypatch.setattr(Trace, "_passed", compiled_once)
    with gpu_code(monkeypatch) as launched:
        traced_update(cifar10(SHALLOW), "fp16", world=world)
    assert len(made) > 15
    assert {name: kernels for name, kernels in made.items() if kernels > fake_gpu.PASSES.get(name, 1)} == {}


@pytest.mark.slow
def test_a_compiled_update_stays_within_its_budget() -> None:
    trace, launched = compiled_update(cifar10(SHALLOW), "fp16")
    assert total(trace, launched) <= 3_000, (launched.kernels.most_common(20), trace.launches.most_common(20))


@pytest.mark.full
def test_a_compiled_update_of_the_recipe_stays_within_its_budget() -> None:
    assert total(*compiled_update(cifar10(), "fp16")) <= 10_400


def total(trace: Trace, launched: Launched) -> int:
    return trace.launches.total() + launched.kernels.total()
