"""scripts/gpu.sh and scripts/gpu_report.py: steps that are kept, missed and told; and both of them on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

STUB = """#!/usr/bin/env bash
# Stands for Python: fails for what FAILING names, else answers or writes one line of JSON.
echo "$*" >>"$CALLS"
for word in "$@"; do
    [ "$word" != "$FAILING" ] || exit 3
done
while [ $# -gt 0 ]; do
    [ "$1" != --json ] || printf '{}' >"$2"
    shift
done
echo '{}'
"""
BEGIN, END = "<!-- scripts/gpu_report.py writes from here -->", "<!-- to here -->"


def script(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "scripts/gpu.sh", out, *options],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def report(out: Path, page: Path | None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/gpu_report.py", out]
    return subprocess.run([*command, *(["--page", page] if page else [])], capture_output=True, text=True)


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """An environment in which the script's Python is the stub."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    return {"PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "FAILING": ""}


def calls(stub: dict[str, str]) -> list[str]:
    return Path(stub["CALLS"]).read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------- the steps


def test_a_dry_run_lists_the_steps_and_makes_nothing(tmp_path: Path) -> None:
    steps = script(tmp_path / "out", "--dry-run").stdout.splitlines()
    assert steps[0] == "doctor"
    assert {"tests-training", "tests-kernels", "depthwise", "training-1", "training-2"} <= set(steps)
    recipes, precisions = ("cifar10", "celeba_64", "ffhq_256"), ("fp16", "bf16", "tf32")
    assert {f"update-{recipe}-{precision}" for recipe in recipes for precision in precisions} <= set(steps)
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_done_is_not_done_again(tmp_path: Path, stub: dict[str, str]) -> None:
    first = script(tmp_path / "out", "--tiny", "--device", "cpu", **stub)
    done = len(calls(stub))
    second = script(tmp_path / "out", "--tiny", "--device", "cpu", **stub)
    assert (first.returncode, second.returncode, len(calls(stub))) == (0, 0, done)
    steps = {file.stem for file in (tmp_path / "out").glob("*.json")}
    assert steps == {"doctor", "tests-sampling", "update-debug-fp32", "training-1"}
    assert second.stdout.splitlines()[0] == "doctor: done before"


def test_a_step_that_fails_stops_no_other_and_is_tried_again(tmp_path: Path, stub: dict[str, str]) -> None:
    first = script(tmp_path / "out", "--tiny", "--device", "cpu", **{**stub, "FAILING": "scripts/benchmark.py"})
    assert first.returncode == 1
    assert "update-debug-fp32: failed, see" in first.stdout
    assert (tmp_path / "out/training-1.json").exists() and not (tmp_path / "out/update-debug-fp32.json").exists()
    again = script(tmp_path / "out", "--tiny", "--device", "cpu", **stub)
    assert "update-debug-fp32: done\n" in again.stdout and again.returncode == 0


def test_one_step_alone(tmp_path: Path, stub: dict[str, str]) -> None:
    assert script(tmp_path / "out", "--step", "update-ffhq_256-tf32", **stub).stdout == "update-ffhq_256-tf32: done\n"
    (command,) = calls(stub)
    assert command.startswith("scripts/benchmark.py train --plain --device cuda --json ")
    assert command.endswith("--model configs/ffhq_256.yaml --batch 4 --compile --precision tf32")


def test_what_is_no_option_is_said(tmp_path: Path) -> None:
    found = script(tmp_path / "out", "--fast")
    assert (found.returncode, found.stderr) == (2, "error: --fast: takes --device, --tiny, --dry-run, --step\n")


# --------------------------------------------------------------------------------------------------------- the report


def results(out: Path, name: str) -> Path:
    """What a GPU of that name might have left."""
    way = {"milliseconds": 200.0, "spread": 1.0, "faster": 2.0, "faster_least": 1.9, "faster_most": 2.1}
    machine = {"device": name, "threads": 8, "torch": "2.14"}
    gpu = {"name": "cuda:0", "words": name, "figures": {"name": name}}
    compared = {
        "name": "gated_sum (gated_sum:gated_sum)",
        "words": "float32 right, 0.04 ms (plain 0.05)",
        "figures": {},
    }
    steps: dict[str, Any] = {
        "doctor": {"sections": {"devices": [gpu], "versions": [], "kernels": [compared]}},
        "update-cifar10-bf16": {
            "machine": machine, "model": "configs/cifar10.yaml",
            "train": {"batch 32": {"ours bf16": way | {"share_of_peak": 0.25}}, "matrix_peak_gflops": {"bf16": 1.0}},
        },
        "depthwise": {"machine": machine, "depthwise": {"cifar10 bf16": {"ours": way}}},
        "tests-kernels": {"passed": 9, "failed": ["tests.kernels.test_x"], "skipped": 1},
        "training-2": {"outcome": "interrupted", "last": {"step": 900, "nelbo": 90.5, "tflops": None}},
    }  # fmt: skip
    out.mkdir()
    for step, content in steps.items():
        (out / f"{step}.json").write_text(json.dumps(content))
    return out


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "page.md"
    file.write_text(f"# Performance\n\n{BEGIN}\nNot measured.\n{END}\n\n## After\n")
    return file


def test_a_device_has_its_tables_between_the_markers(tmp_path: Path, page: Path) -> None:
    assert report(results(tmp_path / "out", "NVIDIA Imaginary"), page).returncode == 0
    text = page.read_text()
    assert text.startswith(f"# Performance\n\n{BEGIN}\n### NVIDIA Imaginary, PyTorch 2.14\n")
    assert text.endswith(f"{END}\n\n## After\n") and "Not measured" not in text
    for row in (
        "| `cifar10` | 32 | ours bf16 | 200.0 ± 1.0 | 2.00 (1.90–2.10) | 25% |",
        "| cifar10 bf16 | ours | 200.00 | 2.00 |",
        "| gated_sum (gated_sum:gated_sum) | float32 right, 0.04 ms (plain 0.05) |",
        "| kernels | 9 | tests.kernels.test_x | 1 |",
        "| training, interrupted |  |",
        "| nelbo | 90.5 |",
    ):
        assert row in text


def test_another_device_is_added_and_the_same_replaced(tmp_path: Path, page: Path) -> None:
    for number, name in enumerate(("NVIDIA Imaginary", "NVIDIA Another", "NVIDIA Imaginary")):
        report(results(tmp_path / f"out{number}", name), page)
    headings = [line for line in page.read_text().splitlines() if line.startswith("### ")]
    assert headings == ["### NVIDIA Imaginary, PyTorch 2.14", "### NVIDIA Another, PyTorch 2.14"]


def test_what_a_cpu_measured_does_not_get_into_the_docs(tmp_path: Path) -> None:
    out = results(tmp_path / "out", "Processor")
    (out / "doctor.json").write_text(json.dumps({"sections": {"devices": [{"name": "cores", "figures": {}}]}}))
    found = report(out, None)
    assert (found.returncode, found.stderr) == (2, "error: these are not of a GPU; name a page with --page\n")


def test_a_page_without_markers_is_left_alone(tmp_path: Path, page: Path) -> None:
    page.write_text("# Performance\n")
    found = report(results(tmp_path / "out", "NVIDIA Imaginary"), page)
    assert found.returncode == 2 and "has not both markers" in found.stderr
    assert page.read_text() == "# Performance\n"


def test_the_docs_have_both_markers_once() -> None:
    text = (ROOT / "docs/performance.md").read_text()
    assert (text.count(BEGIN), text.count(END)) == (1, 1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_on_a_cpu(tmp_path: Path, page: Path) -> None:
    found = script(tmp_path / "out", "--tiny", "--device", "cpu", PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    assert found.returncode == 0, found.stdout
    assert report(tmp_path / "out", page).returncode == 0
    text = page.read_text()
    assert "| `debug` | 2 | ours fp32 |" in text
    assert "| training, finished |  |" in text
    assert "| sampling | 0 | none |" in text
