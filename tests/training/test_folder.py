"""A run's folder: one run at a time, whole checkpoints or none, and a word on how it ended."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvae.checkpoints.format import FORMAT, read_safely
from nvae.core.errors import UserError
from nvae.core.files import atomic_file
from nvae.training.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def save(folder: RunFolder, *steps: int, keep: int = 100, milestone_every: int | None = None) -> None:
    for step in steps:
        folder.save(step, {"step": step, "weights": torch.ones(3)}, keep=keep, milestone_every=milestone_every)


def steps(folder: RunFolder) -> list[int]:
    return sorted(int(file.stem.removeprefix("step-")) for file in folder.checkpoints.glob("step-*.pt"))


# ------------------------------------------------------------------------------------------------------------- lock


def test_a_second_run_in_a_live_folder_refuses(folder: RunFolder) -> None:
    with folder.locked(), pytest.raises(UserError, match="another process trains in this folder"):  # noqa: SIM117
        with RunFolder(folder.path).locked():
            pass


def test_the_lock_is_given_back_at_the_end(folder: RunFolder) -> None:
    with folder.locked():
        pass
    with RunFolder(folder.path).locked():
        pass


def test_the_lock_of_a_killed_process_is_free(folder: RunFolder) -> None:
    program = (
        "import os, sys, fcntl; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    )
    folder.path.mkdir()
    assert subprocess.run([sys.executable, "-c", program, folder.path / ".lock"]).returncode == -9
    with folder.locked():
        pass


def test_where_there_are_no_locks_a_run_goes_on_and_says_so(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    with folder.locked():
        pass
    monkeypatch.setattr("nvae.core.files.fcntl", None)
    with folder.locked():
        pass
    assert capsys.readouterr().err.count(f"{folder.path}: no locks here") == 2


def test_what_a_killed_process_was_writing_is_removed(folder: RunFolder) -> None:
    save(folder, 10)
    leftovers = [folder.checkpoints / ".step-000000020.pt.x1", folder.path / ".outcome.json.x2"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    lock = folder.path / ".results.json.lock"  # of an evaluation that goes on
    lock.touch()
    with folder.locked():
        folder.begin("")
        assert lock.exists()
        assert not any(leftover.exists() for leftover in leftovers)
        assert steps(folder) == [10]


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_reads_back(folder: RunFolder) -> None:
    save(folder, 10)
    content = folder.newest()
    assert content is not None
    assert (content["format"], content["step"]) == (FORMAT, 10)
    assert torch.equal(content["weights"], torch.ones(3))


def test_a_new_folder_has_none(folder: RunFolder) -> None:
    assert folder.newest() is None


def test_the_newest_few_and_the_milestones_are_kept(folder: RunFolder) -> None:
    save(folder, *range(0, 130, 10), keep=2, milestone_every=40)
    assert steps(folder) == [40, 80, 110, 120]


def test_latest_points_to_the_newest(folder: RunFolder) -> None:
    save(folder, 10, 20)
    assert read_safely(folder.checkpoints / "latest")["step"] == 20


def test_the_best_one_stands_apart(folder: RunFolder) -> None:
    folder.save_best({"step": 5})
    save(folder, 10, 20, keep=1)
    assert read_safely(folder.checkpoints / "best.pt")["step"] == 5
    assert steps(folder) == [20]


def test_a_save_that_fails_leaves_nothing(folder: RunFolder) -> None:
    save(folder, 10)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        folder.save(20, {"bad": lambda: None}, keep=1, milestone_every=None)
    assert [file.name for file in folder.checkpoints.iterdir() if file.name != "latest"] == ["step-000000010.pt"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "garbled"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    folder: RunFolder, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(folder, 10, 20)
    newest = folder.checkpoints / "step-000000020.pt"
    whole = newest.read_bytes()
    if damage == "foreign":
        torch.save({"step": 20}, newest)
    else:
        newest.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "garbled": b"x" * 500}[damage])
    content = folder.newest()
    assert content is not None
    assert content["step"] == 10
    said = capsys.readouterr().err
    assert "step-000000020.pt" in said
    assert "going on from step-000000010.pt" in said


def test_a_damaged_checkpoint_is_set_aside_and_never_outlives_good_ones(folder: RunFolder) -> None:
    save(folder, 10, 20)
    (folder.checkpoints / "step-000000020.pt").write_bytes(b"")
    folder.newest()
    assert (folder.checkpoints / "step-000000020.pt").exists()
    folder.begin("")
    assert (folder.checkpoints / "step-000000020.pt.damaged").exists()
    assert read_safely(folder.checkpoints / "latest")["step"] == 10
    save(folder, 15, keep=1)
    assert steps(folder) == [15]


def test_where_none_can_be_read_the_run_does_not_start_over(folder: RunFolder) -> None:
    save(folder, 10)
    (folder.checkpoints / "step-000000010.pt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="none of them can be read"):
            folder.newest()


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"text")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


# ---------------------------------------------------------------------------------------------------------- outcome


def outcome(folder: RunFolder) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder.path / "outcome.json").read_text())
    return found


def test_the_outcome_names_the_checkpoint_to_go_on_from(folder: RunFolder) -> None:
    folder.record_outcome("running")
    assert outcome(folder) == {"outcome": "running", "step": 0, "message": ""}
    save(folder, 10, 20)
    folder.record_outcome("interrupted")
    assert outcome(folder) == {"outcome": "interrupted", "step": 20, "message": ""}


def test_the_first_failure_is_the_one_that_is_told(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.record_outcome("running")
    monkeypatch.setattr("nvae.training.folder.rank", lambda: 3)
    folder.record_failure("out of memory")
    monkeypatch.setattr("nvae.training.folder.rank", lambda: 0)
    folder.record_failure("connection closed by peer")
    assert outcome(folder) == {"outcome": "failed", "step": 0, "message": "rank 3: out of memory"}
    folder.record_outcome("running")
    assert outcome(folder)["outcome"] == "running"
