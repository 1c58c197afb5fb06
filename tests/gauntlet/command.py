"""Tries the software with bad input, damage, kills and exhaustion, and counts what comes of it.

    %(prog)s [--short] [--group NAME ...] [--seed S] [--only K]
    %(prog)s --table

Case K of a group follows from the seed and K alone: `--group kills --seed 0 --only 17` is that case again. Exit codes:
0 all cases passed, 1 some did not (each is told in a line).
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import reporting
from .cases import PASSED, Group
from .groups import GROUPS
from .running import material_of, run_group


def main() -> int:
    """What was asked for on the command line; the exit code."""
    args = _parse()
    if args.table:
        print(reporting.table(reporting.read(args.out)))
        return 0
    entries, failures = reporting.read(args.out) if args.keep else {}, 0
    with tempfile.TemporaryDirectory(prefix="gauntlet-") as folder:
        for name in args.group or GROUPS:
            group = GROUPS[name]
            numbers = numbers_of(group, short=args.short, count=args.count, only=args.only)
            if not numbers:
                continue
            entries[name] = _run(group, numbers, Path(folder), args)
            failures += reporting.failed(entries[name])
            if args.only is None:
                reporting.write(args.out, entries)
    print(reporting.table(entries))
    return int(failures > 0)


def numbers_of(group: Group, *, short: bool, count: int | None, only: Sequence[int] | None) -> Sequence[int]:
    """Which cases of a group were asked for."""
    return only or range(count or (group.short if short else group.full))


def _run(group: Group, numbers: Sequence[int], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What was found in the cases of a group."""
    began, records = time.perf_counter(), []
    material = material_of(group, folder)
    for record in run_group(group, args.seed, numbers, folder, material, args.jobs):
        records.append(record)
        if args.only is not None or record.verdict not in PASSED:
            print(
                f"--group {group.name} --seed {args.seed} --only {record.number}: {record.verdict}: {record.note}",
                flush=True,
            )
    return reporting.found(group, records, time.perf_counter() - began)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="+", choices=GROUPS, help="which (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument("--only", type=int, nargs="+", metavar="K", help="only these cases, each told in full")
    parser.add_argument("--count", type=int, help="the first so many cases of each group")
    parser.add_argument("--short", action="store_true", help="a few cases of each")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("gauntlet.json"), help="results (default: gauntlet.json)")
    parser.add_argument("--keep", action="store_true", help="add to the results that are there")
    parser.add_argument("--table", action="store_true", help="print the results that are there as Markdown")
    return parser.parse_args()
