"""The examples of CONTRIBUTING.md are whole: they run as they stand there, and do what is said of them."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT
from tiny_run import log, tiny_run, train_in

from nvae.bricks.cells import ARCHITECTURES
from nvae.bricks.likelihoods import LIKELIHOODS, Likelihood, LikelihoodConfig
from nvae.checkpoints.loading import load_model
from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.named import SETS
from nvae.data.sets import open_images
from nvae.evaluation.bounds import Evaluator

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(name: str) -> ModuleType:
    """The block of the page that begins with a comment of that name, run as a module."""
    blocks = re.findall(rf"^```python\n(# {name}:.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    module = ModuleType(f"example_{name.replace(' ', '_')}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(blocks[0], f"CONTRIBUTING.md: {name}", "exec"), module.__dict__)
    return module


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    """What examples add to tables and modules is taken out again."""
    rows, modules = dict(ARCHITECTURES), set(sys.modules)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(rows)
    for name in set(sys.modules) - modules:
        if name.startswith(("example_", "my_")):
            del sys.modules[name]


def test_every_block_of_python_is_run_here() -> None:
    assert re.findall(r"^```python\n# ([\w ]+):", PAGE, re.MULTILINE) == ["cell", "likelihood", "data set", "family"]
    assert PAGE.count("```python") == 4


def test_the_rooms_of_the_page_are_those_of_the_tests() -> None:
    listed = re.search(r"`scripts/test\.sh ROOM` runs one room \((.*?)\)", PAGE, re.DOTALL)
    assert listed is not None
    rooms = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert set(re.findall(r"`(\w+)`", listed[1])) == rooms


def test_the_cell_trains(tmp_path: Path) -> None:
    example("cell")
    assert train_in(tmp_path, tiny_run("model.architecture=mbconv_e4", "data.batch=2", "train.steps=2")) == "finished"


@pytest.fixture
def likelihood() -> Any:
    return example("likelihood").Categorical


@pytest.mark.parametrize("bits", [3, 8])
def test_levels_of_the_likelihood_sum_to_one(likelihood: Any, bits: int) -> None:
    config, count = LikelihoodConfig(bits=bits), 2**bits
    params = torch.randn(1, likelihood.params_per_pixel(config, 1), 1, 1).expand(count, -1, 1, 1)
    x = torch.linspace(0, 1, count).reshape(count, 1, 1, 1)
    assert float(likelihood(params, config, 1).log_prob(x).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_draws_of_the_likelihood_have_their_probabilities(likelihood: Any) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5])
    pixels: Likelihood = likelihood(logits.reshape(1, 4, 1, 1).expand(1, 4, 100, 100), LikelihoodConfig(bits=2), 1)
    share = (3 * pixels.sample()).round().long().flatten().bincount(minlength=4) / 1e4
    torch.testing.assert_close(share, logits.softmax(0), rtol=0, atol=0.02)  # four standard errors
    assert bool(((3 * pixels.sample(temperature=0)).round() == 2).all())
    mean = logits.softmax(0) @ torch.arange(4.0) / 3
    torch.testing.assert_close(pixels.mean(), mean.expand(1, 1, 100, 100))


def test_the_likelihood_trains(likelihood: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIKELIHOODS, "logistic_mixture", likelihood)
    options = [
        "model.likelihood.kind=logistic_mixture",
        "model.likelihood.bits=4",
        "data.binarize=false",
        "data.batch=2",
    ]
    assert train_in(tmp_path, tiny_run(*options, "train.steps=2")) == "finished"


def test_the_data_set_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "digits", example("data set").BARS)
    config = DataConfig(name="digits", path=tmp_path)
    with pytest.raises(UserError, match=r"data\.path: .* looked for bars\.npz"):
        open_images(config, "train")
    arrays = {name: np.full((count, 8, 8), 255, np.uint8) for name, count in (("train", 3), ("test", 2))}
    np.savez(tmp_path / "bars.npz", **arrays)
    assert [len(open_images(config, split)) for split in ("train", "validation", "test")] == [3, 2, 2]
    assert open_images(config, "train").shape == (1, 8, 8)


def test_the_family_trains_and_has_bounds(tmp_path: Path) -> None:
    sys.modules["my_family"] = example("family")
    model = "model={family: 'my_family:Linear', image_size: 8, image_channels: 1, likelihood: {kind: bernoulli}}"
    assert train_in(tmp_path, tiny_run(model, "train.validate_every=1")) == "finished"
    losses = [line["loss"] for line in log(tmp_path / "tiny") if "loss" in line]
    assert losses[-1] < losses[0]
    loaded = load_model(tmp_path / "tiny")
    figures = Evaluator(loaded, samples=10).measure(torch.bernoulli(torch.rand(8, 1, 8, 8)), range(8))
    assert bool((figures.bounds[10] < figures.bounds[1]).any())
