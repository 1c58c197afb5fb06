"""Reports: a check that fails is a line, and nothing personal is in it."""

import getpass
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvae.benchmark.findings import Finding, found_by, impersonal


def breaks() -> Iterator[Finding]:
    yield Finding("first", "fine")
    raise RuntimeError("no such library\nat 0xffff")


def test_a_check_that_fails_is_a_line_after_what_it_found() -> None:
    first, last = found_by("section", breaks)
    assert (first.words, first.attention) == ("fine", False)
    assert (last.name, last.words, last.attention) == ("section", "RuntimeError: no such library", True)


def test_home_user_machine_and_working_folder_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    monkeypatch.setattr(Path, "cwd", lambda: Path("/scratch/ada/work"))
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "node17")
    text = "/home/ada/.cache, /scratch/ada/work/runs, /data/ada/x, node17: refused; node170 has adaptive groups"
    assert impersonal(text) == "~/.cache, ./runs, /data/…/x, …: refused; node170 has adaptive groups"


def test_a_user_without_a_name_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("uid 1234")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert impersonal("fine") == "fine"
