"""What was found of a machine: lines for people and figures for programs, without anything personal."""

import getpass
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import in_a_line


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    name: str
    words: str
    attention: bool = False
    """Whether somebody should do something about it."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs, in plain containers."""


Check = Callable[[], Iterator[Finding]]


def found_by(name: str, check: Check) -> list[Finding]:
    """All findings of a check; one that fails ends with a finding of that name, which says how."""
    found: list[Finding] = []
    try:
        for finding in check():
            found.append(finding)
    except Exception as error:
        found.append(Finding(name, in_a_line(error), attention=True))
    return found


def impersonal(text: str) -> str:
    """The text without this machine's name, the home folder, the working folder and the user's name in a path."""
    for path, stands in ((Path.cwd, "."), (Path.home, "~")):
        try:
            folder = str(path())
        except (OSError, RuntimeError):
            continue
        if folder != "/":
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])", stands, text)
    for name, pattern in ((_user(), r"(?<=/){}(?![\w.-])"), (socket.gethostname(), r"(?<![\w.-]){}(?![\w-])")):
        if len(name) > 1:
            text = re.sub(pattern.format(re.escape(name)), "…", text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
