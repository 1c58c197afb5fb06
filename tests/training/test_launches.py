"""What an update of the recipes costs a GPU, counted without one, at a rank's own batch in fp16 and without
`train.compile`: launches, and memory read and written; and how early gradients are on their way to other ranks."""

from collections import Counter
from functools import cache

import pytest
from fake_gpu import Trace, let_it_train
from fake_update import Readiness, readiness, traced_update
from places import ROOT

from nvae.training.config import read_run_config

GIB = 2**30
SHALLOW = ("model.groups=6",)
"""Of CIFAR-10's 30 groups."""
NORMS = 76
"""Batch norms of these."""
WEIGHTS_IN_STAGES = 250
"""Launches for making weights not all at once, but as the pass gets to them."""


@pytest.fixture(scope="module", autouse=True)
def trainable(tmp_path_factory: pytest.TempPathFactory) -> None:
    let_it_train(tmp_path_factory.mktemp("library"))


@cache
def update(recipe: str, *overrides: str, world: int = 1) -> Trace:
    return traced_update(read_run_config(ROOT / "configs" / f"{recipe}.yaml", list(overrides)), "fp16", world=world)


def of_norms(launches: Counter[str]) -> int:
    """Those of batch norms, of the gates that some end in, and of collectives."""
    return sum(count for name, count in launches.items() if name.startswith(("batch_norm", "gated_sum", "allreduce_")))


@cache
def progress() -> Readiness:
    return readiness(read_run_config(ROOT / "configs" / "cifar10.yaml", list(SHALLOW)), world=8)


@pytest.mark.parametrize(
    ("recipe", "overrides", "launches", "gib"),
    [
        pytest.param("cifar10", SHALLOW, 3_050, 22, id="cifar10 of six groups"),
        pytest.param("cifar10", (), 10_700, 97, marks=pytest.mark.full, id="cifar10"),
        pytest.param("ffhq_256", (), 16_700, 211, marks=pytest.mark.full, id="ffhq_256"),
    ],
)
def test_an_update_stays_within_its_budget(recipe: str, overrides: tuple[str, ...], launches: int, gib: int) -> None:
    trace = update(recipe, *overrides)
    assert trace.launches.total() <= launches, trace.launches.most_common(20)
    assert trace.moved.total() <= gib * GIB, trace.moved.most_common(20)


def test_statistics_over_ranks_cost_a_collective_each_way_and_a_pass_over_channels() -> None:
    """One collective besides balances the KL, and one lets ranks agree."""
    alone, together = (update("cifar10", *SHALLOW, world=world).launches for world in (1, 8))
    assert of_norms(together) - of_norms(alone) == 3 * NORMS + 2
    assert together.total() - alone.total() <= 3 * NORMS + 2 + WEIGHTS_IN_STAGES


@pytest.mark.parametrize(("share", "ready"), [(0.75, 0.54), (0.8, 0.68), (0.9, 0.86), (0.95, 0.95)])
def test_gradients_are_ready_for_other_ranks_during_the_backward_pass(share: float, ready: float) -> None:
    """By the time that an A100 at its peaks takes; the last third of it is the way up, where most weights are."""
    assert progress().after(share) >= ready
