"""Runs the entry scripts' `main` in this process."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from places import ROOT


def call(script: str, *arguments: object) -> int:
    """The exit code of `script.py arguments…`; a UserError passes through."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [f"{script}.py", *map(str, arguments)]
    try:
        code: int = module.main()
    finally:
        sys.argv = before
    return code


def results_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found
