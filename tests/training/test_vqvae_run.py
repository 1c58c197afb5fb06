"""VQ-VAE through the same commands as every family: both stages trained, cut short, on two ranks, evaluated, drawn."""

import json
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_scripts import call, results_of
from processes import start_ranks
from tiny_run import checkpoint, column, differences, log, train_in
from tiny_vqvae import first_config, prior_config
from torch import nn
from torch._dynamo.utils import counters

from nvae.checkpoints.loading import load_model
from nvae.core.errors import UserError
from nvae.models.vqvae.model import VQVAE
from nvae.models.vqvae.prior import VQVAEPrior
from nvae.training.trainer import Trainer


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of stage 1 that nothing happened to."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vqvae")
    assert train_in(folder, first_config()) == "finished"
    return folder / "tiny"


@pytest.fixture(scope="module")
def prior(first: Path) -> Path:
    """That of one of stage 2."""
    assert train_in(first.parent, prior_config(first)) == "finished"
    return first.parent / "prior"


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the fifth update die in its middle, once."""
    original, left = Trainer._accumulate_gradients, [5]

    def gradients(self: Trainer) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise ConnectionAbortedError
        return original(self)

    monkeypatch.setattr(Trainer, "_accumulate_gradients", gradients)
    yield


# -------------------------------------------------------------------------------------------------------------- stage 1


def test_a_run_learns_and_logs_its_codebooks(first: Path) -> None:
    nelbo = column(first, "nelbo")
    assert nelbo[-1] < nelbo[0]
    for level in ("00", "01"):
        assert all(1 <= value <= 6 for value in column(first, f"perplexity/{level}"))
        assert len(column(first, f"restarts/{level}")) == 6
        assert 1 <= column(first, f"validation/codes_in_use/{level}")[-1] <= 6


@pytest.mark.usefixtures("dying")
def test_a_run_that_died_ends_as_if_it_had_not(first: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionAbortedError):
        train_in(tmp_path, first_config())
    assert train_in(tmp_path, first_config()) == "finished"
    assert differences(checkpoint(tmp_path / "tiny"), checkpoint(first)) == []
    assert log(tmp_path / "tiny") == log(first)


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("loss", "nelbo", "gradient_norm", "perplexity/01"):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=1e-4), name
    state, other = checkpoint(ours)["model"], checkpoint(theirs)["model"]
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


def test_accumulation_changes_nothing(first: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path, first_config("data.batch=8", "data.global_batch=32")) == "finished"
    assert_same_run(tmp_path / "tiny", first)


def test_recomputation_changes_nothing(first: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path, first_config("train.recompute=cells")) == "finished"
    assert_same_run(tmp_path / "tiny", first)


def _train_rank(folder: Path) -> None:
    train_in(folder, first_config("data.batch=16"))


def test_two_processes_train_as_one(first: Path, tmp_path: Path) -> None:
    processes = start_ranks(2, _train_rank, tmp_path)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same_run(tmp_path / "tiny", first)


def test_skipped_updates_leave_codebooks_as_they_began(tmp_path: Path) -> None:
    assert train_in(tmp_path, first_config("optim.skip_norm=1e-9", "optim.skip_limit=100")) == "finished"
    began, ended = (checkpoint(tmp_path / "tiny", step)["model"] for step in (0, 6))
    assert differences(began, ended) == []


def test_averages_of_the_weights_have_the_codebooks_of_now(tmp_path: Path) -> None:
    assert train_in(tmp_path, first_config("optim.ema=0.9")) == "finished"
    content = checkpoint(tmp_path / "tiny")
    for name, tensor in content["model"].items():
        same = torch.equal(content["ema"][name], tensor)
        assert same if "quantiser" in name else not same, name


def test_bf16_works(first: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path, first_config("train.precision=bf16")) == "finished"
    assert column(tmp_path / "tiny", "nelbo") == pytest.approx(column(first, "nelbo"), rel=0.02)


# -------------------------------------------------------------------------------------------------------------- stage 2


def test_priors_learn_and_the_first_stage_does_not(first: Path, prior: Path) -> None:
    rate = column(prior, "kl")
    assert rate[-1] < rate[0]
    content = checkpoint(prior)["model"]
    for name, tensor in checkpoint(first)["model"].items():
        assert torch.equal(content[f"first.{name}"], tensor)


def test_a_prior_is_whole_without_the_run_it_came_from(first: Path, prior: Path, tmp_path: Path) -> None:
    whole = tmp_path / "prior"
    prior.rename(whole)
    hidden = first.rename(first.with_name("hidden"))
    try:
        model = load_model(whole)
        assert isinstance(model, VQVAEPrior)
        assert model.sample(2).mean().shape == (2, 1, 8, 8)
        assert train_in(tmp_path, prior_config(first, "train.steps=7", "allow_changes=true")) == "finished"
    finally:
        hidden.rename(first)
        whole.rename(prior)


def test_a_prior_without_a_run_to_build_on_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"built on: .*nowhere: no such checkpoint") as error:
        train_in(tmp_path, prior_config(tmp_path / "nowhere"))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.usefixtures("dying")
def test_a_prior_that_died_ends_as_if_it_had_not(first: Path, prior: Path, tmp_path: Path) -> None:
    reference = tmp_path / "whole"
    assert train_in(reference, prior_config(first, "train.steps=4")) == "finished"
    with pytest.raises(ConnectionAbortedError):
        train_in(tmp_path, prior_config(first, "train.steps=4"))
    assert train_in(tmp_path, prior_config(first, "train.steps=4")) == "finished"
    assert differences(checkpoint(tmp_path / "prior"), checkpoint(reference / "prior")) == []


def test_a_level_trained_alone_goes_on_top_of_another(first: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path, prior_config(first, "model.level=0", "name=top", "train.steps=2")) == "finished"
    both = prior_config(tmp_path / "top", "model.level=1", "name=both", "train.steps=2")
    assert train_in(tmp_path, both) == "finished"
    top, whole = (checkpoint(tmp_path / name)["model"] for name in ("top", "both"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in top.items() if name.startswith("priors.0"))
    assert any(name.startswith("priors.1") for name in whole)


# ------------------------------------------------------------------------------------------------- what is made of them


def test_both_are_evaluated_with_their_one_draw(first: Path, prior: Path) -> None:
    for folder in (first, prior):
        assert call("evaluate", folder, "--limit", 50) == 0
        (entry,) = results_of(folder).values()
        assert entry["density"] == "point"
        assert entry["importance_samples"] == 1
        assert min(entry["active_units_per_group"]) >= 1 and max(entry["active_units_per_group"]) <= 6
        estimates = entry["estimates"]
        rate_and_distortion = estimates["kl"]["nats"] + estimates["reconstruction"]["nats"]
        assert estimates["nelbo"]["nats"] == pytest.approx(rate_and_distortion, rel=1e-6)
        with pytest.raises(UserError, match="all draws of an image are the same"):
            call("evaluate", folder, "--importance-samples", 10)


def test_a_posterior_temperature_gives_importance_samples(first: Path, tmp_path: Path) -> None:
    config = prior_config(first, "model.posterior_temperature=1", "train.steps=1")
    assert train_in(tmp_path, config) == "finished"
    assert call("evaluate", tmp_path / "prior", "--importance-samples", 10, "--limit", 20) == 0
    (entry,) = results_of(tmp_path / "prior").values()
    assert entry["estimates"]["bound_10"]["nats"] < entry["estimates"]["bound_1"]["nats"]


def test_evaluation_is_compiled_where_asked_for(first: Path, prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    for folder in (first, prior):
        torch._dynamo.reset()
        counters.clear()
        assert call("evaluate", folder, "--limit", 4, "--seed", 1, "--compile") == 0
        assert counters["stats"]["unique_graphs"] > 0 and dict(counters["graph_break"]) == {}
    torch._dynamo.reset()


@pytest.mark.parametrize("arguments", [["--temperature", "0.7", "1,0"], ["reconstruct", "--groups", 1]])
def test_both_are_sampled(first: Path, prior: Path, arguments: list[Any]) -> None:
    for folder in (first, prior):
        assert call("sample", folder, *arguments, "--count", 2) == 0


def test_a_prior_with_classes_draws_them_with_guidance(first: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path, prior_config(first, "model.classes=10")) == "finished"
    for guidance in (0, 2.5):
        out = tmp_path / str(guidance)
        options = ["--classes", 3, 0, "--count", 2, "--guidance", guidance, "--out", out]
        assert call("sample", tmp_path / "prior", *options) == 0
        (file,) = (out / "samples").glob("*.json")
        about = json.loads(file.read_text())
        assert about["classes"] == [3, 0] and about["guidance"] == guidance
        assert ("guidance2.5" in file.name) == bool(guidance)


def test_they_have_a_page(prior: Path) -> None:
    assert call("evaluate", prior, "--report") == 0
    assert "KL of each group" in (prior / "report.html").read_text()


# ----------------------------------------------------------------------------------------------------- squared error


def test_without_a_likelihood_rate_and_distortion_are_reported_and_no_sum(tmp_path: Path) -> None:
    squared = "model.likelihood={kind: squared_error}"
    assert train_in(tmp_path, first_config(squared, "data.binarize=false")) == "finished"
    folder = tmp_path / "tiny"
    assert column(folder, "squared_error")[-1] < column(folder, "squared_error")[0]
    logged = {name for line in log(folder) for name in line}
    assert not {name for name in logged if "nelbo" in name or "bound" in name or "bits" in name}
    assert call("evaluate", folder, "--limit", 20) == 0
    (entry,) = results_of(folder).values()
    assert entry["estimates"].keys() == {"squared_error", "kl"}
    assert call("evaluate", folder, "--report") == 0
    assert "no likelihood" in (folder / "report.html").read_text()
    assert isinstance(load_model(folder), VQVAE)
