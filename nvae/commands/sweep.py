"""Train and evaluate recipes under several seeds, and set them beside each other.

    %(prog)s ablations configs/ablations/mnist_*.yaml --seeds 3
    %(prog)s rates digits fast.yaml train.epochs=20

Runs are kept in runs/<NAME>/<recipe>-<seed>/, what they print in log.txt there. The table, with differences from the
first recipe, is kept in runs/<NAME>/sweep.md. Each GPU has one run at a time; on a CPU, --workers says how many. The
same command goes on where it was stopped. Exit codes: 0 all is done, 2 something to fix, 75 interrupted by a signal.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..core.errors import UserError
from ..core.files import atomic_file
from ..evaluation.results import read_results
from ..evaluation.sweeps import comparison
from ..training.config import read_run_config
from ..training.folder import RunFolder, inside, step_of
from ..training.interruption import Interruption
from .arguments import natural
from .bounds import DEFAULT_SAMPLES
from .command import EXIT_INTERRUPTED, EXIT_USER_ERROR, command
from .recipes import recipe
from .train import planned

POLL = 0.2
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Run:
    """A recipe under a seed."""

    recipe: Path
    seed: int
    name: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(inside(Path("runs"), self.name))


@dataclass(frozen=True)
class Sweep:
    """What was asked for."""

    name: str
    runs: list[Run]
    importance_samples: int
    draws: int

    def commands(self, run: Run) -> list[list[str]]:
        """What a person would type to train and to evaluate it; both go on where they were stopped."""
        overrides = [*run.overrides, f"name={run.name}", f"seed={run.seed}"]
        samples = ["--importance-samples", f"{self.importance_samples}", "--draws", f"{self.draws}"]
        return [
            python("train", f"{run.recipe}", *overrides),
            python("evaluate", f"{run.folder.path}", *samples),
        ]

    def entry(self, run: Run) -> dict[str, Any] | None:
        """What results.json says of the run's newest checkpoint; None where it was not evaluated in this way."""
        files = sorted(run.folder.checkpoints.glob("step-*.pt"), key=step_of)
        asked = {"split": "test", "importance_samples": self.importance_samples, "draws": self.draws, "seed": 0}
        asked |= {"checkpoint": files[-1].name if files else None, "limit": None, "weights": "ema"}
        entries = read_results(run.folder.path / "results.json").values()
        return next((e for e in reversed(entries) if asked.items() <= e.items() and "estimates" in e), None)


def main() -> NoReturn:
    """scripts/sweep.py and nvae-sweep."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    args = parse()
    sweep = Sweep(args.name, runs_of(args), args.importance_samples, args.draws)
    parameters = {run.recipe.stem: parameters_of(run, args.importance_samples) for run in sweep.runs if run.seed == 0}
    with Interruption() as interruption:
        failed = carry_out(sweep, places(args.workers), interruption)
    table = comparison(figures(sweep), parameters)
    with atomic_file(inside(Path("runs"), sweep.name) / "sweep.md") as file:
        file.write(f"{table}\n".encode())
    print(f"\n{table}")
    for run in failed:
        print(f"{run.name} failed: {log_of(run)} says why", file=sys.stderr)
    return EXIT_INTERRUPTED if interruption.requested else EXIT_USER_ERROR if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="of the sweep: a folder of runs/")
    parser.add_argument("recipes", nargs="+", metavar="CONFIG", help="YAML file, recipe, or field=value for all")
    parser.add_argument("--seeds", type=natural, default=1, metavar="N", help="seeds 0 to N−1 of each (default: 1)")
    parser.add_argument("--importance-samples", type=natural, default=DEFAULT_SAMPLES, metavar="K", help="default: 100")
    parser.add_argument("--draws", type=natural, default=1, help="test draws of a binarised set (default: 1)")
    parser.add_argument("--workers", type=natural, help="runs at once (default: the number of GPUs, else 1)")
    return parser.parse_intermixed_args()


def runs_of(args: argparse.Namespace) -> list[Run]:
    """Seed by seed all recipes, so that a sweep cut short has something to compare."""
    overrides = tuple(word for word in args.recipes if "=" in word)
    files = [recipe(word) for word in args.recipes if "=" not in word]
    if not files:
        raise UserError("CONFIG: a sweep needs at least one recipe")
    if len({file.stem for file in files}) < len(files):
        raise UserError(f"CONFIG: two recipes have one name: {', '.join(sorted(file.stem for file in files))}")
    for text in overrides:
        if text.partition("=")[0] in ("name", "seed"):
            raise UserError(f"{text}: a sweep names its runs and chooses their seeds itself")
    return [
        Run(file, seed, f"{args.name}/{file.stem}-{seed}", overrides) for seed in range(args.seeds) for file in files
    ]


def parameters_of(run: Run, importance_samples: int) -> int:
    """How many parameters a recipe has. Raises UserError where it cannot be run, or not be evaluated in this way."""
    _, model = planned(read_run_config(run.recipe, list(run.overrides)))
    model.check_samples(importance_samples)
    return sum(p.numel() for p in model.parameters())


def places(workers: int | None) -> list[dict[str, str]]:
    """Of each place where a run can go on beside the others, the environment: a GPU each, else a share of the cores."""
    gpus = torch.cuda.device_count()
    count = workers or max(gpus, 1)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [f"{index}" for index in range(gpus)]
    threads = os.environ.get("OMP_NUM_THREADS") or f"{max((os.cpu_count() or 1) // count, 1)}"
    return [
        {"OMP_NUM_THREADS": threads} | ({"CUDA_VISIBLE_DEVICES": visible[place % gpus]} if gpus else {})
        for place in range(count)
    ]


# ------------------------------------------------------------------------------------------------------- processes


@dataclass
class Work:
    """A run on its way: the process of the command that it is at, and those that follow."""

    run: Run
    place: dict[str, str]
    commands: deque[list[str]]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begins the next command, whose output is added to the run's log."""
        log = log_of(self.run)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.commands.popleft(), stdout=output, stderr=subprocess.STDOUT, env=os.environ | self.place
            )

    def has_ended(self) -> bool:
        """Whether nothing more is to be done; where a command has succeeded, the next one begins."""
        while (code := self.process.poll()) == 0 and self.commands:
            self.start()
        return code is not None


def carry_out(sweep: Sweep, places: list[dict[str, str]], interruption: Interruption) -> list[Run]:
    """Trains and evaluates all runs, as many at once as there are places; those that failed.

    When an interruption is asked for, the runs on their way are asked to save and leave, and nothing more begins.
    """
    waiting, free, at_work, failed = deque(sweep.runs), list(places), list[Work](), list[Run]()
    with ended_at_the_latest_here(at_work):
        while waiting or at_work:
            while waiting and free and not interruption.requested:
                run = waiting.popleft()
                at_work.append(Work(run, free.pop(0), deque(sweep.commands(run))))
                print(f"{run.name}: begun; {len(waiting)} more to begin", flush=True)
            for work in [work for work in at_work if work.has_ended()]:
                at_work.remove(work)
                free.append(work.place)
                if work.process.returncode and not interruption.requested:
                    failed.append(work.run)
                print(f"{work.run.name}: {outcome(sweep, work)}", flush=True)
            if interruption.requested:
                waiting.clear()
                for work in at_work:
                    work.commands.clear()
                    work.process.terminate()
            time.sleep(POLL)
    return failed


@contextmanager
def ended_at_the_latest_here(at_work: Sequence[Work]) -> Iterator[None]:
    """Whatever becomes of the block, no process outlives it."""
    try:
        yield
    finally:
        for work in at_work:
            work.process.terminate()
        for work in at_work:
            work.process.wait()


def outcome(sweep: Sweep, work: Work) -> str:
    """How a run ended, in a few words."""
    if code := work.process.returncode:
        return "interrupted" if code == EXIT_INTERRUPTED else f"failed with code {code}"
    entry = sweep.entry(work.run)
    return "done" if entry is None else f"done, negative ELBO {entry['estimates']['nelbo']['nats']:.3f} nats"


def figures(sweep: Sweep) -> dict[str, dict[int, dict[str, Any]]]:
    """Of each recipe, by seed, what was measured."""
    found: dict[str, dict[int, dict[str, Any]]] = {run.recipe.stem: {} for run in sweep.runs}
    for run in sweep.runs:
        if entry := sweep.entry(run):
            found[run.recipe.stem][run.seed] = entry
    return found


def log_of(run: Run) -> Path:
    """Where what a run prints is kept."""
    return run.folder.path / "log.txt"


def python(name: str, *arguments: str) -> list[str]:
    """One of our commands, by this interpreter, wherever the package is."""
    return [sys.executable, "-c", f"from nvae.commands.{name} import main; main()", *arguments]
