"""A field of any section that is given is used, or refused by name when a run begins; none of the recipes has one."""

from pathlib import Path

import pytest
from places import ROOT
from tiny_run import tiny_run, train_in

from nvae.commands.train import dry_run
from nvae.core.config import refuse_idle, validate
from nvae.core.errors import UserError
from nvae.models.vqvae.config import VQVAEConfig, VQVAEPriorConfig
from nvae.training.config import read_run_config

MIXTURE = ["model.likelihood.kind=logistic_mixture", "data.binarize=false"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["optim.schedule=constant", "optim.lr_min=1e-5"], "the schedule is constant"),
        (["optim.skip_factor=4"], "there is no skip_quantile"),
        (["optim.skip_norm=3", "optim.skip_window=100"], "there is no skip_quantile"),
        (["optim.skip_limit=4"], "there is neither skip_norm nor skip_quantile"),
        (["train.loss_scale=8"], "with precision fp32 no loss is scaled"),
        (["train.steps=3", "train.profile=2"], "the first 3 updates are not recorded, and steps is 3"),
        (["train.exchange=bf16"], "there is one process"),
        (["model.min_groups=2"], "without adaptive_groups all scales have the same"),
        (["model.likelihood.components=3"], "the likelihood is bernoulli"),
        (["model.likelihood.edge=published"], "the likelihood is bernoulli"),
        ([*MIXTURE, "model.likelihood.grid=truncated"], "both have the same 8 bits"),
        (["model.objective.kl_warmup=0", "model.objective.kl_balance=false"], "there is no kl_warmup"),
        (["model.objective.spectral=0", "model.objective.spectral_start=1"], "there are no penalties"),
    ],
    ids=lambda given: given[-1] if isinstance(given, list) else "",
)
def test_a_field_without_effect_is_refused_before_anything_is_written(
    given: list[str], reason: str, tmp_path: Path
) -> None:
    field, _, value = given[-1].partition("=")
    with pytest.raises(UserError, match=rf"^{field}: has no effect, {reason}; leave it out \(found "):
        train_in(tmp_path, tiny_run(*given))
    assert not (tmp_path / "tiny" / "config.yaml").exists()
    with pytest.raises(UserError, match=rf"^{field}: has no effect"):
        dry_run(tiny_run(*given))
    assert value


@pytest.mark.parametrize(
    "given",
    [
        ["optim.lr_min=1e-5"],
        ["optim.skip_quantile=0.5", "optim.skip_factor=4", "optim.skip_window=100", "optim.skip_limit=4"],
        ["optim.skip_norm=3", "optim.skip_limit=4"],
        ["train.precision=mixed", "train.loss_scale=8"],
        ["train.steps=4", "train.profile=2"],
        ["model.adaptive_groups=true", "model.min_groups=2"],
        [*MIXTURE, "model.likelihood.bits=5", "model.likelihood.grid=truncated", "model.likelihood.edge=published"],
        ["model.objective.kl_balance=false", "model.objective.spectral_start=1"],
    ],
    ids=lambda given: given[0],
)
def test_the_same_field_is_taken_where_it_has_one(given: list[str]) -> None:
    refuse_idle(tiny_run(*given))


def test_codes_that_learn_by_gradient_have_no_averages() -> None:
    config = validate(VQVAEConfig, {"quantiser": {"learning": "gradient", "decay": 0.9}}, "config")
    with pytest.raises(UserError, match=r"^quantiser\.decay: has no effect, codes learn by their gradient"):
        refuse_idle(config)


def test_a_prior_without_classes_drops_none() -> None:
    config = validate(VQVAEPriorConfig, {"codes": "runs/first", "label_dropout": 0.2}, "config")
    with pytest.raises(UserError, match=r"^label_dropout: has no effect, the model takes no classes"):
        refuse_idle(config)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_gives_no_such_field(path: Path) -> None:
    refuse_idle(read_run_config(path, []))


def test_a_run_that_began_with_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions accepted it, and without it the config would be another one."""
    config = tiny_run("optim.skip_factor=4", "train.steps=1")
    with monkeypatch.context() as earlier:
        earlier.setattr("nvae.training.setup.refuse_idle", lambda config: None)
        assert train_in(tmp_path, config) == "finished"
    assert train_in(tmp_path, config) == "finished"
