"""The short form of scripts/gauntlet.py: a few cases of every group, all of which must pass."""

from pathlib import Path

import pytest
from processes import start

from tests.gauntlet import reporting
from tests.gauntlet.groups import GROUPS
from tests.gauntlet.running import material_of, run_group

QUICK = ("configs", "command-lines", "checkpoints", "images", "hostile")
"""Groups without processes that are started, killed and started again."""
SLOW = [name for name, group in GROUPS.items() if group.short and name not in (*QUICK, "kills")]
KILLS = pytest.param("kills", marks=(pytest.mark.full, pytest.mark.timeout(1800)))
"""A minute for every three: tests of resuming kill runs at every change."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the groups make what they start from: some share it."""
    return tmp_path_factory.mktemp("gauntlet")


def run_few(name: str, folder: Path) -> None:
    """In a process of its own, which computes nothing: what was found in the short form of a group."""
    group = GROUPS[name]
    material = material_of(group, folder)
    records = list(run_group(group, 0, range(group.short), folder, material))
    reporting.write(folder / f"{name}.json", reporting.found(group, records, 0))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW), KILLS])
def test_a_few_cases_of_a_group_pass(name: str, folder: Path) -> None:
    process = start(run_few, name, folder)
    process.join()
    assert process.exitcode == 0
    entry = reporting.read(folder / f"{name}.json")
    assert entry["tried"] == GROUPS[name].short
    assert entry["failures"] == []
