"""nvae-doctor: its report, its exit codes, and that nothing ends it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_scripts import call

from nvae.benchmark.findings import Finding
from nvae.commands import doctor

Quick = Callable[..., None]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Quick:
    """Leaves out what starts processes or compiles, and lets the checks be replaced."""
    monkeypatch.chdir(tmp_path)

    def fine(*args: Any) -> Iterator[Finding]:
        yield Finding("one", "fine")

    def replace(**checks: Any) -> None:
        for name in ("round_trips", "comparisons"):
            monkeypatch.setattr(doctor, name, checks.get(name, fine))

    return replace


def test_a_healthy_machine_is_code_0(quick: Quick, capsys: pytest.CaptureFixture[str]) -> None:
    quick()
    assert call("doctor", "--recipe", "vqvae_digits", "cifar10") == 0
    out = capsys.readouterr().out
    assert "vqvae_digits         as it is (fp32, 100 images at once" in out
    assert "for GPUs             cifar10" in out
    assert out.endswith("\nall is well\n")


def test_what_fails_is_a_line_and_code_1(quick: Quick, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def breaks(*args: Any) -> Iterator[Finding]:
        raise RuntimeError("CUDA error: device-side assert")
        yield

    quick(comparisons=breaks)
    assert call("doctor", "--recipe", "vqvae_digits", "--json", tmp_path / "report.json") == 1
    out = capsys.readouterr().out
    assert "!! kernels              RuntimeError: CUDA error: device-side assert" in out
    assert out.endswith("\n1 need attention: kernels\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["needs_attention"] == 1
    assert report["sections"]["kernels"][0]["attention"] is True
    assert list(report["sections"]) == [
        "versions", "devices", "precisions", "folder", "processes", "kernels", "recipes",
    ]  # fmt: skip


def test_a_device_that_is_not_here_is_a_line(quick: Quick, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is here")
    quick()
    assert call("doctor", "--device", "cuda", "--recipe", "vqvae_digits") == 1
    assert (
        "!! device               --device: cuda was asked for, but no CUDA device is there" in capsys.readouterr().out
    )


def test_a_recipe_that_is_not_counted_says_how(
    quick: Quick, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick()
    monkeypatch.setattr(doctor, "counted", dict)
    assert call("doctor", "--recipe", "vqvae_digits") == 0
    assert "vqvae_digits; nvae-doctor --count --recipe NAME counts one" in capsys.readouterr().out


def test_nothing_of_the_machine_is_named(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node17")

    def personal(*args: Any) -> Iterator[Finding]:
        yield Finding("round trip", f"node17: no route from {tmp_path}/x")

    quick(round_trips=personal)
    call("doctor", "--recipe", "vqvae_digits", "--json", tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "node17" not in text and str(tmp_path) not in text
    assert "…: no route from ./x" in text


@pytest.mark.slow
def test_the_whole_report_ends_in_words_and_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("doctor", "--recipe", "digits", "--device", "cpu") in (0, 1)
    out = capsys.readouterr().out
    assert "gloo" in out and "bounded_normal (cpu.latents:bounded_normal)" in out
    assert "Traceback" not in out
