"""Files and configs that want to run something, climb out of their folder, or burst."""

from collections.abc import Callable
from pathlib import Path

from . import hostile_archives, hostile_names, hostile_pickles
from .cases import Case, Result, Verdict
from .effects import effects_outside

Attack = Callable[[Case], Result]
ATTACKS: tuple[Attack, ...] = (
    *hostile_pickles.ATTACKS,
    *hostile_archives.ATTACKS,
    *hostile_names.ATTACKS,
)


def prepare(material: Path) -> None:
    """A run, and bombs."""
    hostile_pickles.prepare(material)
    hostile_archives.prepare(material)


def run(case: Case) -> Result:
    """The attacks in turn."""
    attack = ATTACKS[case.number % len(ATTACKS)]
    with effects_outside(case.folder) as seen:
        result = attack(case)
    tried = f"{attack.__name__}: {result.note}"
    if (case.folder / "trace").exists():
        return Result(Verdict.LET_IN, f"{tried}: a command was executed")
    if seen:
        return Result(Verdict.LET_IN, f"{tried}: {seen[:5]}")
    return Result(result.verdict, tried)
