"""All groups, and how many cases each has."""

from . import (
    checkpoints,
    command_lines,
    configs,
    exhaustion,
    hangs,
    hostile,
    jobs,
    kills,
    long_runs,
    stored_images,
    twins,
)
from .cases import Group

GROUPS = {
    group.name: group
    for group in (
        Group(
            "configs",
            "mutated configs and overrides, each built on the meta device",
            full=8500,
            short=60,
            run=configs.run,
            prepare=configs.prepare,
            cases_per_process=100,
        ),
        Group(
            "command-lines",
            "mutated command lines",
            full=1500,
            short=20,
            run=command_lines.run,
            prepare=command_lines.prepare,
            cases_per_process=50,
        ),
        Group(
            "checkpoints",
            "damaged and edited checkpoints, loaded or continued",
            full=2000,
            short=40,
            run=checkpoints.run,
            prepare=checkpoints.prepare,
            cases_per_process=50,
        ),
        Group(
            "images",
            "damaged images, archives, arrays, databases and stores",
            full=500,
            short=40,
            run=stored_images.run,
            prepare=stored_images.prepare,
            cases_per_process=20,
        ),
        Group(
            "hostile",
            "pickles, names, archives and pages that mean harm",
            full=400,
            short=20,
            run=hostile.run,
            prepare=hostile.prepare,
            cases_per_process=10,
        ),
        Group(
            "kills",
            "signals at random moments to one or all of one or two ranks",
            full=200,
            short=20,
            run=kills.run,
            prepare=jobs.prepare,
            seconds=60,
        ),
        Group(
            "exhaustion",
            "full, locked and vanished disks, too little memory, jumping clocks",
            full=100,
            short=6,
            run=exhaustion.run,
            prepare=jobs.prepare,
            seconds=60,
        ),
        Group(
            "hangs",
            "silent ranks, dead loaders, a second run in one folder",
            full=16,
            short=4,
            run=hangs.run,
            prepare=jobs.prepare,
            seconds=60,
        ),
        Group(
            "twins",
            "commands given twice, compared bit for bit",
            full=len(jobs.JOBS),
            short=2,
            run=twins.run,
            prepare=jobs.prepare,
            seconds=60,
        ),
        Group(
            "long",
            "20 000 updates: memory and open files",
            full=1,
            short=0,
            run=long_runs.run_for(20_000),
            seconds=3600,
        ),
        Group(
            "long-short", "300 updates: memory and open files", full=0, short=1, run=long_runs.run_for(300), seconds=60
        ),
    )
}
