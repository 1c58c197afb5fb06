"""The models that ship: they are small, load by their names, and are as good as their cards say."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from entry_scripts import call
from places import SHARED

import nvae
from nvae.checkpoints.pretrained import pretrained_models
from nvae.evaluation.results import read_results

MODELS = pretrained_models()
LARGEST = 3_000_000
"""Bytes of a model."""


def said(name: str) -> dict[str, float]:
    """The figures of a card, by what they are called."""
    front = yaml.safe_load((MODELS[name] / "README.md").read_text(encoding="utf-8").split("---")[1])
    results = front["model-index"][0]["results"]
    return {metric["name"]: metric["value"] for result in results for metric in result["metrics"]}


def measured(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """The entry of an evaluation into a folder."""
    assert call("evaluate", name, "--out", str(folder), *options) == 0
    (entry,) = read_results(folder / "results.json").values()
    estimates: dict[str, Any] = entry["estimates"]
    return estimates


def test_digits_and_a_small_mnist_ship() -> None:
    assert list(MODELS) == ["digits", "mnist-small"]


@pytest.mark.parametrize("name", MODELS)
def test_it_is_small_and_has_a_card_without_places(name: str) -> None:
    assert sum(file.stat().st_size for file in MODELS[name].iterdir()) < LARGEST
    text = (MODELS[name] / "README.md").read_text() + (MODELS[name] / "config.yaml").read_text()
    assert not re.search(r"/(tmp|home|work|root)/", text)


@pytest.mark.parametrize("name", MODELS)
def test_it_loads_by_its_name_and_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nvae.from_pretrained(name)
    images = model.sample(2, temperature=0.8).mean()
    size = model.config.image_size
    assert images.shape == (2, 1, size, size)
    assert torch.isfinite(images).all()


@pytest.mark.slow
def test_digits_have_the_bound_of_their_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = measured("digits", tmp_path / "out", "--importance-samples", "10")
    told = said("digits")["bound on −log p(x), nats, 10 importance samples"]
    assert found["bound_10"]["nats"] == pytest.approx(told, abs=1e-3)  # the same noise: only rounding differs


@pytest.mark.slow
@pytest.mark.shared
def test_mnist_has_the_bound_of_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--importance-samples", "10", "--limit", "200", "--data", str(SHARED / "data" / "mnist"))
    bound = measured("mnist-small", tmp_path / "out", *options)["bound_10"]
    told = said("mnist-small")["bound on −log p(x), nats, 10 importance samples"]
    assert abs(bound["nats"] - told) < 4 * bound["standard_error"]
