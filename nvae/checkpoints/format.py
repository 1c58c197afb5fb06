"""Checkpoints: written whole or not at all, read without unpickling anything but tensors and plain containers."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.config import shortened
from ..core.errors import UserError
from ..core.files import atomic_file

FORMAT = "nvae-checkpoint"
VERSION = 1
FORBIDDEN = re.compile(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) ([\w.]+)")
"""How PyTorch's reader names what it refuses to unpickle."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint atomically: tensors and plain containers under the format's name and version."""
    write_checkpoint(path, {"format": FORMAT, "version": VERSION, **content})


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` atomically as it is, with PyTorch's checksums. Raises OSError, naming the file."""
    with atomic_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # PyTorch's writer hides why the file could not be written
                raise error.__context__ from None
            raise


def read_safely(path: Path, allowed: Sequence[type] = ()) -> dict[str, Any]:
    """The dict a checkpoint file holds, on the CPU. Only tensors, plain containers and `allowed` types are unpickled.

    Every part is held against its checksum in the archive, which PyTorch writes and does not read. Raises UserError, in
    one line, for a file that is missing, damaged, not a checkpoint, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        damaged = _first_damaged(path)
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere in the reader
        if found := FORBIDDEN.search(str(error)):
            raise UserError(
                f"{path}: refused, it holds {found[1]}; a checkpoint holds tensors and plain containers"
            ) from error
        raise UserError(f"{path}: damaged or truncated, or not a checkpoint") from error
    if damaged is not None:
        raise UserError(f"{path}: damaged, '{damaged}' in it is not as it was written")
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint (holds a {type(content).__name__})")
    return content


def _first_damaged(path: Path) -> str | None:
    """The first part of an archive that its checksum does not fit; None also where there are no checksums.

    There are none in PyTorch's earlier format, nor where they were turned off, and so all are 0.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if len({part.filename for part in parts}) < len(parts):
            return "a part that is there twice"
        for part in parts:
            if part.compress_type == zipfile.ZIP_STORED and part.compress_size != part.file_size:
                return part.filename
        return archive.testzip() if any(part.CRC for part in parts) else None


def is_ours(content: dict[str, Any]) -> bool:
    """True for a checkpoint of this package, False for a foreign one."""
    return content.get("format") == FORMAT


def require_version(content: dict[str, Any]) -> None:
    """Raises UserError for a checkpoint of ours that another version has written in another way."""
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise UserError(f"a checkpoint of format {shortened(version)}, this version of nvae reads format {VERSION}")
