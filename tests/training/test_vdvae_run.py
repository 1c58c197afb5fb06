"""The Very Deep VAE through the same commands as every family: trained, cut short, on two ranks, evaluated, opened."""

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_scripts import call, results_of
from processes import start_ranks
from tiny_run import TINY, VERY_DEEP, checkpoint, column, differences, log, tiny_run, train_in
from torch import nn
from torch._dynamo.utils import counters

from nvae.checkpoints.loading import load_model
from nvae.core.config import apply_overrides
from nvae.core.errors import UserError
from nvae.models.vdvae.model import VDVAE
from nvae.models.vdvae.published import to_published
from nvae.training.config import AnyRunConfig, run_config
from nvae.training.trainer import Trainer

OPTIM = {"name": "adamw", "lr": 1e-2, "schedule": "constant", "warmup_steps": 2, "betas": [0.9, 0.9], "eps": 1e-8}
LIMITS = {"clip_norm": 0.05, "skip_norm": 10, "ema": 0.9}


def config(*overrides: str) -> AnyRunConfig:
    """A run of six updates, clipped, watched for skipping, and averaged."""
    return run_config(
        apply_overrides({**TINY, "model": VERY_DEEP, "optim": {**OPTIM, **LIMITS}}, list(overrides)), "tiny"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vdvae")
    assert train_in(folder, config()) == "finished"
    return folder / "tiny"


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


def test_losses_are_in_nats_per_dimension_and_metrics_in_nats(trained: Path) -> None:
    for loss, nelbo in zip(column(trained, "loss"), column(trained, "nelbo"), strict=True):
        assert loss == pytest.approx(nelbo / 64, rel=1e-6)


def test_a_run_learns(trained: Path) -> None:
    nelbo = column(trained, "nelbo")
    assert nelbo[-1] < nelbo[0]


def test_the_measured_moments_are_kept_in_the_run_and_its_checkpoints(trained: Path) -> None:
    mean, std = moments(trained)
    assert 70 < mean < 85 and 100 < std < 125
    content = checkpoint(trained, 0)
    for weights in (content["model"], content["ema"]):
        assert (float(weights["input.mean"]), float(weights["input.std"])) == (mean, std)
    assert content["config"]["model"]["input_mean"] is None


def moments(run: Path) -> tuple[float, float]:
    """What a run's model standardises its input with."""
    model = load_model(run)
    assert isinstance(model, VDVAE) and model.input.moments is not None
    return model.input.moments


def given(folder: Path) -> list[str]:
    """The options that give another run the numbers a run has measured."""
    mean, std = moments(folder)
    return [f"model.input_mean={mean:.4f}", f"model.input_std={std:.4f}"]


def test_a_run_of_given_moments_is_that_of_the_same_ones_measured(trained: Path, tmp_path: Path) -> None:
    assert train_in(tmp_path, config(*given(trained))) == "finished"
    assert log(tmp_path / "tiny") == log(trained)


@pytest.mark.usefixtures("dying")
def test_a_run_whose_config_holds_its_moments_goes_on_without_them(trained: Path, tmp_path: Path) -> None:
    """Earlier versions wrote what they had measured into the config."""
    with pytest.raises(ConnectionAbortedError):
        train_in(tmp_path, config(*given(trained)))
    assert train_in(tmp_path, config()) == "finished"
    assert log(tmp_path / "tiny") == log(trained)
    assert not [name for name in checkpoint(tmp_path / "tiny")["model"] if name.startswith("input")]


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "given"])
def test_a_warm_start_takes_the_moments_that_belong_to_the_weights(
    trained: Path, tmp_path: Path, measured: bool
) -> None:
    source = trained
    if not measured:
        source = tmp_path / "source" / "tiny"
        assert (
            train_in(source.parent, config("model.input_mean=60", "model.input_std=90", "train.steps=1")) == "finished"
        )
    assert train_in(tmp_path, config(f"train.init_from={source}", "train.steps=1")) == "finished"
    assert moments(tmp_path / "tiny") == moments(source)


@pytest.mark.usefixtures("dying")
def test_a_run_that_died_ends_as_if_it_had_not(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionAbortedError):
        train_in(tmp_path, config())
    assert train_in(tmp_path, config()) == "finished"
    assert differences(checkpoint(tmp_path / "tiny"), checkpoint(trained)) == []
    assert log(tmp_path / "tiny") == log(trained)


def test_a_run_starts_from_a_published_checkpoint(trained: Path, tmp_path: Path) -> None:
    """Such a one carries no hyper-parameters: they are the run's."""
    model = load_model(trained)
    assert isinstance(model, VDVAE)
    published = tmp_path / "published.th"
    torch.save(to_published(model), published)
    asked = config(f"train.init_from={published}", "train.steps=1", *given(trained))
    assert train_in(tmp_path, asked) == "finished"
    content = checkpoint(tmp_path / "tiny", 0)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("input")}
    assert differences(content["model"], weights) == []
    assert differences(content["ema"], weights) == []


def test_a_published_checkpoint_does_not_say_what_its_input_was_standardised_with(
    trained: Path, tmp_path: Path
) -> None:
    torch.save(to_published(load_model(trained)), tmp_path / "published.th")
    with pytest.raises(UserError, match=r"model\.input_mean, model\.input_std: not measured"):
        train_in(tmp_path, config(f"train.init_from={tmp_path / 'published.th'}"))


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (
            lambda *options: config("model.width=16", *options),
            r"state_dict: weights and config are of .*: model\.width is 16 in the config, 8 by the weights",
        ),
        (tiny_run, "config: its model is of family 'nvae', the checkpoint is of family 'vdvae'"),
    ],
    ids=["width", "family"],
)
def test_a_published_checkpoint_of_another_model_is_refused(
    trained: Path, tmp_path: Path, other: Any, complaint: str
) -> None:
    model = load_model(trained)
    assert isinstance(model, VDVAE)
    torch.save(to_published(model), tmp_path / "published.th")
    with pytest.raises(UserError, match=rf"^train\.init_from: .*published\.th: {complaint}") as error:
        train_in(tmp_path, other(f"train.init_from={tmp_path / 'published.th'}"))
    assert len(str(error.value).splitlines()) == 1


def test_other_moments_are_another_model(trained: Path) -> None:
    with pytest.raises(UserError, match=r"model\.input_mean: .* → 1"):
        train_in(trained.parent, config("model.input_mean=1", "model.input_std=1"))


def _train_rank(folder: Path) -> None:
    train_in(folder, config("data.batch=16"))


@pytest.mark.slow
def test_two_processes_train_as_one(trained: Path, tmp_path: Path) -> None:
    processes = start_ranks(2, _train_rank, tmp_path)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for name in ("loss", "nelbo", "kl", "gradient_norm"):
        assert column(tmp_path / "tiny", name) == pytest.approx(column(trained, name), rel=1e-5), name
    assert moments(tmp_path / "tiny") == moments(trained)


@pytest.mark.parametrize("option", ["train.recompute=cells", "train.precision=bf16"])
def test_options_of_the_engine_work(trained: Path, tmp_path: Path, option: str) -> None:
    assert train_in(tmp_path, config(option)) == "finished"
    tolerance = 1e-6 if "recompute" in option else 0.02
    assert column(tmp_path / "tiny", "nelbo") == pytest.approx(column(trained, "nelbo"), rel=tolerance)


def test_it_is_evaluated_like_any_other(trained: Path) -> None:
    assert call("evaluate", trained, "--importance-samples", 10, "--limit", 50) == 0
    (entry,) = results_of(trained).values()
    estimates = entry["estimates"]
    assert estimates["bound_10"]["nats"] < estimates["bound_1"]["nats"]
    assert entry["weights"] == "ema"


def test_its_evaluation_is_compiled_where_asked_for(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    assert call("evaluate", trained, "--importance-samples", 2, "--limit", 4, "--seed", 1, "--compile") == 0
    assert counters["stats"]["unique_graphs"] > 0 and dict(counters["graph_break"]) == {}
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "0.7", "1,0.9,0.8"],  # one, and one for each resolution
        ["reconstruct", "--groups", 1, 3],
        ["interpolate", "--steps", 3],
        ["traverse", "--group", 0, "--steps", 3],
        ["neighbours", "--nearest", 2],
    ],
    ids=lambda arguments: arguments[0],
)
def test_its_samples_and_latents_are_seen_like_any_other_s(trained: Path, arguments: list[Any]) -> None:
    assert call("sample", trained, *arguments, "--count", 2) == 0


def test_it_has_a_page(trained: Path) -> None:
    assert call("evaluate", trained, "--report") == 0
    assert "KL of each group" in (trained / "report.html").read_text()
