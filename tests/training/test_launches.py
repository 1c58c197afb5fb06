"""What an update of the recipes costs a GPU, counted without one: launches of kernels, and memory read and written, at a
rank's own batch in fp16 and without `train.compile`."""

from collections import Counter
from functools import cache

import pytest
from fake_gpu import Trace, let_it_train
from fake_update import traced_update
from places import ROOT

from nvae.training.config import read_run_config

GIB = 2**30
SHALLOW = ("model.groups=6",)
"""Of CIFAR-10's 30 groups."""
SYNCHRONISED = 160
"""Launches that seven other ranks may add to these: a collective each way for each of the 76 batch norms."""


@pytest.fixture(scope="module", autouse=True)
def trainable(tmp_path_factory: pytest.TempPathFactory) -> None:
    let_it_train(tmp_path_factory.mktemp("library"))


@cache
def update(recipe: str, *overrides: str, world: int = 1) -> Trace:
    return traced_update(read_run_config(ROOT / "configs" / f"{recipe}.yaml", list(overrides)), "fp16", world=world)


def total(counts: Counter[str]) -> int:
    return sum(counts.values())


@pytest.mark.parametrize(
    ("recipe", "overrides", "launches", "gib"),
    [
        pytest.param("cifar10", SHALLOW, 3_600, 25, marks=pytest.mark.slow, id="cifar10 of six groups"),
        pytest.param("cifar10", (), 11_700, 111, marks=pytest.mark.full, id="cifar10"),
        pytest.param("ffhq_256", (), 33_300, 273, marks=pytest.mark.full, id="ffhq_256"),
    ],
)
def test_an_update_stays_within_its_budget(recipe: str, overrides: tuple[str, ...], launches: int, gib: int) -> None:
    trace = update(recipe, *overrides)
    assert total(trace.launches) <= launches, trace.launches.most_common(20)
    assert total(trace.moved) <= gib * GIB, trace.moved.most_common(20)


@pytest.mark.slow
def test_statistics_over_ranks_cost_a_collective_each_way() -> None:
    alone, together = update("cifar10", *SHALLOW), update("cifar10", *SHALLOW, world=8)
    added = together.launches - alone.launches
    assert total(together.launches) - total(alone.launches) <= SYNCHRONISED, added
