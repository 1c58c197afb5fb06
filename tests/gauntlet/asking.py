"""Asks a command in this process, as from the command line, and judges its answer."""

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from nvae.commands.command import EXIT_USER_ERROR

from .cases import Result, Verdict


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def ask(name: str, *arguments: object) -> Answer:
    """What the command `nvae-name arguments…` prints, and its exit code; anything but an exit is raised."""
    module = importlib.import_module(f"nvae.commands.{name}")
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv = before
    return Answer(code, out.getvalue(), err.getvalue())


def refusal(answer: Answer, names: Iterable[str], tried: str) -> Result:
    """The verdict on an answer that is no success: REFUSED where a line says which of `names` is at fault."""
    lines = answer.err.strip().splitlines()
    said = " ".join(lines)
    if answer.code != EXIT_USER_ERROR or "Traceback" in answer.err:
        return Result(Verdict.BROKEN, f"{tried}: code {answer.code}: {said[-2000:]}")
    told = next((line for line in lines if line.startswith("error: ") or ".py: error: " in line), "")
    wanted = [name for name in names if name]
    if not told or not any(_folded(name) in _folded(said) for name in wanted):
        return Result(Verdict.BROKEN, f"{tried}: none of {wanted} is named by: {said[:500]}")
    return Result(Verdict.REFUSED, f"{tried}: {said[:200]}")


def _folded(text: str) -> str:
    """Without differences of spacing and quoting that messages may make."""
    return "".join(text.replace("\\", "").split())
