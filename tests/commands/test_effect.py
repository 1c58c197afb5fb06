"""Options are used or refused, and what a command writes is never of two minds; on a run of a few updates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from entry_scripts import call
from tiny_run import TINY, VERY_DEEP, tiny_run, train_in

from nvae.checkpoints.conversion import convert
from nvae.core.errors import UserError
from nvae.training.config import run_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert train_in(runs, tiny_run("train.steps=2")) == "finished"
    return runs / "tiny"


@pytest.fixture(scope="module")
def very_deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model without batch norm."""
    runs = tmp_path_factory.mktemp("runs")
    config = run_config({**TINY, "model": VERY_DEEP, "train": {**TINY["train"], "steps": 1}}, "vdvae")
    assert train_in(runs, config) == "finished"
    return runs / "tiny"


# ---------------------------------------------------------------------------------------------------- used or refused


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("sample --data images", "--data: has no effect on images, only on reconstruct, interpolate, traverse, neigh"),
        ("sample --mixture-edge published", "--mixture-edge: has no effect, the likelihood is bernoulli"),
        ("evaluate --mixture-edge right", "--mixture-edge: has no effect, the likelihood is bernoulli"),
    ],
)
def test_an_option_without_effect_is_refused(run: Path, command: str, sentence: str) -> None:
    script, *arguments = command.split()
    with pytest.raises(UserError, match=f"^{sentence}"):
        call(script, run, *arguments)


@pytest.mark.parametrize("command", ["sample", "sample neighbours", "evaluate --report"])
def test_a_model_without_batch_norm_has_none_to_readjust(very_deep: Path, command: str) -> None:
    script, *arguments = command.split()
    with pytest.raises(UserError, match=r"^--readjust: has no effect on VDVAE, it has no batch norm; leave it out$"):
        call(script, very_deep, *arguments, "--readjust")


def test_a_conversion_takes_no_option_that_it_would_ignore(run: Path, tmp_path: Path) -> None:
    published = tmp_path / "published.pt"
    torch.save({"encoder.in_conv.weight": torch.zeros(1)}, published)
    with pytest.raises(UserError, match=r"^--dataset: has no effect here, .*\(found cifar10\)$"):
        convert(published, tmp_path / "ours.pt", dataset="cifar10")
    with pytest.raises(UserError, match=r"^--config: has no effect here, one of ours carries its own"):
        convert(run, tmp_path / "out.pt", config=tmp_path / "recipe.yaml")
    assert not (tmp_path / "out.pt").exists()


# ------------------------------------------------------------------------------------------------------- of one mind


def test_an_animation_of_earlier_weights_does_not_outlive_its_picture(run: Path, tmp_path: Path) -> None:
    for ending in (".gif", ".webp"):
        call("sample", run, "interpolate", "--count", 1, "--animation", ending, "--out", tmp_path)
    files = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert files == ["interpolation.png", "interpolation.webp"]


def test_pictures_of_the_raw_weights_stand_beside_those_of_the_average(run: Path, tmp_path: Path) -> None:
    for weights in ("ema", "raw"):
        call("sample", run, "reconstruct", "--count", 1, "--weights", weights, "--out", tmp_path)
    files = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert files == ["reconstructions-raw.png", "reconstructions.png"]


def test_a_set_of_samples_whose_description_is_damaged_is_replaced(run: Path, tmp_path: Path) -> None:
    call("sample", run, "--count", 2, "--out", tmp_path)
    (tmp_path / "samples/t1-seed0.json").write_text('{"count": 2')
    call("sample", run, "--count", 1, "--out", tmp_path)
    assert len(list((tmp_path / "samples/t1-seed0").iterdir())) == 1


# ----------------------------------------------------------------------------------------------------------- damaged


def report(run: Path, out: Path, log: bytes) -> Any:
    """Writes the page of a run whose log is this."""
    before = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(log)
    try:
        return call("evaluate", run, "--report", "--out", out)
    finally:
        (run / "metrics.jsonl").write_bytes(before)


def test_a_page_does_without_the_line_that_a_killed_run_was_writing(run: Path, tmp_path: Path) -> None:
    assert report(run, tmp_path, b'{"step": 1, "nelbo": 40.0}\n{"step": 2, "nel') == 0


def test_a_damaged_log_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged: "):
        report(run, tmp_path, b'{"step": 1, "nelbo"\n{"step": 2, "nelbo": 40.0}\n')


def test_damaged_statistics_of_batch_norm_are_made_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvae.commands.prior.READJUSTMENT", {"batches": 1, "batch": 8})
    command = ("sample", run, "--count", 1, "--readjust", "--out", tmp_path)
    call(*command)
    (file,) = (tmp_path / "batch-norm").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    call(*command)
    assert file.read_bytes() == whole
