"""How commands end: one line for a mistake or a refusal of the machine, whatever the terminal is and whoever reads."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT

from nvae.commands.command import EXIT_KEYBOARD, EXIT_USER_ERROR, command
from nvae.core.errors import UserError


def ended(run: Callable[[], int]) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as exited:
        command(run)
    assert isinstance(exited.value.code, int)
    return exited.value.code


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("optim.lr: must be more than 0"), "error: optim.lr: must be more than 0"),
        (OSError(28, "No space left on device", "runs/x"), "error: runs/x: No space left on device"),
        (PermissionError(13, "Permission denied", "runs/x"), "error: runs/x: Permission denied"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
    ],
)
def test_what_a_person_can_mend_is_one_line_and_code_2(
    error: BaseException, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(raising(error)) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"{line}\n"


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(OSError, match="no number"):
        command(raising(OSError("no number")))


def test_the_keyboard_ends_a_command_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(raising(KeyboardInterrupt())) == EXIT_KEYBOARD
    assert capsys.readouterr().err == "interrupted\n"


PROGRAM = "from nvae.commands.command import command; command(lambda: {})"


def run(expression: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of one expression in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(expression)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_characters_that_the_terminal_lacks_are_replaced() -> None:
    found = run("print('−log p(x) → 1') or 0", PYTHONIOENCODING="ascii")
    assert (found.returncode, found.stdout, found.stderr) == (0, "?log p(x) ? 1\n", "")


def test_names_that_are_no_text_are_printed_all_the_same() -> None:
    found = run("print(b'runs/caf\\xe9'.decode('utf-8', 'surrogateescape')) or 0", PYTHONIOENCODING="utf-8")
    assert (found.returncode, found.stdout) == (0, "runs/caf?\n")


def test_a_command_goes_on_when_its_reader_has_gone(tmp_path: Path) -> None:
    """As a run does whose output is looked at through `| head -1`."""
    loop = "[print(i, flush=True) for i in range(99999)] and open({!r}, 'w').write('end') and 0"
    writer = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(loop.format(str(tmp_path / "end")))],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert writer.stdout is not None and writer.stderr is not None
    assert writer.stdout.readline() == b"0\n"
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 0 and (tmp_path / "end").exists()
