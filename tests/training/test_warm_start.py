"""A warm start takes from a trained model what fits, says what does not, and from another model takes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import shared as model_folder
from safetensors.torch import load_file
from tiny_run import checkpoint, tiny_run, train_in

from nvae.checkpoints.model_folder import WEIGHTS
from nvae.core.errors import UserError
from nvae.models.registry import build
from nvae.training.config import AnyRunConfig

MIXTURE = ("data.binarize=false", "model.likelihood={kind: logistic_mixture, components: 2}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on binary digits of 8×8 pixels."""
    runs = tmp_path_factory.mktemp("source")
    assert train_in(runs, tiny_run("train.steps=2")) == "finished"
    return runs / "tiny"


@pytest.fixture(scope="module")
def larger(source: Path, tmp_path_factory: pytest.TempPathFactory) -> AnyRunConfig:
    """A run on 16×16 pixels that starts from it."""
    file = tmp_path_factory.mktemp("images") / "sixteen.npy"
    np.save(file, np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8))
    data = f"data={{name: images, path: '{file}', size: 16, channels: 1, binarize: true, batch: 8}}"
    return tiny_run(data, "model.image_size=16", "train.steps=1", f"train.init_from={source}")


def test_another_image_size_takes_all_but_what_has_that_size(
    source: Path, larger: AnyRunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_in(tmp_path, larger) == "finished"
    weights, begun = checkpoint(source)["model"], checkpoint(tmp_path / "tiny", 0)["model"]
    others = [name for name in begun if not torch.equal(begun[name], weights[name])]
    assert others == ["first_state"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train.init_from"))
    count = f"{len(begun) - 1} of {len(begun)}"
    assert (
        line == f"train.init_from: {count} tensors are taken (model.image_size: 8 → 16); these begin anew: first_state"
    )


def test_the_average_begins_with_what_the_weights_begin_with(larger: AnyRunConfig, tmp_path: Path) -> None:
    assert train_in(tmp_path, larger) == "finished"
    content = checkpoint(tmp_path / "tiny", 0)
    assert all(torch.equal(content["ema"][name], content["model"][name]) for name in content["ema"])


def test_another_likelihood_takes_all_but_the_head(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(*MIXTURE, "train.steps=1", f"train.init_from={source}")
    assert train_in(tmp_path, config) == "finished"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train.init_from"))
    assert "model.likelihood.kind: bernoulli → logistic_mixture" in line
    assert "; these begin anew: head (3), spectral; left over: spectral" in line


def test_another_architecture_is_refused_with_its_fields_however_much_would_fit(
    source: Path, larger: AnyRunConfig, tmp_path: Path
) -> None:
    deeper = larger.model_copy(update={"model": larger.model.model_copy(update={"decoder_cells": 2})})
    with pytest.raises(UserError) as told:
        train_in(tmp_path, deeper)
    assert str(told.value).startswith("train.init_from: the weights are of another model")
    assert "\n  model.decoder_cells: 1 → 2" in str(told.value)
    assert not (tmp_path / "tiny" / "config.yaml").exists()


def test_another_family_is_refused_in_a_line(source: Path, tmp_path: Path) -> None:
    family = "model={family: toy_family:Toy, image_size: 8, image_channels: 1, likelihood: {kind: bernoulli}}"
    with pytest.raises(
        UserError, match=r"^train\.init_from: the weights are of family 'nvae', the run's of 'toy_family:Toy'$"
    ):
        train_in(tmp_path, tiny_run(family, f"train.init_from={source}"))


def test_a_run_that_goes_on_takes_every_tensor_or_none(source: Path, larger: AnyRunConfig, tmp_path: Path) -> None:
    """What a warm start may do, a continuation may not."""
    assert train_in(tmp_path, tiny_run("train.steps=2")) == "finished"
    changed = larger.model_copy(update={"allow_changes": True})
    with pytest.raises(UserError):
        train_in(tmp_path, changed)
    assert checkpoint(tmp_path / "tiny")["config"]["model"]["image_size"] == 8


def test_a_model_folder_is_a_start_like_a_run(tmp_path: Path) -> None:
    """Another machine has what was exported, and not the run."""
    config = tiny_run("train.steps=1")
    folder = model_folder(tmp_path / "shared", build(config.model))
    assert train_in(tmp_path / "runs", tiny_run("train.steps=1", f"train.init_from={folder}")) == "finished"
    begun = checkpoint(tmp_path / "runs" / "tiny", 0)["model"]
    assert all(torch.equal(begun[name], weight) for name, weight in load_file(folder / WEIGHTS).items())
