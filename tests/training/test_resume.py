"""A run that was cut short goes on as if it had not been: bit for bit, wherever it was cut."""

import io
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from processes import start
from tiny_run import checkpoint, column, differences, log, outcome, tiny_run, train_in
from toy_family import Toy

from nvae.checkpoints.format import save_checkpoint
from nvae.core.errors import UserError
from nvae.training.adamax import Adamax
from nvae.training.config import AnyRunConfig, load_run
from nvae.training.folder import RunFolder
from nvae.training.trainer import Trainer

OPTIONS = ("train.steps=12", "train.save_every=3", "train.keep=2", "train.validate_every=0.1")
VALIDATE_EVERY = 5  # updates: 0.1 · 1500 / 32


def assert_same_end(found: Path, expected: Path) -> None:
    """The same weights, average, optimiser, counters and log, bit for bit."""
    assert differences(checkpoint(found), checkpoint(expected)) == []
    assert log(found) == log(expected)
    best = [torch.load(folder / "checkpoints" / "best.pt", weights_only=True) for folder in (found, expected)]
    assert differences(*best) == []
    assert outcome(found) == outcome(expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    assert train_in(folder, tiny_run(*OPTIONS)) == "finished"
    return folder / "tiny"


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Has something happen once, in the middle of an update, counted from 1."""

    def patch(step: int, happening: Callable[[], Any]) -> None:
        original, pending = Trainer._accumulate_gradients, [happening]

        def gradients(self: Trainer) -> Any:
            if self.state.step + 1 == step and pending:
                pending.pop()()
            return original(self)

        monkeypatch.setattr(Trainer, "_accumulate_gradients", gradients)

    return patch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_code_75(
    tmp_path: Path, number: signal.Signals, at_step: Callable[[int, Callable[[], Any]], None]
) -> None:
    before = signal.getsignal(number)
    at_step(2, lambda: os.kill(os.getpid(), number))
    assert train_in(tmp_path, tiny_run()) == "interrupted"
    assert outcome(tmp_path / "tiny") == {"outcome": "interrupted", "step": 2, "message": ""}
    assert checkpoint(tmp_path / "tiny")["counters"]["step"] == 2
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("step", [1, 4, VALIDATE_EVERY, 12])
def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, step: int, uninterrupted: Path, at_step: Callable[[int, Callable[[], Any]], None]
) -> None:
    """In the first update, between two saves, where validation is due, and in the last."""
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train_in(tmp_path, tiny_run(*OPTIONS)) == "interrupted"
    assert train_in(tmp_path, tiny_run(*OPTIONS)) == "finished"
    assert_same_end(tmp_path / "tiny", uninterrupted)


def test_a_family_that_draws_for_itself_goes_on_exactly_too(
    tmp_path: Path, at_step: Callable[[int, Callable[[], Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Toy.encode
    monkeypatch.setattr(
        Toy, "encode", lambda self, x, labels=None: original(self, torch.dropout(x, 0.5, self.training))
    )
    toy = "model={family: 'toy_family:Toy', image_size: 8, image_channels: 1, likelihood: {kind: bernoulli}}"
    assert train_in(tmp_path / "plain", tiny_run(toy)) == "finished"
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train_in(tmp_path, tiny_run(toy)) == "interrupted"
    assert train_in(tmp_path, tiny_run(toy)) == "finished"
    found, expected = checkpoint(tmp_path / "tiny"), checkpoint(tmp_path / "plain" / "tiny")
    assert differences(found["model"], expected["model"]) == []


# ------------------------------------------------------------------------------------------------------------ kills


def train_until_killed(folder: Path, seconds: float | None) -> None:
    """In a process of its own: trains, and dies that long after it began."""
    if seconds is not None:
        threading.Timer(seconds, die).start()
    train_in(folder, tiny_run(*OPTIONS))


def die() -> NoReturn:
    """As a machine does that loses power: nothing is said, nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def finish(folder: Path) -> None:
    assert train_in(folder, tiny_run(*OPTIONS)) == "finished"


def kill_at_random_moments(folder: Path, kills: int, uninterrupted: Path) -> None:
    """Kills runs, each continuing the one before it, over and over; those that reach their end must be as expected."""
    began = time.perf_counter()
    finish(folder / "timed")
    duration, moments = time.perf_counter() - began, random.Random(kills)
    killed, number = 0, 0
    while killed < kills:
        process = start(train_until_killed, folder / str(number), moments.uniform(0, duration))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            assert_same_end(folder / str(number) / "tiny", uninterrupted)
            number += 1
        else:
            killed += 1
    finish(folder / str(number))
    assert_same_end(folder / str(number) / "tiny", uninterrupted)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_the_same(tmp_path: Path, uninterrupted: Path) -> None:
    kill_at_random_moments(tmp_path, 5, uninterrupted)


@pytest.mark.full
def test_a_run_killed_at_twenty_random_moments_ends_the_same(tmp_path: Path, uninterrupted: Path) -> None:
    kill_at_random_moments(tmp_path, 20, uninterrupted)


def train_and_die_in_save(folder: Path, moment: str) -> None:
    """In a process of its own: dies within the third save, that of update 5."""
    traps = {
        "half of it written": lambda: setattr(torch, "save", save_half),
        "written but not in place": lambda: setattr(os, "fsync", lambda file: die()),
        "in place but not the latest": lambda: setattr(RunFolder, "_point_latest_to", lambda *args: die()),
    }
    saves, original = iter(range(100)), RunFolder.save

    def save(self: RunFolder, *args: Any, **kwargs: Any) -> None:
        if next(saves) == 2:
            traps[moment]()
        original(self, *args, **kwargs)

    RunFolder.save = save  # type: ignore[method-assign]
    train_in(folder, tiny_run(*OPTIONS))


def save_half(content: Any, file: Any) -> NoReturn:
    whole = io.BytesIO()
    torch.serialization.save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    die()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "newest"),
    [("half of it written", 3), ("written but not in place", 3), ("in place but not the latest", 5)],
)
def test_a_run_killed_within_a_save_ends_the_same(
    tmp_path: Path, moment: str, newest: int, uninterrupted: Path
) -> None:
    process = start(train_and_die_in_save, tmp_path, moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    checkpoints = tmp_path / "tiny" / "checkpoints"
    assert max(int(file.stem[5:]) for file in checkpoints.glob("step-*.pt")) == newest
    assert outcome(tmp_path / "tiny")["outcome"] == "running"
    finish(tmp_path)
    assert_same_end(tmp_path / "tiny", uninterrupted)
    assert not list(checkpoints.glob(".*"))


# ---------------------------------------------------------------------------------------------------------- workers


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of small pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    numbers = np.random.RandomState(0)
    for number in range(60):
        Image.fromarray(numbers.randint(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def everyone_is_told_to_stop() -> None:
    """As by a terminal or a scheduler that signals all processes of a run."""
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_loader_processes_change_nothing_and_outlive_the_signal(
    tmp_path: Path, pictures: Path, at_step: Callable[[int, Callable[[], Any]], None]
) -> None:
    options = [f"data={{name: images, path: {pictures}, size: 8, channels: 1, binarize: true, batch: 8, memory: 0}}"]
    options += ["train.steps=5", "data.global_batch=64"]  # eight passes: more than are ever read ahead
    assert train_in(tmp_path / "plain", tiny_run(*options, "data.workers=0")) == "finished"
    at_step(3, everyone_is_told_to_stop)
    assert train_in(tmp_path, tiny_run(*options, "data.workers=2")) == "interrupted"
    assert train_in(tmp_path, tiny_run(*options, "data.workers=2")) == "finished"
    plain, found = checkpoint(tmp_path / "plain" / "tiny"), checkpoint(tmp_path / "tiny")
    assert differences(found["model"], plain["model"]) == []
    assert log(tmp_path / "tiny") == log(tmp_path / "plain" / "tiny")


# -------------------------------------------------------------------------------------------------- changed configs


@pytest.fixture
def half_done(tmp_path: Path, at_step: Callable[[int, Callable[[], Any]], None]) -> Path:
    """The runs folder of a run that was asked to stop after update 3 of 6."""
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train_in(tmp_path, tiny_run()) == "interrupted"
    return tmp_path


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.groups=3", "model.groups: 2 → 3"),
        ("optim.lr=0.5", "optim.lr: 0.01 → 0.5"),
        ("train.steps=7", "train.steps: 6 → 7"),
        ("seed=1", "seed: 0 → 1"),
        ("data.global_batch=64", "data.global_batch: 32 → 64"),
    ],
)
def test_what_alters_the_model_or_the_schedule_is_refused(half_done: Path, override: str, line: str) -> None:
    with pytest.raises(UserError, match=r"trained with another config.*allow_changes=true") as error:
        train_in(half_done, tiny_run(override))
    assert f"  {line}" in str(error.value).splitlines()
    assert checkpoint(half_done / "tiny")["counters"]["step"] == 3


def test_what_alters_neither_is_only_said(half_done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_in(half_done, tiny_run("train.log_every=2")) == "finished"
    assert "changed since the last checkpoint: train.log_every: 1 → 2" in capsys.readouterr().out
    assert load_run(half_done / "tiny").train.log_every == 2


def test_a_field_that_the_checkpoint_does_not_know_had_its_default(half_done: Path, capsys: Any) -> None:
    """Those of earlier versions."""
    content = checkpoint(half_done / "tiny")
    del content["config"]["model"]["classes"], content["format"], content["version"]
    save_checkpoint(half_done / "tiny" / "checkpoints" / "step-000000003.pt", content)
    assert train_in(half_done, tiny_run()) == "finished"
    assert "changed" not in capsys.readouterr().out


def test_images_and_lists_may_lie_elsewhere(
    tmp_path: Path, pictures: Path, at_step: Callable[[int, Callable[[], Any]], None], capsys: Any
) -> None:
    names = sorted(file.name for file in pictures.iterdir())
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
        (folder / "train.txt").write_text("\n".join(names[:40]))
        (folder / "test.txt").write_text("\n".join(names[40:]))

    def options(path: Path, *more: str) -> AnyRunConfig:
        own = f"data={{name: images, path: {path}, size: 8, channels: 1, binarize: true, batch: 8}}"
        return tiny_run(own, "data.workers=0", *more)

    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train_in(tmp_path, options(pictures, f"data.lists={folders[0]}")) == "interrupted"
    with pytest.raises(UserError, match=rf"trained with another config[\s\S]*data\.lists: {folders[0]} → None"):
        train_in(tmp_path, options(pictures))
    moved = pictures.rename(tmp_path / "moved")
    assert train_in(tmp_path, options(moved, f"data.lists={folders[1]}")) == "finished"
    assert f"data.lists: {folders[0]} → {folders[1]}" in capsys.readouterr().out


def test_allowed_changes_take_effect(half_done: Path) -> None:
    options = ["optim.lr=0.5", "optim.schedule=constant", "optim.weight_decay=0", "optim.ema=null"]
    assert train_in(half_done, tiny_run(*options, "allow_changes=true")) == "finished"
    assert column(half_done / "tiny", "learning_rate")[3:] == [0.5, 0.5, 0.5]
    assert checkpoint(half_done / "tiny")["ema"] is None


def test_another_optimiser_is_refused_even_so(half_done: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.name: adamax → adamw: start a new run, with train\.init_from"):
        train_in(half_done, tiny_run("optim.name=adamw", "allow_changes=true"))


def test_another_model_is_a_clear_error_even_so(half_done: Path) -> None:
    with pytest.raises(UserError, match="the weights are of another model than the config describes"):
        train_in(half_done, tiny_run("model.groups=3", "allow_changes=true"))


def test_weight_decay_that_was_changed_is_used(half_done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = Adamax.step
    monkeypatch.setattr(
        Adamax,
        "step",
        lambda self, *args: (seen.append(self.param_groups[0]["weight_decay"]), original(self, *args))[1],
    )
    train_in(half_done, tiny_run("optim.weight_decay=0.25", "allow_changes=true"))
    assert seen == [0.25] * 3


def test_smaller_passes_keep_the_global_batch(half_done: Path) -> None:
    assert train_in(half_done, tiny_run("data.batch=16")) == "finished"
    counters = checkpoint(half_done / "tiny")["counters"]
    assert counters["images_seen"] == 6 * 32


def test_a_finished_run_is_left_as_it_is(half_done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_in(half_done, tiny_run()) == "finished"
    before = {file: file.read_bytes() for file in (half_done / "tiny" / "checkpoints").iterdir()}
    written = (half_done / "tiny" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("nvae.training.watching.Watcher.bounds", lambda *args: pytest.fail("validated again"))
    assert train_in(half_done, tiny_run()) == "finished"
    assert {file: file.read_bytes() for file in (half_done / "tiny" / "checkpoints").iterdir()} == before
    assert (half_done / "tiny" / "metrics.jsonl").read_bytes() == written
    assert outcome(half_done / "tiny") == {"outcome": "finished", "step": 6, "message": ""}


# ------------------------------------------------------------------------------------------------------ the folder


def test_a_second_run_in_a_live_folder_refuses_and_leaves_it_alone(half_done: Path) -> None:
    before = outcome(half_done / "tiny")
    with RunFolder(half_done / "tiny").locked(), pytest.raises(UserError, match="another process trains"):
        train_in(half_done, tiny_run())
    assert outcome(half_done / "tiny") == before


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    tmp_path: Path, uninterrupted: Path, at_step: Callable[[int, Callable[[], Any]], None]
) -> None:
    at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train_in(tmp_path, tiny_run(*OPTIONS)) == "interrupted"
    newest = tmp_path / "tiny" / "checkpoints" / "step-000000007.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    finish(tmp_path)
    assert_same_end(tmp_path / "tiny", uninterrupted)


# ------------------------------------------------------------------------------------------------------- warm starts


def test_a_warm_start_takes_the_weights_and_begins_at_step_0(half_done: Path, tmp_path_factory: Any) -> None:
    runs = tmp_path_factory.mktemp("warm")
    assert train_in(runs, tiny_run(f"train.init_from={half_done / 'tiny'}", "train.steps=1")) == "finished"
    source, content = checkpoint(half_done / "tiny"), checkpoint(runs / "tiny", 0)
    assert differences(content["model"], source["model"]) == []
    assert differences(content["ema"], source["model"]) == []
    assert content["counters"]["step"] == 0
    assert content["optimiser"] == {}


def test_a_warm_start_from_another_model_is_a_clear_error(half_done: Path, tmp_path_factory: Any) -> None:
    runs = tmp_path_factory.mktemp("warm")
    with pytest.raises(UserError, match=r"^train\.init_from: the weights are of another model"):
        train_in(runs, tiny_run(f"train.init_from={half_done / 'tiny'}", "model.groups=3"))
    assert outcome(runs / "tiny")["outcome"] == "failed"
