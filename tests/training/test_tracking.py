"""What a run writes about itself: JSON lines, TensorBoard, the line in a log file; and how it is cut back."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nvae.training.tracking import Tracker


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_on_board(folder: Path, name: str) -> list[int]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [event.step for event in board.Scalars(name)]


def test_numbers_go_to_both_places(tmp_path: Path) -> None:
    with Tracker(tmp_path, total_steps=10) as tracker:
        tracker.scalars(5, {"loss": 2.5, "kl_group/00": 1.0})
    assert lines(tmp_path) == [{"step": 5, "loss": 2.5, "kl_group/00": 1.0}]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {name: board.Scalars(name)[0].value for name in board.Tags()["scalars"]} == {"loss": 2.5, "kl_group/00": 1.0}


def test_a_number_that_is_none_is_valid_json(tmp_path: Path) -> None:
    with Tracker(tmp_path, total_steps=10) as tracker:
        tracker.scalars(5, {"loss": float("nan"), "norm": float("inf")})
    assert lines(tmp_path) == [{"step": 5, "loss": None, "norm": None}]


def test_a_continued_run_forgets_what_was_written_after_its_checkpoint(tmp_path: Path) -> None:
    with Tracker(tmp_path, total_steps=10) as tracker:
        for step in (1, 2):
            tracker.scalars(step, {"loss": step})
        kept = tracker.log_lines
        tracker.scalars(3, {"loss": 3})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    with Tracker(tmp_path, total_steps=10, step=2, log_lines=kept) as tracker:
        tracker.scalars(3, {"loss": 33})
    assert lines(tmp_path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 33}]
    assert steps_on_board(tmp_path, "loss") == [1, 2, 3]


def test_a_run_that_returns_writes_on_from_there(tmp_path: Path) -> None:
    with Tracker(tmp_path, total_steps=10) as tracker:
        tracker.scalars(1, {"loss": 1})
        kept = tracker.log_lines
        tracker.scalars(2, {"loss": 2})
        tracker.rewind(1, kept)
        tracker.scalars(2, {"loss": 22})
    assert [line["loss"] for line in lines(tmp_path)] == [1, 22]
    assert steps_on_board(tmp_path, "loss") == [1, 2]


def test_a_log_file_gets_a_line_with_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, total_steps=10) as tracker:
        tracker.scalars(5, {"loss": 2.54321, "other": 1}, shown=("loss", "absent"))
    assert capsys.readouterr().out.strip() == "step 5/10  loss 2.543  0:00:00 left"


def test_the_time_left_is_told_without_what_the_first_steps_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0
    monkeypatch.setattr("nvae.training.tracking.time.monotonic", lambda: clock)
    with Tracker(tmp_path, total_steps=100) as tracker:
        for step in range(1, 31):
            clock += 60 if step in (1, 2) else 2 if step <= 10 else 3
            tracker.advance(step)
            if step % 10 == 0:
                tracker.scalars(step, {"loss": 1.0}, shown=("loss",))
    told = [line.rsplit("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert told == ["0:03:00 left", "0:04:00 left", "0:03:30 left"]  # 90 steps of 2 s, then 80 and 70 of 3 s


def test_pictures_text_and_hyperparameters_are_on_the_board(tmp_path: Path) -> None:
    with Tracker(tmp_path, total_steps=10) as tracker:
        tracker.picture(3, "samples/0.7", torch.rand(3, 4, 4))
        tracker.text("config", "name: x\nseed: 0")
        tracker.hyperparameters({"optim.lr": 0.1, "data.path": None}, {"final/bound": 3.0})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert tags["images"] == ["samples/0.7"]
    assert "config/text_summary" in tags["tensors"]
    assert "final/bound" in tags["scalars"]
    assert "_hparams_/experiment" in board.summary_metadata
    assert "_hparams_/session_start_info" in board.summary_metadata


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvae.training.tracking.rank", lambda: 1)
    with Tracker(tmp_path, total_steps=10) as tracker:
        tracker.scalars(5, {"loss": 2.5})
        tracker.advance(5)
        tracker.rewind(1, 0)
        tracker.note("hello")
        tracker.flush()
    assert list(tmp_path.iterdir()) == []
