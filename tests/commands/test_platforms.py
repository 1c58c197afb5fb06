"""The three commands where the system is another one: Windows has no fcntl, no resource and no SIGUSR1."""

import json
import os
import subprocess
import sys
from pathlib import Path

from places import ROOT
from tiny_run import TINY

PROGRAM = """
import signal, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
del signal.SIGUSR1
sys.path.insert(0, sys.argv[1])
from entry_scripts import call
assert call("train", "tiny.yaml", "train.kernels=plain") == 0
assert call("evaluate", "runs/tiny", "--importance-samples", 2, "--kernels", "plain") == 0
assert call("sample", "runs/tiny", "--count", 2, "--kernels", "plain") == 0
"""


def test_one_process_trains_evaluates_and_samples_without_what_only_unix_has(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, ROOT / "tests" / "support"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "no locks here (Windows)" in found.stderr
    last = json.loads((tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()[0])
    assert last["peak_memory_mib"] is None
    assert len(list((tmp_path / "runs/tiny/samples").glob("t1-seed0/*.png"))) == 2
