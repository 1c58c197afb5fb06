"""Sets that torchvision downloads: by one process at a time, into a folder that is the set's own, and nowhere else."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from ..core.errors import UserError

LOCK = ".download.lock"
ERRORS = (RuntimeError, OSError, ValueError, AssertionError, EOFError, KeyError, pickle.UnpicklingError)
"""What torchvision raises for sets that are missing, damaged, or can't be downloaded."""


def is_free(path: Path, marks: Sequence[str]) -> bool:
    """True where a set may be downloaded to: nothing is there yet, or nothing but what downloading it makes."""
    if not path.exists():
        return True
    return path.is_dir() and all(entry.name in (*marks, LOCK) for entry in path.iterdir())


def from_torchvision(dataset: Callable[..., Any], path: Path, by_hand: str = "", **options: Any) -> Any:
    """A set of torchvision, downloaded first where it is not whole. Raises UserError with the reason.

    A download that fails takes with it what it made in a folder that was empty, or not there.
    """
    try:
        return dataset(path, download=False, **options)
    except ERRORS:
        pass
    was_empty = not path.exists() or not any(path.iterdir())
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path / LOCK):
            return dataset(path, download=True, **options)
    except ERRORS as error:
        if was_empty:
            _remove_empty_folders(path)
        reason = " ".join(str(error).split())
        advice = f"; {by_hand}" if by_hand else "; download it elsewhere and copy the folder"
        raise UserError(f"data.path: {path} has no (whole) set, and downloading failed ({reason}){advice}") from error


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Within, this process alone downloads; where the file system has no locks, by a file that exists meanwhile."""
    lock: FileLock | SoftFileLock = FileLock(file)
    try:
        lock.acquire()
    except (NotImplementedError, OSError):
        lock = SoftFileLock(file.with_name(f"{LOCK}.soft"), timeout=3600)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(f"{file}.soft: another process downloads, or was killed; remove the file") from error
    try:
        yield
    finally:
        lock.release()


def _remove_empty_folders(path: Path) -> None:
    """Removes the lock and the folders below that hold no file."""
    (path / LOCK).unlink(missing_ok=True)
    for folder in sorted((entry for entry in path.rglob("*") if entry.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
