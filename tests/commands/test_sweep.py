"""Recipes under seeds: what is refused, where runs go on, and a sweep from its begin to its table."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from places import ROOT

from nvae.commands import sweep
from nvae.core.errors import UserError

DEBUG = f"base: {ROOT / 'configs' / 'debug.yaml'}\ntrain: {{steps: 2}}\n"


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "sweep.py"), "s", *arguments]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two recipes, which the command is called in."""
    (tmp_path / "a.yaml").write_text(DEBUG)
    (tmp_path / "b.yaml").write_text("base: a.yaml\nmodel: {squeeze_excite: false}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train.steps=2"], "CONFIG: a sweep needs at least one recipe"),
        (["a.yaml", "./a.yaml"], "CONFIG: two recipes have one name: a, a"),
        (["a.yaml", "seed=3"], "seed=3: a sweep names its runs and chooses their seeds itself"),
        (["a.yaml", "model.scale=1"], "model.scale: unknown field; did you mean 'scales'"),
        (["vqvae_digits"], "importance samples"),
    ],
)
def test_what_cannot_be_swept_is_told_before_anything_is_trained(
    here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", "s", *arguments])
    with pytest.raises(UserError, match=line.replace(".", r"\.")):
        sweep.run()
    assert not (here / "runs").exists()


def test_seed_by_seed_all_recipes_are_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", "s", "a.yaml", "b.yaml", "--seeds", "2", "optim.lr=1e-3"])
    runs = sweep.runs_of(sweep.parse())
    assert [run.name for run in runs] == ["s/a-0", "s/b-0", "s/a-1", "s/b-1"]
    assert {run.overrides for run in runs} == {("optim.lr=1e-3",)}


def test_every_gpu_has_one_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in sweep.places(None)] == ["4", "6"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in sweep.places(3)] == ["4", "6", "4"]


def test_runs_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 8)  # type: ignore[attr-defined]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert sweep.places(3) == [{"OMP_NUM_THREADS": "2"}] * 3


@pytest.mark.slow
def test_a_sweep_is_stopped_goes_on_and_ends_in_a_table_that_tells_what_failed(here: Path) -> None:
    (here / "c.yaml").write_text("base: a.yaml\ndata: {name: images, path: nowhere, binarize: true}\n")
    with subprocess.Popen(command("a.yaml", "b.yaml", "train.steps=100000"), stdout=subprocess.PIPE) as process:
        log = here / "runs" / "s" / "a-0" / "log.txt"
        while process.poll() is None and not (log.exists() and "step" in log.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
    assert not (here / "runs" / "s" / "b-0").exists()
    trained = len(list((here / "runs" / "s" / "a-0" / "checkpoints").glob("step-*.pt")))
    assert trained, "it was to save before it left"

    done = subprocess.run(
        command("a.yaml", "c.yaml", "--importance-samples", "2", "allow_changes=true"), capture_output=True, text=True
    )
    table = (here / "runs" / "s" / "sweep.md").read_text()
    assert done.returncode == 2
    assert "s/c-0 failed: runs/s/c-0/log.txt says why" in done.stderr
    assert "nowhere" in (here / "runs" / "s" / "c-0" / "log.txt").read_text()
    assert "| a | 29 126 | 1 |" in table
    assert "| c | 29 126 | 0 | not evaluated |" in table
