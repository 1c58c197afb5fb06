"""Depthwise convolutions that are timed: three ways to one result, and the table of the command."""

import json
from pathlib import Path

import pytest
import torch
from entry_scripts import call
from places import ROOT

from nvae.benchmark.depthwise import COLUMNS, OURS, ROWS, SHAPES, Shape, depthwise_times
from nvae.commands import benchmark
from nvae.training.config import read_run_config

SMALL = Shape("small", 2, 6, 8)


def test_all_three_ways_are_timed_with_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {}

    def once(actions, rounds, device, warmup):  # type: ignore[no-untyped-def]
        results.update({name: action() for name, action in actions.items()})

    monkeypatch.setattr("nvae.benchmark.depthwise.in_turns", once)
    depthwise_times(SMALL, torch.float32, 1, torch.device("cpu"))
    assert set(results) == {OURS, ROWS, COLUMNS}
    for way in (OURS, COLUMNS):
        for found, expected in zip(results[way], results[ROWS], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_command_has_a_row_for_each_shape_and_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SHAPES", (SMALL,))
    file = tmp_path / "figures.json"
    call("benchmark", "depthwise", "--device", "cpu", "--rounds", 1, "--precision", "fp32", "bf16", "--json", file)
    figures = json.loads(file.read_text())["depthwise"]
    assert set(figures) == {"small fp32", "small bf16"}
    assert figures["small fp32"][ROWS]["faster"] == 1
    assert "small, 2 × 6 × 8², bf16" in capsys.readouterr().out


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.recipe)
def test_the_shapes_are_those_of_the_recipes(shape: Shape) -> None:
    """As many images as the recipe puts through at once; widened sixfold from a multiple of the decoder's channels."""
    config = read_run_config(ROOT / "configs" / f"{shape.recipe}.yaml", [])
    assert shape.batch == config.data.batch
    assert shape.channels % (6 * config.model.decoder_channels) == 0
    assert config.model.image_size % shape.side == 0
