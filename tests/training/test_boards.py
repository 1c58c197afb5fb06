"""Weights & Biases beside TensorBoard: the same numbers, one run however often it goes on, nothing without it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import start
from tiny_run import tiny_run, train_in

from nvae.core.errors import UserError
from nvae.training.boards import WeightsAndBiases

INSTALLED = importlib.util.find_spec("wandb") is not None
installed = pytest.mark.skipif(not INSTALLED, reason="wandb is not installed")


def test_without_the_package_a_run_is_refused_in_a_line_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'^train\.wandb: offline needs the package wandb .*"nvae\[wandb\]"') as told:
        train_in(tmp_path, tiny_run("train.wandb=offline"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "tiny" / "config.yaml").exists()


def test_online_without_an_account_is_refused_before_the_run_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda **options: False))
    with pytest.raises(UserError, match=r"^train\.wandb: online needs an account: run `wandb login` first"):
        train_in(tmp_path, tiny_run("train.wandb=online"))
    assert not (tmp_path / "tiny" / "config.yaml").exists()


def train_without(runs: Path) -> None:
    assert train_in(runs, tiny_run("train.steps=1", "train.kernels=plain")) == "finished"
    assert "wandb" not in sys.modules


def test_a_run_that_does_not_ask_for_it_does_not_import_it(tmp_path: Path) -> None:
    process = start(train_without, tmp_path)
    process.join()
    assert process.exitcode == 0


@installed
@pytest.mark.slow
def test_an_offline_run_has_the_numbers_of_the_log_and_goes_on_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, Any]] = []
    original = WeightsAndBiases.close

    def close(self: WeightsAndBiases, failed: bool) -> None:
        shown.append({"id": self.run.id, "batch": self.run.config["data.batch"], **self.run.summary})
        original(self, failed)

    monkeypatch.setattr(WeightsAndBiases, "close", close)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (2, 4):
        config = tiny_run("train.wandb=offline", f"train.steps={steps}", "train.kernels=plain", "allow_changes=true")
        assert train_in(tmp_path, config) == "finished"
    folder = tmp_path / "tiny"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for found, step in zip(shown, (2, 4), strict=True):
        last = {name: value for line in lines if line["step"] <= step for name, value in line.items()}
        assert {name: found[name] for name in last} == pytest.approx(last)
        assert found["samples/0.7"]["_type"] == "image-file"
        assert found["batch"] == 32
    assert shown[0]["id"] == shown[1]["id"] == (folder / "wandb" / "id").read_text().strip()
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 2
