"""Checkpoints: written whole or not at all, read without unpickling anything but tensors and plain containers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from ..core.files import atomic_file

FORMAT = "nvae-checkpoint"
VERSION = 1
FORBIDDEN = re.compile(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) ([\w.]+)")
"""How PyTorch's reader names what it refuses to unpickle."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint atomically: tensors and plain containers under the format's name and version."""
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def read_safely(path: Path, allowed: Sequence[type] = ()) -> dict[str, Any]:
    """The dict a checkpoint file holds, on the CPU. Only tensors, plain containers and `allowed` types are unpickled.

    Raises UserError, in one line, for a file that is missing, truncated, not a checkpoint, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere in the reader
        if found := FORBIDDEN.search(str(error)):
            raise UserError(
                f"{path}: refused, it holds {found[1]}; a checkpoint holds tensors and plain containers"
            ) from error
        raise UserError(f"{path}: damaged or truncated, or not a checkpoint") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint (holds a {type(content).__name__})")
    return content


def is_ours(content: dict[str, Any]) -> bool:
    """True for a checkpoint of this package, False for a foreign one."""
    return content.get("format") == FORMAT
