"""Both ways of drawing codes that the benchmark times give the same codes."""

import json
from pathlib import Path
from typing import Any

import torch
from entry_scripts import call

from nvae.benchmark.drawing import SMALL, anew
from nvae.models.vqvae.pixelsnail import MapShape, PixelSNAIL


def test_a_whole_pass_at_each_position_draws_the_same_codes() -> None:
    prior = PixelSNAIL(MapShape(7, 5, 6), SMALL).eval()
    noise = torch.randn(3, 1, 5, 6)
    codes = anew(prior, noise)
    assert torch.equal(codes, prior.draw(noise)) and len(codes.unique()) == 7


def test_the_command_prints_how_much_faster_it_is(tmp_path: Path, capsys: Any) -> None:
    assert call("benchmark", "draw", "--side", 4, "--rounds", 1, "--json", tmp_path / "figures.json") == 0
    assert "draw: 16 × 4×4 codes, a prior of" in capsys.readouterr().out
    found = json.loads((tmp_path / "figures.json").read_text())["draw"]
    assert found["kept"]["faster"] > 0 and found["whole passes"]["faster"] == 1
