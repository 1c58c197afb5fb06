"""The code that PyTorch's compiler makes for GPUs, counted without one: kernels of each pass over memory, and of an
update with `train.compile`."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from fake_gpu import PASSES, let_it_train
from gpu_counts import alone, kernels_of_passes, launches_compiled

SHALLOW = "model.groups=6"
"""Of CIFAR-10's 30 groups."""


@pytest.fixture(autouse=True)
def trainable(tmp_path: Path) -> None:
    let_it_train(tmp_path)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.full)])
def test_no_pass_is_more_kernels_than_it_is_counted_for(world: int, tmp_path: Path) -> None:
    made = alone(kernels_of_passes, tmp_path, world, SHALLOW)
    assert len(made) > 15
    assert {name: kernels for name, kernels in made.items() if kernels > PASSES.get(name, 1)} == {}


@pytest.mark.slow
def test_a_compiled_update_stays_within_its_budget(tmp_path: Path) -> None:
    assert alone(launches_compiled, tmp_path, SHALLOW) <= 3_000


@pytest.mark.full
def test_a_compiled_update_of_the_recipe_stays_within_its_budget(tmp_path: Path) -> None:
    assert alone(launches_compiled, tmp_path) <= 10_400
