"""Full, locked and vanished disks, jumping clocks, too little memory: what was saved stays, and a line says why."""

import importlib
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import processes
import torch
from tiny_run import TINY, checkpoint, outcome

from nvae.core.config import apply_overrides
from nvae.training.config import run_config
from nvae.training.trainer import Trainer

from . import jobs
from .asking import Answer, ask
from .cases import Case, Result, Verdict
from .disks import leave_the_mounts_of_others, resize, set_writable, show_also_at, small_disk, take_away
from .jobs import JOBS, enter, finished, not_whole
from .running import FORK

ROOMY = 64 * 1024
COMMANDS: dict[str, tuple[object, ...]] = {
    "training": ("train", "tiny.yaml", *jobs.STEPS),
    "evaluation": ("evaluate", "trained", "--importance-samples", 12, "--draws", 2, "--batch", 50, *jobs.OUT),
    "sampling": ("sample", "trained", "--count", 40, "--batch", 4, *jobs.OUT),
}


def run(case: Case) -> Result:
    return case.random.choice(EXHAUSTIONS)(case)


def _command(name: str, before: Callable[[], None] = lambda: None) -> Answer:
    """A job's command in a process of its own, where `before` happens first."""
    connection, other = FORK.Pipe()

    def work() -> None:
        torch.set_num_threads(1)
        before()
        try:
            other.send(ask(*(str(word) for word in COMMANDS[name])))
        except BaseException as error:
            other.send(Answer(1, "", f"Traceback: {type(error).__name__}: {error}"))

    process = FORK.Process(target=work)
    process.start()
    other.close()
    try:
        answer: Answer = connection.recv()
    except EOFError:
        process.join()
        answer = Answer(process.exitcode or 1, "", "it died")
    process.join()
    return answer


def _on_a_disk(case: Case, kibibytes: int) -> Path:
    """A folder on a small disk of its own, as the job finds it."""
    leave_the_mounts_of_others()
    disk = case.folder / "disk"
    small_disk(disk, kibibytes)
    _enter(disk / "work", case.material)
    return disk


def _enter(folder: Path, material: Path) -> None:
    enter(folder, material)
    config = run_config(apply_overrides(TINY, []), "tiny")
    Path("tiny.yaml").write_text(json.dumps(config.model_dump(mode="json")))


def _judged(case: Case, name: str, answer: Answer, words: tuple[str, ...], tried: str) -> Result:
    """Refused by a line with one of the words, all that was saved whole; afterwards the job comes to its usual end."""
    tried = f"{name}, {tried}: code {answer.code}: {answer.err.strip()[-300:]}"
    said = answer.err.partition("error: ")[2]
    if damage := not_whole(Path.cwd()):
        return Result(Verdict.LOST, f"{tried}: {damage}")
    if answer.code not in (0, 2) or (answer.code == 2 and not any(word in said for word in words)):
        return Result(Verdict.BROKEN, tried)
    job = JOBS[name]
    if finished(job) != [0]:
        return Result(Verdict.LOST, f"{tried}: the next one failed")
    wrong = job.differs(Path.cwd(), case.material / "undisturbed" / name)
    return Result(Verdict.LOST if wrong else Verdict.SURVIVED, f"{tried}: {wrong[:5]}")


# ------------------------------------------------------------------------------------------------------------- disks


def full_disk(case: Case) -> Result:
    """A disk that is full at some point, and later is not."""
    name = case.random.choice((*COMMANDS, "training"))
    disk = _on_a_disk(case, kibibytes := case.random.choice((64, 128, 256, 512, 1024)))
    answer = _command(name)
    resize(disk, ROOMY)
    return _judged(case, name, answer, ("No space left on device",), f"a disk of {kibibytes} KiB")


def read_only_disk(case: Case) -> Result:
    """A disk that can only be read."""
    name = case.random.choice(tuple(COMMANDS))
    disk = _on_a_disk(case, ROOMY)
    set_writable(disk, False)
    answer = _command(name)
    set_writable(disk, True)
    return _judged(case, name, answer, ("Read-only file system",), "a disk that can only be read")


def vanished_disk(case: Case) -> Result:
    """The disk of runs/ is gone after a while, and later is back."""
    seconds = json.loads((case.material / "seconds.json").read_text())["training"]
    delay = case.random.uniform(0, seconds)
    leave_the_mounts_of_others()
    disk, mounts = case.folder / "disk", case.folder / "mounts"
    small_disk(disk, ROOMY)
    (disk / "runs").mkdir()
    small_disk(mounts, 64)
    show_also_at(disk, mounts / "disk")
    set_writable(mounts, False)
    _enter(case.folder / "work", case.material)
    runs = Path("runs")
    runs.symlink_to(mounts / "disk" / "runs")
    answer = _command("training", lambda: _take_away_in_training(mounts / "disk", delay))
    runs.unlink()
    runs.symlink_to(disk / "runs")
    words = ("No such file", "Read-only file system", "File exists", "Not a directory")
    return _judged(case, "training", answer, words, f"gone after {delay:.2f} s")


def _take_away_in_training(disk: Path, delay: float) -> None:
    """Before the first update that begins so many seconds from now."""
    original, end, pending = Trainer.step, time.monotonic() + delay, [disk]

    def step(self: Trainer) -> object:
        if pending and time.monotonic() > end:
            take_away(pending.pop())
        return original(self)

    Trainer.step = step  # type: ignore[assignment,method-assign]


# ------------------------------------------------------------------------------------------- write errors and clocks


def failing_write(case: Case) -> Result:
    """The n-th flush, renaming or opening for writing is refused, for a reason that has a name."""
    name = case.random.choice((*COMMANDS, "training"))
    call = case.random.choice(("fsync", "replace"))
    reason = case.random.choice((28, 5, 122, 30, 13))
    count = case.random.randint(1, 12)
    _enter(case.folder / "work", case.material)
    answer = _command(name, lambda: _refuse(call, count, reason))
    return _judged(case, name, answer, (os.strerror(reason),), f"{os.strerror(reason)} at {call} {count}")


def _refuse(call: str, count: int, reason: int) -> None:
    original = getattr(os, call)
    left = iter(range(count - 1))

    def refused(*args: object, **kwargs: object) -> object:
        if next(left, None) is None:
            raise OSError(reason, os.strerror(reason))
        return original(*args, **kwargs)

    setattr(os, call, refused)


def jumping_clock(case: Case) -> Result:
    """The clock of the machine goes back or forth by up to a year, again and again."""
    name = case.random.choice(tuple(COMMANDS))
    _enter(case.folder / "work", case.material)
    seed = case.random.random()

    def jump() -> None:
        original, draws = time.time, Random(seed)
        time.time = lambda: original() + draws.choice((-3e7, 0.0, 3e7))

    return _judged(case, name, _command(name, jump), (), "a clock that jumps")


# ------------------------------------------------------------------------------------------------------------ memory


def little_memory(case: Case) -> Result:
    """An address space that leaves little room."""
    name, room = case.random.choice(tuple(COMMANDS)), case.random.choice((8, 16, 32, 64, 128, 256))
    _enter(case.folder / "work", case.material)

    def limit() -> None:
        for module in processes.PRELOADED:  # what is loaded late, as by any command
            importlib.import_module(module)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + room * 2**20,) * 2)

    return _judged(case, name, _command(name, limit), ("memory",), f"{room} MiB of room")


def full_gpu(case: Case) -> Result:
    """PyTorch's error of a full GPU, in a forward pass."""
    step = case.random.randint(1, 10)
    _enter(case.folder / "work", case.material)

    def fill() -> None:
        original = Trainer._loss

        def loss(self: Trainer, *args: object) -> object:
            if self.state.step + 1 == step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(self, *args)  # type: ignore[arg-type]

        Trainer._loss = loss  # type: ignore[assignment,method-assign]

    answer = _command("training", fill)
    if outcome(Path("runs") / "tiny")["outcome"] != "failed" or checkpoint(Path("runs") / "tiny") is None:
        return Result(Verdict.BROKEN, f"the outcome is {outcome(Path('runs') / 'tiny')}")
    return _judged(case, "training", answer, ("train.recompute=cells",), f"a full GPU in update {step}")


EXHAUSTIONS = (
    full_disk,
    full_disk,
    read_only_disk,
    vanished_disk,
    failing_write,
    failing_write,
    jumping_clock,
    little_memory,
    little_memory,
    full_gpu,
)
