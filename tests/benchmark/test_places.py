"""The working folder: what holds there, and what is said where it does not."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from nvae.benchmark import places
from nvae.benchmark.installation import GIB
from nvae.core import files


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_local_folder_is_fine_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {finding.name: finding for finding in places.places()}
    assert not found["locks"].attention and not found["files"].attention
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_needs_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    found = places.locks(tmp_path)
    assert found.attention and "do not hold" in found.words


def test_a_full_disk_needs_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 99 * GIB, GIB))
    found = next(places.places())
    assert (found.name, found.words, found.attention) == ("free disk", "1.0 of 100.0 GiB", True)


def test_little_shared_memory_needs_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    (found,) = places.shared_memory(tmp_path)
    assert found.attention and "--shm-size" in found.words
