"""Two processes train as one: the same numbers, the same decisions, and the same end when one of them dies."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from processes import free_port, start_ranks
from tiny_run import EVERY_BRICK, checkpoint, column, log, outcome, tiny_run, train_in
from torch import Tensor

from nvae.core import distributed
from nvae.core.errors import UserError
from nvae.training import setup
from nvae.training.continuation import require_same_config
from nvae.training.folder import RunFolder, step_of
from nvae.training.trainer import Trainer
from nvae.training.watching import Watcher

pytestmark = pytest.mark.slow

PLAIN = (*EVERY_BRICK, "train.steps=20")
ACCUMULATED = (*EVERY_BRICK, "train.steps=4", "data.global_batch=64")
Facts = dict[str, Any]


# -------------------------------------------------------------------------------------------- what the two ranks do


def facts(folder: Path) -> None:
    """In each of two processes: everything they are asked, into a file of their own."""
    distributed.start(torch.device("cpu"), timeout_minutes=1)
    distributed.stop = lambda: None  # one group for all runs
    rank = distributed.rank()
    found = {
        "config": complaint(lambda: require_same_config({"optim": {"lr": rank}, "data": {"path": f"/disk{rank}"}})),
        "plain": train(folder / "plain", *PLAIN, "data.batch=16"),
        "accumulated": train(folder / "accumulated", *ACCUMULATED, "data.batch=16"),
    }
    Watcher.bounds = lambda self, model: {"bound": 0.0}  # type: ignore[method-assign]
    Watcher.pictures = lambda self, model, count=16: {}  # type: ignore[method-assign]
    stays = ["train.non_finite_limit=2", "train.return_limit=1"]
    found |= {
        "weights": complaint(lambda: train(folder / "weights", altered=differ_on_rank_one)),
        "collectives": {mode: collectives(folder / mode, mode) for mode in ("none", "activations", "cells")},
        "gradient": train(folder / "gradient", altered=poison_a_gradient_of_rank_one),
        "stays": complaint(lambda: train(folder / "stays", *stays, altered=poison_rank_one)),
    }
    with held_by_another(folder / "held" / "tiny"):
        found["held"] = complaint(lambda: train(folder / "held"))
        found["outcome of the other"] = outcome(folder / "held" / "tiny")["outcome"]
    make_saving_slow()
    found["stopped"] = train(folder / "stopped", *PLAIN, "data.batch=16", altered=stop_rank_one)
    found["written by then"] = outcome(folder / "stopped" / "tiny")["outcome"]
    (folder / f"facts-{rank}.json").write_text(json.dumps(found))


def train(folder: Path, *overrides: str, altered: Callable[[Any], Any] = lambda model: None) -> str:
    """A run; `altered` changes the model that is trained, on the rank where it runs."""
    original = setup.build

    def build(config: Any) -> Any:
        model = original(config)
        altered(model)
        return model

    setup.build = build  # type: ignore[attr-defined]
    try:
        return train_in(folder, tiny_run(*overrides))
    finally:
        setup.build = original  # type: ignore[attr-defined]


def complaint(action: Callable[[], Any]) -> str:
    """What a UserError says, or nothing."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def differ_on_rank_one(model: Any) -> None:
    if distributed.rank() == 1:
        with torch.no_grad():
            model.stem.weight[0, 0, 0, 0] += 1e-3


def poison_a_gradient_of_rank_one(model: Any) -> None:
    """nan in one weight's gradient, in the second update alone."""
    updates = iter(range(100))

    def poisoned(gradient: Tensor) -> Tensor:
        return gradient * (torch.nan if next(updates) == 1 and distributed.rank() == 1 else 1)

    model.stem.weight.register_hook(poisoned)


def poison_rank_one(model: Any) -> None:
    if distributed.rank() == 1:
        model.head.register_forward_hook(lambda module, inputs, output: output * torch.nan)


def stop_rank_one(model: Any) -> None:
    """A signal in the seventh update, to one process only."""
    updates = iter(range(100))

    def signalled(module: Any, inputs: Any) -> None:
        if module.training and next(updates) == 6 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    model.stem.register_forward_pre_hook(signalled)


@contextmanager
def held_by_another(folder: Path) -> Iterator[None]:
    """A run folder as a live run of another launch has it."""
    if distributed.rank() == 0:
        folder.mkdir(parents=True)
        (folder / "outcome.json").write_text(json.dumps({"outcome": "running", "step": 0, "message": ""}))
    distributed.barrier()
    with (folder / ".lock").open("w") as lock:
        if distributed.rank() == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
        distributed.barrier()
        yield
        distributed.barrier()


def make_saving_slow() -> None:
    """As of a model of gigabytes."""
    original = RunFolder.save

    def save(self: RunFolder, step: int, *args: Any, **kwargs: Any) -> None:
        if distributed.rank() == 0 and step > 0:
            time.sleep(0.5)
        original(self, step, *args, **kwargs)

    RunFolder.save = save  # type: ignore[method-assign]


def collectives(folder: Path, mode: str) -> list[int]:
    """How many reductions over ranks each of two updates begins, those of gradients not counted."""
    counts: list[int] = []
    reduce, step = torch.distributed.all_reduce, Trainer.step

    def counted_reduce(*args: Any, **kwargs: Any) -> Any:
        counts[-1:] = [count + 1 for count in counts[-1:]]
        return reduce(*args, **kwargs)

    def counted_step(self: Trainer) -> Any:
        counts.append(0)
        return step(self)

    torch.distributed.all_reduce, Trainer.step = counted_reduce, counted_step  # type: ignore[method-assign]
    try:
        train(folder, *EVERY_BRICK, "train.steps=2", f"train.recompute={mode}", "train.log_every=2")
    finally:
        torch.distributed.all_reduce, Trainer.step = reduce, step  # type: ignore[method-assign]
    return counts


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Facts]]:
    """The runs of the two processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = start_ranks(2, facts, folder)
    for process in processes:
        process.join(timeout=200)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return folder, [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the same global batches."""
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    assert train_in(folder / "plain", tiny_run(*PLAIN)) == "finished"
    assert train_in(folder / "accumulated", tiny_run(*ACCUMULATED)) == "finished"
    return folder


# -------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(("kind", "steps"), [("plain", 20), ("accumulated", 4)])
def test_two_processes_have_the_losses_of_one(
    ranks: tuple[Path, list[Facts]], alone: Path, kind: str, steps: int
) -> None:
    two, one = ranks[0] / kind / "tiny", alone / kind / "tiny"
    losses = column(one, "loss")
    assert len(losses) == steps
    assert column(two, "loss") == pytest.approx(losses, rel=1e-5)
    for name in ("spectral", "kl_group/02", "nelbo", "validation_ema/bound"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-4)


@pytest.mark.parametrize("kind", ["plain", "accumulated"])
def test_two_processes_have_the_running_statistics_of_one(
    ranks: tuple[Path, list[Facts]], alone: Path, kind: str
) -> None:
    two, one = (checkpoint(folder / kind / "tiny")["model"] for folder in (ranks[0], alone))
    names = [name for name in one if "running_" in name or "num_batches" in name]
    assert len(names) > 30
    for name in names:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_log_tells_both_the_same_story(ranks: tuple[Path, list[Facts]], alone: Path) -> None:
    for two, one in zip(log(ranks[0] / "plain" / "tiny"), log(alone / "plain" / "tiny"), strict=True):
        assert two.keys() == one.keys()
        whole = [name for name in one if name.startswith(("active_units", "epoch", "learning_rate", "kl_coefficient"))]
        assert {name: two[name] for name in whole} == {name: one[name] for name in whole}


# ------------------------------------------------------------------------------------------------------- collectives


def test_recomputation_repeats_no_collective(ranks: tuple[Path, list[Facts]]) -> None:
    counts = ranks[1][0]["collectives"]
    assert counts["none"][0] > 50
    assert counts["activations"] == counts["none"]
    assert counts["cells"] == counts["none"]


def test_an_update_begins_no_more_collectives_than_it_needs(ranks: tuple[Path, list[Facts]]) -> None:
    """One each way for every batch norm, one for balancing, one to agree."""
    model = checkpoint(ranks[0] / "none" / "tiny")["model"]
    norms = sum(name.endswith("running_mean") for name in model)
    assert ranks[1][0]["collectives"]["none"][0] == 2 * norms + 2


# -------------------------------------------------------------------------------------------------- the same decisions


def test_ranks_that_start_from_other_weights_are_found_out(ranks: tuple[Path, list[Facts]]) -> None:
    for found in ranks[1]:
        assert found["weights"].startswith("ranks hold different weights, first at 'model.stem.weight'")


def test_ranks_that_were_started_differently_are_found_out(ranks: tuple[Path, list[Facts]]) -> None:
    assert [found["config"] for found in ranks[1]] == [
        "",
        "optim.lr: 1 on rank 1, 0 on rank 0; start every machine with the same command",
    ]


def test_a_bad_gradient_of_one_rank_is_skipped_by_all(ranks: tuple[Path, list[Facts]]) -> None:
    folder = ranks[0] / "gradient" / "tiny"
    assert column(folder, "non_finite") == [0, 1, 1, 1, 1, 1]
    assert checkpoint(folder)["counters"]["non_finite"] == 1
    assert outcome(folder)["outcome"] == "finished"


def test_all_ranks_stop_with_the_name_of_the_one_that_went_bad(ranks: tuple[Path, list[Facts]]) -> None:
    one, two = (found["stays"] for found in ranks[1])
    assert one == two
    assert "first to be non-finite: the output of 'head' (rank 1)" in one


def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks: tuple[Path, list[Facts]]) -> None:
    assert [found["stopped"] for found in ranks[1]] == ["interrupted"] * 2
    assert outcome(ranks[0] / "stopped" / "tiny") == {"outcome": "interrupted", "step": 7, "message": ""}


def test_no_rank_leaves_before_everything_is_written(ranks: tuple[Path, list[Facts]]) -> None:
    """Launchers kill the others when the first is gone."""
    assert [found["written by then"] for found in ranks[1]] == ["interrupted", "interrupted"]


def test_a_launch_into_the_folder_of_a_live_run_is_refused_on_all_ranks_and_leaves_its_outcome_alone(
    ranks: tuple[Path, list[Facts]],
) -> None:
    for found in ranks[1]:
        assert "another process trains in this folder" in found["held"]
        assert found["outcome of the other"] == "running"
    assert outcome(ranks[0] / "held" / "tiny")["outcome"] == "running"


def test_a_run_goes_on_with_another_number_of_processes(ranks: tuple[Path, list[Facts]], alone: Path) -> None:
    folder = ranks[0] / "stopped"
    assert train_in(folder, tiny_run(*PLAIN, "data.batch=32")) == "finished"
    assert checkpoint(folder / "tiny")["counters"]["images_seen"] == 20 * 32
    assert column(folder / "tiny", "loss") == pytest.approx(column(alone / "plain" / "tiny", "loss"), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- torchrun


def start_agents(folder: Path, *overrides: str) -> list[subprocess.Popen[bytes]]:
    """Two torchrun agents on this machine, as on two machines with a process each, training configs/debug.yaml."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous]
    command = [*torchrun, str(ROOT / "train.py"), str(ROOT / "configs" / "debug.yaml"), "data.batch=16", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("ab") as output:
        streams = {"stdout": output, "stderr": output}
        return [subprocess.Popen(command, cwd=folder, env=environment, **streams) for _ in range(2)]


def child_of(pid: int) -> int:
    """The process that another has started."""
    (child,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return child


def newest_step(folder: Path) -> int:
    """Of the checkpoints' names: a run that lives is only looked at."""
    return max(step_of(file) for file in (folder / "checkpoints").glob("step-*.pt"))


def wait_until(condition: Callable[[], bool], seconds: float, agents: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert all(agent.poll() is None for agent in agents), "an agent has ended"
        time.sleep(0.05)


def test_two_machines_train_die_together_and_go_on(tmp_path: Path) -> None:
    run_folder = tmp_path / "runs" / "debug"
    options = ["train.steps=400", "train.save_every=5", "train.log_every=5"]
    agents = start_agents(tmp_path, *options)
    try:
        wait_until(lambda: (run_folder / "checkpoints" / "step-000000010.pt").exists(), 200, agents)
        os.kill(child_of(agents[1].pid), signal.SIGKILL)
        killed = time.monotonic()
        codes = [agent.wait(timeout=60) for agent in agents]
        assert time.monotonic() - killed < 60
        assert 0 not in codes
        before = newest_step(run_folder)
        assert before >= 10

        agents = start_agents(tmp_path, *options)
        wait_until(lambda: newest_step(run_folder) > before, 200, agents)
        os.kill(agents[0].pid, signal.SIGTERM)
        assert all(agent.wait(timeout=60) != 0 for agent in agents)
        assert outcome(run_folder)["outcome"] == "interrupted"
        assert outcome(run_folder)["step"] == newest_step(run_folder) > before
    finally:
        for agent in agents:
            agent.kill()
    said = (tmp_path / "output.txt").read_text()
    assert "continuing debug: 29,126 parameters on 2 × cpu, 32 images per update (16 per process and pass)" in said


# ------------------------------------------------------------------------------------------------------------- Slurm

SRUN = """#!/usr/bin/env bash
# Two tasks on one machine; passes SIGUSR1 on, as Slurm does, and ends with the highest code.
shift
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
trap 'kill -USR1 $first $second' USR1
highest=0
for task in $first $second; do
    while code=0; wait $task || code=$?; kill -0 $task 2>/dev/null; do :; done
    [ $code -le $highest ] || highest=$code
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> scontrol.txt; fi
"""


def test_slurm_puts_an_interrupted_run_back_into_the_queue(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "OMP_NUM_THREADS": "1"}
    path = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    command = ["bash", str(ROOT / "scripts" / "slurm.sh"), str(ROOT / "configs" / "debug.yaml"), "data.batch=16"]
    process = subprocess.Popen(
        [*command, "train.steps=400"], cwd=tmp_path, env={**os.environ, **job, **path}, start_new_session=True
    )
    try:
        log_file = tmp_path / "runs" / "debug" / "metrics.jsonl"
        wait_until(lambda: log_file.exists() and log_file.stat().st_size > 0, 200, [process])
        os.kill(child_of(process.pid), signal.SIGUSR1)
        assert process.wait(timeout=60) == 75
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"
    assert outcome(tmp_path / "runs" / "debug")["outcome"] == "interrupted"
