"""Every recipe resolves, builds on the meta device and has the size the papers give."""

from pathlib import Path

import pytest
import torch
from places import ROOT

from nvae.commands.train import dry_run
from nvae.core.config import flat
from nvae.models.config import ModelConfig
from nvae.models.registry import build
from nvae.training.config import read_run_config

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ABLATIONS = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
PARAMETERS = {  # spec §6; spec_vdvae; spec_vqvae §3
    "mnist": 33_363_134,
    "cifar10": 130_852_480,
    "celeba_64": 153_281_364,
    "imagenet_32": 268_509_444,
    "celeba_hq_256": 330_798_664,
    "ffhq_256": 330_798_664,
    "vdvae_cifar10": 39_145_700,
    "vdvae_imagenet_32": 119_280_868,
    "vdvae_imagenet_64": 125_005_860,
    "vdvae_ffhq_256": 114_874_852,
    "vdvae_ffhq_1024": 109_366_904,
    "vqvae_cifar10": 662_723,
    "vqvae2_imagenet_256": 1_716_803,
    "vqvae2_ffhq_256": 1_388_867,
}


def model_of(path: Path) -> ModelConfig:
    """The model of a recipe; one built on the run of another recipe has that one's model in it."""
    config = read_run_config(path, []).model
    if config.foundation is None:
        return config
    return config.built_on(model_of(path.with_name(f"{Path(config.foundation).name}.yaml")))


def test_there_is_a_recipe_for_every_figure() -> None:
    assert PARAMETERS.keys() <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_it_builds_on_the_meta_device_with_the_published_number_of_parameters(path: Path) -> None:
    with torch.device("meta"):
        model = build(model_of(path))
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS.get(path.stem, count)


def test_a_dry_run_prints_config_parameters_and_groups() -> None:
    text = dry_run(read_run_config(CONFIGS[0].with_name("mnist.yaml"), ["optim.lr=3e-3"]))
    assert "lr: 0.003" in text
    assert "parameters: 33,363,134" in text
    assert text.count("20 × 8 × 8") == 10
    assert text.count("20 × 4 × 4") == 5
    assert "images per update: 400" in text


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_its_comment_names_that_number(path: Path) -> None:
    count = PARAMETERS.get(path.stem)
    if count is not None:
        assert f"{count:,}".replace(",", " ") in path.read_text()


@pytest.mark.parametrize("path", ABLATIONS, ids=[path.stem for path in ABLATIONS])
def test_an_ablation_builds_and_changes_one_field_of_its_base(path: Path) -> None:
    with torch.device("meta"):
        build(model_of(path))
    changes = flat(read_run_config(path, ["name=run"]).model_dump()).items()
    base = path.with_name(f"{path.stem.partition('_')[0]}_base.yaml")
    assert len(changes - flat(read_run_config(base, ["name=run"]).model_dump()).items()) == (path != base)


def test_every_ablation_of_one_set_is_one_of_the_other() -> None:
    names = [path.stem.partition("_") for path in ABLATIONS]
    kinds = {data: {kind for other, _, kind in names if other == data} for data in ("cifar10", "mnist")}
    assert kinds["cifar10"] == kinds["mnist"]
