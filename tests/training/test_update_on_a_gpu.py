"""A whole update of every family as a GPU would see it, traced where there is none: the host never waits for it but
where it asks whether all numbers are finite."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_gpu import let_it_train
from fake_update import traced_update
from tiny_run import EVERY_BRICK, TINY, VERY_DEEP, tiny_run
from tiny_vqvae import first_config, prior_config

from nvae.core.config import apply_overrides
from nvae.core.precision import Precision
from nvae.training.config import AnyRunConfig, run_config

JUDGING = "_local_scalar_dense at training/trainer.py:_judge"
"""The one read of an update: three numbers, by which all ranks decide together whether it is made."""
ADAMW = {"name": "adamw", "lr": 1e-2, "warmup_steps": 2, "eps": 1e-8}
LADDER = {**VERY_DEEP, "input_mean": 120.0, "input_std": 60.0}
MIXTURE = ("model.likelihood={kind: logistic_mixture, components: 2}", "data.binarize=false")
RUNS: dict[str, Callable[[], AnyRunConfig]] = {
    "nvae": lambda: tiny_run(*EVERY_BRICK, *MIXTURE),
    "nvae_of_classes": lambda: tiny_run("model.classes=10", "optim.name=adamw"),
    "vdvae": lambda: run_config({**TINY, "model": LADDER, "optim": ADAMW}, "tiny"),
    "vqvae": first_config,
    "vqvae_prior": lambda: prior_config(Path("unread"), "model.classes=10"),
}


@pytest.fixture(scope="module", autouse=True)
def trainable(tmp_path_factory: pytest.TempPathFactory) -> None:
    let_it_train(tmp_path_factory.mktemp("library"))


def config_of(name: str, *overrides: str) -> AnyRunConfig:
    config = RUNS[name]()
    if config.model.foundation is not None:
        config = config.model_copy(update={"model": config.model.built_on(first_config().model)})
    settings = apply_overrides(config.model_dump(mode="json"), ["optim.clip_norm=1", "optim.ema=0.9", *overrides])
    return run_config(settings, "tiny")


@pytest.mark.parametrize(
    "precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow), pytest.param("fp32", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", RUNS)
def test_the_host_waits_once(name: str, precision: Precision) -> None:
    trace = traced_update(config_of(name), precision)
    assert trace.launches
    assert set(trace.waits) == {JUDGING}
    assert not trace.mixed


@pytest.mark.parametrize(
    "name", ["nvae", *(pytest.param(name, marks=pytest.mark.slow) for name in RUNS if name != "nvae")]
)
def test_it_waits_once_as_one_of_eight_ranks_for_two_batches_and_cells_computed_again(name: str) -> None:
    trace = traced_update(config_of(name, "train.recompute=cells"), "bf16", world=8, accumulation=2)
    assert trace.launches["allreduce_"]
    assert set(trace.waits) == {JUDGING}
    assert not trace.mixed
