"""Runs the entry scripts' `main` in this process."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
