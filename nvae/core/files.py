"""Files that exist whole or not at all, locks, and errors that name the file they are about."""

import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that will exist whole or not at all: written under a temporary name, flushed to disk, renamed.

    Raises OSError, naming the file, where the machine refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with naming(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with naming(path, temporary):
            temporary.unlink(missing_ok=True)
        raise


def tensors_in(path: Path) -> dict[str, Tensor] | None:
    """What a safetensors file keeps; None where there is none, or a damaged one: it is to be made again."""
    try:
        return safetensors.torch.load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


@contextmanager
def naming(path: Path, *standing_in: Path) -> Iterator[None]:
    """Within, an OSError that names no file, or one that stands in for `path`, names `path`: a full disk says where."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, *map(str, standing_in)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def require_writable(folder: Path) -> None:
    """Makes a folder. Raises OSError, naming it, where that, or a new file in it, is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Within, the lock of a file is this process's: True. Another's, without `wait`: False.

    The system gives it back whatever becomes of the process. Where there are no locks, on Windows and on some file
    systems of clusters, everyone has it, and a line says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        yield _taken(file, path, wait)


def _taken(file: IO[str], path: Path, wait: bool) -> bool:
    reason = "Windows"
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            reason = str(error.strerror)
    print(f"{path.parent}: no locks here ({reason}); let no second process write into it", file=sys.stderr)
    return True
