"""Both stages of a VQ-VAE-2 through evaluate.py, sample.py and the converter."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_scripts import call, results_of
from PIL import Image
from stand_in_features import stand_in
from tiny_run import column, train_in
from tiny_vqvae import GREY, first_config, prior_config

from nvae.checkpoints.loading import load_model
from nvae.commands.quality import evaluate_fid
from nvae.commands.subject import open_subject
from nvae.core.config import dump_yaml
from nvae.core.errors import UserError
from nvae.models.vqvae.prior import VQVAEPrior
from nvae.sampling.latent_space import reconstruct


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("vqvae")
    assert train_in(runs, first_config()) == "finished"
    return runs / "tiny"


@pytest.fixture(scope="module")
def prior(first: Path) -> Path:
    assert train_in(first.parent, prior_config(first)) == "finished"
    return first.parent / "prior"


# ------------------------------------------------------------------------------------------------------------ evaluate


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_level_has_its_nats_a_code_and_its_use_of_the_codebook(prior: Path, split: str, capsys: Any) -> None:
    assert call("evaluate", prior, "--limit", 30, "--split", split) == 0
    (entry,) = (entry for entry in results_of(prior).values() if entry["split"] == split)
    found, rates = entry["codebooks"], entry["kl_per_group"]
    assert found["nats_per_code"] == pytest.approx([rates[0] / 4, rates[1] / 16])
    for used, perplexity in zip(entry["active_units_per_group"], found["perplexity"], strict=True):
        assert 1 <= perplexity <= used <= 6
    printed = capsys.readouterr().out
    assert "nats a code" in printed and f"{found['nats_per_code'][1]:.4f}" in printed


def test_uniform_codes_cost_their_logarithm(first: Path) -> None:
    assert call("evaluate", first, "--limit", 30) == 0
    (entry,) = results_of(first).values()
    assert entry["codebooks"]["nats_per_code"] == pytest.approx([math.log(6)] * 2)
    assert entry["estimates"]["nelbo"]["bits_per_dim"] == pytest.approx(
        entry["estimates"]["nelbo"]["nats"] / (64 * math.log(2))
    )


def test_validation_logs_nats_a_code(prior: Path) -> None:
    for level, positions in (("00", 4), ("01", 16)):
        assert 0 < column(prior, f"validation/nats_per_code/{level}")[-1] <= 2 * math.log(6), positions


def test_several_samples_change_no_nats_a_code(first: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path, prior_config(first, "model.posterior_temperature=0.01", "train.steps=1")) == "finished"
    assert call("evaluate", tmp_path / "prior", "--limit", 5, "--importance-samples", 3) == 0
    (entry,) = results_of(tmp_path / "prior").values()
    assert entry["codebooks"]["nats_per_code"][1] == pytest.approx(entry["kl_per_group"][1] / 16)


@pytest.mark.parametrize("folder", ["first", "prior"])
def test_fid_is_measured(folder: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    subject = open_subject(request.getfixturevalue(folder), device=torch.device("cpu"), out=tmp_path)
    found = evaluate_fid(subject, [0.9, 0.8], 20, networks=stand_in(), cache=tmp_path / "cache")
    assert found["metrics"]["fid"] > 0


def test_the_page_shows_codebooks_level_by_level(first: Path, prior: Path) -> None:
    for folder, curve in ((first, "Use of codebooks"), (prior, "Rate of each level, validation")):
        assert call("evaluate", folder, "--limit", 10, "--seed", 3) == 0
        assert call("evaluate", folder, "--report") == 0
        page = (folder / "report.html").read_text()
        for words in (
            "Codes, level by level from the top",
            "codes in use",
            "of the codes of the top levels alone",
            curve,
        ):
            assert words in page
        assert "latent channels" not in page


# -------------------------------------------------------------------------------------------------------------- sample


def test_each_level_is_drawn_at_its_own_temperature(prior: Path) -> None:
    assert call("sample", prior, "--count", 2, "--temperature", "0.8,0.9") == 0
    assert (prior / "samples" / "t0.8-0.9-seed0-raw.png").exists()
    with pytest.raises(UserError, match="temperature: 3 values"):
        call("sample", prior, "--temperature", "1,1,1")


def test_codes_are_drawn_in_mixed_precision(prior: Path) -> None:
    assert call("sample", prior, "--count", 2, "--precision", "bf16", "--seed", 9) == 0
    assert (prior / "samples" / "t1-seed9-raw.png").exists()


def test_images_are_rebuilt_from_the_top_levels_alone(prior: Path) -> None:
    arguments = ("reconstruct", "--groups", 1, 2, "--temperature", 0, "--count", 2)
    assert call("sample", prior, *arguments) == 0
    width, height = Image.open(prior / "samples" / "reconstructions-raw.png").size
    assert width > height  # the image, its top level alone, both


def test_below_the_top_levels_stands_the_likeliest_code(prior: Path) -> None:
    model, x = load_model(prior), torch.bernoulli(torch.rand(3, 1, 8, 8))
    assert isinstance(model, VQVAEPrior)
    top, below = model(x).z[0], model.prior(1)
    assert below is not None
    bottom = below.draw(torch.zeros(3, 1, 4, 4), [top[:, 0]], temperature=0.0)
    expected = model.first.sample(3, latents=[top, bottom[:, None]]).mean()
    torch.testing.assert_close(reconstruct(model, x, groups=1, temperature=0.0), expected)


def test_in_stage_1_zeros_stand_below_the_top_levels(first: Path) -> None:
    model, x = load_model(first), torch.bernoulli(torch.rand(3, 1, 8, 8))
    top, bottom = model(x).z
    values = model.network.values([top[:, 0], bottom[:, 0]])
    expected = model.likelihood([values[0], torch.zeros_like(values[1])]).mean()
    torch.testing.assert_close(reconstruct(model, x, groups=1, temperature=0.0), expected)


@pytest.mark.parametrize("action", ["interpolate", "traverse"])
def test_codes_are_not_interpolated_and_it_says_why(prior: Path, action: str) -> None:
    with pytest.raises(UserError, match="its latents are not Normal but discrete: without μ, σ and ε"):
        call("sample", prior, action, "--count", 2)


def test_samples_stand_beside_their_neighbours(first: Path, prior: Path) -> None:
    for folder in (first, prior):
        assert call("sample", folder, "neighbours", "--count", 2, "--nearest", 3) == 0
        assert (folder / "samples" / "neighbours-raw.png").exists()


# ------------------------------------------------------------------------------------------------------------- convert


def test_stage_1_converts_both_ways(tmp_path: Path) -> None:
    config = first_config(*GREY, "model.factors=[4, 2]", "train.steps=1")
    assert train_in(tmp_path, config) == "finished"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(config))
    theirs, ours = tmp_path / "theirs.pt", tmp_path / "ours.pt"
    assert call("convert", tmp_path / "tiny", theirs) == 0
    assert call("convert", theirs, ours, "--config", recipe) == 0
    x = torch.rand(2, 1, 8, 8)
    before, after = (load_model(path)(x) for path in (tmp_path / "tiny", ours))
    assert torch.equal(before.reconstruction, after.reconstruction)
    for z, other in zip(before.z, after.z, strict=True):
        assert torch.equal(z, other)


def test_levels_that_no_public_network_has_are_refused(tmp_path: Path) -> None:
    config = first_config("model.factors=[2, 4]", "train.steps=1")
    assert train_in(tmp_path, config) == "finished"
    with pytest.raises(UserError, match=r"model\.factors: is \[2, 4\]; public networks have 1 to 3 levels"):
        call("convert", tmp_path / "tiny", tmp_path / "theirs.pt")
    assert not (tmp_path / "theirs.pt").exists()
