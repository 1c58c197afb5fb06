"""The work that is disturbed: small runs, evaluations, samples and preparations, and how their ends are compared."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from processes import free_port
from tiny_run import EVERY_BRICK, checkpoint, differences, log, outcome, tiny_run, train_in

from nvae.checkpoints.format import read_safely
from nvae.core.config import read_yaml
from nvae.data import preparation
from nvae.data.config import DataConfig

from .asking import ask
from .running import FORK

STEPS = (
    *EVERY_BRICK,
    "train.steps=10",
    "train.save_every=3",
    "train.keep=2",
    "train.validate_every=0.1",
    "train.kernels=plain",  # nothing to compile, or to judge, in each of hundreds of processes
)
OUT = ("--out", "found", "--kernels", "plain")
PICTURES, SHARD = 40, 4
"""Images of the set that is prepared, and of each shard."""


@dataclass(frozen=True)
class Job:
    """Something that a command does in the current folder, and can be told to do again."""

    name: str
    work: Callable[[], int]
    """Returns the exit code."""
    ranks: int
    differs: Callable[[Path, Path], list[str]]
    """Where the ends in two folders differ."""


def _train(*overrides: str) -> int:
    return 0 if train_in(Path("runs"), tiny_run(*STEPS, *overrides)) == "finished" else 75


def _evaluate() -> int:
    return ask("evaluate", "trained", "--importance-samples", 12, "--draws", 2, "--batch", 50, *OUT).code


def _sample() -> int:
    return ask("sample", "trained", "--count", 40, "--batch", 4, *OUT).code


def _prepare() -> int:
    preparation.SHARD_BYTES = SHARD * 8 * 8
    config = DataConfig(path=Path("pictures"), size=8, channels=1, holdout=0.2)
    preparation.prepare(config, Path("store"), processes=1, progress=False)
    return 0


def _two_prepare() -> int:
    preparation.SHARD_BYTES = SHARD * 8 * 8
    config = DataConfig(path=Path("pictures"), size=8, channels=1, holdout=0.2)
    preparation.prepare(config, Path("store"), processes=2, progress=False)
    return 0


# -------------------------------------------------------------------------------------------------------------- ends


def _run_differs(found: Path, expected: Path) -> list[str]:
    """Weights, average, optimiser, counters, the best checkpoint, log and outcome, bit for bit."""
    one, other = found / "runs" / "tiny", expected / "runs" / "tiny"
    lines = differences(checkpoint(one), checkpoint(other))
    best = [torch.load(folder / "checkpoints" / "best.pt", weights_only=True) for folder in (one, other)]
    lines += differences(*best, "best")
    if log(one) != log(other):
        lines.append("metrics.jsonl")
    return lines + [f"outcome: {outcome(one)}"] * (outcome(one) != outcome(other))


def _results_differ(found: Path, expected: Path) -> list[str]:
    one, other = (_entries(folder / "found" / "results.json") for folder in (found, expected))
    return [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]


def _entries(file: Path) -> dict[str, Any]:
    """What was measured, without how long that took."""
    return {key: {**entry, "seconds": 0} for key, entry in json.loads(file.read_text()).items()}


def _files_differ(name: str) -> Callable[[Path, Path], list[str]]:
    def differ(found: Path, expected: Path) -> list[str]:
        one, other = (_contents(folder / name) for folder in (found, expected))
        return [file for file in one.keys() | other.keys() if one.get(file) != other.get(file)]

    return differ


def _contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder; where a store's images lay is no part of it."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {
        file.relative_to(folder).as_posix(): _without_places(file) if file.name == "store.json" else file.read_bytes()
        for file in files
    }


def _without_places(file: Path) -> bytes:
    index = json.loads(file.read_text())
    index["settings"]["source"] = ""
    return json.dumps(index).encode()


JOBS = {
    job.name: job
    for job in (
        Job("training", _train, 1, _run_differs),
        Job("training of two", lambda: _train("data.batch=16"), 2, _run_differs),
        Job("evaluation", _evaluate, 1, _results_differ),
        Job("evaluation of two", _evaluate, 2, _results_differ),
        Job("sampling", _sample, 1, _files_differ("found")),
        Job("preparation", _prepare, 1, _files_differ("store")),
    )
}


# --------------------------------------------------------------------------------------------------------- beginnings


def lay_out(folder: Path) -> None:
    """What the jobs start from: a trained run, and pictures."""
    os.chdir(folder)
    assert finished(JOBS["training"]) == [0]
    (folder / "runs" / "tiny").rename(folder / "trained")
    draws = np.random.RandomState(0)
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        pixels = draws.randint(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:03d}.png")


def enter(folder: Path, material: Path) -> None:
    """Makes a folder as jobs find it, and goes there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("trained", "pictures"):
        (folder / name).symlink_to(material / name)
    os.chdir(folder)


def prepare(material: Path) -> None:
    """Also the end of every job when nothing happens, and how long it takes."""
    lay_out(material)
    seconds = {}
    for job in JOBS.values():
        enter(material / "undisturbed" / job.name, material)
        began = time.perf_counter()
        codes = finished(job)
        assert codes == [0] * job.ranks, f"{job.name}: {codes}"
        seconds[job.name] = time.perf_counter() - began
    (material / "seconds.json").write_text(json.dumps(seconds))


# ----------------------------------------------------------------------------------------------------------- running


def start(job: Job, before: Callable[[int], None] = lambda rank: None) -> list[ForkProcess]:
    """The ranks of a job; `before` is called in each of them first."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(job.ranks):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if job.ranks > 1 else {}
        process = FORK.Process(target=_work, args=(job, environment, before, rank))
        process.start()
        processes.append(process)
    return processes


def _work(job: Job, environment: dict[str, str], before: Callable[[int], None], rank: int) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    before(rank)
    os._exit(job.work())


def finished(job: Job) -> list[int | None]:
    """The exit codes of the job's ranks, run to their end."""
    processes = start(job)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@contextmanager
def ended(processes: list[ForkProcess]) -> Iterator[None]:
    """After the block no process is left."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


# ------------------------------------------------------------------------------------------------------ what is whole


def not_whole(folder: Path) -> list[str]:
    """Files below a folder that have the name of something whole, and are not."""
    lines = []
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() or not file.is_file() or file.name.startswith("."):
            continue
        try:
            _read(file)
        except Exception as error:
            lines.append(f"{file.relative_to(folder)}: {error}")
    return lines


def _read(file: Path) -> Any:
    if file.suffix == ".pt" and "evaluation" not in file.parts:
        return read_safely(file)
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        return preparation.verify(file.parent, processes=1, progress=False) if file.name == "store.json" else content
    if file.suffix == ".png":
        Image.open(file).load()
    return read_yaml(file) if file.suffix == ".yaml" else None
