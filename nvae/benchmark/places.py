"""The folder that runs are written into: locks, files that exist whole, space."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from ..core.files import atomic_file, lock
from .findings import Finding
from .installation import GIB, cores

LEAST_DISK = 5 * GIB
"""Checkpoints of the larger recipes have some GiB each."""
LEAST_SHARED = GIB
"""Of /dev/shm, through which loader processes hand over images."""


def places() -> Iterator[Finding]:
    """Findings about the working folder and what loader processes need."""
    disk = shutil.disk_usage(Path.cwd())
    yield Finding(
        "free disk", f"{disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB",
        attention=disk.free < LEAST_DISK, figures={"free_bytes": disk.free, "total_bytes": disk.total},
    )  # fmt: skip
    with TemporaryDirectory(dir=Path.cwd(), prefix=".nvae-doctor-") as folder:
        yield locks(Path(folder))
        yield whole_files(Path(folder))
    yield from memory()
    yield from shared_memory(Path("/dev/shm"))
    workers = max(cores() - 1, 0)
    yield Finding(
        "loaders", f"data.workers=0 to {workers}, over all processes of this machine", figures={"most": workers}
    )


def locks(folder: Path) -> Finding:
    """Whether a lock that is taken is refused to others."""
    with lock(folder / "lock", wait=False) as mine, lock(folder / "lock", wait=False) as others:
        hold = mine and not others
    words = "hold" if hold else "do not hold on this file system; let no second process write into a run"
    return Finding("locks", words, attention=not hold)


def whole_files(folder: Path) -> Finding:
    """Whether a file takes another's place in one move, however often."""
    path = folder / "file"
    for content in (b"first", b"second"):
        with atomic_file(path) as file:
            file.write(content)
    whole = path.read_bytes() == b"second" and len(list(folder.glob(".file.*"))) == 0
    words = "replaced in one move" if whole else "are not replaced in one move: a checkpoint may be lost"
    return Finding("files", words, attention=not whole)


def memory() -> Iterator[Finding]:
    """What the machine has left, where the system says so."""
    try:
        pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * size
    except (AttributeError, ValueError, OSError):
        return
    free = pages * size
    figures = {"free_bytes": free, "total_bytes": total}
    yield Finding("free memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB", figures=figures)


def shared_memory(folder: Path) -> Iterator[Finding]:
    """What loader processes hand images over in; small in many containers."""
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    small = free < LEAST_SHARED
    words = f"{free / GIB:.1f} GiB" + (": data.workers=0, or more of it (docker run --shm-size 8g)" if small else "")
    yield Finding("shared memory", words, attention=small, figures={"free_bytes": free})
