"""Both stages of a VQ-VAE-2 go on exactly after a kill, and two processes train either as one."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from processes import start, start_ranks
from tiny_run import checkpoint, column, differences, log, train_in
from tiny_vqvae import first_config, prior_config

from nvae.models.base import Metrics
from nvae.training.config import AnyRunConfig
from nvae.training.trainer import Trainer

OPTIONS = ("train.steps=12", "train.save_every=3", "optim.ema=0.9")


def stage(number: int, runs: Path, *overrides: str) -> AnyRunConfig:
    """The config of a stage; the second is built on runs/tiny."""
    make = first_config if number == 1 else lambda *changes: prior_config(runs / "tiny", *changes)
    return make(*OPTIONS, *overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both stages that nothing happened to."""
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("whole")
    for number in (1, 2):
        assert train_in(runs, stage(number, runs)) == "finished"
    return runs


def name_of(number: int) -> str:
    return "tiny" if number == 1 else "prior"


def train_until_killed(number: int, whole: Path, folder: Path, step: int) -> None:
    """In a process of its own: dies, as by SIGKILL, once the weights of an update are there, before its averages."""
    original = Trainer._update

    def update(self: Trainer, norm: torch.Tensor) -> Metrics:
        if self.state.step == step:
            self.state.scaler.step(self.state.optimiser)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, norm)

    Trainer._update = update  # type: ignore[method-assign]
    train_in(folder, stage(number, whole))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(runs: Path, tmp_path: Path, number: int) -> None:
    for step in sorted(random.Random(number).sample(range(12), 3)):
        process = start(train_until_killed, number, runs, tmp_path, step)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert train_in(tmp_path, stage(number, runs)) == "finished"
    found, expected = tmp_path / name_of(number), runs / name_of(number)
    assert differences(checkpoint(found), checkpoint(expected)) == []
    assert log(found) == log(expected)


def train_rank(number: int, whole: Path, folder: Path) -> None:
    train_in(folder, stage(number, whole, "data.batch=16"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_two_processes_train_as_one(runs: Path, tmp_path: Path, number: int) -> None:
    processes = start_ranks(2, train_rank, number, runs, tmp_path)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    found, expected = tmp_path / name_of(number), runs / name_of(number)
    for name in ("loss", "nelbo", "gradient_norm"):
        assert column(found, name) == pytest.approx(column(expected, name), rel=1e-4), name
    for kind in ("model", "ema"):
        state, other = checkpoint(found)[kind], checkpoint(expected)[kind]
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
