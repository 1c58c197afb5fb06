"""Training on GPUs: compiled, recomputed, taken back, and by two of them; and that none of it changes the numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start_ranks
from tiny_run import EVERY_BRICK, checkpoint, column, differences, tiny_run, train_in

from nvae.core import distributed
from nvae.training.graph import WARM_UP

pytestmark = pytest.mark.gpu

ON_GPU = ("train.device=cuda", *EVERY_BRICK)
Losses = Callable[..., list[float]]


@pytest.fixture
def losses(tmp_path: Path) -> Losses:
    """The losses of six updates with some overrides."""

    def of(name: str, *overrides: str) -> list[float]:
        train_in(tmp_path / name, tiny_run(*ON_GPU, *overrides))
        return column(tmp_path / name / "tiny", "loss")

    return of


def test_compiled_parts_have_the_losses_of_the_others(losses: Losses) -> None:
    assert losses("compiled", "train.compile=true") == pytest.approx(losses("not"), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_parts_train_in_mixed_precision(losses: Losses, precision: str) -> None:
    found = losses("compiled", "train.compile=true", f"train.precision={precision}")
    assert found == pytest.approx(losses("not", f"train.precision={precision}"), rel=3e-2)


@pytest.mark.parametrize("mode", ["activations", "cells"])
def test_recomputation_changes_no_loss(losses: Losses, mode: str) -> None:
    assert losses(mode, f"train.recompute={mode}") == pytest.approx(losses("none"), rel=1e-4)


def test_recomputing_cells_takes_less_memory(tmp_path: Path) -> None:
    peaks = {}
    for mode in ("none", "cells"):
        torch.cuda.reset_peak_memory_stats()
        wide = ("model.encoder_channels=32", "model.decoder_channels=32", "data.batch=256")
        train_in(tmp_path / mode, tiny_run(*ON_GPU, *wide, f"train.recompute={mode}"))
        peaks[mode] = torch.cuda.max_memory_allocated()
    assert peaks["cells"] < 0.9 * peaks["none"]


def test_an_overflow_in_fp16_leaves_weights_statistics_and_moments_as_they_were(tmp_path: Path) -> None:
    train_in(tmp_path, tiny_run(*ON_GPU, "train.precision=fp16", f"train.loss_scale={2.0**40}", "train.steps=1"))
    before, after = (checkpoint(tmp_path / "tiny", step) for step in (0, 1))
    assert after["counters"]["non_finite"] == 1
    for part in ("model", "ema", "optimiser"):
        assert differences(before[part], after[part]) == []


def test_a_deterministic_run_repeats_bit_for_bit(tmp_path: Path, losses: Losses) -> None:
    first, second = (losses(name, "train.deterministic=true") for name in ("first", "second"))
    assert first == second
    weights = (checkpoint(tmp_path / name / "tiny")["model"] for name in ("first", "second"))
    assert differences(*weights) == []


def test_replayed_updates_are_those_of_others_bit_for_bit(tmp_path: Path, losses: Losses) -> None:
    same = ("train.deterministic=true", f"train.steps={WARM_UP + 3}")
    assert losses("replayed", "train.graph=true", *same) == losses("plain", *same)
    found = (checkpoint(tmp_path / name / "tiny") for name in ("replayed", "plain"))
    assert differences(*(content["model"] for content in found)) == []


def test_the_log_has_reserved_memory_and_the_profile_has_kernels(tmp_path: Path) -> None:
    train_in(tmp_path, tiny_run(*ON_GPU, "train.profile=2"))
    lines = (tmp_path / "tiny/metrics.jsonl").read_text().splitlines()
    assert '"reserved_memory_mib"' in lines[0]
    assert '"kernel"' in (tmp_path / "tiny/profile/step-000000004.json").read_text()


def train_rank(folder: Path, *overrides: str) -> None:
    train_in(folder, tiny_run(*ON_GPU, *overrides))
    assert not distributed.is_distributed()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="less than two GPUs")
def test_two_gpus_have_the_losses_of_one(tmp_path: Path, losses: Losses) -> None:
    processes: list[Any] = start_ranks(2, train_rank, tmp_path / "two", "data.batch=16")
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert column(tmp_path / "two" / "tiny", "loss") == pytest.approx(losses("one", "data.batch=32"), rel=1e-4)
