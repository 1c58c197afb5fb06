"""What the benchmark of drawing says of its times, and that its command runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from entry_scripts import call

from nvae.benchmark.drawing import AT_ONCE, DRAWN, PASSES, Drawing
from nvae.benchmark.timing import Times


def test_each_code_would_take_a_pass() -> None:
    times = Times({DRAWN: [2.0, 1.0, 4.0], PASSES: [1.0 * AT_ONCE] * 3})
    found = Drawing(side=10, batch=1, parameters=7, times=times).summary()
    assert found["faster"] == pytest.approx(100 / 2)
    assert (found["faster_least"], found["faster_most"]) == pytest.approx((25, 100))
    assert (found["milliseconds"], found["pass_milliseconds"]) == pytest.approx((2000, 1000))


def test_the_command_prints_how_much_faster_it_is(tmp_path: Path, capsys: Any) -> None:
    assert call("benchmark", "draw", "--side", 4, "--rounds", 1, "--json", tmp_path / "figures.json") == 0
    assert "draw: 16 × 4×4 codes, a prior of 1,916,960 parameters" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["draw"]["faster"] > 0
