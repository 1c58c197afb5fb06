"""Signals at random moments, to one rank or all, and to what is being written: the end is the undisturbed one."""

import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from random import Random

from nvae.commands.command import EXIT_INTERRUPTED

from .cases import Case, Result, Verdict
from .jobs import JOBS, Job, ended, enter, finished, not_whole, start

OFTEN = ("training", "training", "training of two", "evaluation", "preparation")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
GRACE = 10.0
"""Seconds within which the other ranks leave once one is gone."""


def run(case: Case) -> Result:
    """One or two disturbances of a job, then the job undisturbed to its end."""
    random = case.random
    job = JOBS[random.choice((*OFTEN, *JOBS))]
    seconds = json.loads((case.material / "seconds.json").read_text())[job.name]
    enter(case.folder / "work", case.material)
    tried = [job.name]
    for _ in range(random.choice((1, 1, 2))):
        disturb = random.choice((at_a_moment, at_a_moment, within_a_write))
        tried.append(disturb(random, job, seconds))
        if damage := not_whole(Path.cwd()):
            return Result(Verdict.LOST, f"{', '.join(tried)}: {damage}")
    codes = finished(job)
    if codes != [0] * job.ranks:
        return Result(Verdict.LOST, f"{', '.join(tried)}: then ended with {codes}")
    wrong = job.differs(Path.cwd(), case.material / "undisturbed" / job.name)
    return Result(Verdict.LOST if wrong else Verdict.SURVIVED, f"{', '.join(tried)}: {wrong[:5]}")


def at_a_moment(random: Random, job: Job, seconds: float) -> str:
    """A signal after a random time, to one rank or to all of them."""
    number, delay = random.choice(SIGNALS), random.uniform(0, 1.1 * seconds)
    processes = start(job)
    hit = processes if random.random() < 0.5 else [random.choice(processes)]
    with ended(processes):
        time.sleep(delay)
        for process in hit:
            _signal(process, number)
        if number == signal.SIGSTOP:
            time.sleep(random.uniform(0.01, 0.5))
            for process in hit:
                _signal(process, signal.SIGCONT)
        codes = _left(processes)
    return f"{number.name} to {len(hit)} of {job.ranks} after {delay:.2f} s ({codes})"


def _signal(process: ForkProcess, number: int) -> None:
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)


def _left(processes: list[ForkProcess]) -> list[int | None]:
    """The exit codes of all ranks; once one has died the others are told to leave, then killed, as torchrun does."""
    while all(process.exitcode in (None, 0, EXIT_INTERRUPTED) for process in processes):
        if all(process.exitcode is not None for process in processes):
            return [process.exitcode for process in processes]
        time.sleep(0.01)
    for process in processes:
        _signal(process, signal.SIGTERM)
    end = time.monotonic() + GRACE
    for process in processes:
        process.join(max(end - time.monotonic(), 0))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def within_a_write(random: Random, job: Job, seconds: float) -> str:
    """Death at the n-th flush, or renaming, of a file."""
    call, count, rank = random.choice(("fsync", "replace")), random.randint(1, 12), random.randrange(job.ranks)
    processes = start(job, lambda own: _die_at(call, count) if own == rank else None)
    with ended(processes):
        codes = _left(processes)
    return f"death of rank {rank} at {call} {count} ({codes})"


def _die_at(call: str, count: int) -> None:
    original: Callable[..., None] = getattr(os, call)
    left = iter(range(count - 1))

    def deadly(*args: object, **kwargs: object) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args, **kwargs)

    setattr(os, call, deadly)
