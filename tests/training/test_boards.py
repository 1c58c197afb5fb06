"""Weights & Biases beside TensorBoard: the same numbers, one run however often it goes on, nothing without it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from places import ROOT
from tiny_run import tiny_run, train_in

from nvae.core.errors import UserError

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
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(api=SimpleNamespace(api_key=None)))
    with pytest.raises(UserError, match=r"^train\.wandb: online needs an account: run `wandb login` first"):
        train_in(tmp_path, tiny_run("train.wandb=online"))
    assert not (tmp_path / "tiny" / "config.yaml").exists()


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/support")
from tiny_run import tiny_run, train_in
train_in(Path(sys.argv[1]), tiny_run("train.steps=1", "train.kernels=plain"))
assert "wandb" not in sys.modules
"""


def test_a_run_that_does_not_ask_for_it_does_not_import_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)


def summaries(run: Path) -> list[dict[str, Any]]:
    """The last numbers of each process of a run, the first first."""
    files = sorted(run.glob("wandb/offline-run-*/files/wandb-summary.json"))
    return [json.loads(file.read_text()) for file in files]


@installed
@pytest.mark.slow
def test_an_offline_run_has_the_numbers_of_the_log_and_goes_on_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (2, 4):
        config = tiny_run("train.wandb=offline", f"train.steps={steps}", "train.pictures_every=1", "allow_changes=true")
        assert train_in(tmp_path, config) == "finished"
    folder = tmp_path / "tiny"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [{k: v for line in lines if line["step"] <= step for k, v in line.items()} for step in (2, 4)]
    for found, expected in zip(summaries(folder), last, strict=True):
        assert found["step"] == expected["step"]
        assert found["loss"] == pytest.approx(expected["loss"])
        assert found["samples/0.7"]["_type"] == "image-file"
    made = (folder / "wandb" / "id").read_text().strip()
    assert all(path.name.endswith(made) for path in folder.glob("wandb/offline-run-*"))
