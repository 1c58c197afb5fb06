"""Priors that were trained apart, at the same time, are one run: with the numbers of the parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_scripts import call, results_of
from tiny_run import checkpoint, outcome, tiny_run, train_in
from tiny_vqvae import first_config, prior_config

from nvae.checkpoints.loading import load_model
from nvae.core.errors import UserError
from nvae.models.vqvae.prior import VQVAEPrior
from nvae.training.folder import RunFolder
from nvae.training.joining import join

THREE = "model.factors=[2, 2, 2]"
PARTS = ("top", "middle", "bottom")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage of three levels, and a run for each level that knows of no other."""
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("parts")
    assert train_in(runs, first_config(THREE)) == "finished"
    for level, name in enumerate(PARTS):
        options = [f"name={name}", f"model.level={level}", f"seed={level}", *(["optim.ema=0.5"] if level == 1 else [])]
        assert train_in(runs, prior_config(runs / "tiny", *options, "train.steps=3")) == "finished"
    return runs


def joined(runs: Path, *parts: str, into: Path) -> Path:
    join([runs / part for part in parts], into.name, RunFolder(into))
    return into


@pytest.fixture(scope="module")
def whole(runs: Path) -> Path:
    return joined(runs, *PARTS, into=runs / "whole")


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_it_has_the_numbers_of_its_parts(runs: Path, whole: Path, weights: Any) -> None:
    model = load_model(whole, weights=weights)
    x = torch.bernoulli(torch.rand(5, 1, 8, 8))
    output = model(x)
    for level, name in enumerate(PARTS):
        part = load_model(runs / name, weights=weights)(x)
        assert torch.equal(output.kl[:, level], part.kl[:, level])
        assert torch.equal(output.reconstruction, part.reconstruction)


def test_it_draws_what_its_parts_draw(runs: Path, whole: Path) -> None:
    model = load_model(whole)
    noise = [torch.randn(shape) for shape in model.latent_shapes(4)]
    indices: list[torch.Tensor] = []
    for level, name in enumerate(PARTS):
        part = load_model(runs / name)
        assert isinstance(part, VQVAEPrior)
        prior = part.prior(level)
        assert prior is not None
        indices.append(prior.draw(noise[level], indices))
    expected = part.first.sample(4, latents=[map_[:, None] for map_ in indices])
    assert torch.equal(model.sample(4, noise=noise).params, expected.params)


def test_it_is_a_run_that_is_evaluated_and_sampled(runs: Path, whole: Path) -> None:
    assert outcome(whole)["outcome"] == "finished"
    assert call("evaluate", whole, "--limit", 20) == 0
    assert call("sample", whole, "--count", 2, "--temperature", "0.9,1,1") == 0
    (entry,) = results_of(whole).values()
    for level, name in enumerate(PARTS):
        assert call("evaluate", runs / name, "--limit", 20) == 0
        (part,) = results_of(runs / name).values()
        assert entry["kl_per_group"][level] == part["kl_per_group"][level]


def test_it_may_be_trained_on(runs: Path, whole: Path) -> None:
    config = prior_config(runs / "tiny", "name=whole", "train.steps=5", "optim.ema=0.5", "allow_changes=true")
    copy = joined(runs, *PARTS, into=runs / "again" / "whole")
    assert train_in(copy.parent, config) == "finished"
    assert checkpoint(copy)["counters"]["step"] == 5


def test_a_level_on_top_of_another_run_is_only_its_own(runs: Path, tmp_path: Path) -> None:
    below = prior_config(runs / "top", "name=below", "model.level=1", "train.steps=2")
    assert train_in(tmp_path, below) == "finished"
    join([runs / "top", tmp_path / "below", runs / "bottom"], "whole", RunFolder(tmp_path / "whole"))
    model, top = load_model(tmp_path / "whole"), load_model(runs / "top")
    x = torch.bernoulli(torch.rand(5, 1, 8, 8))
    assert torch.equal(model(x).kl[:, 0], top(x).kl[:, 0])


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(parts: list[Path], into: Path) -> str:
    with pytest.raises(UserError) as error:
        join(parts, into.name, RunFolder(into))
    assert not (into / "config.yaml").exists() or into.name == "whole"
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_parts_of_different_first_stages_are_refused_by_name(runs: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path, first_config(THREE, "seed=1", "train.steps=1")) == "finished"
    assert train_in(tmp_path, prior_config(tmp_path / "tiny", "model.level=1", "train.steps=1")) == "finished"
    words = refused([runs / "top", tmp_path / "prior", runs / "bottom"], tmp_path / "new")
    assert f"{tmp_path / 'prior'}: is built on another first stage ({tmp_path / 'tiny'}" in words
    assert f"than {runs / 'top'} ({runs / 'tiny'}" in words


def test_a_decoder_that_trained_on_is_refused(runs: Path, tmp_path: Path) -> None:
    config = prior_config(runs / "tiny", "model.level=1", "model.train_decoder=true", "train.steps=3")
    assert train_in(tmp_path, config) == "finished"
    assert "its decoder is not that of" in refused([runs / "top", tmp_path / "prior"], tmp_path / "new")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["top", "bottom"], "level 1: its prior was trained by none of"),
        (["top", "middle", "bottom", "all"], "level 0: its prior was trained by"),
        (["top", "top"], "given twice"),
        (["tiny"], "tiny: a VQVAE is not trained in parts"),
        (["top", "tiny"], "tiny: a VQVAE, but"),
    ],
)
def test_parts_that_are_no_whole_are_refused(runs: Path, tmp_path: Path, parts: list[str], message: str) -> None:
    if "all" in parts:
        assert train_in(tmp_path, prior_config(runs / "tiny", "name=all", "train.steps=1")) == "finished"
    paths = [tmp_path / part if part == "all" else runs / part for part in parts]
    assert message in refused(paths, tmp_path / "new")


def test_parts_for_other_classes_are_refused(runs: Path, tmp_path: Path) -> None:
    assert (
        train_in(tmp_path, prior_config(runs / "tiny", "model.level=1", "train.steps=1", "model.classes=10"))
        == "finished"
    )
    assert "model.classes is 10, in" in refused([runs / "top", tmp_path / "prior", runs / "bottom"], tmp_path / "new")


def test_parts_of_other_images_are_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "middle", tmp_path / "middle")
    images = tmp_path / "middle" / "images.json"
    found = json.loads(images.read_text())
    found["train"]["fingerprint"] = "0123456789abcdef"
    images.write_text(json.dumps(found))
    words = refused([runs / "top", tmp_path / "middle", runs / "bottom"], tmp_path / "new")
    assert f"was trained on other images than {runs / 'top'}" in words


def test_a_run_that_is_there_is_never_written_over(runs: Path, whole: Path) -> None:
    assert "is a run already" in refused([runs / part for part in PARTS], whole)


def test_other_families_are_not_joined(tmp_path: Path) -> None:
    assert train_in(tmp_path, tiny_run("train.steps=1")) == "finished"
    assert "NVAE is not trained in parts" in refused([tmp_path / "tiny"], tmp_path / "new")
