"""Two runs of one command are bitwise the same on a CPU."""

from pathlib import Path

from .cases import Case, Result, Verdict
from .jobs import JOBS, enter, finished


def run(case: Case) -> Result:
    """Each job in turn, against the one that made the material."""
    job = list(JOBS.values())[case.number % len(JOBS)]
    enter(case.folder / "work", case.material)
    if (codes := finished(job)) != [0] * job.ranks:
        return Result(Verdict.BROKEN, f"{job.name}: {codes}")
    wrong = job.differs(Path.cwd(), case.material / "undisturbed" / job.name)
    return Result(Verdict.LOST if wrong else Verdict.SURVIVED, f"{job.name}: {wrong[:5]}")
