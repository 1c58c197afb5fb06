"""The contract of a family is enough: a toy one trains, evaluates what it can and samples by the same commands."""

import json
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from entry_scripts import call
from tiny_run import train_in
from torch import nn
from torch._dynamo.utils import counters
from toy_family import Toy, ToyFeatures, drawn

from nvae.checkpoints.loading import load_model
from nvae.core.errors import UserError
from nvae.evaluation.bounds import Evaluator
from nvae.sampling.images import sample_images
from nvae.sampling.latent_space import reconstruct
from nvae.training.config import run_config

CONFIG = {
    "name": "toy",
    "model": {
        "family": "toy_family:Toy",
        "image_size": 8,
        "image_channels": 1,
        "likelihood": {"kind": "bernoulli"},
    },
    "data": {"name": "digits", "size": 8, "channels": 1, "binarize": True, "batch": 50},
    "optim": {"name": "adamw", "lr": 1e-2, "warmup_epochs": 0},
    "train": {"epochs": 3, "log_every": 30, "device": "cpu"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert train_in(folder, run_config(CONFIG, "toy")) == "finished"
    return folder


def test_it_trains_and_validates(runs: Path) -> None:
    lines = [json.loads(line) for line in (runs / "toy" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert any("validation/nelbo" in line for line in lines)


def test_its_whole_is_compiled_for_training_where_it_names_no_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    settings = {**CONFIG, "train": {"steps": 2, "device": "cpu", "compile": True}}
    assert train_in(tmp_path, run_config(settings, "toy")) == "finished"
    assert counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("classes", [0, 10])
def test_labels_reach_it_in_training_where_it_has_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    seen: list[torch.Tensor | None] = []
    original = Toy.encode

    def encode(self: Toy, x: torch.Tensor, labels: torch.Tensor | None = None) -> ToyFeatures:
        seen.append(labels)
        return original(self, x, labels)

    monkeypatch.setattr(Toy, "encode", encode)
    model, few = {**CONFIG["model"], "classes": classes}, {"steps": 1, "device": "cpu"}
    assert train_in(tmp_path, run_config({**CONFIG, "model": model, "train": few}, "toy")) == "finished"
    if classes:
        assert seen[0] is not None and seen[0].shape == (50,) and set(seen[0].tolist()) <= set(range(10))
    else:
        assert seen[0] is None


def test_its_checkpoint_loads(runs: Path) -> None:
    model = load_model(runs / "toy")
    assert model.sample(4).mean().shape == (4, 1, 8, 8)


def test_its_discrete_draws_follow_from_noise(runs: Path) -> None:
    model, images = load_model(runs / "toy"), (torch.rand(3, 1, 8, 8) < 0.5).float()
    rebuilt = [reconstruct(model, images, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(rebuilt[0], rebuilt[1]) and not all(torch.equal(rebuilt[0], other) for other in rebuilt[2:])
    together, apart = sample_images(model, range(4)), [sample_images(model, [number]) for number in range(4)]
    torch.testing.assert_close(together, torch.cat(apart))
    given = model.decode(model.encode(images))
    again = model.decode(model.encode(images), latents=given.z)
    assert torch.equal(given.likelihood.params, again.likelihood.params)


def test_a_discrete_draw_has_its_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    noise = torch.special.ndtri((torch.arange(1000) + 0.5) / 1000)[:, None, None, None]
    codes = drawn(probabilities.log().expand(1000, -1), noise)
    torch.testing.assert_close(codes.bincount(minlength=4) / 1000, probabilities, rtol=0, atol=2e-3)


def test_importance_weighting_is_a_clear_error(runs: Path) -> None:
    with pytest.raises(UserError, match="importance samples"):
        Evaluator(load_model(runs / "toy"), samples=10)


def test_it_is_evaluated_and_sampled_by_the_same_commands(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", runs / "toy") == 0
    assert "gives no bound on the likelihood" in capsys.readouterr().out
    assert call("sample", runs / "toy", "--count", 4, "--temperature", 0.7) == 0
    assert call("sample", runs / "toy", "reconstruct") == 0
    assert call("evaluate", runs / "toy", "--report") == 0
    assert "Reconstructions" in (runs / "toy" / "report.html").read_text()


def test_what_it_cannot_do_is_a_clear_error(runs: Path) -> None:
    with pytest.raises(UserError, match="Toy takes none, it has no density of its latents"):
        call("evaluate", runs / "toy", "--importance-samples", 10)
    with pytest.raises(UserError, match="--compile: Toy names no parts to compile for evaluation"):
        call("evaluate", runs / "toy", "--compile")
    with pytest.raises(UserError, match="Toy: its latents are not Normal"):
        call("sample", runs / "toy", "interpolate")
