"""Look a machine over before anything is trained on it: what is installed, what works, how to run each recipe here.

    %(prog)s                         one or two screens, in about a minute
    %(prog)s --json report.json      the same for a bug report; it names no user, no machine and no folder of yours
    %(prog)s --recipe cifar10        how to run that one only

Exit codes: 0 all is well, 1 something needs attention (marked !!), 2 a wrong argument.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from ..benchmark.collectives import round_trips
from ..benchmark.comparison import comparisons
from ..benchmark.findings import Check, Finding, found_by, impersonal
from ..benchmark.installation import GIB, devices, precisions, versions
from ..benchmark.places import places
from ..benchmark.recipes import Demand, count, counted, fingerprint, keep, recommended
from ..core.devices import device_of
from ..core.errors import UserError
from ..core.memory import MIB
from ..core.precision import computed_in, precision_on
from ..training.config import AnyRunConfig, read_run_config
from .arguments import known_device, natural
from .command import command
from .recipes import recipe, recipes

EXIT_ATTENTION = 1
WIDTH = 20

NOTES = {"kernels": ": forward passes over small inputs, against the plain function"}
"""What stands beside the name of a section."""

Report = dict[str, list[Finding]]
"""Findings by section."""


def main() -> NoReturn:
    """scripts/doctor.py and nvae-doctor."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    args = parse()
    files = {Path(file).stem: file for file in map(recipe, args.recipe)} if args.recipe else recipes()
    if args.count:
        count_again(files)
        return 0
    report: Report = {}
    for section, check in checks(args, files):
        report[section] = found_by(section, check)
        print(impersonal("\n".join(lines(section, report[section]))), flush=True)
    attention = [finding.name for findings in report.values() for finding in findings if finding.attention]
    print(f"\n{len(attention)} need attention: {', '.join(attention)}" if attention else "\nall is well")
    if args.json is not None:
        args.json.write_text(impersonal(as_json(report)) + "\n", encoding="utf-8")
    return EXIT_ATTENTION if attention else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", type=known_device, default="auto", help="whose kernels are compared (default: auto)"
    )
    parser.add_argument("--recipe", nargs="+", default=[], metavar="RECIPE", help="only these (default: all)")
    parser.add_argument("--seconds", type=natural, default=120, help="limit of each round trip (default: 120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    parser.add_argument(
        "--count", action="store_true", help="count the memory of recipes again, minutes for each, and keep it"
    )
    return parser.parse_args()


def checks(args: argparse.Namespace, files: dict[str, Path]) -> Iterator[tuple[str, Check]]:
    """The sections of a report, in their order."""
    yield "versions", versions
    yield "devices", devices
    try:
        device = device_of(args.device, "--device")
    except UserError as error:
        yield "device", partial(_refused, error)
        device = torch.device("cpu")
    yield "precisions", partial(precisions, device)
    yield "folder", places
    yield "processes", partial(round_trips, args.seconds)
    yield "kernels", partial(kernels, device)
    yield "recipes", partial(recommendations, device, files)


def _refused(error: UserError) -> Iterator[Finding]:
    yield Finding("device", str(error), attention=True)


def kernels(device: torch.device) -> Iterator[Finding]:
    """Every implementation of the table against the plain function, in the types that `mixed` and fp32 compute in."""
    dtypes = computed_in(precision_on(device, "mixed", "mixed"))
    yield from comparisons(device, dtypes if device.type == "cuda" else [torch.float32, torch.bfloat16])


# ---------------------------------------------------------------------------------------------------------- recipes


def recommendations(device: torch.device, files: dict[str, Path]) -> Iterator[Finding]:
    """How to run each recipe on this machine's devices; those for other devices, and uncounted ones, in a line each."""
    demands, mib = counted(), memory_of(device)
    number = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    yield Finding(
        "for", f"{number} × {device.type} of {mib / 1024:.0f} GiB; tensors counted on fake ones, nothing was run"
    )
    elsewhere, uncounted = [], []
    for name, file in files.items():
        demand, config = demands.get(name), read_run_config(file, [])
        if device.type == "cpu" and config.train.precision not in ("fp32", "tf32"):
            elsewhere.append(name)
        elif demand is None or demand.fingerprint != fingerprint(file):
            uncounted.append(name)
        else:
            yield recommendation(name, config, demand, device, mib, number)
    if elsewhere:
        yield Finding("for GPUs", ", ".join(elsewhere))
    if uncounted:
        yield Finding("not counted", f"{', '.join(uncounted)}; nvae-doctor --count --recipe NAME counts one")


def memory_of(device: torch.device) -> float:
    """MiB of a GPU, the smallest where there are several, or of the machine."""
    if device.type == "cuda":
        indices = range(torch.cuda.device_count()) if device.index is None else [device.index]
        return min(torch.cuda.get_device_properties(index).total_memory for index in indices) / MIB
    figures = {finding.name: finding.figures for finding in found_by("folder", places)}
    return float(figures.get("free memory", {}).get("total_bytes", 4 * GIB)) / MIB


def recommendation(
    name: str, config: AnyRunConfig, demand: Demand, device: torch.device, mib: float, devices: int
) -> Finding:
    """What to change in a recipe, if anything, and the memory that it then takes."""
    found = recommended(config, demand, device, mib, devices)
    if found is None:
        return Finding(name, "one image at a time is too much for this device's memory")
    words = " ".join(found.overrides) or "as it is"
    images = f"{found.batch} image{'s' if found.batch > 1 else ''} at once"
    taken = f"{found.precision}, {images}: {found.mib / 1024:.1f} GiB"
    return Finding(name, f"{words} ({taken})", figures=asdict(found))


def count_again(files: dict[str, Path]) -> None:
    """Counts recipes and keeps what was counted."""
    for name, file in files.items():
        keep(name, count(file))
        print(f"{name}: counted", flush=True)


# ------------------------------------------------------------------------------------------------------------ writing


def lines(section: str, findings: list[Finding]) -> list[str]:
    """A section for people."""
    found = [f"{'!!' if finding.attention else '  '} {finding.name:{WIDTH}} {finding.words}" for finding in findings]
    return ["", f"{section}{NOTES.get(section, '')}", *found]


def as_json(report: Report) -> str:
    """The report for programs."""
    attention = sum(finding.attention for findings in report.values() for finding in findings)
    sections = {section: [asdict(finding) for finding in findings] for section, findings in report.items()}
    return json.dumps({"needs_attention": attention, "sections": sections}, indent=1, ensure_ascii=False)
