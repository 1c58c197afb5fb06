"""Updates whose gradients are recorded once and replayed; on GPUs that are not there, and by a stand-in that records
what the host does and does it again."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import let_it_train
from fake_update import ranks, traced_gradients
from tiny_run import EVERY_BRICK, TINY, VERY_DEEP, checkpoint, differences, log, tiny_run, train_in
from tiny_vqvae import first_config, prior_config
from torch import Tensor

from nvae.core.config import apply_overrides
from nvae.core.errors import UserError
from nvae.models.base import Recomputation
from nvae.models.registry import build
from nvae.training import graph
from nvae.training.config import AnyRunConfig, run_config
from nvae.training.graph import WARM_UP, Replayed, require_replayable
from nvae.training.passes import Pass

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CHANGING = ("model.objective.spectral_start=1", "model.objective.kl_warmup=0.9")
"""Weights of the loss that change with every update."""


def with_graph(config: AnyRunConfig, *overrides: str) -> AnyRunConfig:
    if config.model.foundation is not None:
        config = config.model_copy(update={"model": config.model.built_on(first_config().model)})
    return run_config(apply_overrides(config.model_dump(mode="json"), ["train.graph=true", *overrides]), "tiny")


RUNS: dict[str, Callable[[], AnyRunConfig]] = {
    "nvae": lambda: tiny_run(*EVERY_BRICK, *CHANGING),
    "nvae_of_classes": lambda: tiny_run("model.classes=10", *CHANGING),
    "vdvae": lambda: run_config({**TINY, "model": {**VERY_DEEP, "input_mean": 120.0, "input_std": 60.0}}, "tiny"),
    "vqvae_prior": lambda: prior_config(Path("unread"), "model.classes=10"),
}

# ------------------------------------------------------------------------------------------------- what is recorded


@pytest.fixture(scope="module")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> None:
    let_it_train(tmp_path_factory.mktemp("library"))


@pytest.mark.usefixtures("trainable")
@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        pytest.param("nvae", "none", marks=pytest.mark.slow),
        ("nvae_of_classes", "none"),
        pytest.param("nvae", "cells", marks=pytest.mark.full),
        pytest.param("vdvae", "cells", marks=pytest.mark.slow),
        pytest.param("vqvae_prior", "none", marks=pytest.mark.slow),
    ],
)
def test_a_gpu_is_asked_the_same_in_every_update_and_for_nothing_of_the_host_s(name: str, recompute: str) -> None:
    config = with_graph(RUNS[name](), f"train.recompute={recompute}")
    trace, (_, early, late) = traced_gradients(config, "fp16", 0, 100, 999)
    assert not trace.waits
    assert not trace.mixed
    assert not early.between_devices
    assert early.lines
    assert early.lines == late.lines


# ---------------------------------------------------------------------------------------------- how it is replayed


class StandIn:
    """A graph of what the host does: done when it is recorded, and again at each replay after the first."""

    def beside(self, compute: Callable[[], Any]) -> Any:
        return compute()

    def record(self, compute: Callable[[], Any]) -> Any:
        self.compute, self.result, self.replays = compute, compute(), 0
        return self.result

    def replay(self) -> None:
        self.replays += 1
        if self.replays > 1:
            for kept, found in zip(tensors(self.result), tensors(self.compute()), strict=True):
                kept.copy_(found)


def tensors(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "Graph", StandIn)
    monkeypatch.setattr("nvae.training.trainer.require_replayable", lambda *args, **options: None)


def passing(number: float) -> list[Pass]:
    """Two passes over one image of one number."""
    return [Pass(torch.full((1,), scale * number), [torch.ones(1)], None, None, 0.5) for scale in (1, 10)]


@pytest.mark.usefixtures("stand_in")
def test_a_replay_sees_the_passes_of_its_call() -> None:
    replayed = Replayed(lambda passes: sum(one.images for one in passes), recording=True)
    assert [float(replayed(passing(number))) for number in range(WARM_UP + 3)] == [11 * n for n in range(WARM_UP + 3)]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("recording", "times"), [(True, WARM_UP + 1), (False, WARM_UP + 4)])
def test_it_is_recorded_after_the_warm_up(recording: bool, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "replay", lambda graph: None)
    calls = []
    replayed = Replayed(calls.append, recording=recording)
    for _ in range(WARM_UP + 4):
        replayed(passing(1))
    assert len(calls) == times


@pytest.mark.usefixtures("stand_in")
def test_what_is_forgotten_is_warmed_up_and_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "replay", lambda graph: None)
    calls: list[Iterable[Pass]] = []
    replayed = Replayed(calls.append, recording=True)
    for _ in range(2):
        for _ in range(WARM_UP + 4):
            replayed(passing(1))
        replayed.forget()
    assert len(calls) == 2 * (WARM_UP + 1)


@pytest.mark.usefixtures("stand_in")
def test_a_run_by_replays_has_the_numbers_of_another_bit_for_bit(tmp_path: Path) -> None:
    """Of classes, two passes an update, plainly computed."""
    few = ("data.batch=16", "data.global_batch=32", "train.kernels=plain")
    config = tiny_run(*EVERY_BRICK, *CHANGING, *few, "model.classes=10", f"train.steps={WARM_UP + 4}")
    for name, run in (("plain", config), ("replayed", with_graph(config))):
        train_in(tmp_path / name, run)
    assert log(tmp_path / "plain/tiny") == log(tmp_path / "replayed/tiny")
    plain, replayed = (checkpoint(tmp_path / name / "tiny") for name in ("plain", "replayed"))
    for part in ("model", "ema", "optimiser"):
        assert differences(plain[part], replayed[part]) == []


# ------------------------------------------------------------------------------------------------ what is not taken


def refusal(
    config: AnyRunConfig, device: torch.device = CUDA, *, recompute: Recomputation = "none", profiled: bool = False
) -> str:
    if config.model.foundation is not None:
        config = config.model_copy(update={"model": config.model.built_on(first_config().model)})
    model = build(config.model)
    model.set_recomputation(recompute)
    with pytest.raises(UserError) as caught:
        require_replayable(model, device, profiled=profiled)
    return str(caught.value)


def test_other_devices_are_refused() -> None:
    assert refusal(tiny_run(), CPU) == "train.graph: is for a CUDA device, found cpu"


def test_a_run_on_a_cpu_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train\.graph: is for a CUDA device, found cpu$"):
        train_in(tmp_path, tiny_run("train.graph=true"))
    assert not list(tmp_path.rglob("*.yaml"))


def test_several_processes_are_refused() -> None:
    with ranks(4):
        assert refusal(tiny_run()) == "train.graph: is for one process, there are 4"


def test_a_profile_is_refused() -> None:
    assert "train.profile" in refusal(tiny_run(), profiled=True)


def test_codebooks_that_learn_by_averages_are_refused() -> None:
    assert "VQVAE learns otherwise" in refusal(first_config())


def test_dropout_that_is_computed_again_is_refused() -> None:
    assert "train.recompute=cells" in refusal(RUNS["vqvae_prior"](), recompute="cells")


@pytest.mark.parametrize("name", RUNS)
def test_others_are_taken(name: str) -> None:
    config = with_graph(RUNS[name]())
    require_replayable(build(config.model), CUDA, profiled=False)
