"""Runs the commands in this process."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def call(script: str, *arguments: object) -> int:
    """The exit code of `script.py arguments…`; a UserError passes through."""
    module = importlib.import_module(f"nvae.commands.{Path(script).name}")
    before, sys.argv = sys.argv, [f"{script}.py", *map(str, arguments)]
    try:
        code: int = module.run()
    finally:
        sys.argv = before
    return code


def results_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found
