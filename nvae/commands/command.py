"""How every command begins and ends: what it prints on, its exit codes, one line for what a person can mend."""

import sys
from collections.abc import Callable
from typing import NoReturn

from ..core.errors import UserError
from ..training.interruption import ignore_signals

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75
"""A signal asked for a stop, and the same command continues: EX_TEMPFAIL, "try again", of sysexits.h."""


def command(run: Callable[[], int]) -> NoReturn:
    """Runs a command, which returns its exit code. A UserError is printed without a traceback and ends with code 2."""
    try:
        code = run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    if code == EXIT_INTERRUPTED:
        ignore_signals()  # those that schedulers repeat would change the code
    sys.exit(code)
