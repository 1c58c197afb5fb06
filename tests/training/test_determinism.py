"""`train.deterministic`: what is set, that an update of each family runs with it, and what is said where none can."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import EVERY_BRICK, checkpoint, differences, outcome, tiny_run, train_in

from nvae.core.errors import UserError
from nvae.training import run
from nvae.training.determinism import WORKSPACE, be_deterministic


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    be_deterministic(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_everything_that_decides_is_set() -> None:
    be_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == WORKSPACE


def test_without_it_the_fastest_algorithm_is_looked_for() -> None:
    be_deterministic(True)
    be_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.benchmark


def test_a_workspace_that_was_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    be_deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_update_runs_with_it(tmp_path: Path) -> None:
    train_in(tmp_path, tiny_run("train.deterministic=true", "train.kernels=plain", "train.steps=1"))
    assert torch.are_deterministic_algorithms_enabled()
    assert outcome(tmp_path / "tiny")["outcome"] == "finished"


@pytest.mark.slow
def test_a_run_with_it_has_the_same_weights(tmp_path: Path) -> None:
    for name in ("true", "false"):
        train_in(tmp_path / name, tiny_run(f"train.deterministic={name}", *EVERY_BRICK))
        assert torch.are_deterministic_algorithms_enabled() == (name == "true")
    ours, others = (checkpoint(tmp_path / name / "tiny") for name in ("true", "false"))
    assert differences(ours["model"], others["model"]) == []


def test_an_operator_that_cannot_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise RuntimeError(
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
        )

    monkeypatch.setattr(run, "ready", refused)
    line = "train.deterministic: cumsum_cuda_kernel does not have a deterministic implementation; leave it out"
    with pytest.raises(UserError, match=f"^{line}$"):
        train_in(tmp_path, tiny_run("train.deterministic=true"))
    assert not (tmp_path / "tiny/config.yaml").exists()
