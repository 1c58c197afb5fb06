"""Whatever a case does to its process, it has a verdict, and the next one runs."""

import os
import signal
import time
from pathlib import Path

import pytest
from processes import start

from tests.gauntlet import reporting
from tests.gauntlet.cases import Case, Group, Result, Verdict
from tests.gauntlet.command import numbers_of
from tests.gauntlet.running import Record, run_group


def misbehave(case: Case) -> Result:
    """By its number: nothing, an error, an exit, death, sleep, work, memory, or nothing again."""
    match case.number:
        case 1:
            raise KeyError("lost")
        case 2:
            raise SystemExit(0)
        case 3:
            os.kill(os.getpid(), signal.SIGKILL)
        case 4:
            time.sleep(1000)
        case 5:
            while time.process_time() < 1000:
                pass
        case 6:
            bytearray(100 * 2**20)
        case 7:
            Path("file").write_text("left behind")
    return Result(Verdict.RESOLVED, f"{case.random.random()}")


BAD = Group("bad", "what may happen", full=9, short=9, run=misbehave, cases_per_process=5, seconds=0.3, mebibytes=50)


def write_records(folder: Path, seed: int) -> None:
    """In a process of its own."""
    records = list(run_group(BAD, seed, range(9), folder, folder / "material", jobs=2))
    reporting.write(folder / "found.json", {"records": [vars(record) for record in records]})


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Record]:
    folder = tmp_path_factory.mktemp("bad")
    process = start(write_records, folder, 0)
    process.join(120)
    found = [Record(**line) for line in reporting.read(folder / "found.json")["records"]]
    assert len(found) == 9
    assert sorted(entry.name for entry in folder.iterdir() if entry.name not in ("found.json", "bad-3", "bad-4")) == []
    return {record.number: record for record in found}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "KeyError: 'lost'"),
        (2, "SystemExit"),
        (3, "its process died with code -9"),
        (4, "still running after"),
        (5, "TooLongError"),
        (6, "MiB"),
    ],
)
def test_a_case_that_misbehaves_is_broken(records: dict[int, Record], number: int, words: str) -> None:
    assert records[number].verdict == Verdict.BROKEN
    assert words in records[number].note


@pytest.mark.parametrize("number", [0, 7, 8])
def test_a_case_beside_such_ones_has_its_own_verdict(records: dict[int, Record], number: int) -> None:
    assert records[number].verdict == Verdict.RESOLVED


def test_a_case_follows_from_seed_and_number(records: dict[int, Record], tmp_path: Path) -> None:
    first, second = ([record.note for record in run_alone(tmp_path / str(i), seed)] for i, seed in enumerate((0, 1)))
    assert first == [records[8].note]
    assert second != first


def run_alone(folder: Path, seed: int) -> list[Record]:
    folder.mkdir()
    process = start(write_one, folder, seed)
    process.join(60)
    return [Record(**line) for line in reporting.read(folder / "found.json")["records"]]


def write_one(folder: Path, seed: int) -> None:
    records = list(run_group(BAD, seed, [8], folder, folder / "material"))
    reporting.write(folder / "found.json", {"records": [vars(record) for record in records]})


def test_failures_are_counted_and_told() -> None:
    records = [Record(1, Verdict.LET_IN, "how", 0.1, 1), Record(0, Verdict.RESOLVED, "", 0.2, 3)]
    entry = reporting.found(BAD, records, seconds=1.0)
    assert (entry["tried"], entry["resolved"], entry["let in"], reporting.failed(entry)) == (2, 1, 1, 1)
    assert entry["failures"] == [{"number": 1, "verdict": "let in", "note": "how"}]
    assert reporting.table({"bad": entry}).splitlines()[2] == "| `bad` | what may happen | 2 | 1 | 0 | 0 | 0 | 1 | 0 |"


def test_only_names_cases_and_count_the_first_ones() -> None:
    assert list(numbers_of(BAD, short=True, count=3, only=None)) == [0, 1, 2]
    assert list(numbers_of(BAD, short=False, count=None, only=[7])) == [7]
    assert len(numbers_of(BAD, short=False, count=None, only=None)) == 9
