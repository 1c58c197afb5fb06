"""A page in a real browser without a screen: Chromium, as Qt carries it, in a process of its own.

pip install "PySide6-Addons<6.10"
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 90
"""What a step may take."""


class Visit(NamedTuple):
    said: list[str]
    """By each step."""
    hosts: list[str]
    """That the page asked for anything."""


def visit(url: str, steps: Sequence[str], picture: Path) -> Visit:
    """Goes through steps, each an expression of JavaScript that is asked until it is neither false nor empty.

    At the end `picture`, a PNG, shows the page.
    """
    flags = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    browser = subprocess.run(
        [sys.executable, __file__, url, picture], input=json.dumps(list(steps)), env={**os.environ, **flags},
        capture_output=True, text=True,
    )  # fmt: skip
    assert browser.returncode == 0, f"{browser.stdout}\n{browser.stderr}"
    return Visit(*json.loads(browser.stdout.splitlines()[-1]))


def main(url: str, picture: str) -> int:
    """The browser."""
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    class Watch(QWebEngineUrlRequestInterceptor):  # type: ignore[misc]
        def interceptRequest(self, request: Any) -> None:  # noqa: N802 - Qt's name
            hosts.add(request.requestUrl().host())

    steps, said, hosts = json.load(sys.stdin), [], set()
    application, view, timer = QApplication(sys.argv[:1]), QWebEngineView(), QTimer()
    left = [SECONDS * 5]

    def ask() -> None:
        left[0] -= 1
        if left[0] < 0:
            print(f"in vain: {steps[len(said)]}")
            application.exit(1)
        view.page().runJavaScript(f"String(({steps[len(said)]}) || '')", heard)

    def heard(answer: str | None) -> None:
        if answer:
            said.append(answer)
            left[0] = SECONDS * 5
        if len(said) < len(steps):
            timer.singleShot(200, ask)
        else:
            timer.singleShot(1000, end)

    def end() -> None:
        view.grab().save(picture)
        print(json.dumps([said, sorted(hosts - {""})]))
        application.quit()

    watch = Watch()
    view.page().profile().setUrlRequestInterceptor(watch)
    view.resize(1100, 760)
    view.show()
    view.load(QUrl(url))
    timer.singleShot(200, ask)
    return int(application.exec())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
