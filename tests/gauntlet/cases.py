"""What a case is, what it may come to, and a group of them."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random


class Verdict(StrEnum):
    RESOLVED = "resolved"
    """It was taken, and means what it says: it builds, or loads with the right numbers."""
    REFUSED = "refused"
    """One line names the field or the file, and the code is 2."""
    SURVIVED = "survived"
    """Everything is as if nothing had happened, or as it was before."""
    LOST = "lost"
    """Something that was whole is gone or damaged, or the end is another one."""
    LET_IN = "let in"
    """Damage became numbers, a mistake became a setting, or a file made something happen."""
    BROKEN = "broken"
    """A traceback, a hang, too much time or memory, or words that name nothing."""


PASSED = (Verdict.RESOLVED, Verdict.REFUSED, Verdict.SURVIVED)


@dataclass(frozen=True)
class Result:
    verdict: Verdict
    note: str = ""
    """What was tried and what came of it."""


@dataclass(frozen=True)
class Case:
    """One of a group; everything random in it follows from the seed and its number."""

    number: int
    random: Random
    folder: Path
    """Its own, empty."""
    material: Path
    """What all cases of the group start from; not to be changed."""


@dataclass(frozen=True)
class Group:
    name: str
    what: str
    """What is tried, in a line."""
    full: int
    """Cases of the full run."""
    short: int
    """Of the short form."""
    run: Callable[[Case], Result]
    """A case from its beginning to its verdict; whatever it raises is a broken case."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Makes the material, once."""
    cases_per_process: int = 1
    seconds: float = 5.0
    """Processor time that a case may take."""
    mebibytes: int = 1024
    """Memory that a case may add."""


def case_of(group: Group, seed: int, number: int, folder: Path, material: Path) -> Case:
    """The case of a number."""
    return Case(number, Random(f"{group.name} {seed} {number}"), folder, material)
