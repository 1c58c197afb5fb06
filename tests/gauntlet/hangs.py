"""Ranks that stop answering, loaders that die, two runs in one folder: the job ends, and says who."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_run import TINY, outcome, tiny_run, train_in

from nvae.core.config import apply_overrides
from nvae.core.errors import UserError
from nvae.training.config import run_config
from nvae.training.trainer import Trainer

from . import jobs
from .asking import ask
from .cases import Case, Result, Verdict
from .jobs import JOBS, Job, ended, enter, finished, not_whole, start

PATIENCE = "train.timeout_minutes=0.05"
"""Three seconds."""


def run(case: Case) -> Result:
    enter(case.folder / "work", case.material)
    return HANGS[case.number % len(HANGS)](case)


def _end(case: Case, name: str, tried: str) -> Result:
    """Everything is whole, and the job comes to its usual end afterwards."""
    if damage := not_whole(Path.cwd()):
        return Result(Verdict.LOST, f"{tried}: {damage}")
    if finished(JOBS[name]) != [0] * JOBS[name].ranks:
        return Result(Verdict.LOST, f"{tried}: the next one failed")
    wrong = JOBS[name].differs(Path.cwd(), case.material / "undisturbed" / name)
    return Result(Verdict.LOST if wrong else Verdict.SURVIVED, f"{tried}: {wrong[:5]}")


def silent_rank(case: Case) -> Result:
    """One of two ranks stops answering: the other waits no longer than it was told to, and names it."""
    job = Job("silent", lambda: jobs._train("data.batch=16", PATIENCE), 2, JOBS["training of two"].differs)
    silent, step = case.random.randrange(2), case.random.randint(1, 9)
    processes = start(job, lambda rank: _fall_silent_at(step) if rank == silent else None)
    with ended(processes):
        processes[1 - silent].join(60)
        code = processes[1 - silent].exitcode
    message = outcome(Path("runs") / "tiny")["message"]
    tried = f"rank {silent} of 2 silent from update {step}: code {code}, {message!r:.300}"
    if code in (None, 0) or f"rank {silent}" not in message.partition(":")[2]:
        return Result(Verdict.BROKEN, tried)
    return _end(case, "training of two", tried)


def _fall_silent_at(step: int) -> None:
    original = Trainer.step

    def silent(self: Trainer) -> object:
        if self.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self)

    Trainer.step = silent  # type: ignore[assignment,method-assign]


def dead_loader(case: Case) -> Result:
    """A loader process is killed: one line says so, and the next command goes on."""
    overrides = [f"data={{name: images, path: {Path('pictures').resolve()}, size: 8, channels: 1, binarize: true}}"]
    overrides += ["data.batch=4", "data.memory=0", "train.steps=30", "data.workers=2"]
    killer = threading.Thread(target=_kill_a_child, args=(case.random.uniform(0, 1),), daemon=True)
    Trainer._open_stream = _then(Trainer._open_stream, killer.start)  # type: ignore[method-assign]
    try:
        train_in(Path("runs"), tiny_run(*overrides))
    except UserError as error:
        verdict = Verdict.REFUSED if "loader process was killed" in str(error) else Verdict.BROKEN
        return Result(verdict, str(error))
    return Result(Verdict.SURVIVED, "it had come to its end")


def _then(first: Callable[..., object], second: Callable[[], object]) -> Callable[..., None]:
    def both(*args: object) -> None:
        first(*args)
        second()

    return both


def _kill_a_child(delay: float) -> None:
    end = time.monotonic() + 60
    while not (children := multiprocessing.active_children()) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(delay)
    for child in children[:1]:
        child.kill()


def second_run(case: Case) -> Result:
    """Training in the folder of a live run is refused, and disturbs nothing."""
    config = run_config(apply_overrides(TINY, list(jobs.STEPS)), "tiny")
    Path("tiny.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    first = start(JOBS["training"], lambda rank: _pause_at(case.random.randint(1, 9)))
    with ended(first):
        end = time.monotonic() + 60
        while not Path("paused").exists() and time.monotonic() < end:
            time.sleep(0.01)
        answer = ask("train", "tiny.yaml")
        Path("go-on").touch()
        first[0].join(60)
        code = first[0].exitcode
    wrong = JOBS["training"].differs(Path.cwd(), case.material / "undisturbed" / "training")
    if code != 0 or wrong:
        return Result(Verdict.LOST, f"the first run: {code}, {wrong}")
    told = answer.code == 2 and "runs/tiny: another process trains in this folder" in answer.err
    return Result(Verdict.REFUSED if told else Verdict.BROKEN, f"second run: {answer.code}: {answer.err[-300:]}")


def _pause_at(step: int) -> None:
    original = Trainer.step

    def paused(self: Trainer) -> object:
        if self.state.step + 1 == step:
            Path("paused").touch()
            while not Path("go-on").exists():
                time.sleep(0.01)
        return original(self)

    Trainer.step = paused  # type: ignore[assignment,method-assign]


def dead_preparer(case: Case) -> Result:
    """A process that prepares images is killed: one line says so, and the next command goes on."""
    torch.set_num_threads(1)
    killer = threading.Thread(target=_kill_a_child, args=(case.random.uniform(0, 0.5),), daemon=True)
    killer.start()
    tried = "a preparing process killed"
    try:
        jobs._two_prepare()
    except UserError as error:
        tried = f"{tried}: {error}"
        if "--processes" not in str(error):
            return Result(Verdict.BROKEN, tried)
    return _end(case, "preparation", tried)


HANGS = (silent_rank, dead_loader, second_run, dead_preparer)
