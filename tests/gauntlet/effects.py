"""Sees what a case does to the machine, by the interpreter's audit: programs, sockets, files outside of its folder."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn", "webbrowser.open")
REACHES = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "ftplib.connect", "smtplib.connect")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CACHES = ("/.cache", "/.config/matplotlib", "/torchinductor_")
"""Where libraries keep what they have compiled or looked up."""
JOKES = ("antigravity", "this", "idlelib.idle", "turtle", "pty", "webbrowser", "smtpd")
"""Modules of Python that do something, or open the way to it, when imported."""


class _Watch:
    """The one hook of a process: hooks stay for ever."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        self.is_installed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "subprocess.Popen" and list(arguments[1][1:]) == ["--version"]:
            return  # whether there is a compiler
        if event in STARTS or event in REACHES or (event == "import" and arguments[0] in JOKES):
            self.seen.append(f"{event} {arguments[:2]!r:.200}")
        elif event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            self._look_at(event, arguments[0])

    def _look_at(self, event: str, path: Any) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | Path):
            return
        place = os.path.realpath(path)
        is_cache = any(cache in place for cache in CACHES)
        if not is_cache and not place.startswith((f"{self.folder}{os.sep}", os.devnull)) and place != str(self.folder):
            self.seen.append(f"{event} {place}")


_watch = _Watch()


@contextmanager
def effects_outside(folder: Path) -> Iterator[list[str]]:
    """Within, a line for everything that is done beyond the folder."""
    if not _watch.is_installed:
        sys.addaudithook(_watch)
        _watch.is_installed = True
        tempfile.gettempdir()  # tries, once a process, whether a file can be written there
    _watch.folder, _watch.seen = folder.resolve(), []
    try:
        yield _watch.seen
    finally:
        _watch.folder = None
