"""Runs cases in forked processes with limits on time and memory.

The process that forks has imported everything and computed nothing. Whatever a case does to its process, the run goes
on with the next one.
"""

import contextlib
import io
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from .cases import Group, Result, Verdict, case_of

MIB = 2**20
PATIENCE = 24
"""A case is killed after so many times its processor time on the clock: the machine may be shared."""
ADDRESS_SPACE = 3 * 2**30
"""Bytes that a process may map beyond what it has when it starts; protects the machine, not the verdict."""
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Record:
    """A case and what came of it."""

    number: int
    verdict: Verdict
    note: str
    seconds: float
    """Processor time."""
    mebibytes: int
    """Memory that was added at most."""


def run_group(
    group: Group, seed: int, numbers: Sequence[int], folder: Path, material: Path, jobs: int = 1
) -> Iterator[Record]:
    """The record of each case as it is finished; `folder` holds their files meanwhile."""
    left = iter(numbers)
    workers: list[_Worker] = []
    try:
        while True:
            workers += [
                _Worker(group, seed, folder, material, first)
                for first in itertools.islice(left, max(jobs - len(workers), 0))
            ]
            if not workers:
                return
            wait([worker.connection for worker in workers], timeout=0.2)
            for worker in list(workers):
                record = worker.record()
                if record is None:
                    continue
                yield record
                following = next(left, None) if worker.takes_more() else None
                if following is None:
                    worker.end()
                    workers.remove(worker)
                else:
                    worker.ask(following)
    finally:
        for worker in workers:
            worker.end()


def material_of(group: Group, folder: Path) -> Path:
    """What the cases of a group start from, made in a process of its own; groups that start from the same share it."""
    material = folder / f"{group.prepare.__module__}.{group.prepare.__qualname__}"
    if not material.exists():
        material.mkdir(parents=True)
        process = FORK.Process(target=_prepare, args=(group, material))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"{group.name}: its material could not be made")
    return material


def _prepare(group: Group, material: Path) -> None:
    torch.set_num_threads(1)
    group.prepare(material)


class _Worker:
    """A process that runs cases one after the other, and the case that it is at."""

    def __init__(self, group: Group, seed: int, folder: Path, material: Path, first: int) -> None:
        self.group, self.left = group, group.cases_per_process
        self.connection, other = FORK.Pipe()
        self.process = FORK.Process(target=_serve, args=(group, seed, folder, material, other))
        self.process.start()
        other.close()
        self.ask(first)

    def ask(self, number: int) -> None:
        self.number, self.asked = number, time.monotonic()
        self.left -= 1
        self.connection.send(number)

    def record(self) -> Record | None:
        """What came of the case; None while it runs."""
        waited = time.monotonic() - self.asked
        try:
            if self.connection.poll():
                record: Record = self.connection.recv()
                return record
        except (EOFError, ConnectionError):
            self.left = 0
            self.process.join()
            code = self.process.exitcode
            return Record(self.number, Verdict.BROKEN, f"its process died with code {code}", waited, 0)
        if waited < PATIENCE * self.group.seconds:
            return None
        self.left = 0
        return Record(self.number, Verdict.BROKEN, f"still running after {waited:.0f} s", waited, 0)

    def takes_more(self) -> bool:
        return self.left > 0

    def end(self) -> None:
        """Ends the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(group: Group, seed: int, folder: Path, material: Path, connection: Connection) -> None:
    os.setsid()
    torch.set_num_threads(1)
    mapped = _status("VmSize") * MIB
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        connection.send(_record(group, seed, number, folder / f"{group.name}-{number}", material))


def _record(group: Group, seed: int, number: int, folder: Path, material: Path) -> Record:
    folder.mkdir()
    before, began = _resident(), _processor_time()
    try:
        with _quiet(), contextlib.chdir(folder), _interrupted_after(1.5 * group.seconds):
            result = group.run(case_of(group, seed, number, folder, material))
    except BaseException:  # a SystemExit, too, is nothing that a case should come to
        result = Result(Verdict.BROKEN, traceback.format_exc(limit=-12))
    seconds, added = _processor_time() - began, max(_status("VmHWM") - before, 0)
    if seconds > group.seconds:
        result = Result(Verdict.BROKEN, f"took {seconds:.1f} s: {result.verdict}: {result.note}")
    if added > group.mebibytes:
        result = Result(Verdict.BROKEN, f"took {added} MiB: {result.verdict}: {result.note}")
    shutil.rmtree(folder, ignore_errors=True)
    return Record(number, result.verdict, result.note, round(seconds, 3), added)


class TooLongError(BaseException):
    """Raised in the midst of a case that takes too long; nothing that catches errors catches it."""


@contextlib.contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Within, so much of this process's own processor time is at hand."""

    def interrupt(number: int, frame: object) -> None:
        raise TooLongError

    signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _processor_time() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _resident() -> int:
    """MiB in memory, from which the highest so far is counted anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """A number of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) // 1024
    raise KeyError(name)


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Within, nothing reaches the screen, from C++ neither."""
    saved = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for number, stream in zip((1, 2), saved, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.close(nowhere)
