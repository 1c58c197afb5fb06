"""Processes that find each other, and processes that do not."""

import subprocess
import sys

import pytest

from nvae.benchmark import collectives
from nvae.benchmark.collectives import round_trip


@pytest.mark.slow
def test_two_processes_add_up() -> None:
    found = round_trip("gloo", 2, seconds=240)
    assert not found.attention, found.words
    assert found.figures["milliseconds"] > 0


def test_processes_that_wait_in_vain_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    original = subprocess.Popen

    def sleeping(command: list[str], **options: object) -> subprocess.Popen[str]:
        started.append(original([sys.executable, "-c", "import time; time.sleep(600)"], **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(collectives.subprocess, "Popen", sleeping)
    found = round_trip("gloo", 2, seconds=0.5)
    assert found.attention
    assert found.words == "2 processes did not find each other within 0 s"
    assert [process.poll() is not None for process in started] == [True, True]


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    original = subprocess.Popen
    program = [sys.executable, "-c", "import sys; sys.exit('no network')"]
    monkeypatch.setattr(collectives.subprocess, "Popen", lambda command, **options: original(program, **options))
    found = round_trip("gloo", 2, seconds=60)
    assert (found.words, found.attention) == ("2 processes: no network", True)
