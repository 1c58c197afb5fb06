"""`train.profile`: a trace of some updates in the run's folder, and a run that is none the different for it."""

import json
from pathlib import Path

import pytest
from tiny_run import checkpoint, differences, tiny_run, train_in


def recorded(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "tiny/profile").glob("*"))


def test_updates_are_recorded_and_no_number_changes(tmp_path: Path) -> None:
    for name, updates in (("with", 2), ("without", 0)):
        train_in(tmp_path / name, tiny_run(f"train.profile={updates}"))
    assert recorded(tmp_path / "with") == ["step-000000004.json", "step-000000004.txt"]
    assert recorded(tmp_path / "without") == []
    with_, without = (checkpoint(tmp_path / name / "tiny") for name in ("with", "without"))
    assert differences(with_["model"], without["model"]) == []


def test_the_trace_is_of_that_many_updates(tmp_path: Path) -> None:
    train_in(tmp_path, tiny_run("train.profile=2"))
    events = json.loads((tmp_path / "tiny/profile/step-000000004.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 2
    assert any("conv" in event.get("name", "") for event in events)
    assert "Self CPU" in (tmp_path / "tiny/profile/step-000000004.txt").read_text()


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path: Path) -> None:
    train_in(tmp_path, tiny_run("train.profile=1000"))
    assert recorded(tmp_path) == ["step-000000004.json", "step-000000004.txt"]


@pytest.mark.parametrize("first", [2, 4])
def test_a_run_that_goes_on_is_recorded_from_where_it_is(tmp_path: Path, first: int) -> None:
    train_in(tmp_path, tiny_run(f"train.steps={first}", "allow_changes=true"))
    train_in(tmp_path, tiny_run("train.steps=8", "allow_changes=true", "train.profile=1"))
    assert recorded(tmp_path)[0] == f"step-{first + 4:09d}.json"
