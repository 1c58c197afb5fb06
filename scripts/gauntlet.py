"""Tries the software with bad input, damage, kills and exhaustion; the cases are in tests/gauntlet/."""

import os
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from tests.gauntlet.command import main  # noqa: E402 - found once the paths are known

if __name__ == "__main__":
    sys.exit(main())
