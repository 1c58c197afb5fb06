"""How every command ends: its exit codes, and one line for whatever a person, or the machine, can be asked to mend."""

import io
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from ..core.errors import UserError, line_of
from ..core.memory import ran_out_of_memory
from ..training.interruption import ignore_signals

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75
"""A signal asked for a stop, and the same command continues: EX_TEMPFAIL, "try again", of sysexits.h."""
EXIT_KEYBOARD = 130
"""Ctrl-C where there is nothing to save: 128 + SIGINT, as shells have it."""


def command(run: Callable[[], int]) -> NoReturn:
    """Runs a command, which returns its exit code.

    A UserError is one line and code 2, and so is what the machine refuses: space, permission, a folder where a file is.
    Characters that the terminal lacks are replaced, and a reader who has gone (`| head`) is not missed.
    """
    sys.stdout, sys.stderr = unfailing(sys.stdout), unfailing(sys.stderr)
    try:
        code = run()
        sys.stdout.flush()
    except UserError as error:
        code = _told(f"error: {error}")
    except OSError as error:
        if error.errno is None:
            raise
        code = _told(f"error: {line_of(error)}")
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        code = _told("error: out of memory; a smaller --batch, or fewer --processes, would need less")
    except KeyboardInterrupt:
        _told("interrupted")
        code = EXIT_KEYBOARD
    if code == EXIT_INTERRUPTED:
        ignore_signals()  # those that schedulers repeat would change the code
    sys.exit(code)


def _told(line: str) -> int:
    print(line, file=sys.stderr)
    return EXIT_USER_ERROR


class _Pipe(io.FileIO):
    """A file that swallows what is written once nobody reads it any more."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def unfailing(stream: TextIO) -> TextIO:
    """The stream, made to print `?` for what its encoding lacks and to outlive its reader."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if stream not in (sys.__stdout__, sys.__stderr__):
        stream.reconfigure(errors="replace")
        return stream
    stream.flush()
    pipe = _Pipe(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        pipe if stream.write_through else io.BufferedWriter(pipe),
        stream.encoding,
        "replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
