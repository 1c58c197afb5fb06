"""Join runs that trained the priors of different levels, at the same time on different machines, into one run.

    %(prog)s runs/top runs/middle runs/bottom --name whole

Each was trained with `model.level`, on codes of the same first stage. The new run, runs/<name>, is evaluated and
sampled as a whole; its data and schedule are the first part's. Exit codes: 0 done, 2 something to fix (one line says
what).
"""

import argparse
from pathlib import Path
from typing import NoReturn

from ..training.folder import RunFolder, inside
from ..training.joining import join
from .command import command


def main() -> NoReturn:
    """scripts/join_priors.py and nvae-join."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+", metavar="RUN", help="a run, or a checkpoint of one")
    parser.add_argument("--name", required=True, help="of the new run, which is kept in runs/<name>")
    args = parser.parse_args()
    folder = RunFolder(inside(Path("runs"), args.name))
    join(args.parts, args.name, folder)
    print(f"{folder.path}: one run of {', '.join(map(str, args.parts))}")
    return 0
